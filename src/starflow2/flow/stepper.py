"""Sequential decoding of one block with few operations: the fast twin of `AffineBlock.predict` for single latents.

What does not depend on the latents (rotations, positions, noise level) is computed once, keys and values of a layer
stand in one buffer that each step writes in place and reads behind a mask, queries, keys and values turn in one
multiplication, biases and the last norm are folded into products, and modules without hooks or adapters are called as
the functions that they are. It computes what `predict` computes, up to
rounding. Not for gradients, half precision or autocast: `predict` takes those.
Letters: B batch, N latents, D latent dim, C width, H heads, K head dim, P prefix slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.flow.affine import Affine, soft_clip
from starflow2.nn import FinalNorm, axial_angles

if TYPE_CHECKING:
    from starflow2.flow.block import AffineBlock, Run

__all__ = ["Stepper"]

Function = Callable[[Tensor], Tensor]
Adder = Callable[[Tensor, Tensor], Tensor]
WINDOW = 32  # keys that a step may read in vain: their number grows by as many at a time, so that views last


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True for a module of exactly this class that nobody has hooked into."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks


def _linear(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Bias and transposed weight (in, out) of a plain linear layer with a bias; None for any other module."""
    if not _is_plain(module, nn.Linear):
        return None
    bias, weight = module.bias, module.weight
    return (bias, weight.t()) if isinstance(bias, Tensor) and isinstance(weight, Tensor) else None


def _function(module: nn.Module) -> Function:
    """A module as a function of (B, C), without the costs of a module where it has neither hooks nor another class."""
    if (parts := _linear(module)) is not None:
        bias, weight = parts
        return lambda x: torch.addmm(bias, x, weight)
    if isinstance(module, nn.LayerNorm) and _is_plain(module, nn.LayerNorm):
        shape, gain, shift, eps = module.normalized_shape, module.weight, module.bias, module.eps
        return lambda x: torch.layer_norm(x, shape, gain, shift, eps)
    return module


def _writer(module: nn.Module, target: Tensor) -> Callable[[Tensor], object]:
    """A module as a function of (B, C) that writes what it gives into `target`."""
    if (parts := _linear(module)) is not None:
        bias, weight = parts
        return lambda x: torch.addmm(bias, x, weight, out=target)
    return lambda x: target.copy_(module(x))


def _adder(module: nn.Module) -> Adder:
    """A module as a function (h, x) -> h + module(x)."""
    if (parts := _linear(module)) is not None:
        bias, weight = parts
        return lambda h, x: torch.addmm(h, x, weight).add_(bias)
    return lambda h, x: h + module(x)


