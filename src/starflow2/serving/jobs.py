"""Requests to a service and the events that answer them.

An `Ask` is one user turn after a past, and one reply to it; its events end with `Done`. A `ScoreAsk` ends with
`Scored`. Words and images in them are checked: `Service.checked` makes them from what a client sends. Not here: HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from starflow2.core.images import PILImage
from starflow2.inference.config import DrawConfig, ReplyLimits
from starflow2.inference.events import DecodedImage
from starflow2.inference.likelihood import Score
from starflow2.inference.reading import Part, PastTurn

__all__ = [
    "LOCAL",
    "Accepted",
    "Ask",
    "Done",
    "Draft",
    "Event",
    "Failed",
    "ImageBegun",
    "ImageDone",
    "Keep",
    "Mode",
    "Part",
    "PastTurn",
    "Progress",
    "ScoreAsk",
    "Scored",
    "TextDelta",
    "Usage",
    "count_images",
]

LOCAL = "local"  # the owner of everything where no key is asked for
Mode = Literal["auto", "text", "image"]
Keep = Literal["no", "memory", "stored"]


# -- requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A user's turn that is to be replied to.

    parts: words as the model reads them, and images (3, s, s) in [-1, 1]; empty words and no image: an empty turn.
    """

    parts: Sequence[Part]
    owner: str = LOCAL  # whose sessions it may continue, and who may continue it
    mode: Mode = "auto"  # auto: the model decides; text: words only; image: an image and nothing else
    limits: ReplyLimits = field(default_factory=ReplyLimits)
    seed: int = 0
    config: DrawConfig | None = None  # of this reply; None: the service's
    tries: int | None = 1  # replies made to keep the one that the model confirms; None: the model's own number
    previous: str | None = None  # the id of the reply that this turn follows
    past: Sequence[PastTurn] = ()  # or, instead, the turns before it
    keep: Keep = "no"  # memory: while there is room; stored: in the service's folder, too
    id: str | None = None  # under which it is kept, a name of `sessions.new_id`; None: another one
    drafts: int = 0  # images of a half-drawn image that are wanted
    reports: bool = False  # `Progress` is wanted
    timeout_s: float | None = None  # None: the service's


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreAsk:
    """Likelihood of a reply after a prompt, parts as in `Ask`."""

    prompt: Sequence[Part]
    reply: Sequence[Part]
    owner: str = LOCAL
    noise_level: float | None = None
    timeout_s: float | None = None


# -- events


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request has been read and its reply is being made; nothing in it is wrong."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More words of a reply."""

    text: str


@dataclass(frozen=True, slots=True)
class ImageBegun:
    """Image `index` of a reply, from 0, has begun."""

    index: int


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` latents of image `index` are drawn; all tries at it together."""

    index: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Draft:
    """Draft `number`, from 0, of image `index`: what is drawn of it so far."""

    index: int
    number: int
    image: PILImage


@dataclass(frozen=True, slots=True)
class ImageDone:
    """Image `index` is complete. gain: nats by which the conversation makes it likelier than none, if it was guided."""

    index: int
    image: PILImage
    picture: DecodedImage
    gain: float | None = None
    confidence: float | None = None  # with which the model confirms it, where it was chosen from several tries


@dataclass(frozen=True, slots=True)
class Usage:
    """Positions of the model that a reply took. `input_*` counts the whole past, `cached` the part that was kept."""

    input_text: int = 0
    input_images: int = 0
    cached: int = 0
    output_text: int = 0
    output_images: int = 0

    @property
    def input(self) -> int:
        return self.input_text + self.input_images

    @property
    def output(self) -> int:
        return self.output_text + self.output_images


@dataclass(frozen=True, slots=True)
class Done:
    """The reply is over. reason: the model ended it, or a limit did; id: with which it can be followed, if kept."""

    reason: Literal["end", "limit"]
    usage: Usage
    seed: int
    id: str | None = None
    is_stored: bool = False  # in the service's folder


@dataclass(frozen=True, slots=True)
class Scored:
    """The likelihood that was asked for."""

    score: Score
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """The reply cannot go on; nothing of it is kept."""

    error: Exception


Event = Accepted | TextDelta | ImageBegun | Progress | Draft | ImageDone | Done | Scored | Failed


def count_images(parts: Sequence[Part]) -> int:
    """How many of the parts are images."""
    return sum(isinstance(part, Tensor) for part in parts)
