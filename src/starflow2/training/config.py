"""Configs of a run: its stages, their optimisers, data and sharding. No loops and no networks here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Final, Literal

from starflow2.core.fields import Config, Count, Natural, Positive, Range, Seed, Share, Weight
from starflow2.errors import ConfigError, nearest
from starflow2.models.config import ModelConfig
from starflow2.world.captions import T2I_MIX
from starflow2.world.conversations import MIX

__all__ = [
    "JOINT",
    "CaptionConfig",
    "CorpusConfig",
    "MixConfig",
    "OptimConfig",
    "Precision",
    "RunConfig",
    "ShardConfig",
    "StageConfig",
    "StageName",
    "TalkConfig",
    "TextMean",
    "WarmupMixConfig",
    "WarmupTalkConfig",
]


StageName = Literal["features", "fae", "vlm", "t2i", "adapter", "joint", "end", "final"]
JOINT: Final = ("joint", "end", "final")  # stages that train on all kinds of documents
Precision = Literal["auto", "float32", "bfloat16"]
Decay = Annotated[float, Range(least=0, below=1)]
TextMean = Literal["reply", "token"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Config):
    """Muon on hidden matrices, AdamW elsewhere; linear warm-up, constant, then a decay to `min_lr`."""

    lr: Weight = 2e-3  # learning rate of AdamW
    matrix_lr: Weight = 4e-3  # learning rate of Muon, with AdamW's update size; 0: AdamW everywhere
    weight_decay: Weight = 0.01
    warmup_steps: Natural = 60
    decay_share: Share = 0.6  # share of all steps, at the end, over which the rate falls
    decay: Literal["linear", "cosine"] = "linear"  # how it falls
    min_lr: Weight = 0.0  # learning rate of AdamW that the decay ends at; Muon's ends at the same fraction of its own
    clip: Weight = 1.0  # largest global gradient norm
    ema: Decay = 0.995  # decay of the averaged weights, which are saved; 0: no average
    # type of AdamW's moments; 8bit needs torchao, 8bit-bnb needs bitsandbytes
    optimizer_state_dtype: Literal["float32", "8bit", "8bit-bnb"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"optim.min_lr is {self.min_lr}; expected 0 to optim.lr, which is {self.lr}.")

    def rate(self, step: int, steps: int) -> float:
        """Factor on both learning rates at `step` of `steps`."""
        up = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = min(1.0, (steps - step) / max(1.0, self.decay_share * steps))
        if self.decay == "cosine":
            left = 0.5 * (1 - math.cos(math.pi * left))
        floor = self.min_lr / self.lr if self.lr else 0.0
        return up * (floor + (1 - floor) * left)


class _Shares(Config):
    """Fields that are shares of a whole; they need not add up to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = asdict(self)  # type: ignore[call-overload]
        if min(shares.values()) < 0 or sum(shares.values()) <= 0:
            raise ConfigError(f"{type(self).__name__} is {shares}; expected shares of at least 0, one of them above 0.")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(_Shares):
    """Shares of the kinds of captions: GenEval's six families, dense ones that describe the whole scene, two kinds with
    counts, three or four objects, places in the picture, sizes in a relation."""

    single_object: Weight = T2I_MIX["single_object"]
    two_object: Weight = T2I_MIX["two_object"]
    counting: Weight = T2I_MIX["counting"]
    colors: Weight = T2I_MIX["colors"]
    position: Weight = T2I_MIX["position"]
    color_attr: Weight = T2I_MIX["color_attr"]
    dense: Weight = T2I_MIX["dense"]
    mixed: Weight = T2I_MIX["mixed"]
    many: Weight = T2I_MIX["many"]
    placed: Weight = T2I_MIX["placed"]
    sized: Weight = T2I_MIX["sized"]


@dataclass(frozen=True, kw_only=True)
class TalkConfig(_Shares):
    """Shares of the kinds of conversations about images: see `world.conversations.MIX`."""

    picture: Weight = MIX["picture"]
    places: Weight = MIX["places"]
    sides: Weight = MIX["sides"]
    details: Weight = MIX["details"]
    pictures: Weight = MIX["pictures"]
    choice: Weight = MIX["choice"]
    reading: Weight = MIX["reading"]
    game: Weight = MIX["game"]
    check: Weight = MIX["check"]
    halves: Weight = MIX["halves"]


