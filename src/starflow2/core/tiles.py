"""Attention and rotation in bfloat16 on CPUs, where torch's fused kernel trains three times slower.

Scores are computed in tiles that fit into a core's own cache, only as far as the mask lets any query of a tile see, and
the queries of a key head are one long row of its product. `nn.attention` and `nn.heads_of` come here by themselves.
Letters: B batch, T positions, H query heads, G key heads, K head dim; R rows, t queries, n keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["RotatedHeads", "Tile", "TiledAttention", "computes_in_tiles", "is_tiled", "tiles_of"]

QUERIES = 128  # of a tile
SCORES = 2**18  # of a tile, 1 MiB in float32


def is_tiled(q: Tensor) -> bool:
    """True where `nn.attention` of such queries goes tile by tile: plain tensors on a CPU, neither traced nor fake."""
    return q.dtype == torch.bfloat16 and _is_plain(q)


def computes_in_tiles(x: Tensor) -> bool:
    """`is_tiled` of the queries that a layer makes of x, under autocast, too."""
    if not _is_plain(x):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype == torch.bfloat16


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


@dataclass(frozen=True, slots=True)
class Tile:
    """Scores that are computed together, small enough for a core's own cache; whatever is masked around them is not."""

    rows: slice
    queries: slice
    keys: slice
    added: Tensor | None  # (R or 1, 1, 1, Tq, Tk) float32, added to scores: 0, or the lowest number; None: all attend


def tiles_of(attend: Tensor | None, shape: Sequence[int], keys: int) -> list[Tile]:
    """The tiles of attention of queries of this shape (B, H, Tq, K) under a mask, which serve all layers of a pass."""
    batch, heads, length, _ = shape
    rows = max(1, SCORES // (heads * min(length, QUERIES) * keys))
    parts = [slice(i, min(batch, i + rows)) for i in range(0, batch, rows)]
    steps = [slice(i, min(length, i + QUERIES)) for i in range(0, length, QUERIES)]
    if attend is None:
        return [Tile(part, step, slice(0, keys), None) for step in steps for part in parts]
    return [tile for step in steps for tile in _masked_tiles(attend[:, 0, step], parts, step)]


def _masked_tiles(attend: Tensor, parts: Sequence[slice], queries: slice) -> Iterator[Tile]:
    """Tiles of some queries, with the keys that any of them sees; attend: (B or 1, t, Tk) bool."""
    seen = attend.any(1).int()
    lows, highs = seen.argmax(1).tolist(), (attend.shape[2] - seen.flip(1).argmax(1)).tolist()
    for part in parts:
        own = part if len(attend) > 1 else slice(0, 1)
        keys = slice(min(lows[own]), max(highs[own]))
        mask = attend[own, :, keys]
        added = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)
        yield Tile(part, queries, keys, None if bool(mask.all()) else added[:, None, None])


class TiledAttention(torch.autograd.Function):
    """`nn.attention` of contiguous q (B, G, H / G, Tq, K) and k, v (B, G, Tk, K), tile by tile.

    The queries of a key head are one long row of its matrix product; the softmax is in float32, its weights are kept
    for the backward pass in the dtype of q.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile]) -> Tensor:
        out, kept = torch.empty_like(q), list[Tensor]()
        for tile in tiles:
            at = tile.rows, slice(None), slice(None), tile.queries
            scores = q[at].flatten(2, 3) @ k[tile.rows, :, tile.keys].transpose(-1, -2)  # (R, G, H / G * t, n)
            kept.append(_softmax(scores, tile, q.shape))
            out[at] = (kept[-1] @ v[tile.rows, :, tile.keys]).unflatten(2, (q.shape[2], -1))
        ctx.tiles = tiles
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph, as in `nn._SquaredRelu`
            raise NotImplementedError("attention in bfloat16 can be differentiated only once; use float32 for more.")
        q, k, v, *kept = ctx.saved_tensors
        by_q, (by_k, by_v) = torch.empty_like(q), (torch.zeros(x.shape, device=x.device) for x in (k, v))
        for tile, weights in zip(ctx.tiles, kept, strict=True):
            at, keys = (tile.rows, slice(None), slice(None), tile.queries), (tile.rows, slice(None), tile.keys)
            by_out = grad[at].flatten(2, 3)
            by_v[keys] += weights.transpose(-1, -2) @ by_out
            by_weights = (by_out @ v[keys].transpose(-1, -2)).float()
            by_scores = torch.ops.aten._softmax_backward_data(by_weights, weights.float(), -1, torch.float32)
            by_scores = by_scores.mul_(q.shape[-1] ** -0.5).to(q.dtype)
            by_q[at] = (by_scores @ k[keys]).unflatten(2, (q.shape[2], -1))
            by_k[keys] += by_scores.transpose(-1, -2) @ q[at].flatten(2, 3)
        return by_q, by_k.to(k.dtype), by_v.to(v.dtype), None


def _softmax(scores: Tensor, tile: Tile, shape: Sequence[int]) -> Tensor:
    """Weights (R, G, H / G * t, n) from scores of queries (B, G, H / G, Tq, K), scaled and masked."""
    groups, scale = shape[2], shape[-1] ** -0.5
    if tile.added is None:
        scaled = scores.float().mul_(scale)
    else:
        scaled = torch.add(tile.added, scores.unflatten(2, (groups, -1)), alpha=scale).flatten(2, 3)
    return scaled.softmax(dim=-1).to(scores.dtype)


class RotatedHeads(torch.autograd.Function):
    """`nn.heads_of` with results that are contiguous and rotations in float32, in a fifth of the time in bfloat16."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, turns: Tensor) -> tuple[Tensor, ...]:
        count = heads + (qkv.shape[2] - heads) // 2  # of heads that are rotated
        x = qkv[:, :, :count].float()
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns)
        ctx.save_for_backward(turns)
        parts = x[:, :, :heads], x[:, :, heads:], qkv[:, :, count:]
        return tuple(
            part.transpose(1, 2).to(qkv.dtype, memory_format=torch.contiguous_format, copy=True) for part in parts
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (turns,) = ctx.saved_tensors
        (batch, heads, length, dim), groups = grads[0].shape, grads[1].shape[1]
        x = torch.empty(batch, length, heads + groups, dim, device=turns.device)
        x[:, :, :heads], x[:, :, heads:] = grads[0].transpose(1, 2), grads[1].transpose(1, 2)
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns.conj().resolve_conj())
        out = torch.empty(batch, length, heads + 2 * groups, dim, dtype=grads[0].dtype, device=turns.device)
        out[:, :, : heads + groups], out[:, :, heads + groups :] = x, grads[2].transpose(1, 2)
        return out, None, None
