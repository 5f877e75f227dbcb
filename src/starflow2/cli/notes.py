"""Notes about an image that the model takes, though its training never had anything like it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from starflow2.cli.options import PROGRAM

if TYPE_CHECKING:
    from starflow2.core.images import PictureSource
    from starflow2.pipeline import StarFlow2

__all__ = ["FAR", "far", "note"]

FAR = "the image is unlike all that the model was trained on, so what it makes of it may mean little."


def note(text: str) -> None:
    """Write a note on standard error; nothing for an empty one."""
    if text:
        print(f"{PROGRAM}: note: {text}", file=sys.stderr)


def far(model: StarFlow2, image: PictureSource) -> str:
    """A note on an image unlike all that the model was trained on, "" for any other."""
    return FAR if model.is_far(image) else ""
