"""The plugs: what a codec and a feature extractor must offer, so that any backbone can stand behind them.

Letters: B batch, N latents or patches, D latent dim, F feature dim.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from starflow2.nn import Cache

__all__ = ["Codec", "FeatureExtractor", "LanguageStream"]


@runtime_checkable
class LanguageStream(Protocol):
    """A frozen causal language model, taken apart (Qwen2.5-VL in the paper). E is its width, V its vocabulary."""

    @property
    def width(self) -> int: ...

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, E)."""
        ...

    def states(
        self, embeds: Tensor, positions: Tensor, cache: Cache | None = None, attend: Tensor | None = None
    ) -> Tensor:
        """Last hidden states (B, T, E), those that `logits` takes. positions: (3, B, T); attend as in `CausalStack`."""
        ...

    def new_cache(self) -> Cache:
        """An empty cache, which `states` lets grow by T positions."""
        ...

    def logits(self, h: Tensor) -> Tensor:
        """(..., E) -> (..., V)."""
        ...


@runtime_checkable
class FeatureExtractor(Protocol):
    """Frozen patch features of pictures (DINOv2 in the paper)."""

    feature_dim: int
    grid: tuple[int, int]

    def features(self, images: Tensor) -> Tensor:
        """images: (B, 3, height, width) in [-1, 1] -> (B, N, F), N = grid rows * columns."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Pictures to standardised latents and back."""

    dim: int
    grid: tuple[int, int]
    image_size: int

    def encode(self, images: Tensor) -> Tensor:
        """images: (B, 3, height, width) in [-1, 1] -> latents (B, N, D), unit variance per channel."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, N, D), clean or at a noise level it was trained for -> images in [-1, 1]."""
        ...
