"""First prompts of someone who has read no page: what they type, and what the image must then show.

The list is ours, written before any model was scored on it, and frozen in worldbench.lock. Its prompts name no more
than the world has, in the words that people use ("big", "2", "draw me"). Some combine what benchmarks hold out of
training: a model for users has to draw these as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from starflow2.world.content import Content, Group
from starflow2.world.scene import BACKGROUND_NAMES, COLORS, SHAPES, SIZES, Cell, Relation
from starflow2.world.words import NUMBERS, PLURALS

__all__ = ["FIRST_PROMPTS", "FirstPrompt", "group"]


@dataclass(frozen=True, slots=True)
class FirstPrompt:
    """A prompt and the content that its image has to show, with nothing else."""

    text: str
    content: Content


def group(words: str, cell: Cell | None = None) -> Group:
    """Like objects in few words; `cell`: row and column of their place.

    >>> group("two large red hearts")
    Group(shape=4, count=2, color=0, size=1, cell=None)
    """
    *named, noun = words.split()
    numbers = [NUMBERS.index(word) for word in named if word in NUMBERS]
    colors = [COLORS.index(word) for word in named if word in COLORS]
    sizes = [SIZES.index(word) for word in named if word in SIZES]
    shape = SHAPES.index(noun) if noun in SHAPES else PLURALS.index(noun)
    color, size = (next(iter(found), None) for found in (colors, sizes))
    return Group(shape, next(iter(numbers), 1), color, size, cell)


def _first(text: str, *groups: str | Group, relation: Relation | None = None, background: str = "") -> FirstPrompt:
    tint = BACKGROUND_NAMES.index(background) if background else None
    shown = tuple(group(words) if isinstance(words, str) else words for words in groups)
    return FirstPrompt(text, Content(shown, relation, tint))


FIRST_PROMPTS: Final = (
    _first("a red circle", "red circle"),
    _first("red heart", "red heart"),
    _first("draw a blue square", "blue square"),
    _first("draw me a green star", "green star"),
    _first("Please draw a picture of a yellow triangle.", "yellow triangle"),
    _first("show me an orange ring", "orange ring"),
    _first("a heart", "heart"),
    _first("a big red star", "large red star"),
    _first("a small blue circle", "small blue circle"),
    _first("two circles", "two circles"),
    _first("two red hearts", "two red hearts"),
    _first("2 red hearts", "two red hearts"),
    _first("three yellow stars", "three yellow stars"),
    _first("four blue squares", "four blue squares"),
    _first("a red circle and a blue square", "red circle", "blue square"),
    _first("a black cross and a pink diamond", "black cross", "pink diamond"),
    _first("A red circle, and a green triangle", "red circle", "green triangle"),
    _first("a red circle left of a blue square", "red circle", "blue square", relation="left of"),
    _first("a green square to the right of a purple star", "green square", "purple star", relation="right of"),
    _first("a yellow star above a purple heart", "yellow star", "purple heart", relation="above"),
    _first("an orange ring under a green diamond", "orange ring", "green diamond", relation="below"),
    _first("a big green square and a small red heart", "large green square", "small red heart"),
    _first("two blue stars and a red circle", "two blue stars", "red circle"),
    _first("one yellow star and three green circles", "yellow star", "three green circles"),
    _first("a red circle, a green square and a blue triangle", "red circle", "green square", "blue triangle"),
    _first("a red heart at the top", group("red heart", (0, 1))),
    _first("a black star in the middle", group("black star", (1, 1))),
    _first("a purple square at the bottom left", group("purple square", (2, 0))),
    _first("a red star on a gray background", "red star", background="gray"),
    _first("a blue heart on a white background", "blue heart", background="white"),
)
