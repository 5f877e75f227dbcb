"""Stages as data, and what each trains: its `Task` draws items and says what they cost. No loops, no files here.

Every random choice is a pure function of (seed, stage, index or step).
Letters: B documents, T positions, N latents, P pictures.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.core.images import to_floats
from starflow2.data.dialogue import Dialogue, Turn, pictures, without_words
from starflow2.data.mixture import BatchConfig, Batches, Spelling, read_mixture
from starflow2.errors import ConfigError, DataError, nearest
from starflow2.flow.affine import Affine
from starflow2.flow.noise import add_noise
from starflow2.models.components import ModelConfig, Parts
from starflow2.models.context import drawing_context
from starflow2.models.pretzel import Output
from starflow2.models.qwen import ChatTokenizer, DinoConfig, SiglipConfig
from starflow2.models.sequence import IGNORE, Batch, Layout, length_groups, pack, with_pictures
from starflow2.training.losses import (
    FeatureJudge,
    adversarial_losses,
    count_replies,
    joint_loss,
    last_edits,
    lone_drawings,
    masked_picture_loss,
    ngp_loss,
    ntp_loss,
    perceptual_loss,
)
from starflow2.world.conversations import understanding_dialogue
from starflow2.world.edits import edit_chain_dialogue, edit_dialogue, edit_task
from starflow2.world.questions import T2I_MIX, draw_task
from starflow2.world.scene import Scene, SceneDialogue, render_batch, stream
from starflow2.world.stories import story_beginning, story_dialogue, story_task

__all__ = [
    "TASKS",
    "CaptionConfig",
    "CorpusConfig",
    "MixConfig",
    "OpeningConfig",
    "OptimConfig",
    "Precision",
    "RunConfig",
    "ShardConfig",
    "Share",
    "StageConfig",
    "Task",
]

StageName = Literal["features", "fae", "vlm", "t2i", "adapter", "joint"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Muon on hidden matrices, AdamW elsewhere; linear warm-up, constant, linear decay to zero."""

    lr: float = 2e-3  # AdamW
    matrix_lr: float = 4e-3  # Muon with AdamW's update size; 0 = AdamW everywhere
    weight_decay: float = 0.01
    warmup_steps: int = 60
    decay_share: float = 0.6  # share of all steps at the end over which the rate falls
    clip: float = 1.0  # global gradient norm
    ema: float = 0.995  # decay of the averaged weights that are kept; 0 = none
    # AdamW's moments; 8bit needs torchao, 8bit-bnb bitsandbytes
    states: Literal["float32", "8bit", "8bit-bnb"] = "float32"

    def rate(self, step: int, steps: int) -> float:
        """Factor on both learning rates at `step` of `steps`."""
        up = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = (steps - step) / max(1.0, self.decay_share * steps)
        return up * min(1.0, left)


class _Shares:
    """Shares of a whole, one per field."""

    def __post_init__(self) -> None:
        shares = asdict(self)  # type: ignore[call-overload]
        if min(shares.values()) < 0 or sum(shares.values()) <= 0:
            raise ConfigError(f"{type(self).__name__} is {shares}; expected shares of at least 0, not all of them 0.")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(_Shares):
    """Shares of what captions of drawings are about: GenEval's six families, and those that tell all."""

    single_object: float = T2I_MIX["single_object"]
    two_object: float = T2I_MIX["two_object"]
    counting: float = T2I_MIX["counting"]
    colors: float = T2I_MIX["colors"]
    position: float = T2I_MIX["position"]
    color_attr: float = T2I_MIX["color_attr"]
    dense: float = T2I_MIX["dense"]


@dataclass(frozen=True, kw_only=True)
class MixConfig(_Shares):
    """Shares of stage 3's documents: questions about pictures, pictures from words, edits, edits in chains, first
    pictures of stories, whole stories."""

    understand: float = 0.25
    draw: float = 0.35
    edit: float = 0.15
    chain: float = 0.15
    beginning: float = 0.0
    story: float = 0.1


