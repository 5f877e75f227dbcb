"""Events of decoding: those of one row of a batch, and those that a conversation yields to its user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from starflow2.core.images import PILImage
from starflow2.errors import StarFlowError

__all__ = [
    "Begun",
    "Completed",
    "DecodedImage",
    "DrawnImage",
    "Drew",
    "Ended",
    "Event",
    "Failed",
    "Finished",
    "Made",
    "RowEvent",
    "Sampled",
    "Started",
    "Stepped",
    "Token",
    "Wrote",
]


@dataclass(frozen=True, slots=True)
class Token:
    """A token of text."""

    row: int
    id: int


@dataclass(frozen=True, slots=True)
class Begun:
    """An image has begun."""

    row: int


@dataclass(frozen=True, slots=True)
class Stepped:
    """`done` of `total` latents of an image."""

    row: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class DrawnImage:
    """An image as the latents u (N, D) that were drawn, without pixels yet; nats as in `DecodedImage`."""

    u: Tensor
    log_prob: float
    unconditional_log_prob: float | None


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image as pixels and as latents, with its log density while it was drawn.

    x: (N, D) latents at their noise level; u: (N, D) what the cache holds; image: (3, height, width) in [-1, 1].
    log_prob, unconditional_log_prob: nats of u under both branches, None where the image was not drawn; the second
    also where it was not guided.
    """

    x: Tensor
    u: Tensor
    noise_level: float
    image: Tensor
    log_prob: float | None = None
    unconditional_log_prob: float | None = None


@dataclass(frozen=True, slots=True)
class Completed:
    """An image is complete."""

    row: int
    picture: DecodedImage


@dataclass(frozen=True, slots=True)
class Sampled:
    """All latents of an image are drawn; pixels were not asked for, and `Engine.with_pixels` makes them."""

    row: int
    picture: DrawnImage


@dataclass(frozen=True, slots=True)
class Ended:
    """The reply is over: the model ended it, or a limit did."""

    row: int
    reason: Literal["end", "limit"]


@dataclass(frozen=True, slots=True)
class Failed:
    """The reply cannot go on and was taken back; the row is as it was before, and others go on."""

    row: int
    error: StarFlowError


RowEvent = Token | Begun | Stepped | Completed | Sampled | Ended | Failed


@dataclass(frozen=True, slots=True)
class Wrote:
    """A piece of text, as it comes."""

    text: str


@dataclass(frozen=True, slots=True)
class Started:
    """The model begins something that takes a while."""

    modality: str


@dataclass(frozen=True, slots=True)
class Drew:
    """`done` of `total` latents of an image."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Made:
    """An image is complete: as a PIL image, and as the model holds it.

    confidence: with which the model confirms it, where it was chosen from several tries; seed: that of its try.
    """

    modality: str
    image: PILImage
    picture: DecodedImage
    confidence: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The reply is over: the model ended it, or a limit did."""

    reason: Literal["end", "limit"]


Event = Wrote | Started | Drew | Made | Finished
