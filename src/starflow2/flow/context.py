"""Conditions of a flow: the states that precede the latents, and classifier-free guidance between two of them.

Letters: B batch, T context positions, E width of context states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starflow2.flow.affine import Guidance, Schedule
from starflow2.nn import check

__all__ = ["Context", "Guide"]


@dataclass(frozen=True, slots=True)
class Context:
    """States before the latents. states: (B, T, E); the rest has defaults.

    positions: (B, T, 3), default (0, 0, index). attend: (B, T) bool, False at padding; the last
    position must be real. step: (B,) third coordinate of the latents, default that of the last state.
    """

    states: Tensor
    positions: Tensor | None = None
    attend: Tensor | None = None
    step: Tensor | None = None

    def resolved_positions(self) -> Tensor:
        """positions, or their default: (B, T, 3)."""
        if self.positions is not None:
            return self.positions
        batch, length, _ = self.states.shape
        index = torch.arange(length, device=self.states.device).float()
        zeros = torch.zeros_like(index)
        return torch.stack([zeros, zeros, index], dim=-1).expand(batch, -1, -1)

    def resolved_step(self) -> Tensor:
        """step, or its default: (B,)."""
        return self.resolved_positions()[:, -1, 2] if self.step is None else self.step

    def joined(self, other: Context) -> Context:
        """Both contexts as one doubled batch, `self` first. Raises ShapeError unless their states have one shape."""
        check(self.states, "B T E", "context.states")
        batch, length, width = self.states.shape
        check(other.states, "B T E", "unconditional.states", B=batch, T=length, E=width)
        pairs = (
            (self.states, other.states),
            (self.resolved_positions(), other.resolved_positions()),
            (self._attend(), other._attend()),
            (self.resolved_step(), other.resolved_step()),
        )
        return Context(*(torch.cat(pair) for pair in pairs))

    def _attend(self) -> Tensor:
        if self.attend is not None:
            return self.attend
        return torch.ones(self.states.shape[:2], dtype=torch.bool, device=self.states.device)


@dataclass(frozen=True, slots=True)
class Guide:
    """Classifier-free guidance of an inverse: the unconditional context, the strength, its schedule and the rule."""

    unconditional: Context
    guidance: float
    rule: Guidance = "starflow"
    schedule: Schedule = "constant"
