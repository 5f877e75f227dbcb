"""Least cost of drawing with a model: weights, cache and time of one GPU, by batch and number format.

A roofline: a step takes as long as reading its weights and cache from memory, or as its multiplications, whichever is
longer. Nothing is measured, and a real program is slower. Both streams read every latent, with and without the words
(guidance); the shallow blocks are undone latent by latent, the slow exact way.
Letters: N latents of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from starflow2.core.serialize import JsonObject
from starflow2.training.work import CAPTIONED, Sizes

__all__ = ["BATCHES", "BYTES", "GpuSpeed", "drawing", "table"]

BATCHES = (1, 8, 64)  # images at a time
BYTES = {"bfloat16": 2, "float32": 4}  # of one number
PASSES = 2  # rows for each image: with the words and without


@dataclass(frozen=True, kw_only=True)
class GpuSpeed:
    """One GPU. bandwidth: bytes per second; peak: FLOP/s in bfloat16, of which float32 gets half (TF32)."""

    bandwidth: float
    peak: float

    def seconds(self, moved: float, flops: float, precision: str) -> float:
        """The time of one step that moves and multiplies this much."""
        return max(moved / self.bandwidth, flops / (self.peak if precision == "bfloat16" else self.peak / 2))


def drawing(sizes: Sizes, gpu: GpuSpeed) -> list[JsonObject]:
    """Bytes and seconds of drawing from one caption, for each number format and batch."""
    return [_drawing(sizes, gpu, precision, batch) for precision in BYTES for batch in BATCHES]


def _drawing(sizes: Sizes, gpu: GpuSpeed, precision: str, batch: int) -> JsonObject:
    cfg, weights, size = sizes.cfg, sizes.weights, BYTES[precision]
    count, rows = cfg.flow.deep.num_latents, PASSES * batch
    kept = rows * (CAPTIONED.text + count) * size * cache_numbers(sizes)
    streams = weights["language"] + weights["deep"] + weights["adapter"]
    words = gpu.seconds(size * streams, 2.0 * streams * CAPTIONED.text * rows, precision)
    # half of the cache is there on average
    latents = count * gpu.seconds(size * streams + kept / 2, 2.0 * streams * rows, precision)
    shallow = count * gpu.seconds(size * weights["shallow"], 2.0 * weights["shallow"] * batch, precision)
    decoder = weights["fae decoders"]
    pixels = gpu.seconds(size * decoder, 2.0 * decoder * count * batch, precision)
    total = words + latents + shallow + pixels
    return {
        "precision": precision,
        "batch": batch,
        "weight_bytes": size * sum(weights.values()),
        "cache_bytes": kept,
        "seconds": {"words": words, "latents": latents, "shallow": shallow, "pixels": pixels},
        "total_s": total,
        "images_per_s": batch / total,
    }


def cache_numbers(sizes: Sizes) -> int:
    """Numbers that both streams keep of one position."""
    language, deep = sizes.cfg.vlm, sizes.cfg.flow.deep.stack
    kept = 2 * language.depth * language.kv_heads * language.head_width
    return kept + 2 * deep.depth * deep.width


def table(rows: list[JsonObject]) -> Table:
    """The rows of `drawing` for the terminal."""
    shown = Table(title="drawing: the least time of one GPU (calculated)", title_justify="left")
    for name in ("format", "images at a time", "weights GB", "cache GB", "seconds", "images/s"):
        shown.add_column(name, justify="left" if name == "format" else "right")
    for row in rows:
        sizes = (f"{row[name] / 1e9:.2f}" for name in ("weight_bytes", "cache_bytes"))
        shown.add_row(
            row["precision"], str(row["batch"]), *sizes, f"{row['total_s']:.3g}", f"{row['images_per_s']:.3g}"
        )
    return shown
