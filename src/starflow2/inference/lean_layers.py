"""Transformer layers on packed weights and static caches, with as few operations as torch allows.

The same arithmetic as the modules: `QwenStream.states` and `CausalStack.forward`, which tests compare it with. All new
positions of a pass are rows of one matrix, lane by lane.
Letters: R rows, M rows of each lane, H query heads, G key heads, K head dim, E language width, C flow width, T visible
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow2.inference.lanes import KeyValues
from starflow2.inference.packed import FlowLayer, LanguageLayer
from starflow2.nn import at_least_fp32

__all__ = [
    "Attention",
    "FlowLayers",
    "Heads",
    "LanguageLayers",
    "Linear",
    "Pass",
    "RmsNorm",
    "Rotation",
    "attention",
    "pass_over",
]

Heads = tuple[int, int, int]  # query heads, key heads, dim of a head


class Linear:
    """x W^T + b, one operation on matrices."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight.t(), bias

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W^T + b."""
        if self.bias is None:
            return torch.addmm(residual, x, self.weight)
        return torch.addmm(self.bias, x, self.weight).add_(residual)


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) times a gain."""

    def __init__(self, gain: Tensor, eps: float = 1e-6) -> None:
        self.gain, self.eps, width = gain, eps, len(gain)
        self._scaled = gain * width**0.5
        self._floor = gain.new_tensor((width * eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.rms_norm(x, self.gain.shape, self.gain, self.eps)
        # torch's own norm on CPU is six operations that take three times as long
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(length, self._floor) * self._scaled


@dataclass(slots=True)
class Pass:
    """Where new positions go and what they attend to: M for each of `lanes` lanes from slot `first` on."""

    first: int
    lanes: int
    visible: int  # T
    position: Tensor  # (R,) in the lane
    mask: Tensor  # (lanes, 1, M, T), 0 or -inf

    @property
    def rows(self) -> int:
        """M."""
        return len(self.position) // self.lanes

    def index(self, cache: KeyValues) -> Tensor:
        slots = slice(self.first, self.first + self.lanes)
        if self.rows == 1:
            return cache.index(slots, self.position)
        return cache.index(torch.arange(slots.start, slots.stop).repeat_interleave(self.rows), self.position)


def pass_over(first: int, lanes: int, visible: int, position: Tensor, dtype: torch.dtype) -> Pass:
    """position: (R,), M for each lane; every row attends to positions of its lane up to its own."""
    hidden = torch.arange(visible, device=position.device) > position[:, None]  # (R, T)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
    return Pass(first, lanes, visible, position, mask.view(lanes, 1, -1, visible))


class Rotation:
    """Rotary positions of the rows of a pass, in float32 whatever the dtype of the queries and keys."""

    def __init__(self, turns: Tensor, heads: Heads, dtype: torch.dtype) -> None:
        """turns: (R or 1, K / 2) complex, of all queries and keys; dtype: of these."""
        queries, kv_heads, _ = self.heads = heads
        self._turned = queries + kv_heads  # heads that turn, values do not
        self._turns = turns[:, None]
        self._is_half = dtype.itemsize < 4
        if not self._is_half:
            return
        ones = torch.ones_like(turns[:, None]).expand(-1, kv_heads, -1)
        whole = torch.cat([self._turns.expand(-1, self._turned, -1), ones], dim=1)
        self._matrices = torch.view_as_real(torch.stack([whole, 1j * whole], dim=-1))  # (R, H + 2 G, K / 2, 2, 2)
        self._out = torch.empty((*whole.shape, 2), dtype=dtype, device=whole.device)

    def __call__(self, qkv: Tensor) -> Tensor:
        """qkv (R, (H + 2 G) K), neighbouring pairs rotated, values as they are -> (R, H + 2 G, K).

        The result is overwritten by the next call, or shares memory with qkv.
        """
        pairs = qkv.view(len(qkv), -1, self.heads[2] // 2, 2)
        if not self._is_half:
            torch.view_as_complex(pairs)[:, : self._turned].mul_(self._turns)
            return pairs.flatten(-2)
        products = pairs[..., None] * self._matrices  # float32: a product and a sum that round once, without casts
        return torch.add(products[..., 0, :], products[..., 1, :], out=self._out).flatten(-2)


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal attention of a whole stack over its cache, at the new positions of one pass."""

    cache: KeyValues
    heads: Heads
    lanes: int
    index: Tensor  # (R, 2 * G) where keys and values go
    views: Sequence[tuple[Tensor, Tensor]]  # of each layer, (lanes, G, T, K)
    rotated: Rotation
    mask: Tensor  # (lanes, 1, M or M H / G, T), or what broadcasts to that

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv (R, (H + 2 G) K) -> (R, H K); keys and values go into the cache."""
        queries, kv_heads, _ = self.heads
        turned = self.rotated(qkv)  # (R, H + 2 G, K)
        self.cache.write(layer, self.index, turned[:, queries:])
        k, v = self.views[layer]
        # queries that share a key head are read as if they were positions: no key is repeated
        q = turned[:, :queries].unflatten(1, (-1, kv_heads))  # (R, H / G, G, K)
        if len(qkv) == self.lanes:
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=self.mask)
            return out.transpose(1, 2).reshape(len(qkv), -1)  # no copy: kernels leave heads innermost
        q = q.unflatten(0, (self.lanes, -1)).permute(0, 3, 2, 1, 4)  # (lanes, G, H / G, M, K)
        out = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=self.mask)
        return out.unflatten(2, (q.shape[2], -1)).permute(0, 3, 2, 1, 4).reshape(len(qkv), -1)


def attention(cache: KeyValues, now: Pass, rotation: Tensor, heads: Heads) -> Attention:
    """Attention of a pass; rotation: (R, K / 2) complex."""
    queries, kv_heads, _ = heads
    mask = now.mask.to(cache.buffer.dtype)
    if now.rows > 1:
        mask = mask.repeat(1, 1, queries // kv_heads, 1)
    views = cache.views(now.first, now.lanes, now.visible)
    rotated = Rotation(rotation, heads, cache.buffer.dtype)
    return Attention(cache, heads, now.lanes, now.index(cache), views, rotated, mask)


class LanguageLayers:
    """All layers of the language model and its last norm."""

    def __init__(self, layers: Sequence[LanguageLayer], last_norm: Tensor) -> None:
        self.layers = [
            (
                RmsNorm(w.norm_in),
                Linear(w.qkv, w.qkv_bias),
                Linear(w.out),
                RmsNorm(w.norm_mlp),
                Linear(w.gate_up),
                Linear(w.down),
            )
            for w in layers
        ]
        self.last_norm = RmsNorm(last_norm)

    def __call__(self, x: Tensor, attend: Attention) -> Tensor:
        """x: (R, E) -> states (R, E), float32 or better."""
        for i, (norm_in, qkv, out, norm_mlp, gate_up, down) in enumerate(self.layers):
            x = out.onto(x, attend(i, qkv(norm_in(x))))
            gate, up = gate_up(norm_mlp(x)).chunk(2, dim=-1)
            x = down.onto(x, F.silu(gate).mul_(up))
        return at_least_fp32(self.last_norm(x))


class FlowLayers:
    """All layers of a flow block and its last norm."""

    def __init__(self, layers: Sequence[FlowLayer], last_norm: Tensor, *, is_gelu: bool) -> None:
        self.is_gelu = is_gelu
        self.layers = [
            (
                w,
                Linear(w.qkv, w.qkv_bias),
                Linear(w.out, w.out_bias),
                Linear(w.up, w.up_bias),
                Linear(w.down, w.down_bias),
            )
            for w in layers
        ]
        self.last_norm = RmsNorm(last_norm)

    def __call__(self, x: Tensor, attend: Attention) -> Tensor:
        """x: (R, C) -> (R, C)."""
        width = x.shape[-1:]
        for i, (w, qkv, out, up, down) in enumerate(self.layers):
            x = out.onto(x, attend(i, qkv(F.layer_norm(x, width, w.norm_in, w.norm_in_bias))))
            hidden = up(F.layer_norm(x, width, w.norm_mlp, w.norm_mlp_bias))
            x = down.onto(x, F.gelu(hidden) if self.is_gelu else hidden.relu_().square_())
        return self.last_norm(x)
