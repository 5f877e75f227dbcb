"""Conditions of a flow: the states that precede the latents, and classifier-free guidance between two of them.

Letters: B batch, T context positions, E width of context states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starflow2.core.fields import Weight, conform
from starflow2.errors import ShapeError
from starflow2.flow.affine import Guidance, Schedule
from starflow2.nn import check, check_floating, is_readable

__all__ = ["Context", "Guide"]


@dataclass(frozen=True, slots=True)
class Context:
    """States before the latents. states: (B, T, E); the rest has defaults.

    positions: (B, T, 3), default (0, 0, index). attend: (B, T) bool, False at padding; the last
    position must be real. step: (B,) third coordinate of the latents, default that of the last state, 0 without
    one: T = 0 says that there is no condition, where a block takes one.
    """

    states: Tensor
    positions: Tensor | None = None
    attend: Tensor | None = None
    step: Tensor | None = None

    def check(self, batch: int, width: int) -> None:
        """Raise ShapeError unless this is a context of `batch` rows of `width` channels."""
        check(self.states, "B T E", "context.states", B=batch, E=width)
        check_floating(self.states, "context.states")
        length = self.states.shape[1]
        if self.positions is not None:
            check(self.positions, "B T 3", "context.positions", B=batch, T=length, **{"3": 3})
        if self.step is not None:
            check(self.step, "B", "context.step", B=batch)
        if self.attend is not None:
            self._check_attend(self.attend, batch, length)

    @staticmethod
    def _check_attend(attend: Tensor, batch: int, length: int) -> None:
        check(attend, "B T", "context.attend", B=batch, T=length)
        if attend.dtype != torch.bool:
            raise ShapeError(f"context.attend has dtype {attend.dtype}; expected torch.bool, True at real states.")
        if length and is_readable(attend) and not bool(attend[:, -1].all()):
            raise ShapeError(
                "context.attend is False at the last state of a row; expected padding on the left, "
                "since the last state predicts the first latent."
            )

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
        if self.step is not None:
            return self.step
        if not self.states.shape[1]:
            return self.states.new_zeros(len(self.states))
        return self.resolved_positions()[:, -1, 2]

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

    def __post_init__(self) -> None:
        for name, kind in (("guidance", Weight), ("rule", Guidance), ("schedule", Schedule)):
            conform(kind, getattr(self, name), name)