@dataclass(frozen=True, kw_only=True)
class OpeningConfig:
    """A stage's first steps, with another mix of documents: what is hard is learnt sooner from nothing else."""

    steps: int = 0
    mix: MixConfig = field(default_factory=MixConfig)


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How the processes of a run divide a model among them; see `parallel`."""

    # none: every process holds a copy; fsdp: one model in shards; hsdp: one in the shards of each node, copies across
    mode: Literal["none", "fsdp", "hsdp"] = "none"
    processes: int = 0  # that share one copy under hsdp; 0 = those of a node
    frozen: Literal["replicated", "sharded"] = "replicated"  # layers of a language model that does not train
    reshards: bool = True  # give a layer's gathered weights back behind its forward pass, to gather them once more

    def __post_init__(self) -> None:
        if self.processes < 0 or (self.processes and self.mode != "hsdp"):
            raise ConfigError(f"shard.processes is {self.processes} under mode {self.mode}; it is a count under hsdp.")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Real corpora in place of the drawn world; rows x width positions are one microbatch of one process."""

    mixture: str = ""  # file that lists weighted sources (`data.mix`), "" = the drawn world
    rows: int = 8
    width: int = 1024  # positions of a row; longer documents are counted as broken
    workers: int = 0  # processes that read ahead
    broken: str = ""  # file that lists broken samples, "" = they are only counted


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: how long, how much, how fast."""

    name: StageName
    steps: int
    batch: int  # documents per step; of real corpora as many as fit
    optim: OptimConfig = field(default_factory=OptimConfig)
    save_every: int = 200  # steps between checkpoints
    log_every: int = 10  # steps between metric lines
    caption_drop: float = 0.1  # share of drawings whose words are dropped (t2i, joint)
    hidden_share: float = 0.4  # largest share of hidden patches (features)
    perceptual: float = 0.0  # weight of the distance in the extractor's own features (fae)
    lpips: float = 0.0  # weight of LPIPS, where the package lpips and its weights are there (fae)
    adversarial: float = 0.0  # weight of the judge of features (fae)
    text_weight: float = 0.25  # of the next-token loss beside the flow's, lambda of eq. 3.7 (joint)
    blind_share: float = 0.0  # of last edits, predicted without sight of their own latents (joint)
    keep: float = 0.0  # weight of the distance to what the flow of stage t2i draws from words alone (joint)
    distill: float = 0.0  # weight of the distance to the language model's own vision tower (adapter)
    codec_weight: float = 0.0  # of the FAE's own losses, 0 = frozen; above, FAE and flow train end to end (t2i)
    captions: CaptionConfig = field(default_factory=CaptionConfig)  # of drawings (t2i, joint)
    mix: MixConfig = field(default_factory=MixConfig)  # of documents (joint)
    opening: OpeningConfig = field(default_factory=OpeningConfig)  # what comes in front of that (joint)
    accumulate: int = 1  # microbatches of a step in every process
    # whose layers forget their activations and compute them again in the backward pass
    checkpoint_activations: Literal["none", "trained", "all"] = "none"
    shard: ShardConfig = field(default_factory=ShardConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)

    def __post_init__(self) -> None:
        if self.codec_weight < 0 or (self.codec_weight and self.name != "t2i"):
            raise ConfigError(
                f"codec_weight is {self.codec_weight} in stage {self.name}; expected 0, or more in stage t2i, "
                "where FAE and flow can train together."
            )
        if self.keep < 0 or (self.keep and (self.name != "joint" or self.shard.mode != "none")):
            raise ConfigError(
                f"keep is {self.keep} in stage {self.name} under shard.mode {self.shard.mode}; expected 0, or more in "
                "stage joint of processes that each hold a copy."
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A recipe: the model, its stages in order, the seed of everything."""

    model: ModelConfig
    stages: tuple[StageConfig, ...]
    seed: int = 0
    precision: Precision = "auto"  # autocast type; "auto" times both on this machine

    def stage(self, name: str) -> StageConfig:
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = [s.name for s in self.stages]
        raise ConfigError(f"stage is {name!r}; expected one of {known}.{nearest(name, known)}")