@dataclass(frozen=True, kw_only=True)
class WarmupTalkConfig(Config):
    """Another mix of conversations for a stage's first steps: what is easy first."""

    steps: Natural = 0
    mix: TalkConfig = field(default_factory=TalkConfig)


@dataclass(frozen=True, kw_only=True)
class MixConfig(_Shares):
    """Shares of the kinds of documents in stage 3: questions about images, checks of what an image shows or what was
    changed, drawings from words, edits, chains of edits, first images of stories, whole stories."""

    understand: Weight = 0.25
    check: Weight = 0.0
    draw: Weight = 0.35
    edit: Weight = 0.15
    chain: Weight = 0.15
    beginning: Weight = 0.0
    story: Weight = 0.1


@dataclass(frozen=True, kw_only=True)
class WarmupMixConfig(Config):
    """Another mix of documents for a stage's first steps: a hard kind is learnt sooner from little else."""

    steps: Natural = 0
    mix: MixConfig = field(default_factory=MixConfig)


@dataclass(frozen=True, kw_only=True)
class ShardConfig(Config):
    """How the processes of a run divide a model among themselves; see `parallel`."""

    # none: a copy in every process; fsdp: one model in shards; hsdp: shards within each node, copies across nodes
    mode: Literal["none", "fsdp", "hsdp"] = "none"
    processes: Natural = 0  # processes that hold one copy together under hsdp; 0: those of a node
    frozen: Literal["replicated", "sharded"] = "replicated"  # layers of a language model that does not train
    # whether a layer's gathered weights are freed after its forward pass and gathered again for the backward pass
    reshards: bool = True
    timeout_minutes: Positive = 10.0  # that processes wait for each other within a step before the run ends

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processes < 0 or (self.processes and self.mode != "hsdp"):
            raise ConfigError(
                f"shard.processes is {self.processes} under mode {self.mode}; expected 0, or more under hsdp."
            )
        if self.timeout_minutes <= 0:
            raise ConfigError(f"shard.timeout_minutes is {self.timeout_minutes}; expected more than 0.")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(Config):
    """Real corpora instead of the drawn world; rows x width positions are one microbatch of one process.

    A step takes as many microbatches as its size needs.
    """

    mixture: str = ""  # file that lists weighted sources (`data.mixture`); "": the drawn world
    held_out: str = ""  # the same of data that the stage does not train on, for held-out losses
    batch_positions: Natural = 0  # tokens and latents per step of all processes; 0: `batch` documents per step
    rows: Count = 8  # rows of a microbatch
    width: Count = 1024  # positions of a row; longer documents are counted as broken
    workers: Natural = 0  # processes that read ahead
    broken: str = ""  # file that lists broken samples; "": they are only counted

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_positions < 0 or (self.batch_positions and self.batch_positions < self.rows * self.width):
            raise ConfigError(
                f"corpus.batch_positions is {self.batch_positions}; expected at least rows x width, {self.rows} x "
                f"{self.width}, which is one microbatch, or 0 for steps of `batch` documents."
            )


