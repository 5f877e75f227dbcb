"""Plots drawn with PIL: panels side by side with axes, ticks and curves, without a plotting library.

Numbers come from `analysis`; `core.images.save_png` writes the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from starflow2.core.images import FONT_SIZE, FRAME, INK, MARGIN, PAPER, PILImage
from starflow2.errors import ShapeError

__all__ = ["CURVES", "Panel", "histogram_outline", "plot_panels"]

CURVES = ((31, 99, 176), (208, 92, 24), (46, 134, 72), (150, 60, 150))  # readable side by side, also in grey
PLOT = (400, 260)  # pixels of a panel within its axes


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: curves by name, each a line through its points (x, y)."""

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Sequence[tuple[float, float]]]


def histogram_outline(edges: Sequence[float], heights: Sequence[float]) -> list[tuple[float, float]]:
    """The outline of a histogram as the points of a curve; one more edge than heights.

    >>> histogram_outline([0.0, 1.0, 2.0], [3.0, 4.0])
    [(0.0, 0.0), (0.0, 3.0), (1.0, 3.0), (1.0, 4.0), (2.0, 4.0), (2.0, 0.0)]
    """
    if len(edges) != len(heights) + 1:
        raise ShapeError(f"histogram_outline: {len(edges)} edges and {len(heights)} heights; expected one edge more.")
    sides = [(x, y) for left, right, y in zip(edges, edges[1:], heights, strict=False) for x in (left, right)]
    return [(edges[0], 0.0), *sides, (edges[-1], 0.0)]


def plot_panels(panels: Sequence[Panel]) -> PILImage:
    """Plots side by side; y axes include 0. Raises ShapeError for no panel or a panel without points.

    >>> plot_panels([Panel(title="a", x_label="x", y_label="y", curves={"one": [(0, 1), (2, 3)]})]).size
    (508, 368)
    """
    if not panels or any(not any(panel.curves.values()) for panel in panels):
        raise ShapeError(f"plot_panels got {len(panels)} panels; expected at least one, each with a point to draw.")
    left, top = 84, max(52, MARGIN + 20 * max(len(panel.curves) for panel in panels))
    width, height = PLOT[0] + left + 2 * MARGIN, PLOT[1] + top + 56
    page = Image.new("RGB", (width * len(panels), height), PAPER)
    for i, panel in enumerate(panels):
        _plot(ImageDraw.Draw(page), panel, (i * width + left, top))
    return page


def _plot(draw: ImageDraw.ImageDraw, panel: Panel, corner: tuple[int, int]) -> None:
    """One panel, the upper left corner of its axes at `corner`."""
    font = ImageFont.load_default(FONT_SIZE - 2)
    left, top = corner
    right, bottom = left + PLOT[0], top + PLOT[1]
    points = [point for curve in panel.curves.values() for point in curve]
    x_ticks, y_ticks = _ticks([x for x, _ in points]), _ticks([0.0, *(y for _, y in points)])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * PLOT[0], bottom - up * PLOT[1]

    draw.text((left, top - 40), panel.title, fill=INK, font=ImageFont.load_default(FONT_SIZE))
    draw.text((left, top - 20), panel.y_label, fill=INK, font=font)
    draw.text(((left + right) / 2, bottom + 28), panel.x_label, fill=INK, font=font, anchor="ma")
    for x in x_ticks:
        draw.line((place(x, y_ticks[0]), place(x, y_ticks[-1])), fill=FRAME)
        draw.text((place(x, 0)[0], bottom + 6), f"{x:.4g}", fill=INK, font=font, anchor="ma")
    for y in y_ticks:
        draw.line((place(x_ticks[0], y), place(x_ticks[-1], y)), fill=FRAME)
        draw.text((left - 6, place(0, y)[1]), f"{y:.4g}", fill=INK, font=font, anchor="rm")
    for i, (name, curve) in enumerate(panel.curves.items()):
        colour = CURVES[i % len(CURVES)]
        draw.line([place(x, y) for x, y in curve], fill=colour, width=2, joint="curve")
        draw.text((right, top - 20 * (len(panel.curves) - i)), name, fill=colour, font=font, anchor="ra")


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, at most seven, from below the smallest value to above the largest."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]