# -- tasks --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a step's batch. `factors`: what to multiply its mean of a term with, so that shares average to all."""

    factors: Mapping[str, float] = field(default_factory=dict)

    def of(self, term: str, mean: Tensor) -> Tensor:
        return mean * self.factors[term] if term in self.factors else mean


WHOLE = Share()


class Task(Protocol):
    """What a stage trains, what it draws and how it scores it.

    `draw` makes the items of some indices; it can be sent to another process, since it holds no weights. `counts`
    says what the terms of a loss are means of, by term; those left out are means over equally many documents.
    """

    parts: Parts
    trained: nn.ModuleDict
    draw: Callable[[range], Any]

    def counts(self, data: Any) -> dict[str, int]: ...

    def taken(self, images: Tensor, batch: Batch) -> Any:
        """Packed documents of real corpora with their pictures (P, 3, s, s), in the form of `draw`'s items."""

    def loss(self, data: Any, generator: torch.Generator, share: Share = WHOLE) -> tuple[Tensor, dict[str, Tensor]]: ...


class _Packed:
    """A task that takes packed documents as they are."""

    def taken(self, images: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
        return images, batch


class _Pictures:
    """A task that takes pictures alone; its loss is a mean over them."""

    def counts(self, data: Any) -> dict[str, int]:
        return {"pictures": len(data)}

    def taken(self, images: Tensor, batch: Batch) -> Tensor:
        if not len(images):
            raise DataError("a batch of the mixture holds no picture; give this stage sources with pictures.")
        return images


def to_images(scenes: Sequence[Scene]) -> Tensor:
    """Rendered scenes (B, 3, 64, 64) in [-1, 1]."""
    return to_floats(render_batch(scenes))


@dataclass(frozen=True, slots=True)
class Scenes:
    """Pictures (B, 3, 64, 64) of the training scenes."""

    seed: int

    def __call__(self, indices: range) -> Tensor:
        return to_images([draw_task(self.seed, i).scene for i in indices])


@dataclass(frozen=True, slots=True)
class Captions:
    """The same with their prompts as token ids, `drop` of them empty."""

    tokenizer: ChatTokenizer
    seed: int
    drop: float
    shares: CaptionConfig

    def __call__(self, indices: range) -> tuple[Tensor, list[list[int]]]:
        weights = asdict(self.shares)
        drawings = [draw_task(self.seed, i, weights=weights) for i in indices]
        drops = np.random.default_rng([self.seed, indices.start]).random(len(indices)) < self.drop
        prompts = ["" if gone else d.prompt for d, gone in zip(drawings, drops, strict=True)]
        return to_images([d.scene for d in drawings]), [self.tokenizer.drawing_prompt(p) for p in prompts]


@dataclass(frozen=True, slots=True)
class Documents:
    """Conversations packed into rows, and their pictures (P, 3, s, s) in order."""

    tokenizer: ChatTokenizer
    layout: Layout
    image_size: int
    dialogue: Callable[[int], SceneDialogue]  # by index

    @classmethod
    def of(cls, parts: Parts, dialogue: Callable[[int], SceneDialogue], layout: Layout | None = None) -> Documents:
        """`layout`: how pictures are spelled, by default with one slot per latent."""
        assert parts.tokenizer is not None
        return cls(parts.tokenizer, layout or parts.layout, parts.cfg.fae.image_size, dialogue)

    def __call__(self, indices: range) -> tuple[Tensor, Batch]:
        dialogues = [self.dialogue(i) for i in indices]
        scenes = [scene for dialogue in dialogues for scene in dialogue.pictures]
        images = to_images(scenes) if scenes else torch.zeros(0, 3, self.image_size, self.image_size)
        return images, pack([self.tokenizer.document(d.turns) for d in dialogues], self.layout)


class FeaturesTask(_Pictures):
    """Masked-picture training of the DINOv2 that nano freezes afterwards."""

    def __init__(self, parts: Parts, stage: StageConfig, seed: int) -> None:
        self.parts, self.stage = parts, stage
        self.draw: Callable[[range], Any] = Scenes(seed)
        cfg = _features_of(parts, "stage features")
        self.patch = cfg.patch_size
        self.head = nn.Linear(cfg.width, 3 * cfg.patch_size**2)
        self.trained = nn.ModuleDict({"features": parts.features, "pixel_head": self.head})

    def loss(
        self, images: Tensor, generator: torch.Generator, share: Share = WHOLE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = images.to(self.parts.device)
        rows, cols = self.parts.features.grid
        rate = self.stage.hidden_share * torch.rand(len(images), 1, generator=generator)
        hidden = torch.rand(len(images), rows * cols, generator=generator) < rate
        feats = self.parts.features.features(images, hidden.to(images.device))
        loss = masked_picture_loss(feats, self.head, images, self.patch)
        return share.of("pictures", loss), {}


class FaeTask(_Pictures):
    """Latents and decoders on frozen features."""

    def __init__(self, parts: Parts, stage: StageConfig, seed: int) -> None:
        self.parts, self.stage = parts, stage
        self.draw: Callable[[range], Any] = Scenes(seed)
        _features_of(parts, "codec_weight" if stage.codec_weight else "stage fae")
        self.trained = nn.ModuleDict({"fae": parts.fae})
        if stage.adversarial:
            self.trained["judge"] = FeatureJudge(parts.features.feature_dim)
        self.lpips = _lpips().to(parts.device) if stage.lpips else None

    def loss(
        self, images: Tensor, generator: torch.Generator, share: Share = WHOLE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, extra, _ = self.terms(images.to(self.parts.device), generator)
        return share.of("pictures", loss), extra

    def terms(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss, what it is made of, and the latents (B, N, D) it was taken at, with their gradient."""
        with torch.no_grad():
            feats = self.parts.features.features(images)
        losses = self.parts.fae.losses(images, feats.float(), generator)
        extra = {name: getattr(losses, name) for name in ("feature", "kl", "pixel", "edge")}
        extra |= self._seen(losses.drawn, images, feats)
        weights = {name: getattr(self.stage, name) for name in ("perceptual", "lpips", "adversarial")}
        added = sum(weight * extra[name] for name, weight in weights.items() if weight)
        return losses.total + added + extra.get("judge", 0.0), extra, losses.latents

    def _seen(self, drawn: Tensor, images: Tensor, feats: Tensor) -> dict[str, Tensor]:
        """The losses that look at pictures through another network, those that have a weight."""
        extra: dict[str, Tensor] = {}
        if self.lpips is not None:
            extra["lpips"] = self.lpips(drawn, images).mean()
        if not self.stage.perceptual and not self.stage.adversarial:
            return extra
        given = self.parts.features.features(drawn)
        if self.stage.perceptual:
            extra["perceptual"] = perceptual_loss(given, feats)
        if self.stage.adversarial:
            judge = self.trained["judge"]
            assert isinstance(judge, FeatureJudge)
            extra["adversarial"], extra["judge"] = adversarial_losses(judge, given, feats)
        return extra


def _features_of(parts: Parts, what: str) -> DinoConfig | SiglipConfig:
    """The sizes of what an FAE reads. Raises ConfigError for a model of native patches, which has neither."""
    if parts.cfg.features is None:
        raise ConfigError(
            f"{what} trains an FAE or what it reads, and {parts.cfg.name} has native patches in its place; "
            "leave it out, or use a recipe with a FaeConfig."
        )
    return parts.cfg.features


def _lpips() -> nn.Module:
    """LPIPS with its published weights. Raises ConfigError where the package is missing."""
    try:
        import lpips
    except ImportError as error:
        raise ConfigError(
            "lpips is not 0, but that package cannot be imported; install it with the torchvision that fits torch, "
            "or use perceptual, which needs neither."
        ) from error
    net: nn.Module = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)
    return net


class VlmTask(_Packed):
    """Conversations about drawn pictures, seen through the model's own vision tower, and about words."""

    def __init__(self, parts: Parts, stage: StageConfig, seed: int) -> None:
        self.parts = parts
        dialogue = partial(understanding_dialogue, seed)
        self.draw: Callable[[range], Any] = Documents.of(parts, dialogue, parts.tower_layout)
        self.trained = nn.ModuleDict({"vlm": parts.vlm})

    def counts(self, data: tuple[Tensor, Batch]) -> dict[str, int]:
        return {"text": count_replies(data[1].labels)}

    def loss(
        self, data: tuple[Tensor, Batch], generator: torch.Generator, share: Share = WHOLE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, batch = data[0].to(self.parts.device), data[1].to(self.parts.device)
        return share.of("text", _reading_loss(self.parts, self.parts.vlm.see(images), batch)), {}


class T2iTask:
    """Paper stage 1: the flow's exact NLL given the frozen VLM's states of the caption.

    With `codec_weight` the FAE trains, too: on its own losses, and through its latents on the flow's. Those stay
    standardised over the batch, so that no scale of them makes them likelier (docs/choices.md#end-to-end).
    """

    def __init__(self, parts: Parts, stage: StageConfig, seed: int) -> None:
        self.parts, self.stage, self.seed = parts, stage, seed
        assert parts.tokenizer is not None
        self.draw: Callable[[range], Any] = Captions(parts.tokenizer, seed, stage.caption_drop, stage.captions)
        self.trained = nn.ModuleDict({"flow": parts.flow})
        self.codec = FaeTask(parts, stage, seed) if stage.codec_weight else None
        if self.codec is not None:
            self.trained.update(dict(self.codec.trained.items()))
        if "t2i" not in parts.stages:
            self._whiten()

    def _whiten(self, prompts: int = 2048, batch: int = 128) -> None:
        """Fresh flows start from whitened text states; see `AffineBlock.whiten_context`."""
        rows = self._captions(prompts)
        contexts = [drawing_context(self.parts, rows[i : i + batch]) for i in range(0, prompts, batch)]
        self.parts.flow.deep.whiten_context(torch.cat([c.states[c.attend] for c in contexts]))

    def _captions(self, count: int) -> list[list[int]]:
        """Token ids of the first captions of the mixture, or of the drawn world where the stage has none."""
        parts, corpus = self.parts, self.stage.corpus
        assert parts.tokenizer is not None
        if not corpus.mixture:
            return [parts.tokenizer.drawing_prompt(draw_task(self.seed, i).prompt) for i in range(count)]
        spelling = Spelling(parts.tokenizer, parts.layout, parts.cfg.fae.image_size)
        config = BatchConfig(rows=corpus.rows, width=corpus.width, caption_drop=0.0)
        rows = list[list[int]]()
        for images, batch in Batches(read_mixture(corpus.mixture), spelling, config):  # without end
            rows += self.taken(images, batch)[1]
            if len(rows) >= count:
                break
        return rows[:count]

    def counts(self, data: tuple[Tensor, list[list[int]]]) -> dict[str, int]:
        return {"pictures": len(data[0])}

    def taken(self, images: Tensor, batch: Batch) -> tuple[Tensor, list[list[int]]]:
        """Every drawn picture with the words in front of it. Raises DataError where that is more than words."""
        if not len(images) or not bool(lone_drawings(batch).all()):
            raise DataError("stage t2i takes words with one drawn picture; leave other sources to stage joint.")
        return images, _words_before(batch, range(len(images)))

    def loss(
        self, data: tuple[Tensor, list[list[int]]], generator: torch.Generator, share: Share = WHOLE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, rows = data
        latents, loss, extra = self._encoded(images.to(self.parts.device), generator)
        nats = latents.new_zeros(())
        picture = self.parts.cfg.flow.deep.num_latents
        lengths = [len(r) for r in rows]
        # sharded layers are gathered by all processes at once, so all must read as many groups
        groups = length_groups(lengths, picture) if self.stage.shard.mode == "none" else [list(range(len(rows)))]
        for group in groups:
            context = drawing_context(self.parts, [rows[i] for i in group])
            terms = ngp_loss(self.parts.flow, latents[group], context, generator)
            part = len(group) / len(rows)
            loss, nats = loss + part * terms[0], nats + part * terms[1]
        return share.of("pictures", loss), {"nats_per_dim": nats, **extra}

    def _encoded(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents (B, N, D), and what the FAE itself pays for them where it trains."""
        if self.codec is None:
            with torch.no_grad():
                latents = self.parts.codec.encode(images).float()
            return latents, latents.new_zeros(()), {}
        loss, extra, latents = self.codec.terms(images, generator)
        return latents, self.stage.codec_weight * loss, extra


def _words_before(batch: Batch, pictures: Sequence[int]) -> list[list[int]]:
    """Token ids of the documents of some pictures, up to the slots that begin them."""
    rows, places = [], list(zip(batch.pictures.row.tolist(), batch.pictures.begin.tolist(), strict=True))
    for row, begin in (places[i] for i in pictures):
        own = batch.document[row, : begin + 1] == batch.document[row, begin]
        rows.append(batch.ids[row, : begin + 1][own].tolist())
    return rows


class AdapterTask(_Packed):
    """Paper stage 2: answers about pictures that the language model sees through the adapter; nothing else trains."""

    def __init__(self, parts: Parts, stage: StageConfig, seed: int) -> None:
        self.parts, self.stage = parts, stage
        self.draw: Callable[[range], Any] = Documents.of(parts, partial(understanding_dialogue, seed))
        self.trained = nn.ModuleDict({"adapter": parts.joints.adapter})
        seen, latents = parts.cfg.vlm.image_grid, parts.cfg.flow.deep.grid
        if stage.distill and seen != latents:
            raise ConfigError(f"distill is {stage.distill}, but the tower sees {seen}, latents are {latents}; use 0.")
        if "adapter" not in parts.stages:
            parts.joints.adapter.set_scale(_rms_of_tower(parts, seed))

    def counts(self, data: tuple[Tensor, Batch]) -> dict[str, int]:
        return {"text": count_replies(data[1].labels), "distance": len(data[0])}

    def loss(
        self, data: tuple[Tensor, Batch], generator: torch.Generator, share: Share = WHOLE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, batch = data[0].to(self.parts.device), data[1].to(self.parts.device)
        pretzel = self.parts.pretzel
        level = _source_levels(self.parts, len(images), generator)
        with torch.no_grad():
            latents = self.parts.codec.encode(images).float()
            u, _ = self.parts.flow.shallow(add_noise(latents, level, generator), level)
        adapted = pretzel.adapted(u, level)
        loss = share.of("text", _reading_loss(self.parts, adapted, batch))
        if not self.stage.distill:
            return loss, {}
        with torch.no_grad():
            seen = self.parts.vlm.see(images)
        far = (adapted - seen).square().mean() / seen.square().mean() if len(images) else adapted.sum()
        far = share.of("distance", far)  # over shares a mean of ratios, by pictures, not the ratio of means
        return loss + self.stage.distill * far, {"distance": far}


class JointTask(_Packed):
    """Paper stage 3: everything at once, with the skips open; the language model and the FAE stay frozen."""

    def __init__(self, parts: Parts, stage: StageConfig, seed: int) -> None:
        self.parts, self.stage, self.pretzel = parts, stage, parts.pretzel
        # layers that all processes gather at once, or that run again in the backward pass, run once for each batch
        is_sharded = stage.shard.mode != "none" and stage.shard.frozen == "sharded"
        self.pretzel.reads_apart = not is_sharded and stage.checkpoint_activations != "all"
        self.draw: Callable[[range], Any] = Documents.of(parts, partial(joint_dialogue, stage, seed))
        self.before = _Before(parts) if stage.keep else None
        self.trained = parts.joined_above if stage.keep else parts.joined

    def counts(self, data: tuple[Tensor, Batch]) -> dict[str, int]:
        return {"text": count_replies(data[1].labels), "flow": int(data[1].pictures.is_target.sum())}

    def loss(
        self, data: tuple[Tensor, Batch], generator: torch.Generator, share: Share = WHOLE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, batch = data[0].to(self.parts.device), data[1].to(self.parts.device)
        noise = self.parts.cfg.flow.noise
        assert noise is not None
        with torch.no_grad():
            latents = self.parts.codec.encode(images).float()
        drawn = noise.draw(len(images), generator).to(latents.device)
        level = torch.where(batch.pictures.is_target, drawn, _source_levels(self.parts, len(images), generator))
        blind = self._blind(batch, generator)
        terms = joint_loss(self.pretzel, batch, (add_noise(latents, level, generator), level), noise, blind)
        told = {"flow": share.of("flow", terms.flow), "text": share.of("text", terms.text)}
        loss = told["flow"] + self.stage.text_weight * told["text"]
        if blind is not None:
            told["blind"] = share.of("flow", terms.blind)
            loss = loss + told["blind"]
        if self.before is not None:
            told["kept"] = share.of("flow", self.before.distance(terms.out, batch, level))
            loss = loss + self.stage.keep * told["kept"]
        return loss, told

    def _blind(self, batch: Batch, generator: torch.Generator) -> Tensor | None:
        """Which edits are predicted without sight of their own latents, (P,) bool; None where none are asked for."""
        if not self.stage.blind_share:
            return None
        drawn = torch.rand(len(batch.pictures.is_target), generator=generator).to(batch.pictures.is_target.device)
        return (drawn < self.stage.blind_share) & last_edits(batch)


class _Before:
    """The deep flow as stage t2i left it, which stage joint is kept near where it draws from words alone.

    Distances are of Gaussians of the same intermediate latents, so the shallow blocks stay as they are:
    `Parts.joined_above` trains (docs/choices.md#what-stage-3-keeps).
    """

    def __init__(self, parts: Parts) -> None:
        self.parts, self.is_late = parts, "joint" in parts.stages
        self.deep = copy.deepcopy(parts.flow.deep).requires_grad_(False)

    def distance(self, out: Output, batch: Batch, level: Tensor) -> Tensor:
        """Weighted KL per dim, summed over pictures alone in their documents, over all drawings of the batch."""
        if self.is_late:
            raise ConfigError(
                "keep needs the flow as stage t2i left it, and this run folder's model has finished joint; go on from "
                "a copy of the folder with the model as it was, or with keep 0."
            )
        noise = self.parts.cfg.flow.noise
        assert noise is not None
        total, alone = out.u.new_zeros(()), lone_drawings(batch).nonzero()[:, 0]
        rows = _words_before(batch, alone.tolist())
        for group in length_groups([len(row) for row in rows], out.u.shape[1]):
            index = alone[group]
            was = self._affine([rows[i] for i in group], out.u[index].detach(), level[index])
            far = was.kl(Affine(out.affine.mu[index], out.affine.log_scale[index])).mean((1, 2))
            total = total + (noise.loss_weight(level[index]) * far).sum()
        return total / max(1, int(batch.pictures.is_target.sum()))

    @torch.no_grad()
    def _affine(self, rows: list[list[int]], u: Tensor, level: Tensor) -> Affine:
        deep = self.deep.to(u.device)
        run = deep.begin(len(u), drawing_context(self.parts, rows), level)
        return deep.predict(F.pad(u, (0, 0, 0, 1)), (0, u.shape[1]), run)


def joint_dialogue(stage: StageConfig, seed: int, index: int) -> SceneDialogue:
    """Document number `index` of stage 3, its words dropped now and then."""
    rng = stream(seed, index, _JOINT_STREAM)
    mix = stage.opening.mix if index < stage.opening.steps * stage.batch else stage.mix
    shares = np.array([getattr(mix, f.name) for f in fields(mix)])
    name = fields(mix)[int(rng.choice(len(shares), p=shares / shares.sum()))].name
    return dropped(_makers(stage.captions)[name](seed, index), rng, stage.caption_drop)


def _drawing(shares: CaptionConfig, seed: int, index: int) -> SceneDialogue:
    drawing = draw_task(seed, index, weights=asdict(shares))
    return Dialogue((Turn((drawing.prompt,), (drawing.scene,)),), "draw")


_JOINT_STREAM = 21


def _makers(captions: CaptionConfig) -> dict[str, Callable[[int, int], SceneDialogue]]:
    """What makes stage 3's documents from (seed, index), by the names of `MixConfig`."""
    return {
        "understand": understanding_dialogue,
        "draw": partial(_drawing, captions),
        "edit": lambda seed, index: edit_dialogue(edit_task(seed, index)),
        "chain": edit_chain_dialogue,
        "beginning": story_beginning,
        "story": lambda seed, index: story_dialogue(story_task(seed, index)),
    }


def dropped(dialogue: SceneDialogue, rng: np.random.Generator, share: float) -> SceneDialogue:
    """In `share` of the dialogues with a drawn picture the user says nothing; in half of those, shows nothing either.

    That is what guidance calls the unconditional branch (docs/choices.md#guidance).
    """
    drawn = any(pictures(turn.told) for turn in dialogue.turns)
    if not drawn or rng.random() >= share:
        return dialogue
    return without_words(dialogue, shows=bool(rng.random() < 0.5))


def _reading_loss(parts: Parts, seen: Tensor, batch: Batch) -> Tensor:
    """Next-token loss of the language model alone, pictures read as `seen` (P, N, E)."""
    embeds = with_pictures(parts.vlm.embed(batch.ids), seen, batch)
    h = parts.vlm.states(embeds, batch.mrope, attend=batch.attend)
    return ntp_loss(parts.vlm.logits, (h[batch.labels != IGNORE],), batch.labels)


def _source_levels(parts: Parts, count: int, generator: torch.Generator) -> Tensor:
    """Noise levels (count,) of pictures that are read: often clean as uploads are, often at the level of drawing."""
    noise = parts.cfg.flow.noise
    assert noise is not None
    kind, uniform = torch.rand(2, count, generator=generator)
    level = noise.noise_min + (noise.noise_max - noise.noise_min) * uniform
    level = torch.where(kind < 0.4, torch.full_like(level, noise.noise_min), level)
    return torch.where(kind > 0.7, torch.full_like(level, noise.noise_max), level).to(parts.device)


@torch.no_grad()
def _rms_of_tower(parts: Parts, seed: int, pictures: int = 64) -> float:
    """Root mean square of what the language model's own tower feeds it: the scale the adapter starts at."""
    images = to_images([draw_task(seed, i).scene for i in range(pictures)]).to(parts.device)
    return float(parts.vlm.see(images).square().mean().sqrt())


TASKS: dict[str, Callable[[Parts, StageConfig, int], Task]] = {
    "features": FeaturesTask,
    "fae": FaeTask,
    "vlm": VlmTask,
    "t2i": T2iTask,
    "adapter": AdapterTask,
    "joint": JointTask,
}
