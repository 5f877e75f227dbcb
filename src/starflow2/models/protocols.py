"""Protocols that backbones implement: language stream, feature extractor and codec.

The Pretzel, the decoder and training use only these, so that another language model or codec can take their place.

Letters: B batch, T positions, N latents or patches, D latent dim, E language width, F feature dim, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from starflow2.nn import Cache

__all__ = ["Codec", "FeatureExtractor", "LanguageStream"]


@runtime_checkable
class LanguageStream(Protocol):
    """A frozen causal language model in three steps: embed, states, logits (Qwen2.5-VL in the paper)."""

    @property
    def width(self) -> int: ...

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, E)."""
        ...

    def states(self, embeds: Tensor, positions: Tensor, cache: Cache | None = None, attend: Any = None) -> Tensor:
        """Last hidden states (B, T, E), the input of `logits`. positions: (3, B, T); attend: as in `CausalStack`.

        Documents (`nn.ByDocument`) are passed to a class whose `attends_by_document` is True, and to no other.
        """
        ...

    def new_cache(self) -> Cache:
        """An empty cache; each call of `states` appends T positions to it."""
        ...

    def logits(self, h: Tensor) -> Tensor:
        """(..., E) -> (..., V)."""
        ...


@runtime_checkable
class FeatureExtractor(Protocol):
    """Frozen patch features of images (DINOv2 in the paper)."""

    feature_dim: int
    grid: tuple[int, int]

    def features(self, images: Tensor) -> Tensor:
        """images: (B, 3, height, width) in [-1, 1] -> (B, N, F), N = grid rows * columns."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Images to standardised latents and back."""

    @property
    def dim(self) -> int: ...

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def image_size(self) -> int: ...

    @property
    def encoder(self) -> nn.Module:
        """Module that runs once per `encode`, for hooks that count calls."""
        ...

    @property
    def extractor(self) -> FeatureExtractor | None:
        """The feature extractor that it reads, None if it reads pixels."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """images: (B, 3, height, width) in [-1, 1] -> latents (B, N, D), unit variance per channel."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, N, D), clean or at a noise level of its training -> images in [-1, 1]."""
        ...
