"""The affine step: the only home of its sign, its exponential and its guidance formulas.

z = (u - mu) * exp(-log_scale) and back (paper eq. 2.2). Letters: B batch, N latents, D latent dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow2.core.fields import Weight, conform
from starflow2.nn import at_least_fp32

__all__ = ["Affine", "Guidance", "Scale", "Schedule", "soft_clip", "standard_normal_log_prob", "strengths"]

Scale = Literal["exp", "softplus"]
Guidance = Literal["starflow", "tarflow"]
Schedule = Literal["constant", "linear"]
Strength = TypeVar("Strength", float, Tensor)
SOFTPLUS_SHIFT = 0.541324854612918  # softplus(shift) = 1, so a raw output of 0 is the identity


def soft_clip(x: Tensor, bound: float) -> Tensor:
    """Squash x smoothly into (-bound, bound); bound 0 leaves it unchanged (STARFlow 3.2)."""
    return bound * torch.tanh(x / bound) if bound else x


def strengths(guidance: Strength, schedule: Schedule, index: Tensor, count: int) -> Strength | Tensor:
    """Guidance strength at latents `index` of `count`: constant, or rising linearly from 0 at the first latent to
    `guidance` at the last (TARFlow's annealed guidance; docs/choices.md#guidance)."""
    return guidance if schedule == "constant" else guidance * index / max(1, count - 1)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) summed over all but the first axis: (B, ...) -> (B,) nats."""
    z = at_least_fp32(z)
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)


@dataclass(frozen=True, slots=True)
class Affine:
    """A predicted Gaussian per latent: mean `mu` and `log_scale`, both (B, N, D) float32 or better."""

    mu: Tensor
    log_scale: Tensor

    @classmethod
    def from_raw(cls, raw: Tensor, scale: Scale = "exp") -> Affine:
        """Gaussians of head outputs (B, N, 2D), scale first, then mean, already clipped, in any precision."""
        raw_scale, mu = at_least_fp32(raw).chunk(2, dim=-1)
        return cls.from_halves(raw_scale, mu, scale)

    @classmethod
    def from_halves(cls, raw_scale: Tensor, mu: Tensor, scale: Scale = "exp") -> Affine:
        """`from_raw` of both halves of head outputs, each (B, N, D) in float32 or better."""
        return cls(mu, raw_scale if scale == "exp" else F.softplus(raw_scale + SOFTPLUS_SHIFT).log())

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def normalize(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u -> (z, logdet): data to prior; logdet (B,) nats = log|dz/du|."""
        z = (at_least_fp32(u) - self.mu) * torch.exp(-self.log_scale)
        return z, -self.log_scale.flatten(1).sum(1)

    def denormalize(self, z: Tensor) -> Tensor:
        """z -> u, the inverse of `normalize` (paper eq. 3.5)."""
        return self.mu + torch.exp(self.log_scale) * z

    def log_prob(self, u: Tensor) -> Tensor:
        """log N(u; mu, scale^2) per latent: (B, N) nats, constant included."""
        z = (at_least_fp32(u) - self.mu) * torch.exp(-self.log_scale)
        return -(0.5 * z.square() + self.log_scale + 0.5 * math.log(2 * math.pi)).sum(-1)

    def chunk(self, chunks: int) -> tuple[Affine, ...]:
        """Parts of equal size along the batch axis."""
        return tuple(map(Affine, self.mu.chunk(chunks), self.log_scale.chunk(chunks)))

    def kl(self, other: Affine) -> Tensor:
        """KL(self | other) of each channel, (B, N, D) nats: the cost of predicting `other` where `self` is right."""
        log_ratio = self.log_scale - other.log_scale
        distance = (self.mu - other.mu) * torch.exp(-other.log_scale)
        return 0.5 * (torch.exp(2 * log_ratio) + distance.square() - 1) - log_ratio

    def guide(self, unconditional: Affine, guidance: float | Tensor, rule: Guidance = "starflow") -> Affine:
        """Apply classifier-free guidance; guidance 0 returns `self` unchanged. A tensor broadcasts over mu.

        "starflow": p_c^(1+g) / p_u^g with the variance ratio clipped to at most 1, so that
        guidance never widens (STARFlow prop. 2). "tarflow": both parameters extrapolated.
        """
        conform(Guidance, rule, "rule")
        if not isinstance(guidance, Tensor):
            conform(Weight, guidance, "guidance")
            if guidance == 0:
                return self
        if rule == "tarflow":
            mu = self.mu + guidance * (self.mu - unconditional.mu)
            log_scale = self.log_scale + guidance * (self.log_scale - unconditional.log_scale)
            return Affine(mu, log_scale)
        ratio = torch.exp(2 * (self.log_scale - unconditional.log_scale)).clamp(max=1.0)
        own, other = 1 + guidance, guidance * ratio
        precision = own - other
        mu = (own * self.mu - other * unconditional.mu) / precision
        return Affine(mu, self.log_scale - 0.5 * precision.log())
