"""Memory of one GPU in training, counted from a stage's settings and a model that exists on the meta device only.

Nothing is measured. Trained weights, their gradients, moments and averages are float32; frozen weights are in the
format of their files; activations are in bfloat16 with fused attention. Not counted: workspaces of kernels, gaps of the
allocator beyond `RESERVED`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from starflow2.models.config import DinoConfig, FaeConfig, ModelConfig, SiglipConfig
from starflow2.models.token_loss import LOGITS_AT_ONCE
from starflow2.nn import num_parameters
from starflow2.training.config import RunConfig, StageConfig
from starflow2.training.parallel import transformer_layers
from starflow2.training.state import is_hidden_matrix
from starflow2.training.work import NEAR_T2I, SHAPES, Shape, Sizes, mean_positions, stage_kind, works

__all__ = [
    "activation_bytes",
    "frozen_bytes",
    "gathered_bytes",
    "logit_bytes",
    "microbatch_documents",
    "reads_corpora",
    "shard_count",
    "stage_bytes",
    "state_bytes",
]

RESERVED = 2e9  # bytes of a GPU for its context and the allocator's gaps
MOMENTS = {"float32": 8, "8bit": 2, "8bit-bnb": 2}  # bytes of both of Adam's for each parameter
GPUS_OF_A_NODE = 8


def stage_bytes(run: RunConfig, sizes: Sizes, stage: StageConfig, gpus: int) -> dict[str, float]:
    """Bytes on one GPU by what they hold, for a microbatch as the settings say."""
    kind, shards = stage_kind(stage), shard_count(stage, gpus)
    state = {name: count / shards for name, count in state_bytes(sizes, stage).items()}
    documents = microbatch_documents(run, stage, gpus)
    return {
        "frozen": sum(frozen_bytes(sizes, stage, shards).values()),
        **state,
        "gathered": gathered_bytes(sizes, stage, is_half=run.precision == "bfloat16"),
        "logits": logit_bytes(SHAPES[kind]),
        "activations": documents * max_activation_bytes(sizes, stage),
        "reserved": RESERVED,
    }


def shard_count(stage: StageConfig, gpus: int) -> int:
    """The number of GPUs that hold one copy of what trains together."""
    if stage.shard.mode == "none":
        return 1
    return gpus if stage.shard.mode == "fsdp" else min(gpus, stage.shard.processes or GPUS_OF_A_NODE)


def reads_corpora(run: RunConfig, stage: StageConfig) -> bool:
    """True if microbatches are packed rows: of a mixture, which a model over pretrained parts cannot do without."""
    return bool(stage.corpus.mixture or run.model.references)


def microbatch_documents(run: RunConfig, stage: StageConfig, gpus: int) -> float:
    """Documents of one microbatch of one GPU; of packed rows, as many as these hold on average."""
    share = stage.batch / gpus
    if not reads_corpora(run, stage):
        return share / stage.accumulate
    return min(share, stage.corpus.rows * stage.corpus.width / mean_positions(run.model, stage_kind(stage)))


def frozen_bytes(sizes: Sizes, stage: StageConfig, shards: int = 1) -> dict[str, float]:
    """Bytes of frozen weights by part, each in the format of its files; shards: GPUs that divide layers, if they do."""
    parts, kind = dict(sizes.components.named_children()), stage_kind(stage)
    trained = {id(p) for p in sizes.trained(kind).parameters()}
    widths = {name: 2 if ref.precision == "bfloat16" else 4 for name, ref in sizes.cfg.references.items()}
    found: dict[str, float] = {
        name: widths.get(name, 4) * sum(p.numel() for p in module.parameters() if id(p) not in trained)
        for name, module in parts.items()
    }
    if stage.shard.frozen == "sharded" and kind != "vlm":
        layers = widths.get("vlm", 4) * num_parameters(*sizes.components.vlm.layers)
        found["vlm"] -= layers - layers / shards
    return found | ({"reference flow": 4 * num_parameters(sizes.components.flow.deep)} if kind == NEAR_T2I else {})


def state_bytes(sizes: Sizes, stage: StageConfig) -> dict[str, float]:
    """Bytes on all GPUs of a copy of parameters that train, their gradients, optimiser states and averages.

    Muon has one moment of a hidden matrix where Adam has two.
    """
    trained = sizes.trained(stage_kind(stage))
    named = dict(trained.named_parameters())
    count = sum(p.numel() for p in named.values())
    matrices = sum(p.numel() for n, p in named.items() if stage.optim.matrix_lr and is_hidden_matrix(n, p))
    averaged = trained.state_dict().values()
    return {
        "parameters": 4 * count,
        "gradients": 4 * count,
        "optimizer": MOMENTS[stage.optim.optimizer_state_dtype] * (count - matrices) + 4 * matrices,
        "average": sum(value.numel() * value.element_size() for value in averaged) if stage.optim.ema else 0,
    }


def gathered_bytes(sizes: Sizes, stage: StageConfig, *, is_half: bool) -> float:
    """Bytes of weights in the form in which they are computed with, beside those that a GPU keeps.

    Copies: autocast's bfloat16 copies of what trains. Shards: two layers at a time, or all without resharding, a
    layer's gradient before it is divided, and whatever is no layer, whole, with its gradient.
    """
    trained = sizes.trained(stage_kind(stage))
    width = 2 if is_half else 4
    if stage.shard.mode == "none":
        return float(width * num_parameters(trained)) if is_half else 0.0
    layers = transformer_layers(trained)
    largest = max((num_parameters(layer) for layer in layers), default=0)
    rest = num_parameters(trained) - num_parameters(*layers)
    at_once = 2 * largest if stage.shard.reshards else num_parameters(*layers)
    frozen = 2 * _largest_frozen(sizes) * width if stage.shard.frozen == "sharded" else 0
    return float(at_once * width + largest * (width + 4) + rest * (4 + 4) + frozen)


def _largest_frozen(sizes: Sizes) -> int:
    layers: list[nn.Module] = sizes.components.vlm.layers
    return max(num_parameters(layer) for layer in layers)


def max_activation_bytes(sizes: Sizes, stage: StageConfig) -> float:
    """Bytes that a document of mean length stores, if all documents were of the stage's costliest shape."""
    kind = stage_kind(stage)
    mean = mean_positions(sizes.cfg, kind)
    shapes = SHAPES[kind]
    return max(activation_bytes(sizes, stage, shape) * mean / shape.positions(sizes.cfg) for shape in shapes)


