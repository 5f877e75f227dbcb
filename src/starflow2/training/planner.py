"""Plan the training of a recipe without running it: memory, FLOPs, step time and days, by stage.

Arithmetic only, with its assumptions beside each formula; no number is measured. Behind `starflow2 info --gpus`.

FLOPs: 2 per weight and token forward, 2 for gradients of inputs, 2 for gradients of weights; causal attention is added,
norms and activations are not. A frozen language model costs nothing backward before the first image, where nothing
depends on trained weights (the prefix rule). Memory: trained weights are sharded over all GPUs, frozen ones are on each
in the format of their files; activations are in bfloat16 with fused attention and are either all stored, or one per
layer is and the rest is recomputed. Not counted: communication, data loading, evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from rich.console import Group
from rich.table import Table
from torch import nn

from starflow2.core.fields import Config, Count, Positive, Range
from starflow2.core.serialize import JsonObject
from starflow2.models.components import Components, build
from starflow2.models.config import FaeConfig, ModelConfig
from starflow2.models.token_loss import LOGITS_AT_ONCE
from starflow2.nn import StackConfig, num_parameters
from starflow2.training.config import RunConfig, StageConfig
from starflow2.training.state import is_hidden_matrix

__all__ = [
    "CAPTIONED",
    "INTERLEAVED",
    "SCHEMES",
    "SHAPES",
    "Hardware",
    "Scheme",
    "Shape",
    "Sizes",
    "Work",
    "activation_bytes",
    "flops",
    "frozen_bytes",
    "logit_bytes",
    "plan",
    "stage_kind",
    "state_bytes",
    "table",
    "works",
]

Mode = Literal["forward", "through", "train"]  # frozen; frozen, with gradients of its inputs; trained
END_TO_END = "t2i end to end"  # t2i with a codec_weight
NEAR_T2I = "joint near t2i"  # joint with kl_to_t2i
TIMES = {"forward": 1, "through": 2, "train": 3}  # cost relative to a forward pass
RESERVED = 2e9  # bytes of a GPU for its context and the allocator's gaps
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Hardware(Config):
    """GPUs of one kind that train one recipe together."""

    gpus: Count = 8
    gpu_memory: Positive = 80.0  # GiB each
    peak: Positive = 989e12  # FLOP/s each, dense bfloat16 (H100)
    mfu: Annotated[float, Range(above=0, most=1)] = 0.4  # share of the peak in training: assumed, not measured


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Bytes per trained parameter."""

    name: str
    parameters: int  # master copy and, in some schemes, a copy in the format of the computation
    gradients: int
    moments: int  # both of Adam's

    @property
    def state(self) -> int:
        return self.parameters + self.gradients + self.moments


