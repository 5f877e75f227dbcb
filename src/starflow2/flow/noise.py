"""Multi-noise training: levels, loss weight, embedding of a level (iTARFlow 3; paper section 3.3).

A noise level is the standard deviation of Gaussian noise on standardised latents.
Letters: B batch, C width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from starflow2.core.fields import Config, Share
from starflow2.errors import ConfigError

__all__ = ["NoiseConfig", "NoiseEmbedding", "NoiseWeight", "add_noise"]

NoiseWeight = Literal["level", "one"]


@dataclass(frozen=True, kw_only=True)
class NoiseConfig(Config):
    """Noise levels of training: uniform on [noise_min, noise_max], some of them exactly noise_max.

    Images are sampled at noise_max, so a small model gains from training on that level more often
    (our choice: docs/choices.md#noise-levels); max_share 0 is the plain uniform distribution.
    """

    noise_min: float = 0.01
    noise_max: float = 0.5
    max_share: Share = 0.0  # probability of drawing exactly noise_max
    weight: NoiseWeight = "level"  # loss weight: the level itself, or 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.noise_min <= self.noise_max:
            raise ConfigError(
                f"noise_min {self.noise_min} and noise_max {self.noise_max}: expected 0 < noise_min <= noise_max."
            )

    def sample_levels(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Random levels, (count,) float32."""
        uniform = torch.rand(2, count, generator=generator)
        level = self.noise_min + (self.noise_max - self.noise_min) * uniform[0]
        return torch.where(uniform[1] < self.max_share, self.noise_max, level)

    def loss_weight(self, noise_level: Tensor) -> Tensor:
        """Weight of each sample's NLL, (B,); "level" equalises gradients, which scale like 1 / level."""
        return noise_level if self.weight == "level" else torch.ones_like(noise_level)

    @property
    def mean_log_level(self) -> float:
        """E[ln level]; 1.419 plus this is a lower bound of the held-out NLL in nats per dimension."""
        low, high = self.noise_min, self.noise_max
        if low == high:
            return math.log(high)
        uniform = (high * math.log(high) - low * math.log(low)) / (high - low) - 1
        return self.max_share * math.log(high) + (1 - self.max_share) * uniform


def add_noise(x: Tensor, noise_level: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x + noise_level * eps; x: (B, N, D), noise_level: (B,)."""
    eps = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return x + noise_level.to(x)[:, None, None] * eps.to(x.device)


class NoiseEmbedding(nn.Module):
    """Embed noise levels, (B,) -> (B, C): `waves` sines and cosines of the log level, then a two-layer MLP.

    waves 0: as many as the width (iTARFlow); fewer keep the MLP of a wide stream small.
    """

    def __init__(self, width: int, waves: int = 0) -> None:
        super().__init__()
        self.waves = waves or width
        self.mlp = nn.Sequential(nn.Linear(self.waves, 4 * self.waves), nn.GELU(), nn.Linear(4 * self.waves, width))

    def forward(self, noise_level: Tensor) -> Tensor:
        half = self.waves // 2
        dtype = next(self.mlp.parameters()).dtype
        freqs = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=dtype, device=noise_level.device) / half)
        angles = noise_level.to(dtype).log()[:, None] * freqs  # (B, C / 2)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))
