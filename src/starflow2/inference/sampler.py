"""A model made ready for sampling: its settings, its precision, and where pictures start and enter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from starflow2.errors import ConfigError
from starflow2.inference.config import DrawConfig
from starflow2.models.components import Components
from starflow2.models.sequence import Layout
from starflow2.nn import check, raw_bytes

__all__ = [
    "Sampler",
]


class Sampler:
    """A model made ready for sampling: on CPU a float64 twin of both streams (docs/choices.md#sampling-in-float64)."""

    def __init__(self, components: Components, config: DrawConfig | None = None) -> None:
        self.components = components
        self.config = config or DrawConfig.for_model(components)
        if self.config.cleanup != "none":
            raise ConfigError(
                f"cleanup is {self.config.cleanup!r}; conversations take 'none': their cache is the sample."
            )
        asked = self.config.precision
        doubles = components.device.type == "cpu" if asked == "auto" else asked == "float64"
        self.dtype = torch.float64 if doubles else components.flow.deep.head.weight.dtype
        self.pretzel = components.pretzel.in_float64() if doubles else components.pretzel

    def prior(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Where a picture starts, at the temperature that is set: z of `shape`, (N, D)."""
        return self.config.prior_scale * torch.randn(tuple(shape), generator=generator)

    def noisy(self, images: Tensor, levels: Tensor) -> Tensor:
        """Latents (P, N, D) of pictures from outside (P, 3, s, s) at their levels (P,).

        Their noise is that of seed 0 for each, so that no picture depends on where it stands or what stands beside it.
        """
        levels = levels.to(self.components.device, self.dtype)
        x = self.components.codec.encode(images.to(levels.device)).to(self.dtype)
        eps = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0))
        return x + levels[:, None, None] * eps.to(x)

    def changed(self, **settings: Any) -> Sampler:
        """The same with other settings of `DrawConfig`, all but precision; nothing is copied."""
        twin = copy.copy(self)
        twin.config = replace(self.config, **settings)
        return twin

    def with_code(self, z: Tensor) -> Sampler:
        """The same, but every picture starts from z (N, D), whatever the seed, without guidance: exact inversion.

        Raises ShapeError for any other shape.
        """
        deep = self.components.cfg.flow.deep
        check(z, "N D", "code", N=deep.num_latents, D=deep.dim)
        twin = self.changed(guidance=0.0, edit_guidance=None)
        twin.prior = lambda shape, generator: z  # type: ignore[method-assign]
        return twin

    @cached_property
    def fingerprint(self) -> str:
        """Tells models apart, and precisions: saved sessions fit only their own."""
        found = blake2b(str(self.dtype).encode(), digest_size=16)
        for module in (self.components.vlm, self.components.flow, self.components.joints):
            for value in module.state_dict().values():
                found.update(raw_bytes(value))
        return found.hexdigest()

    @property
    def layout(self) -> Layout:
        return self.components.layout

    @property
    def noise_level(self) -> float:
        """Level at which pictures are drawn."""
        noise = self.components.cfg.flow.noise
        assert noise is not None
        return noise.noise_max

    @property
    def upload_level(self) -> float:
        """Level at which pictures from outside enter."""
        noise = self.components.cfg.flow.noise
        assert noise is not None
        return noise.noise_min