SCHEMES = (
    Scheme(name="float32", parameters=4, gradients=4, moments=8),
    Scheme(name="float32, 8-bit Adam", parameters=6, gradients=2, moments=2),
    Scheme(name="bfloat16", parameters=2, gradients=2, moments=4),
    Scheme(name="bfloat16, 8-bit Adam", parameters=2, gradients=2, moments=2),
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Positions of one document, as documents of the paper's stages have them."""

    text: int  # tokens
    pictures: int
    prefix: int = 0  # tokens before the first image
    labels: int = 0  # tokens with a next-token loss
    share: float = 1.0  # of the stage's documents

    def visual(self, cfg: ModelConfig) -> int:
        return self.pictures * cfg.flow.deep.num_latents

    def positions(self, cfg: ModelConfig) -> int:
        return self.text + self.visual(cfg)


CAPTIONED = Shape(text=128, pictures=1, prefix=128)
ANSWERED = Shape(text=128, pictures=1, labels=128)
INTERLEAVED = Shape(text=512, pictures=2, prefix=64, labels=512)
MIXED = (replace(CAPTIONED, share=0.5), replace(INTERLEAVED, share=0.5))  # 80 M documents of each in the paper
SHAPES: dict[str, tuple[Shape, ...]] = {
    "features": (CAPTIONED,),
    "fae": (CAPTIONED,),
    "vlm": (ANSWERED,),
    "t2i": (CAPTIONED,),
    END_TO_END: (CAPTIONED,),
    "adapter": (ANSWERED,),
    "joint": MIXED,
    NEAR_T2I: MIXED,
}


@dataclass(frozen=True, slots=True)
class Work:
    """The computation of one part of the model at some tokens of a document."""

    part: str
    weights: int  # weights that every token is multiplied with
    tokens: int
    mode: Mode
    attention: int = 0  # layers times width of its attention
    length: int = 0  # positions that are attended to

    @property
    def flops(self) -> float:
        """FLOPs of one document; attention is causal: half of 4 * length * width a layer."""
        return TIMES[self.mode] * self.tokens * (2.0 * self.weights + 2.0 * self.length * self.attention)


# -- what a model is made of ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model on the meta device: its weights by part, and the modules that each stage trains."""

    cfg: ModelConfig
    components: Components

    @classmethod
    def of(cls, cfg: ModelConfig) -> Sizes:
        return cls(cfg, build(cfg, "meta"))

    @property
    def weights(self) -> dict[str, int]:
        p, cfg = self.components, self.cfg
        head = cfg.vlm.vocab * cfg.vlm.width
        vision = num_parameters(p.vlm.model.model.visual)
        embeddings = head if cfg.vlm.ties_embeddings else 2 * head
        codec = dict.fromkeys(("features", "fae encoder", "fae decoders"), 0)
        if isinstance(cfg.fae, FaeConfig):
            decoders = num_parameters(p.fae.feature_decoder) + num_parameters(p.fae.pixel_decoder)
            codec = {
                "features": num_parameters(p.features),
                "fae encoder": num_parameters(p.fae.encoder),
                "fae decoders": decoders,
            }
        return {
            **codec,
            "language": num_parameters(p.vlm) - vision - embeddings,
            "head": head,
            "vision": vision,
            "deep": num_parameters(p.flow.deep.body),
            "shallow": sum(num_parameters(block.get_submodule("body")) for block in p.flow.shallow.blocks),
            "adapter": num_parameters(p.joints.adapter.mlp),
        }

    def trained(self, stage: str) -> nn.ModuleDict:
        """The modules that the stage's task trains, under their names."""
        p = self.components
        table: dict[str, dict[str, nn.Module]] = {
            "vlm": {"vlm": p.vlm},
            "t2i": {"flow": p.flow},
            "adapter": {"adapter": p.joints.adapter},
            "joint": p.joint_modules,
            NEAR_T2I: {"flow": p.flow.deep, "joints": p.joints},
        }
        if (cfg := self.cfg.features) is not None:
            head = nn.Linear(cfg.width, 3 * cfg.patch_size**2, device="meta")
            table |= {"features": {"features": p.features, "pixel_head": head}, "fae": {"fae": p.fae}}
            table[END_TO_END] = {"flow": p.flow, "fae": p.fae}
        return nn.ModuleDict(table[stage])


# -- time ---------------------------------------------------------------------------------------------------


def works(sizes: Sizes, stage: str, shape: Shape) -> Iterator[Work]:
    """The computations of one document of a shape in a stage."""
    cfg, w = sizes.cfg, sizes.weights
    visual, total = shape.visual(cfg), shape.positions(cfg)
    patches = shape.pictures * cfg.flow.deep.num_latents
    language = cfg.vlm.depth * cfg.vlm.width
    deep, shallow = (_attention(stack) for stack in (cfg.flow.deep.stack, cfg.flow.shallow[0].stack))
    shallow *= len(cfg.flow.shallow)

    def vlm(tokens: int, mode: Mode, length: int) -> Work:
        return Work("language", w["language"], tokens, mode, language, length)

    yield Work("features", w["features"], patches + shape.pictures, "train" if stage == "features" else "forward")
    if stage in ("fae", END_TO_END):
        yield Work("fae", w["fae encoder"] + w["fae decoders"], patches, "train")
    if stage in ("features", "fae"):
        return
    if stage == "vlm":
        tower_patches = shape.pictures * 4 * cfg.vlm.image_grid[0] * cfg.vlm.image_grid[1]
        yield Work("vision", w["vision"], tower_patches, "train")
        yield Work("language", w["language"], total, "train", language, total)
        yield Work("head", w["head"], shape.labels, "train")
        return
    if stage != END_TO_END:
        yield Work("fae", w["fae encoder"], patches, "forward")
    if stage in ("t2i", END_TO_END):
        yield vlm(shape.text, "forward", shape.text)
        yield Work("deep", w["deep"], total, "train", deep, total)
        yield Work("shallow", w["shallow"], visual, "train", shallow, visual)
        return
    yield vlm(shape.prefix, "forward", total)
    yield vlm(total - shape.prefix, "through", total)
    yield Work("head", w["head"], shape.labels, "through")
    yield Work("adapter", w["adapter"], visual, "train")
    if stage == "adapter":
        yield Work("shallow", w["shallow"], visual, "forward", shallow, visual)
        return
    yield Work("deep", w["deep"], total, "train", deep, total)
    if stage == NEAR_T2I:  # the reference flow reads drawings alone; here all documents, which is an upper bound
        yield Work("deep", w["deep"], total, "forward", deep, total)
    yield Work("shallow", w["shallow"], visual, "forward" if stage == NEAR_T2I else "train", shallow, visual)


def _attention(stack: StackConfig) -> int:
    return stack.depth * stack.width


def flops(sizes: Sizes, stage: str) -> dict[str, float]:
    """FLOPs of one document by part, averaged over the stage's shapes."""
    total: dict[str, float] = {}
    for shape in SHAPES[stage]:
        for work in works(sizes, stage, shape):
            total[work.part] = total.get(work.part, 0.0) + shape.share * work.flops
    return total


# -- memory -------------------------------------------------------------------------------------------------


def frozen_bytes(sizes: Sizes, stage: str) -> dict[str, int]:
    """Bytes of frozen weights by part, each in the format of its files."""
    cfg = sizes.cfg
    parts = dict(sizes.components.named_children())
    trained = {id(p) for p in sizes.trained(stage).parameters()}
    widths = {name: 2 if ref.precision == "bfloat16" else 4 for name, ref in cfg.references.items()}
    found = {
        name: widths.get(name, 4) * sum(p.numel() for p in module.parameters() if id(p) not in trained)
        for name, module in parts.items()
    }
    return found | ({"reference flow": 4 * num_parameters(sizes.components.flow.deep)} if stage == NEAR_T2I else {})


def state_bytes(sizes: Sizes, stage: StageConfig, scheme: Scheme) -> dict[str, int]:
    """Bytes on all GPUs together of parameters that train, their gradients, optimiser states and averages.

    Muon has one moment of a hidden matrix where Adam has two.
    """
    trained = sizes.trained(stage_kind(stage))
    named = dict(trained.named_parameters())
    count = sum(p.numel() for p in named.values())
    single = sum(p.numel() for n, p in named.items() if stage.optim.matrix_lr and is_hidden_matrix(n, p))
    averaged = trained.state_dict().values()
    return {
        "parameters": count * scheme.parameters,
        "gradients": count * scheme.gradients,
        "optimizer": count * scheme.moments - single * scheme.moments // 2,
        "average": sum(value.numel() * value.element_size() for value in averaged) if stage.optim.ema else 0,
    }


def activation_bytes(sizes: Sizes, stage: str, shape: Shape, *, recomputes: bool) -> float:
    """Bytes of one document that are stored for the backward pass, in bfloat16.

    `recomputes`: the input of every layer, and all of the widest one while it is recomputed.
    """
    total, widest = 0.0, 0.0
    for work in works(sizes, stage, shape):
        for layers in _stored(sizes.cfg, work.part) if work.mode != "forward" else ():
            total += work.tokens * layers.depth * (layers.input if recomputes else layers.all)
            widest = max(widest, float(work.tokens * layers.all))
    return total + (widest if recomputes else 0.0)


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
    if isinstance(cfg.fae, FaeConfig) and cfg.features is not None:
        plain["fae"] = [(s.depth, s.width, s.mlp_ratio) for s in (cfg.fae.feature_decoder, cfg.fae.pixel_decoder)]
        plain["features"] = [(cfg.features.depth, cfg.features.width, 4)]
    # those of the head are its logits, see logit_bytes; those of the adapter are a thousandth of the rest
    return [_Layers(depth, 2 * width, 2 * (8 + 2 * ratio) * width) for depth, width, ratio in plain.get(part, [])]


def logit_bytes(shapes: Iterable[Shape]) -> float:
    """Bytes of all logits that exist at a time, for any batch: bfloat16, a float32 copy, and its gradient."""
    return LOGITS_AT_ONCE * (2.0 + 4 + 4) if any(shape.labels for shape in shapes) else 0.0


# -- the plan -----------------------------------------------------------------------------------------------


def plan(run: RunConfig, hardware: Hardware) -> JsonObject:
    """FLOPs, step time, days, GPU hours and memory under every scheme, for each stage; as JSON."""
    sizes = Sizes.of(run.model)
    return {
        "name": run.model.name,
        "hardware": dict(vars(hardware)),
        "stages": [_stage(sizes, stage, hardware) for stage in run.stages],
    }


def _stage(sizes: Sizes, stage: StageConfig, hardware: Hardware) -> JsonObject:
    by_part = flops(sizes, stage_kind(stage))
    each = sum(by_part.values())
    step = stage.batch * each / (hardware.gpus * hardware.peak * hardware.mfu)
    hours = stage.steps * step / 3600
    return {
        "stage": stage.name,
        "steps": stage.steps,
        "batch": stage.batch,
        "documents": stage.steps * stage.batch,
        "tflops_per_document": each / 1e12,
        "tflops_by_part": {part: value / 1e12 for part, value in by_part.items()},
        "step_s": step,
        "days": hours / 24,
        "gpu_hours": hours * hardware.gpus,
        "plans": [_fit(sizes, stage, s, hardware, recomputes=r) for s in SCHEMES for r in (False, True)],
    }


def stage_kind(stage: StageConfig) -> str:
    """The key of a stage in `SHAPES`."""
    if stage.kl_to_t2i:
        return NEAR_T2I
    return END_TO_END if stage.codec_weight else stage.name


def _fit(sizes: Sizes, stage: StageConfig, scheme: Scheme, hardware: Hardware, *, recomputes: bool) -> JsonObject:
    """Memory of one GPU by component, and the number of documents of the longest shape that fit beside it."""
    frozen = sum(frozen_bytes(sizes, stage_kind(stage)).values())
    state = {name: count / hardware.gpus for name, count in state_bytes(sizes, stage, scheme).items()}
    shapes = SHAPES[stage_kind(stage)]
    stored = max(activation_bytes(sizes, stage_kind(stage), shape, recomputes=recomputes) for shape in shapes)
    fixed = {"frozen": frozen, **state, "logits": logit_bytes(shapes), "reserved": RESERVED}
    left = hardware.gpu_memory * GIB - sum(fixed.values())
    share = max(1, stage.batch // hardware.gpus)
    fits = int(max(0.0, left) // max(1.0, stored))
    return {
        "scheme": scheme.name,
        "recomputes": recomputes,
        "bytes": fixed,
        "bytes_per_document": {"activations": stored},
        "left": left,
        "microbatch": min(share, fits),
        "fits": fits > 0,
    }


def table(facts: JsonObject) -> Group:
    """Tables of a plan: for each stage the first scheme that fits, stored activations before recomputed ones."""
    h = facts["hardware"]
    speed = f"{h['mfu']:.0%} of {h['peak'] / 1e12:g} TFLOP/s"
    title = f"{facts['name']} on {h['gpus']} GPUs of {h['gpu_memory']:g} GiB, {speed} (calculated)"
    times = Table(title=title, title_justify="left")
    memory = Table(title="memory of one GPU in GB", title_justify="left")
    for name in ("stage", "documents", "TFLOP each", "step", "days", "GPU hours"):
        times.add_column(name, justify="left" if name == "stage" else "right")
    parts = ("frozen", "parameters", "gradients", "optimizer", "average", "logits")
    memory.add_column("of stage")
    columns: list[list[str]] = []
    for row in facts["stages"]:
        times.add_row(
            row["stage"],
            f"{row['documents'] / 1e6:,.1f} M",
            f"{row['tflops_per_document']:.3g}",
            f"{row['step_s']:.3g} s",
            f"{row['days']:.3g}",
            f"{row['gpu_hours']:,.3g}" if row["gpu_hours"] < 100 else f"{row['gpu_hours']:,.0f}",
        )
        best = next((p for p in row["plans"] if p["fits"]), None)
        if best is None:
            columns.append(["nothing fits"])
            continue
        each = [best["microbatch"] * n for n in best["bytes_per_document"].values()]
        numbers = [f"{n / 1e9:.1f}" for n in (*(best["bytes"][p] for p in parts), *each)]
        scheme = best["scheme"] + (", recomputing" if best["recomputes"] else "")
        columns.append([scheme, *numbers, str(best["microbatch"])])
    for row in facts["stages"]:
        memory.add_column(row["stage"], justify="right")
    heads = ("scheme", *parts, "activations", "microbatch")
    for head, cells in zip(heads, itertools.zip_longest(*columns, fillvalue=""), strict=False):
        memory.add_row(head, *cells)
    return Group(times, memory)
