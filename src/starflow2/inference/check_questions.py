"""Questions by which a model checks an image of its own, made from the words that asked for it.

A model that has learnt one question about a whole caption needs no more than its words in it. One that has not is
asked about the objects one by one: "is there a red circle?", and how many there are in all. For that the words are
parsed here. Relations, places and the number of one kind are not asked about, since nano's language model answers them
little better than a guess (docs/choices.md#self-check).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from starflow2.models.wording import plural_of, words_of

__all__ = ["Named", "Question", "questions_about", "things_in"]

HOW_MANY: Final = "how many objects are there?"
_NUMBERS: Final = ("one", "two", "three", "four", "five", "six")
_SIZES: Final = ("large", "small")
_COLORS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
_SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
_PLURALS: Final = {plural_of(shape): shape for shape in _SHAPES}


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its right answer, and the other answers that there are; each answer is one word."""

    text: str
    answer: str = "yes"
    others: tuple[str, ...] = ("no",)


@dataclass(frozen=True, slots=True)
class Named:
    """Like objects that words name. count: 0 where the words do not say how many."""

    shape: str
    count: int = 1
    color: str = ""
    size: str = ""

    @property
    def question(self) -> Question:
        """The question whether an image shows one of these objects."""
        words = [word for word in (self.size, self.color, self.shape) if word]
        article = "an" if words[0][0] in "aeiou" else "a"
        return Question(f"is there {' '.join([article, *words])}?")

    def is_again(self, earlier: Named) -> bool:
        """True if these words may mean objects that were named before: "the star" after "a red star"."""
        return self.shape == earlier.shape and self.color in ("", earlier.color) and self.size in ("", earlier.size)


def questions_about(words: str) -> tuple[Question, ...]:
    """Questions about the objects that a request names: each kind once, then how many there are; none without objects.

    >>> [q.text for q in questions_about("a red circle and two small hearts, the circle above the hearts")]
    ['is there a red circle?', 'is there a small heart?', 'how many objects are there?']
    """
    named = things_in(words)
    asked = list(dict.fromkeys(one.question for one in named))
    total = sum(one.count for one in named)
    if named and all(one.count for one in named) and total <= len(_NUMBERS):
        number = _NUMBERS[total - 1]
        asked.append(Question(HOW_MANY, number, tuple(other for other in _NUMBERS if other != number)))
    return tuple(asked)


def things_in(words: str) -> list[Named]:
    """The objects that words name, in order; those named again with "the" only once.

    >>> things_in("a big star")  # words as the model reads them: "large"
    [Named(shape='star', count=1, color='', size='')]
    """
    found: list[Named] = []
    before: list[str] = []  # words since the last object
    for word in words_of(words):
        shape = _PLURALS.get(word, word)
        if shape in _SHAPES and not (word == "cross" and before and before[-1] in ("to", "that")):
            named = _named(shape, word in _PLURALS, before)
            is_definite = "the" in before[-4:]
            if not (is_definite and any(named.is_again(earlier) for earlier in found)):
                found.append(named)
            before = []
        else:
            before.append(word)
    return found


def _named(shape: str, is_plural: bool, before: list[str]) -> Named:
    """Objects of a shape with the words that stand directly before it."""
    count, color, size = 0 if is_plural else 1, "", ""
    for word in reversed(before):
        if word in _COLORS and not color:
            color = word
        elif word in _SIZES and not size:
            size = word
        elif word in _NUMBERS:
            count = _NUMBERS.index(word) + 1
            break
        else:
            break
    return Named(shape, count, color, size)
