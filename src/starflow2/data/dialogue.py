"""A conversation of words and pictures: turns, and what each side brings. No tensors, no token ids here.

The one type that every task and every corpus yields; `sequence` knows how a model reads it. A picture is whatever its
source has, P: a Scene of the drawn world, a Photo of a corpus.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Dialogue", "Turn", "pictures", "without_words"]

P = TypeVar("P")


def pictures(parts: Iterable[str | P]) -> tuple[P, ...]:
    """The parts of a turn that are no words."""
    return tuple(part for part in parts if not isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Turn(Generic[P]):
    """What the user says or shows, and what the model says or draws in reply, in order."""

    user: tuple[str | P, ...]
    assistant: tuple[str | P, ...]


@dataclass(frozen=True, slots=True)
class Dialogue(Generic[P]):
    """Turns in order. `kind` names the task or the sort of document, for metrics only: no layout depends on it."""

    turns: tuple[Turn[P], ...]
    kind: str

    @property
    def pictures(self) -> tuple[P, ...]:
        """Every picture in order of appearance."""
        return pictures(part for turn in self.turns for part in (*turn.user, *turn.assistant))


def without_words(dialogue: Dialogue[P], *, shows: bool) -> Dialogue[P]:
    """What is left where the user says nothing: the pictures that the model draws, and with `shows` the user's own.

    Turns of words alone go: an answer without its question teaches guessing.
    """
    turns = (Turn(pictures(turn.user) if shows else (), pictures(turn.assistant)) for turn in dialogue.turns)
    return Dialogue(tuple(turn for turn in turns if turn.assistant), dialogue.kind)
