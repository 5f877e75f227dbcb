"""Sequential decoding of one block with few operations: the fast twin of `AffineBlock.predict` for single latents.

What does not depend on the latents (rotations, positions, noise level, masks) is computed once, keys and values of a
layer stand in one buffer that each step writes in place, and queries, keys and values turn in one multiplication. It
computes what `predict` computes, up to rounding. Not for gradients, half precision or autocast: `predict` takes those.
Letters: B batch, N latents, D latent dim, C width, H heads, K head dim, P prefix slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow2.flow.affine import Affine
from starflow2.nn import attention, axial_angles

if TYPE_CHECKING:
    from starflow2.flow.block import AffineBlock, Run

__all__ = ["Stepper"]


class Stepper:
    """Gaussians of latents in order, one at a time, for `solve`: a call with targets (n, n + 1) follows n - 1.

    Target 0 is predicted by the block itself, which reads the prefix; later ones read the keys and values kept here.
    """

    def __init__(self, block: AffineBlock, run: Run) -> None:
        """run: begun with a cache, for one batch."""
        self.block, self.run = block, run
        self.kept = list[Tensor]()  # per layer (B, 2, H, P + N, K), keys and values

    @staticmethod
    def fits(block: AffineBlock) -> bool:
        """True if the block computes in float32 or float64 here."""
        weight = block.head.weight
        return weight.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(weight.device.type)

    def __call__(self, buffer: Tensor, targets: tuple[int, int]) -> Affine:
        """Gaussians (B, 1, D) of one target from the latents before it, as `AffineBlock.predict` gives them."""
        first, _ = targets
        if first:
            return self.block.affine(self._read(buffer, first))
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
        self.kept = [weight.new_empty(shape) for _ in range(stack.depth)]
        if self.run.cache is None or not prefix.length:
            return
        state = self.run.cache.state()
        for i, kept in enumerate(self.kept):
            kept[:, :, :, : prefix.length] = torch.stack([state[f"{i}.k"], state[f"{i}.v"]], dim=1)

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
        """Body output (B, 1, C) at the slot of a target that is not the first."""
        block, end = self.block, self.run.prefix.length + target
        x = buffer[:, target - 1]
        if block.cfg.stencil:
            x = torch.cat([x, buffer[:, block.above[target]].flatten(1)], dim=-1)
        h = block.proj_in(x.to(block.proj_in.weight.dtype)) + self.added[target - 1]  # (B, C)
        mask = None if self.mask is None else self.mask[..., :end]
        layers: list[Any] = list(block.body.layers)
        for layer, kept in zip(layers, self.kept, strict=True):
            h = h + self._attend(layer.attention, h, kept, target, mask)
            h = h + layer.mlp(h)
        return block.body.final_norm(h).unsqueeze(1)

    def _attend(self, module: Any, h: Tensor, kept: Tensor, target: int, mask: Tensor | None) -> Tensor:
        """Attention of one layer from the slot of `target` to itself and all before it: (B, C) -> (B, C)."""
        batch, width = h.shape
        _, _, heads, _, size = kept.shape
        end = self.run.prefix.length + target
        qkv = module.qkv(module.norm(h)).view(batch, 3, heads, size)
        if self.rotations is not None:
            pairs = torch.view_as_complex(qkv.unflatten(-1, (-1, 2)))
            qkv = torch.view_as_real(pairs * self.rotations[target - 1]).flatten(-2)
        kept[:, :, :, end - 1] = qkv[:, 1:]
        keys, values = kept[:, :, :, :end].unbind(1)  # 2 x (B, H, T, K)
        out = attention(qkv[:, 0].unsqueeze(2), keys, values, mask)  # (B, H, 1, K)
        return module.proj(out.reshape(batch, width))
