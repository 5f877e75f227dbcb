"""Size of a model before it exists: parameters, bytes and cache of a recipe or a model folder.

Counted on the meta device, so the largest model costs a second and no memory. Used by `starflow2 info`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from starflow2.models.components import Components, build
from starflow2.models.config import CodecConfig, FaeConfig, ModelConfig
from starflow2.nn import num_parameters

__all__ = ["LatentShape", "ModelSummary", "ParameterCounts", "describe", "table"]

BYTES = {"float32": 4, "bfloat16": 2}  # of one number
TRAINED = ("flow.deep", "flow.shallow", "adapter", "skips")  # in the paper's stages, which freeze everything else


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters. trainable: those that the paper's own stages train."""

    total: int
    trainable: int
    by_component: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """Latents of one image: how many, and their channels."""

    count: int
    dim: int


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """Sizes of a model, in the layout of `info --json`.

    kv_bytes_per_token: of each stream that keeps a cache while a sequence grows, by number format; the shallow blocks
    keep none after an image.
    """

    name: str
    parameters: ParameterCounts
    bytes: Mapping[str, int]  # of all weights, by number format
    kv_bytes_per_token: Mapping[str, Mapping[str, int]]
    latents: LatentShape
    image_size: int  # pixels, square


def describe(cfg: ModelConfig) -> ModelSummary:
    """Count parameters, bytes of weights and bytes of cache per position of a model.

    >>> from starflow2.training.recipes import find_config
    >>> counts = describe(find_config("nano")).parameters
    >>> counts.total == sum(counts.by_component.values())
    True
    """
    counts = _parameters(build(cfg, "meta"))
    total = sum(counts.values())
    language, deep = cfg.vlm, cfg.flow.deep.stack
    cached = {
        "language": 2 * language.depth * language.kv_heads * language.head_width,
        "flow": 2 * deep.depth * deep.width,
    }
    return ModelSummary(
        name=cfg.name,
        parameters=ParameterCounts(total=total, trainable=sum(counts[name] for name in TRAINED), by_component=counts),
        bytes=_bytes(total),
        kv_bytes_per_token={stream: _bytes(numbers) for stream, numbers in cached.items()},
        latents=LatentShape(count=cfg.flow.deep.num_latents, dim=cfg.flow.deep.dim),
        image_size=cfg.fae.image_size,
    )


def _parameters(components: Components) -> dict[str, int]:
    has_fae = isinstance(components.cfg.fae, FaeConfig)
    vision = num_parameters(*components.vlm.tower)
    adapter = num_parameters(components.joints.adapter)
    return {
        "features": num_parameters(components.features) if has_fae else 0,
        "vlm.vision": vision,
        "vlm.language": num_parameters(components.vlm) - vision,
        "fae": num_parameters(components.fae) if has_fae else _own_codec_parameters(components),
        "flow.deep": num_parameters(components.flow.deep),
        "flow.shallow": num_parameters(components.flow.shallow),
        "adapter": adapter,
        "skips": num_parameters(components.joints) - adapter,
    }


def _own_codec_parameters(components: Components) -> int:
    return num_parameters(components.own_codec) if isinstance(components.cfg.fae, CodecConfig) else 0


def _bytes(numbers: int) -> dict[str, int]:
    return {dtype: numbers * size for dtype, size in BYTES.items()}


def table(summary: ModelSummary) -> Table:
    """Summary as a table for the terminal."""
    counts = summary.parameters
    grid = Table("component", title=f"{summary.name}: images of {summary.image_size} px", title_justify="left")
    for heading in ("parameters", *BYTES):
        grid.add_column(heading, justify="right")
    for name, count in counts.by_component.items():
        mark = " *" if name in TRAINED else ""
        grid.add_row(name + mark, f"{count:,}", *map(_size, _bytes(count).values()))
    grid.add_section()
    grid.add_row("total", f"{counts.total:,}", *map(_size, summary.bytes.values()), style="bold")
    grid.add_row("* trained by the paper's stages", f"{counts.trainable:,}", "", "")
    grid.add_section()
    for stream, cost in summary.kv_bytes_per_token.items():
        grid.add_row(f"cache per position, {stream}", "", *map(_size, cost.values()))
    return grid


def _size(count: float) -> str:
    """Format a number of bytes.

    >>> _size(2304), _size(12_345_678)
    ('2.3 kB', '12.3 MB')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