class _Layer:
    """One layer of the stack at single positions, with the keys (B H, K, P + N) and values (B H, P + N, K) of all.

    Attention is two products: for one query torch's fused kernel takes longer on CPUs.
    """

    def __init__(self, layer: Any, batch: int, total: int, like: Tensor) -> None:
        attention, mlp = layer.attention, layer.mlp
        heads, size = attention.heads, attention.head_dim
        line = like.new_empty(batch, 3 * heads * size)  # queries, keys and values of the position
        self.line, self.scale = line.view(batch, 3, heads, size), 1 / math.sqrt(size)
        self.sources = self.line.unbind(1)  # 3 x (B, H, K)
        query = like.new_empty(batch, heads, size)
        keys, values = like.new_zeros(batch, heads, size, total), like.new_zeros(batch, heads, total, size)
        self.targets = query, keys.unbind(3), values.unbind(2)
        self.query, self.keys, self.values = query.view(-1, 1, size), keys.flatten(0, 1), values.flatten(0, 1)
        self.norm, self.qkv, self.proj = (
            _function(attention.norm),
            _writer(attention.qkv, line),
            _adder(attention.proj),
        )
        is_plain = mlp.is_gelu and _is_plain(mlp, type(mlp))
        self.mlp: Function = self._gelu_mlp if is_plain else lambda h: h + mlp(h)
        if is_plain:
            self.mlp_norm, self.up, self.down = _function(mlp.norm), _function(mlp.up), _adder(mlp.down)
        self.see(0)

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Take over keys and values (B, H, P, K) of the first positions."""
        count = keys.shape[2]
        self.keys[:, :, :count] = keys.flatten(0, 1).transpose(1, 2)
        self.values[:, :count] = values.flatten(0, 1)

    def see(self, count: int) -> None:
        """Let the next steps read the first `count` keys and values."""
        self.seen_keys, self.seen_values = self.keys.narrow(2, 0, count), self.values.narrow(1, 0, count)

    def _gelu_mlp(self, h: Tensor) -> Tensor:
        return self.down(h, F.gelu(self.up(self.mlp_norm(h))))

    def __call__(self, h: Tensor, end: int, turn: Tensor | None, mask: Tensor) -> Tensor:
        """States (B, C) after this layer of position `end` - 1, which reads what `mask` lets it see."""
        self.qkv(self.norm(h))
        if turn is not None:
            pairs = torch.view_as_complex(self.line.unflatten(-1, (-1, 2)))
            self.line.copy_(torch.view_as_real(pairs * turn).flatten(-2))
        query, keys, values = self.targets
        query.copy_(self.sources[0])
        keys[end - 1].copy_(self.sources[1])
        values[end - 1].copy_(self.sources[2])
        scores = torch.baddbmm(mask, self.query, self.seen_keys, alpha=self.scale)  # (B H, 1, T)
        out = torch.bmm(torch.softmax(scores, -1), self.seen_values)
        return self.mlp(self.proj(h, out.view(h.shape)))


class _Head:
    """The last norm and the head, folded into one product: body states (B, C) -> soft-clipped halves of Gaussians."""

    def __init__(self, block: AffineBlock) -> None:
        norm, head, self.cfg = block.body.final_norm, block.head, block.cfg
        self.plain: Function | None = None
        if not (isinstance(norm, FinalNorm) and _is_plain(norm, FinalNorm) and _is_plain(head, nn.Linear)):
            first, then = _function(norm), _function(head)
            self.plain = lambda h: then(first(h))
            return
        width, scales = head.in_features, head.weight.new_ones(head.out_features, 1)
        scales[: head.out_features // (1 if self.cfg.clips_mean else 2)] = 1 / (self.cfg.clip or 1.0)
        # x / rms(x) = sqrt(C) x / hypot(|x|, sqrt(C eps)); what is clipped is divided by the bound beforehand
        self.weight = (math.sqrt(width) * scales * head.weight * (1 + norm.weight)).t()  # (C, 2 D)
        self.bias = scales[:, 0] * head.bias
        self.floor, self.bound = (head.weight.new_tensor(x) for x in (math.sqrt(width * 1e-6), self.cfg.clip))

    def __call__(self, h: Tensor) -> Affine:
        """Gaussians (B, 1, D), as `AffineBlock.affine` makes them."""
        cfg = self.cfg
        if self.plain is not None:
            raw_scale, mu = self.plain(h).unsqueeze(1).chunk(2, dim=-1)
            mu = soft_clip(mu, cfg.clip) if cfg.clips_mean else mu
            return Affine.from_halves(soft_clip(raw_scale, cfg.clip), mu, cfg.scale)
        length = torch.linalg.vector_norm(h, dim=1, keepdim=True)
        raw = torch.addcdiv(self.bias, torch.mm(h, self.weight), torch.hypot(length, self.floor)).unsqueeze(1)
        clipped = torch.tanh(raw).mul_(self.bound) if cfg.clip else raw  # of both halves: tanh of a half takes longer
        dim = cfg.dim
        mu = (clipped if cfg.clips_mean else raw).narrow(2, dim, dim)
        return Affine.from_halves(clipped.narrow(2, 0, dim), mu, cfg.scale)


class Stepper:
    """Gaussians of latents in order, one at a time, for `solve`: a call with targets (n, n + 1) follows n - 1.

    Target 0 is predicted by the block itself, which reads the prefix; later ones read the keys and values kept here.
    """

    def __init__(self, block: AffineBlock, run: Run) -> None:
        """run: begun with a cache, for one batch."""
        self.block, self.run = block, run
        self.layers = list[_Layer]()

    @staticmethod
    def fits(block: AffineBlock) -> bool:
        """True if the block computes in float32 or float64 here."""
        weight = block.head.weight
        casts = weight.device.type != "meta" and torch.is_autocast_enabled(weight.device.type)
        return weight.dtype in (torch.float32, torch.float64) and not casts

    def __call__(self, buffer: Tensor, targets: tuple[int, int]) -> Affine:
        """Gaussians (B, 1, D) of one target from the latents before it, as `AffineBlock.predict` gives them."""
        first, _ = targets
        if first:
            return self.head(self._read(buffer, first))
        affine = self.block.predict(buffer, targets, self.run)
        self._prepare(len(buffer))
        return affine

    def _prepare(self, batch: int) -> None:
        """Compute what every step needs, and take over the keys and values of the prefix."""
        block, prefix = self.block, self.run.prefix
        count, shift, total = block.cfg.num_latents, prefix.shift, prefix.length + block.cfg.num_latents
        weight, stack = block.head.weight, block.cfg.stack
        projection = _linear(block.proj_in)
        added = self._added(batch)
        self.project = None if projection is None else projection[1]
        self.added = (added if projection is None else added + projection[0]).unbind(0)
        self.rotations = self._rotations(block.slot_positions(prefix.step, 1 - shift, count - shift))
        seen = weight.new_zeros(1, prefix.length) if prefix.attend is None else _added_to_scores(prefix.attend, weight)
        seen = seen.repeat_interleave(stack.heads if len(seen) > 1 else 1, 0)
        self.mask = F.pad(seen, (0, count), value=-math.inf).unsqueeze(1)  # (B H or 1, 1, P + N), added to scores
        self.opens, self.window, self.visible = self.mask.unbind(2), self.mask[..., :0], 0
        layers: list[Any] = list(block.body.layers)
        self.layers = [_Layer(layer, batch, total, weight) for layer in layers]
        self.head = _Head(block)
        if self.run.cache is None or not prefix.length:
            return
        state = self.run.cache.state()
        for i, layer in enumerate(self.layers):
            layer.fill(state[f"{i}.k"], state[f"{i}.v"])

    def _added(self, batch: int) -> Tensor:
        """Learned position and noise level, added to the slot of each target from 1 on: (N - 1, B or 1, C)."""
        block, shift = self.block, self.run.prefix.shift
        count = block.cfg.num_latents
        added = block.head.weight.new_zeros(count - 1, 1, block.cfg.stack.width)
        if block.cfg.learned_positions:
            added = added + block.position_table[1 - shift : count - shift].unsqueeze(1)
        return added if self.run.noise is None else added + self.run.noise.transpose(0, 1)

    def _rotations(self, positions: Tensor) -> Tensor | None:
        """Factors of queries, keys and values, one for values: (N - 1, B, 3, 1, K / 2) complex."""
        stack = self.block.cfg.stack
        if not stack.rope:
            return None
        angles = axial_angles(positions, stack.head_dim).transpose(0, 1)[:, :, None, None]  # (N - 1, B, 1, 1, K / 2)
        dtype = self.block.head.weight.dtype
        turn = torch.complex(angles.cos().to(dtype), angles.sin().to(dtype))
        return torch.cat([turn, turn, torch.ones_like(turn)], dim=2)

    def _read(self, buffer: Tensor, target: int) -> Tensor:
        """Body states (B, C), before the last norm, at the slot of a target that is not the first."""
        end = self.run.prefix.length + target
        if end > self.visible:
            self._see(end)
        self.opens[end - 1].zero_()
        h, turn = self._embedded(buffer, target), None if self.rotations is None else self.rotations[target - 1]
        for layer in self.layers:
            h = layer(h, end, turn, self.window)
        return h

    def _see(self, end: int) -> None:
        """Let steps from `end` on read one window more of keys and values."""
        self.visible = min(-(-end // WINDOW) * WINDOW, self.mask.shape[2])
        self.window = self.mask[..., : self.visible]
        for layer in self.layers:
            layer.see(self.visible)

    def _embedded(self, buffer: Tensor, target: int) -> Tensor:
        """The slot of a target, (B, C): the latent before it, with those above it, position and noise level."""
        block, x = self.block, buffer.select(1, target - 1)
        if block.cfg.stencil:
            x = torch.cat([x, buffer.index_select(1, block.above[target]).flatten(1)], dim=-1)
        x, added = x.to(block.proj_in.weight.dtype), self.added[target - 1]
        if self.project is None:
            return block.proj_in(x) + added
        if len(self.project) == 1:  # one channel: no product of matrices
            return torch.addcmul(added, x, self.project)
        return torch.addmm(added, x, self.project)


def _added_to_scores(attend: Tensor, like: Tensor) -> Tensor:
    """A mask (B, P), True where a query may look, as numbers to add to scores: 0, or minus infinity."""
    return torch.zeros(attend.shape, dtype=like.dtype, device=like.device).masked_fill_(~attend, -math.inf)