@dataclass(frozen=True, kw_only=True)
class StageConfig(Config):
    """One stage: its length, data, losses and optimiser. Settings of certain stages name these in brackets."""

    name: StageName
    steps: Natural
    batch: Count  # documents per step, over all processes
    optim: OptimConfig = field(default_factory=OptimConfig)
    save_every: Count = 200  # steps between checkpoints
    keep_last: Count = 1  # checkpoints that stay, the newest ones
    keep_every: Natural = 0  # steps between checkpoints that stay for good; 0: none do
    log_every: Count = 10  # steps between metric lines
    evaluate_every: Natural = 0  # steps between evaluations; 0: at every checkpoint
    held_out_batches: Natural = 0  # microbatches of each process whose held-out loss an evaluation measures; 0: none
    max_skipped: Count = 50  # steps in a row whose loss or gradient is not finite, after which the run ends
    caption_drop: Share = 0.1  # share of drawings whose words are dropped (t2i, joint)
    hidden_share: Share = 0.4  # largest share of hidden patches (features)
    perceptual: Weight = 0.0  # weight of the distance in the extractor's own features (fae)
    lpips: Weight = 0.0  # weight of LPIPS, which needs the package lpips with its weights (fae)
    adversarial: Weight = 0.0  # weight of the loss against a discriminator of features (fae)
    text_weight: Weight = 0.25  # weight of the next-token loss beside the flow's, lambda of eq. 3.7 (joint)
    # what the next-token loss is a mean of: replies, each a mean over its tokens, or tokens (vlm, adapter, joint)
    text_mean: TextMean = "reply"
    hidden_latents_share: Share = 0.0  # share of last edits that are predicted without sight of their latents (joint)
    kl_to_t2i: Weight = 0.0  # weight of the KL to the flow after stage t2i, for drawings from words alone (joint)
    distill: Weight = 0.0  # weight of the distance to the language model's own vision tower (adapter)
    codec_weight: Weight = 0.0  # weight of the FAE's losses; 0: frozen, more: FAE and flow train end to end (t2i)
    captions: CaptionConfig = field(default_factory=CaptionConfig)  # kinds of captions of drawings (t2i, joint)
    whitening_captions: Natural = 2048  # captions by whose text states a fresh flow's input is whitened (t2i)
    talk: TalkConfig = field(default_factory=TalkConfig)  # kinds of conversations about images (vlm, adapter, joint)
    warmup_talk: WarmupTalkConfig = field(default_factory=WarmupTalkConfig)  # of the first steps (vlm)
    mix: MixConfig = field(default_factory=MixConfig)  # kinds of documents (joint)
    warmup_mix: WarmupMixConfig = field(default_factory=WarmupMixConfig)  # of the first steps (joint)
    task: str = ""  # module:Class of your own Task in place of the stage's: another loss, other data; "": its own
    everything: bool = False  # train on what dev and test hold out as well (final)
    keep_as: str = ""  # name under which the model is kept in the run's folder after this stage; "": it is not
    mean_with: str = ""  # a model in the folder: the mean of its weights and this stage's is kept; "": these alone
    accumulate: Count = 1  # microbatches of a step in every process; of a mixture, as many as its size needs
    # layers whose activations are recomputed in the backward pass: of what trains, or of the language model as well
    checkpoint_activations: Literal["none", "trained", "all"] = "none"
    shard: ShardConfig = field(default_factory=ShardConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean_with and not self.keep_as:
            raise ConfigError(f"mean_with is {self.mean_with!r} without keep_as; expected both, or neither.")
        if self.codec_weight < 0 or (self.codec_weight and self.name != "t2i"):
            raise ConfigError(
                f"codec_weight is {self.codec_weight} in stage {self.name}; expected 0, or more in stage t2i, the only "
                "one in which FAE and flow can train together."
            )
        if self.everything and self.name != "final":
            raise ConfigError(
                f"everything is set in stage {self.name}; expected stage final: a model that has seen what dev and "
                "test hold out cannot be scored on it, so only a last stage may."
            )
        reads_apart = self.shard.mode != "none" and self.shard.frozen == "sharded"  # the reference, in each process
        if self.kl_to_t2i < 0 or (self.kl_to_t2i and (self.name != "joint" or reads_apart)):
            raise ConfigError(
                f"kl_to_t2i is {self.kl_to_t2i} in stage {self.name} under shard.frozen {self.shard.frozen}; expected "
                "0, or more in stage joint with a language model that is replicated."
            )
        if self.corpus.mixture and bool(self.corpus.held_out) != bool(self.held_out_batches):
            raise ConfigError(
                f"held_out_batches is {self.held_out_batches} and corpus.held_out is {self.corpus.held_out!r}; "
                "expected both or neither: how much held-out loss to measure, and on which mixture."
            )
        if self.corpus.mixture and self.accumulate != 1:
            raise ConfigError(
                f"accumulate is {self.accumulate}, but with a mixture it follows from batch and corpus.rows x "
                "corpus.width; leave it out and change these."
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """A recipe: the model, its stages in order, and the seed of all random choices."""

    model: ModelConfig
    stages: tuple[StageConfig, ...]
    seed: Seed = 0
    precision: Precision = "auto"  # of autocast; "auto" times both on this machine

    def stage(self, name: str) -> StageConfig:
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = [s.name for s in self.stages]
        raise ConfigError(f"stage is {name!r}; expected one of {known}.{nearest(name, known)}")
