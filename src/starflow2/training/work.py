"""The computation of training by stage, counted and not measured: FLOPs of a document, part by part.

2 FLOPs per weight and token forward, 2 for gradients of inputs, 2 for gradients of weights; causal attention is added,
norms and activations are not. A frozen language model costs nothing backward before the first image, where nothing
depends on trained weights (the prefix rule). Not here: memory (`memory`), days and GPUs (`planner`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from starflow2.models.components import Components, build
from starflow2.models.config import ExtractorConfig, FaeConfig, ModelConfig
from starflow2.nn import StackConfig, num_parameters
from starflow2.training.config import StageConfig
from starflow2.training.counts import ReadCounts

__all__ = [
    "CAPTIONED",
    "INTERLEAVED",
    "NEAR_T2I",
    "SHAPES",
    "Shape",
    "Sizes",
    "Work",
    "flops",
    "mean_positions",
    "measured_flops",
    "stage_kind",
    "works",
]

Mode = Literal["forward", "through", "train"]  # frozen; frozen, with gradients of its inputs; trained
END_TO_END = "t2i end to end"  # t2i with a codec_weight
NEAR_T2I = "joint near t2i"  # joint with kl_to_t2i
TIMES = {"forward": 1, "through": 2, "train": 3}  # cost relative to a forward pass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Positions of one document, as documents of the paper's stages have them."""

    text: float  # tokens
    pictures: float
    prefix: float = 0  # tokens before the first image
    labels: float = 0  # tokens with a next-token loss
    share: float = 1.0  # of the stage's documents

    def visual(self, cfg: ModelConfig) -> float:
        return self.pictures * cfg.flow.deep.num_latents

    def positions(self, cfg: ModelConfig) -> float:
        return self.text + self.visual(cfg)


CAPTIONED = Shape(text=128, pictures=1, prefix=128)
ANSWERED = Shape(text=128, pictures=1, labels=128)
INTERLEAVED = Shape(text=512, pictures=2, prefix=64, labels=512)
MIXED = (replace(CAPTIONED, share=0.5), replace(INTERLEAVED, share=0.5))  # our guess: the paper gives no shares
SHAPES: dict[str, tuple[Shape, ...]] = {
    "features": (CAPTIONED,),
    "fae": (CAPTIONED,),
    "vlm": (ANSWERED,),
    "t2i": (CAPTIONED,),
    END_TO_END: (CAPTIONED,),
    "adapter": (ANSWERED,),
    "joint": MIXED,
    "end": MIXED,
    "final": MIXED,
    NEAR_T2I: MIXED,
}


@dataclass(frozen=True, slots=True)
class Work:
    """The computation of one part of the model at some tokens of a document."""

    part: str
    weights: int  # weights that every token is multiplied with
    tokens: float
    mode: Mode
    attention: int = 0  # layers times width of its attention
    length: float = 0  # positions that are attended to

    @property
    def flops(self) -> float:
        """FLOPs of one document; attention is causal: half of 4 * length * width a layer."""
        return TIMES[self.mode] * self.tokens * (2.0 * self.weights + 2.0 * self.length * self.attention)


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
        vision = num_parameters(*p.vlm.tower)
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
            "end": p.joint_modules,
            "final": p.joint_modules,
            NEAR_T2I: {"flow": p.flow.deep, "joints": p.joints},
        }
        if (cfg := self.cfg.features) is not None:
            table |= {"fae": {"fae": p.fae}, END_TO_END: {"flow": p.flow, "fae": p.fae}}
            if not isinstance(cfg, ExtractorConfig):
                head = nn.Linear(cfg.width, 3 * cfg.patch_size**2, device="meta")
                table["features"] = {"features": p.features, "pixel_head": head}
        return nn.ModuleDict(table[stage])


def stage_kind(stage: StageConfig) -> str:
    """The key of a stage in `SHAPES`."""
    if stage.kl_to_t2i:
        return NEAR_T2I
    return END_TO_END if stage.codec_weight else stage.name


def mean_positions(cfg: ModelConfig, stage: str) -> float:
    """Positions of a document, averaged over the stage's shapes."""
    return sum(shape.share * shape.positions(cfg) for shape in SHAPES[stage])


def works(sizes: Sizes, stage: str, shape: Shape) -> Iterator[Work]:
    """The computations of one document of a shape in a stage."""
    cfg, w = sizes.cfg, sizes.weights
    visual, total = shape.visual(cfg), shape.positions(cfg)
    patches = shape.pictures * cfg.flow.deep.num_latents
    language = cfg.vlm.depth * cfg.vlm.width
    deep, shallow = (_attention(stack) for stack in (cfg.flow.deep.stack, cfg.flow.shallow[0].stack))
    shallow *= len(cfg.flow.shallow)

    def vlm(tokens: float, mode: Mode, length: float) -> Work:
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


def measured_flops(components: Components, stage: StageConfig) -> Callable[[ReadCounts], float]:
    """A function from what a stage has read to the FLOPs that it took, as if all documents were alike.

    Where the prefix before the first image ends is not counted, so what the prefix rule saves is not taken off.
    """
    sizes, kind = Sizes(components.cfg, components), stage_kind(stage)

    def flops_of(read: ReadCounts) -> float:
        text, pictures = (count / max(1, read.documents) for count in (read.text_tokens, read.images))
        labels = 0.0 if kind in ("t2i", END_TO_END) else text
        return read.documents * sum(
            work.flops for work in works(sizes, kind, Shape(text=text, pictures=pictures, labels=labels))
        )

    return flops_of
