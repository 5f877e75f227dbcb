"""A row's reply as it comes: the engine's events become words and images."""

from __future__ import annotations

from collections.abc import Iterator

from starflow2.core.images import to_pil
from starflow2.inference.events import Begun, Completed, DecodedImage, RowEvent, Sampled, Stepped, Token
from starflow2.models.tokenizer import ChatTokenizer
from starflow2.serving.jobs import Event, ImageBegun, ImageDone, Progress, TextDelta

__all__ = ["Transcript"]


class Transcript:
    """Parts of one reply so far, in order; text is passed on once its characters are whole."""

    def __init__(self, tokenizer: ChatTokenizer, seed: int) -> None:
        self._tokenizer, self.seed = tokenizer, seed
        self.parts: list[str | DecodedImage] = []
        self.tokens = 0
        self.images = 0
        self.drawn = 0  # latents of the image that is being drawn
        self._ids: list[int] = []
        self._written = ""

    def take(self, event: RowEvent) -> Iterator[Event]:
        """Note an event of the row, and translate it."""
        match event:
            case Token():
                yield from self._token(event.id)
            case Begun():
                self.close()
                self.drawn = 0
                yield ImageBegun(self.images)
            case Stepped():
                self.drawn = event.done
                yield Progress(self.images, event.done, event.total)
            case Completed():
                yield self._image(event.picture)
            case Sampled():
                self.images += 1

    def _token(self, token: int) -> Iterator[Event]:
        self._ids.append(token)
        self.tokens += 1
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\ufffd") and text != self._written:
            piece, self._written = text[len(self._written) :], text
            yield TextDelta(piece)

    def _image(self, picture: DecodedImage) -> Event:
        index, self.images = self.images, self.images + 1
        self.parts.append(picture)
        both = picture.log_prob, picture.unconditional_log_prob
        gain = None if both[0] is None or both[1] is None else both[0] - both[1]
        return ImageDone(index, to_pil(picture.image), picture, gain)

    def close(self) -> None:
        """End a run of words."""
        if self._written:
            self.parts.append(self._written)
        self._ids, self._written = [], ""
