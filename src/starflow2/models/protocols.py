"""The plugs: language stream, vision tower, feature extractor and codec, so that any backbone can stand behind them.

Letters: B batch, T positions, N latents or patches, D latent dim, E language width, F feature dim, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

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

    @property
    def dim(self) -> int: ...

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def image_size(self) -> int: ...

    @property
    def encoder(self) -> nn.Module:
        """The module that runs once whenever images are encoded, for hooks that count it."""
        ...

    @property
    def extractor(self) -> FeatureExtractor | None:
        """Frozen features that it reads, None where it reads pixels."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """images: (B, 3, height, width) in [-1, 1] -> latents (B, N, D), unit variance per channel."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, N, D), clean or at a noise level it was trained for -> images in [-1, 1]."""
        ...
