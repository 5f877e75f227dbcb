"""Sequential decoding of one block with few operations: the fast twin of `AffineBlock.predict` for single latents.

What does not depend on the latents (rotations, positions, noise level, masks) is computed once, keys and values of a
layer stand in one buffer that each step writes in place, queries, keys and values turn in one multiplication, and
modules without hooks or adapters are called as the functions that they are. It computes what `predict` computes, up to
rounding. Not for gradients, half precision or autocast: `predict` takes those.
Letters: B batch, N latents, D latent dim, C width, H heads, K head dim, P prefix slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.flow.affine import Affine, soft_clip
from starflow2.nn import FinalNorm, attention, axial_angles

if TYPE_CHECKING:
    from starflow2.flow.block import AffineBlock, Run

__all__ = ["Stepper"]

Function = Callable[[Tensor], Tensor]


def _function(module: nn.Module) -> Function:
    """A module as a function of (B, C), without the costs of a module where it has neither hooks nor another class."""
    if module._forward_hooks or module._forward_pre_hooks:
        return module
    if type(module) is nn.Linear and module.bias is not None:
        bias, weight = module.bias, module.weight.t()
        return lambda x: torch.addmm(bias, x, weight)
    if type(module) is nn.LayerNorm:
        shape, gain, shift, eps = module.normalized_shape, module.weight, module.bias, module.eps
        return lambda x: torch.layer_norm(x, shape, gain, shift, eps)
    if type(module) is FinalNorm:
        scale = 1 + module.weight
        return lambda x: torch.rms_norm(x, scale.shape, scale, 1e-6)
    return module


class _Layer:
    """One layer of the stack at single positions; `kept`: (B, 2, H, P + N, K), keys and values."""

    def __init__(self, layer: Any, kept: Tensor) -> None:
        self.kept = kept
        self.norm, self.qkv, self.proj = map(
            _function, (layer.attention.norm, layer.attention.qkv, layer.attention.proj)
        )
        mlp = layer.mlp
        is_plain = mlp.is_gelu and not mlp._forward_hooks and not mlp._forward_pre_hooks
        self.mlp = self._gelu_mlp if is_plain else mlp
        if is_plain:
            self.mlp_norm, self.up, self.down = map(_function, (mlp.norm, mlp.up, mlp.down))

    def _gelu_mlp(self, h: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.mlp_norm(h))))

    def __call__(self, h: Tensor, end: int, turn: Tensor | None, mask: Tensor | None) -> Tensor:
        """States (B, C) after this layer of position `end` - 1, which reads itself and all before it."""
        batch, width = h.shape
        _, _, heads, _, size = self.kept.shape
        qkv = self.qkv(self.norm(h)).view(batch, 3, heads, size)
        if turn is not None:
            pairs = torch.view_as_complex(qkv.unflatten(-1, (-1, 2)))
            qkv = torch.view_as_real(pairs * turn).flatten(-2)
        self.kept.select(3, end - 1).copy_(qkv[:, 1:])
        keys, values = self.kept.narrow(3, 0, end).unbind(1)  # 2 x (B, H, T, K)
        out = attention(qkv[:, 0].unsqueeze(2), keys, values, mask)  # (B, H, 1, K)
        h = h + self.proj(out.reshape(batch, width))
        return h + self.mlp(h)


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
            return self._affine(self._read(buffer, first))
        affine = self.block.predict(buffer, targets, self.run)
        self._prepare(len(buffer))
        return affine

    def _prepare(self, batch: int) -> None:
        """Compute what every step needs, and take over the keys and values of the prefix."""
        block, prefix = self.block, self.run.prefix
        count, shift = block.cfg.num_latents, prefix.shift
        self.added = self._added(batch)
        self.rotations = self._rotations(block.slot_positions(prefix.step, 1 - shift, count - shift))
        attend = prefix.attend
        self.mask = None if attend is None else F.pad(attend, (0, count), value=True)[:, None, None]  # (B, 1, 1, P + N)
        stack, weight = block.cfg.stack, block.head.weight
        shape = (batch, 2, stack.heads, prefix.length + count, stack.head_dim)
        layers: list[Any] = list(block.body.layers)
        self.layers = [_Layer(layer, weight.new_empty(shape)) for layer in layers]
        self.project, self.final_norm, self.head = map(_function, (block.proj_in, block.body.final_norm, block.head))
        if self.run.cache is None or not prefix.length:
            return
        state = self.run.cache.state()
        for i, layer in enumerate(self.layers):
            layer.kept[:, :, :, : prefix.length] = torch.stack([state[f"{i}.k"], state[f"{i}.v"]], dim=1)

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
        """Body output (B, C) at the slot of a target that is not the first."""
        block, end = self.block, self.run.prefix.length + target
        x = buffer[:, target - 1]
        if block.cfg.stencil:
            x = torch.cat([x, buffer[:, block.above[target]].flatten(1)], dim=-1)
        h = self.project(x.to(block.proj_in.weight.dtype)) + self.added[target - 1]  # (B, C)
        mask = None if self.mask is None else self.mask[..., :end]
        turn = None if self.rotations is None else self.rotations[target - 1]
        for layer in self.layers:
            h = layer(h, end, turn, mask)
        return self.final_norm(h)

    def _affine(self, h: Tensor) -> Affine:
        """`AffineBlock.affine` of one position: (B, C) -> Gaussians (B, 1, D)."""
        cfg = self.block.cfg
        raw_scale, mu = self.head(h).unsqueeze(1).chunk(2, dim=-1)
        mu = soft_clip(mu, cfg.clip) if cfg.clips_mean else mu
        return Affine.from_halves(soft_clip(raw_scale, cfg.clip), mu, cfg.scale)