def activation_bytes(sizes: Sizes, stage: StageConfig, shape: Shape) -> float:
    """Bytes of one document that are stored for the backward pass, in bfloat16.

    Of layers that are recomputed: the input of every one, and all of the widest one while it is recomputed.
    """
    total, widest, recomputed = 0.0, 0.0, stage.checkpoint_activations
    for work in works(sizes, stage_kind(stage), shape):
        again = recomputed == "all" or (recomputed == "trained" and work.mode == "train")
        for layers in _stored(sizes.cfg, work.part) if work.mode != "forward" else ():
            total += work.tokens * layers.depth * (layers.input if again else layers.all)
            widest = max(widest, float(work.tokens * layers.all) if again else 0.0)
    return total + widest


@dataclass(frozen=True, slots=True)
class _Layers:
    """Layers of one kind, and the bytes per token that each stores: its input, or all for its backward pass."""

    depth: int
    input: int
    all: int


def _stored(cfg: ModelConfig, part: str) -> list[_Layers]:
    """Layers of a part with the activations that they store.

    A trained layer of width w stores the inputs of both norms and of all four matrices, q, k, v, and the MLP's hidden
    values before and after the activation: (8 + 2 * ratio) w. A frozen one stores no inputs of matrices: the inputs of
    norms, q, k, v, the output of attention, and both halves of the gated MLP.
    """
    v = cfg.vlm
    if part == "language":
        numbers = 3 * v.width + v.width + 2 * v.kv_heads * (v.width // v.heads) + 2 * v.mlp_width
        return [_Layers(v.depth, 2 * v.width, 2 * numbers)]
    plain = {
        "deep": [(cfg.flow.deep.stack.depth, cfg.flow.deep.stack.width, cfg.flow.deep.stack.mlp_ratio)],
        "shallow": [(b.stack.depth, b.stack.width, b.stack.mlp_ratio) for b in cfg.flow.shallow],
        "vision": [(v.vision_depth, v.vision_width, 4)],
    }
    if isinstance(cfg.fae, FaeConfig):
        plain["fae"] = [(s.depth, s.width, s.mlp_ratio) for s in (cfg.fae.feature_decoder, cfg.fae.pixel_decoder)]
    if isinstance(cfg.features, DinoConfig | SiglipConfig):
        plain["features"] = [(cfg.features.depth, cfg.features.width, 4)]
    # those of the head are its logits, see logit_bytes; those of the adapter are a thousandth of the rest
    return [_Layers(depth, 2 * width, 2 * (8 + 2 * ratio) * width) for depth, width, ratio in plain.get(part, [])]


def logit_bytes(shapes: Iterable[Shape]) -> float:
    """Bytes of all logits that exist at a time, for any batch: bfloat16, a float32 copy, and its gradient."""
    return LOGITS_AT_ONCE * (2.0 + 4 + 4) if any(shape.labels for shape in shapes) else 0.0
