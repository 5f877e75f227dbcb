"""A conversation of words and images: turns, and what each side brings. No token ids here.

The one type that every task and every corpus yields; `models.sequence` knows how a model reads it. An image is whatever
its source has, P: a Scene of the drawn world, a Photo of a corpus, a tensor of an album.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

__all__ = [
    "Dialogue",
    "Turn",
    "is_lone_drawing",
    "pictures",
    "replace_pictures",
    "replace_texts",
    "turned_round",
    "without_words",
]

P = TypeVar("P")
Q = TypeVar("Q")


def pictures(parts: Iterable[str | P]) -> tuple[P, ...]:
    """The parts of a turn that are images."""
    return tuple(part for part in parts if not isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Turn(Generic[P]):
    """Words and images of the user, and words and images of the model's reply, each in order.

    learns: False for a reply that is only there to be read, such as a drawing that may be wrong and is asked about.
    """

    user: tuple[str | P, ...]
    assistant: tuple[str | P, ...]
    learns: bool = True


@dataclass(frozen=True, slots=True)
class Dialogue(Generic[P]):
    """Turns in order. `kind` names the task or the sort of document, for metrics only: no layout depends on it."""

    turns: tuple[Turn[P], ...]
    kind: str

    @property
    def pictures(self) -> tuple[P, ...]:
        """Every image in order of appearance."""
        return pictures(part for turn in self.turns for part in (*turn.user, *turn.assistant))

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text in order of appearance."""
        parts = (part for turn in self.turns for part in (*turn.user, *turn.assistant))
        return tuple(part for part in parts if isinstance(part, str))

    @property
    def draws(self) -> bool:
        """True if an image is drawn in it, and not only shown."""
        return any(pictures(turn.assistant) for turn in self.turns if turn.learns)


def replace_pictures(dialogue: Dialogue[P], images: Iterable[Q]) -> Dialogue[Q]:
    """The dialogue with its images replaced, in order, by as many others."""
    rest = iter(images)

    def replaced(parts: Iterable[str | P]) -> tuple[str | Q, ...]:
        return tuple(part if isinstance(part, str) else next(rest) for part in parts)

    turns = tuple(Turn(replaced(turn.user), replaced(turn.assistant), turn.learns) for turn in dialogue.turns)
    return Dialogue(turns, dialogue.kind)


def replace_texts(dialogue: Dialogue[P], change: Callable[[str], str]) -> Dialogue[P]:
    """The dialogue with `change` applied to each of its texts."""

    def changed(parts: Iterable[str | P]) -> tuple[str | P, ...]:
        return tuple(change(part) if isinstance(part, str) else part for part in parts)

    turns = (replace(turn, user=changed(turn.user), assistant=changed(turn.assistant)) for turn in dialogue.turns)
    return replace(dialogue, turns=tuple(turns))


def is_lone_drawing(dialogue: Dialogue[P]) -> bool:
    """True for one turn of words, or of none, followed by one drawn image.

    >>> is_lone_drawing(Dialogue((Turn(("a kite",), (7,)),), "draw"))
    True
    """
    match dialogue.turns:
        case (Turn(user=() | (str(),), assistant=(picture,)),):
            return not isinstance(picture, str)
    return False


def turned_round(dialogue: Dialogue[P], question: str) -> Dialogue[P]:
    """A captioned image as a question about it: the image is shown, with `question` if any, its caption is the reply.

    Raises ValueError for a dialogue that is not one turn of words followed by one drawn image.

    >>> turned_round(Dialogue((Turn(("a kite",), (7,)),), "draw"), "What is it?").turns
    (Turn(user=(7, 'What is it?'), assistant=('a kite',), learns=True),)
    """
    if not is_lone_drawing(dialogue) or not dialogue.turns[0].user:
        raise ValueError("only words followed by one drawn image can be turned round")
    (turn,) = dialogue.turns
    shown = (*turn.assistant, question) if question else turn.assistant
    return Dialogue((Turn(shown, turn.user),), "describe")


def without_words(dialogue: Dialogue[P], *, shows: bool) -> Dialogue[P]:
    """The dialogue without any words: the images that the model draws, and with `shows` the user's own.

    Turns without a drawn image are left out: an answer without its question teaches guessing.
    """
    turns = (Turn(pictures(turn.user) if shows else (), pictures(turn.assistant)) for turn in dialogue.turns)
    return Dialogue(tuple(turn for turn in turns if turn.assistant), dialogue.kind)
