"""Replies of the language model alone about images of any shape, at their native size or squeezed to a square.

This is the frozen model's own row in a table: it sees through its vision tower at the resolution for which it was
trained, as published numbers of it do. Row by row, greedy and cached. Not here: answers about images of one size, many
at once (`vlm_answer`).
Letters: T positions, E language width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow2.core.torch_defaults import inference_defaults
from starflow2.errors import ConfigError, ShapeError, StateError
from starflow2.models.components import Components
from starflow2.models.sequence import Cursor, text_mrope
from starflow2.nn import Cache

__all__ = ["TowerView", "tower_reply", "tower_size"]

MERGE: Final = 2  # patches on a side that become one token
MOST_PIXELS: Final = 1_605_632  # of an image, as the published harness limits it


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerView:
    """How images are resized. square: pixels a side to squeeze them to first, 0 for their own shape."""

    square: int = 0
    least_pixels: int = 1
    most_pixels: int = MOST_PIXELS


def tower_size(height: int, width: int, step: int, view: TowerView) -> tuple[int, int]:
    """Height and width that the tower sees: multiples of `step` near the image's own, within the view's limits.

    Raises ShapeError for an image of more than 200 to 1, as Qwen's own processor does.

    >>> tower_size(100, 200, 28, TowerView())
    (112, 196)
    """
    if view.square:
        height = width = view.square
    if max(height, width) > 200 * min(height, width):
        raise ShapeError(f"an image has {height} x {width} pixels; expected sides of at most 200 to 1.")
    sides = [max(step, round(length / step) * step) for length in (height, width)]
    if math.prod(sides) > view.most_pixels:
        shrink = math.sqrt(height * width / view.most_pixels)
        sides = [max(step, math.floor(length / shrink / step) * step) for length in (height, width)]
    elif math.prod(sides) < view.least_pixels:
        grow = math.sqrt(view.least_pixels / (height * width))
        sides = [math.ceil(length * grow / step) * step for length in (height, width)]
    return sides[0], sides[1]


@inference_defaults()
def tower_reply(
    components: Components, parts: Sequence[str | Tensor], *, max_tokens: int = 48, view: TowerView | None = None
) -> str:
    """The reply to one message of words and images (3, h, w) in [-1, 1], the likeliest token at every step.

    Raises StateError if the language model was not trained, ConfigError for an empty message, ShapeError.
    """
    if "vlm" not in (*components.finished_stages, *components.cfg.references):
        raise StateError(f"this model has finished stages {list(components.finished_stages)}; answering needs vlm.")
    if not parts or max_tokens < 1:
        raise ConfigError(f"{len(parts)} parts and max_tokens {max_tokens}; expected at least one of both.")
    embeds, positions, after = _read(components, parts, view or TowerView())
    cache = components.vlm.new_cache()
    h = components.vlm.states(embeds, positions, cache=cache)
    return components.tokenizer.decode(_decode(components, cache, h, after, max_tokens))


def _read(components: Components, parts: Sequence[str | Tensor], view: TowerView) -> tuple[Tensor, Tensor, int]:
    """Embeddings (1, T, E) of a message up to where the reply begins, their M-RoPE ids, and the next position."""
    tokenizer, special = components.tokenizer, components.cfg.vlm.special
    cursor = Cursor(grid=(1, 1))
    pieces, positions = list[Tensor](), list[Tensor]()

    def say(ids: Sequence[int]) -> None:
        pieces.append(components.vlm.embed(torch.tensor([list(ids)], device=components.device)))
        positions.append(cursor.text(len(ids))[0])

    say(tokenizer.opens_user())
    for part in parts:
        if isinstance(part, str):
            say(tokenizer.encode(part))
            continue
        say([special.vision_start])
        tokens, cursor.grid = _seen(components, part, view)
        pieces.append(tokens.to(pieces[0].dtype))
        positions.append(cursor.latents()[0])
        say([special.vision_end])
    say(tokenizer.opens_reply())
    return torch.cat(pieces, 1), torch.cat(positions, 1)[:, None].to(components.device), cursor.mrope


def _seen(components: Components, image: Tensor, view: TowerView) -> tuple[Tensor, tuple[int, int]]:
    """Image tokens (1, rows * columns, E), and their grid."""
    step = components.cfg.vlm.vision_patch * MERGE
    size = tower_size(image.shape[1], image.shape[2], step, view)
    if view.square and tuple(image.shape[1:]) != (view.square, view.square):
        image = _resized(image, (view.square, view.square))
    pixels = _resized(image, size).to(components.device)
    return components.vlm.see_whole(pixels), (size[0] // step, size[1] // step)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[1:]) == size:
        return image.float()
    return F.interpolate(image[None].float(), size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(-1, 1)


def _decode(components: Components, cache: Cache, h: Tensor, position: int, max_tokens: int) -> list[int]:
    """Tokens of the reply without the end token."""
    vlm, end = components.vlm, components.cfg.vlm.special.end
    reply: list[int] = []
    while True:
        token = int(vlm.logits(h[:, -1]).argmax(-1))
        if token == end:
            return reply
        reply.append(token)
        if len(reply) == max_tokens:
            return reply
        ids = torch.tensor([[token]], device=components.device)
        h = vlm.states(vlm.embed(ids), text_mrope(1, 1, position).to(components.device), cache=cache)
        position += 1
