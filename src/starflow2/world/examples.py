"""Sentences that the pages and `starflow2 words` show, and what a right reply to each looks like.

Every example on a page of the drawn world comes from here, so that one test can draw or answer each with the shipped
weights and ask the judge. Our choice: docs/choices.md#pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from starflow2.world.captions import GenEvalObject
from starflow2.world.scene import SHAPES
from starflow2.world.words import PLURALS

__all__ = ["EXAMPLES", "TASKS", "Example", "Task", "shown"]

Task = Literal["draw", "edit", "ask"]
TASKS: Final[tuple[Task, ...]] = ("draw", "edit", "ask")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sentence and the seed with which the pages use it.

    about: the prompt of the picture, drawn with the same seed, that an edit changes or a question asks about.
    shows: objects of the resulting picture, and nothing else. answer: the reply to a question.
    """

    task: Task
    what: str  # the kind of request, such as "count"
    text: str
    seed: int = 0
    about: str = ""
    shows: tuple[GenEvalObject, ...] = ()
    background: str = ""  # of the resulting picture, where the sentence is about it
    answer: str = ""


def shown(words: str, position: tuple[str, int] | None = None) -> GenEvalObject:
    """Objects of one kind as GenEval's metadata has them.

    position: where they are with respect to objects earlier in the list, by number.

    >>> shown("two red hearts")
    {'class': 'heart', 'count': 2, 'color': 'red'}
    """
    number, color, noun = words.split()
    count = {"a": 1, "two": 2, "three": 3, "four": 4}[number]
    row: GenEvalObject = {"class": SHAPES[PLURALS.index(noun)] if count > 1 else noun, "count": count, "color": color}
    return row if position is None else {**row, "position": list(position)}


def _draw(what: str, text: str, *shows: GenEvalObject, seed: int = 0, background: str = "") -> Example:
    return Example(task="draw", what=what, text=text, shows=shows, seed=seed, background=background)


def _edit(what: str, about: str, text: str, *shows: GenEvalObject, seed: int = 0, background: str = "") -> Example:
    return Example(task="edit", what=what, text=text, about=about, shows=shows, seed=seed, background=background)


def _ask(what: str, about: str, text: str, answer: str, seed: int = 0) -> Example:
    return Example(task="ask", what=what, text=text, about=about, answer=answer, seed=seed)


STAR, HEARTS, PAIR = "a red star", "two pink hearts", "a red square and a green circle"
SIDE, ABOVE = "a red star left of a blue square", "a blue star above a green square"

EXAMPLES: Final = (
    _draw("one object", STAR, shown("a red star")),
    _draw("size", "a large pink heart", shown("a pink heart")),
    _draw("number", HEARTS, shown("two pink hearts")),
    _draw("number", "three green squares", shown("three green squares"), seed=1),
    _draw("two objects", PAIR, shown("a red square"), shown("a green circle"), seed=1),
    _draw("side", SIDE, shown("a blue square"), shown("a red star", ("left of", 0))),
    _draw("side", ABOVE, shown("a green square"), shown("a blue star", ("above", 0))),
    _draw("background", "a purple circle on a mint background", shown("a purple circle"), background="mint"),
    _edit("colour", STAR, "make the star blue", shown("a blue star")),
    _edit("colour", SIDE, "make the star yellow", shown("a yellow star"), shown("a blue square"), seed=6),
    _edit("shape", STAR, "turn the star into a square", shown("a red square"), seed=4),
    _edit("size", "a small red star", "make the star large", shown("a red star")),
    _edit("remove", PAIR, "remove the green circle", shown("a red square"), seed=1),
    _edit(
        "add",
        STAR,
        "add a small purple circle in the lower left",
        shown("a red star"),
        shown("a purple circle"),
        seed=1,
    ),
    _edit("background", STAR, "make the background sky", shown("a red star"), background="sky"),
    _ask("number", HEARTS, "how many hearts are there?", "two"),
    _ask("colour", STAR, "what color is the star?", "red"),
    _ask("is it there", PAIR, "is there a red square?", "yes", seed=1),
    _ask("side", ABOVE, "is the star above the square?", "yes"),
    _ask("shape", PAIR, "what shape is the red object?", "square", seed=1),
)
