"""What a model weighs, before it exists: parameters, bytes and cache of a recipe or a model folder.

Counted on the meta device, so the largest model costs a second and no memory. Behind `starflow2 info`.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from starflow2.models.components import build
from starflow2.models.config import FaeConfig, ModelConfig
from starflow2.nn import num_parameters

__all__ = ["describe", "table"]

BYTES = {"float32": 4, "bfloat16": 2}  # of one number
TRAINED = ("flow.deep", "flow.shallow", "adapter", "skips")  # by the paper's stages; the rest is frozen when they start


def describe(cfg: ModelConfig) -> dict[str, Any]:
    """Parameters, bytes of weights and bytes of cache per position, as JSON.

    trainable: what the paper's own stages train. kv_bytes_per_token: of each stream that keeps a cache while a
    sequence grows; the shallow blocks keep none beyond a picture.

    >>> facts = describe(find_config("nano"))
    >>> facts["parameters"]["total"] == sum(facts["parameters"]["by_component"].values())
    True
    """
    components = build(cfg, "meta")
    vision = num_parameters(components.vlm.model.model.visual)
    counts = {
        "features": num_parameters(components.features) if isinstance(cfg.fae, FaeConfig) else 0,
        "vlm.vision": vision,
        "vlm.language": num_parameters(components.vlm) - vision,
        "fae": num_parameters(components.fae) if isinstance(cfg.fae, FaeConfig) else 0,
        "flow.deep": num_parameters(components.flow.deep),
        "flow.shallow": num_parameters(components.flow.shallow),
        "adapter": num_parameters(components.joints.adapter),
        "skips": num_parameters(components.joints) - num_parameters(components.joints.adapter),
    }
    total = sum(counts.values())
    language, deep = cfg.vlm, cfg.flow.deep.stack
    cached = {
        "language": 2 * language.depth * language.kv_heads * (language.width // language.heads),
        "flow": 2 * deep.depth * deep.width,
    }
    return {
        "name": cfg.name,
        "parameters": {
            "total": total,
            "trainable": sum(counts[name] for name in TRAINED),
            "by_component": counts,
        },
        "bytes": {dtype: total * size for dtype, size in BYTES.items()},
        "kv_bytes_per_token": {
            stream: {dtype: numbers * size for dtype, size in BYTES.items()} for stream, numbers in cached.items()
        },
        "latents": {"count": cfg.flow.deep.num_latents, "dim": cfg.flow.deep.dim},
        "image_size": cfg.fae.image_size,
    }


def table(facts: dict[str, Any]) -> Table:
    """The same for the terminal."""
    counts = facts["parameters"]
    grid = Table("component", title=f"{facts['name']}: {facts['image_size']} px pictures", title_justify="left")
    for heading in ("parameters", *BYTES):
        grid.add_column(heading, justify="right")
    for name, count in counts["by_component"].items():
        mark = " *" if name in TRAINED else ""
        grid.add_row(name + mark, f"{count:,}", *(_size(count * size) for size in BYTES.values()))
    grid.add_section()
    grid.add_row("total", f"{counts['total']:,}", *(_size(facts["bytes"][dtype]) for dtype in BYTES), style="bold")
    grid.add_row("* trained by the paper's stages", f"{counts['trainable']:,}", "", "")
    grid.add_section()
    for stream, cost in facts["kv_bytes_per_token"].items():
        grid.add_row(f"cache per position, {stream}", "", *(_size(cost[dtype]) for dtype in BYTES))
    return grid


def _size(count: float) -> str:
    """Bytes for people.

    >>> _size(2304), _size(12_345_678)
    ('2.3 kB', '12.3 MB')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
