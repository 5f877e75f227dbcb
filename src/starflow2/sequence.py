"""Documents as tensors: text rows padded for a batch, and the position ids of both streams.

Letters: B batch, T positions, N latents of one picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IGNORE", "TextRows", "image_mrope", "length_groups", "pad_rows", "text_mrope"]

IGNORE = -100  # label of positions that carry no next-token loss
_PASS_COST = 256


@dataclass(frozen=True, slots=True)
class TextRows:
    """Token rows of unequal length, padded at the right. ids: (B, T) int64, lengths: (B,)."""

    ids: Tensor
    lengths: Tensor

    @property
    def width(self) -> int:
        return int(self.ids.shape[1])

    def left_padded(self, states: Tensor) -> Tensor:
        """Per-position states (B, T, E) moved so that every row ends at the last position."""
        index = torch.arange(self.width, device=states.device)[None] - self.padding[:, None]
        index = index.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])
        return states.gather(1, index)

    @property
    def padding(self) -> Tensor:
        return self.width - self.lengths

    @property
    def left_attend(self) -> Tensor:
        """(B, T) bool, True at real positions once left-padded."""
        index = torch.arange(self.width, device=self.ids.device)
        return index[None] >= self.padding[:, None]

    @property
    def left_positions(self) -> Tensor:
        """(B, T, 3) flow positions (0, 0, index) of left-padded text; negative at padding."""
        index = torch.arange(self.width, device=self.ids.device)[None] - self.padding[:, None]
        zeros = torch.zeros_like(index)
        return torch.stack([zeros, zeros, index], dim=-1).float()


def pad_rows(rows: Sequence[Sequence[int]], pad: int) -> TextRows:
    """Rows of ids as one right-padded batch."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return TextRows(ids, torch.tensor([len(r) for r in rows]))


def text_mrope(batch: int, length: int, start: int = 0) -> Tensor:
    """M-RoPE ids of plain text: (3, B, T), all three axes count on from `start`."""
    return torch.arange(start, start + length).expand(3, batch, length)


def image_mrope(grid: tuple[int, int], start: int) -> tuple[Tensor, int]:
    """M-RoPE ids (3, N) of a picture that begins at `start`, and where text goes on after it."""
    rows, cols = grid
    index = torch.arange(rows * cols)
    positions = torch.stack([torch.zeros_like(index), index // cols, index % cols]) + start
    return positions, start + max(grid)


def length_groups(lengths: Sequence[int], extra: int) -> list[list[int]]:
    """Row indices as one or two groups of similar length, whichever wastes less on padding.

    `extra` positions follow each row. A second pass over the network costs about as much as the
    padding of `_PASS_COST` positions, so rows are split only where that pays. Exact: a mean over
    rows weighted by group size is the mean over all.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])

    def cost(first: int, last: int) -> int:
        return (last - first) * (lengths[order[last - 1]] + extra)

    whole = cost(0, len(order))
    best = min(
        range(1, len(order)),
        key=lambda k: cost(0, k) + cost(k, len(order)),
        default=0,
    )
    if not best or cost(0, best) + cost(best, len(order)) + _PASS_COST >= whole:
        return [order]
    return [order[:best], order[best:]]
