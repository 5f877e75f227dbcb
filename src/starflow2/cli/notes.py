"""Notes about an image or a sentence that the model takes, though its training never had anything like it."""

from __future__ import annotations

import difflib
import sys
from typing import TYPE_CHECKING

from starflow2.cli.options import PROGRAM
from starflow2.errors import printable_line

if TYPE_CHECKING:
    from starflow2.core.images import PictureSource
    from starflow2.models.components import Components
    from starflow2.models.trained_wordings import Form
    from starflow2.pipeline import StarFlow2

__all__ = ["FAR", "far", "note", "unlike"]

FAR = "the image is unlike all that the model was trained on, so what it makes of it may mean little."


def note(text: str) -> None:
    """Write a note on standard error; nothing for an empty one."""
    if text:
        print(f"{PROGRAM}: note: {text}", file=sys.stderr)


def far(model: StarFlow2, image: PictureSource) -> str:
    """A note on an image unlike all that the model was trained on, "" for any other."""
    return FAR if model.is_far(image) else ""


def unlike(components: Components, text: str, *tasks: Form) -> str:
    """A note on a sentence outside the forms that each of the tasks was trained on, "" for any other."""
    from starflow2.models.trained_wordings import nearest_trained

    trained = [nearest_trained(components, text, task) for task in tasks]
    if not all(trained):
        return ""
    best = max(trained, key=lambda known: difflib.SequenceMatcher(None, known, text).ratio())
    return f"{printable_line(text)!r} is put unlike all that the model was trained on; it knows: {best!r}."
