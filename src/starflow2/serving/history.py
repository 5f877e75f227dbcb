"""Digests of conversations, by which a client that sends all turns every time is found not to be new.

The digest of a beginning covers every turn of it: words as the model reads them, images by their pixels, so that an
image comes back as itself after any lossless format.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from torch import Tensor

from starflow2.core.images import to_bytes
from starflow2.inference.events import DecodedImage
from starflow2.inference.reading import Part, PastTurn

__all__ = ["START", "after", "beginnings", "words_first"]

START = b""  # the digest of an empty conversation


def beginnings(past: Sequence[PastTurn]) -> list[bytes]:
    """The digest after each turn of a past."""
    digests, last = list[bytes](), START
    for user, reply in past:
        last = after(last, user, reply)
        digests.append(last)
    return digests


def after(before: bytes, user: Sequence[Part], reply: Sequence[Part | DecodedImage]) -> bytes:
    """The digest of a conversation after one more turn."""
    digest = blake2b(before, digest_size=16)
    for side, parts in (("user", user), ("reply", reply)):
        for kind, content in _spelled(parts):
            digest.update(f"\0{side} {kind} {len(content)}\0".encode())
            digest.update(content)
    return digest.digest()


def words_first(reply: Sequence[Part | DecodedImage]) -> list[Part | DecodedImage]:
    """A reply as a client gives it back that knows words and images, but not their order."""
    words = " ".join(part for part in reply if isinstance(part, str))
    return [*([words] if words else []), *(part for part in reply if not isinstance(part, str))]


def _spelled(parts: Sequence[Part | DecodedImage]) -> list[tuple[str, bytes]]:
    """Parts as bytes; neighbouring words are one part, whatever the blanks between them."""
    spelled: list[tuple[str, bytes]] = []
    for part in parts:
        if isinstance(part, str):
            words = " ".join(part.split()).encode()
            if spelled and spelled[-1][0] == "text":
                words = b" ".join(filter(None, (spelled.pop()[1], words)))
            if words:
                spelled.append(("text", words))
        else:
            spelled.append(("image", _pixels(part if isinstance(part, Tensor) else part.image)))
    return spelled


def _pixels(image: Tensor) -> bytes:
    return blake2b(to_bytes(image[None]).tobytes(), digest_size=16).digest()
