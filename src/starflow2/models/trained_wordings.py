"""Sentences outside the forms that a task was trained on: found by their pairs of words, answered with one like them.

assets/wordings.json, written by `scripts/wordings.py`, holds the pairs of neighbouring words of thousands of training
sentences of each task, with colours, shapes, sizes and numbers put together. A sentence with a pair that is not among
them is noted, not refused. Our choice: docs/choices.md#sentences-outside-training.
"""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from starflow2.core.serialize import read_json
from starflow2.models.components import Components
from starflow2.models.hub import ASSETS
from starflow2.models.prompts import normalized
from starflow2.models.wording import kinds_of_words

__all__ = ["WORDINGS_FILE", "Form", "Wordings", "nearest_trained", "pairs_of", "wordings"]

Form = Literal["draw", "edit", "ask"]
WORDINGS_FILE: Final = ASSETS / "wordings.json"


@dataclass(frozen=True, slots=True)
class Wordings:
    """Sentences of a task: all pairs of neighbouring words, as `pairs_of` gives them, and some sentences whole."""

    pairs: frozenset[str]
    examples: tuple[str, ...]

    def nearest(self, text: str) -> str:
        """The example most like a sentence that is outside the trained forms; "" for one that is not."""
        if pairs_of(text) <= self.pairs:
            return ""
        kinds = kinds_of_words(text)
        alike = difflib.SequenceMatcher(b=kinds, autojunk=False)

        def likeness(example: str) -> float:
            alike.set_seq1(kinds_of_words(example))
            return alike.ratio()

        return max(self.examples, key=likeness)


def pairs_of(text: str) -> frozenset[str]:
    """The pairs of neighbouring words of a sentence, "^" before the first and "$" after the last.

    >>> sorted(pairs_of("a red star"))
    ['<colours> <shapes>', '<shapes> $', '^ a', 'a <colours>']
    """
    words = ["^", *kinds_of_words(text), "$"]
    return frozenset(f"{one} {other}" for one, other in itertools.pairwise(words))


@functools.cache
def wordings() -> Mapping[Form, Wordings]:
    """Sentences of training on the drawn world, by task; nothing where the file is not there."""
    found: Mapping[Any, Mapping[str, Iterable[str]]] = read_json(WORDINGS_FILE) if WORDINGS_FILE.is_file() else {}
    return {task: Wordings(frozenset(of["pairs"]), tuple(of["examples"])) for task, of in found.items()}


@functools.cache
def _all_words() -> frozenset[str]:
    """Every word, or kind of words, of the sentences of all tasks."""
    return frozenset(word for of in wordings().values() for pair in of.pairs for word in pair.split())


def nearest_trained(components: Components, text: str, task: Form) -> str:
    """A sentence that the task was trained on, the one most like `text`, where that is outside the trained forms.

    "" where it is not, for words of an album of the user's own, which say nothing about the form, and for a model
    without a fixed vocabulary, which was trained on text that anybody wrote. Raises PromptError as `normalized` does.
    """
    if not components.vocabulary or task not in wordings():
        return ""
    read = normalized(components, text)
    return wordings()[task].nearest(read) if _all_words().issuperset(kinds_of_words(read)) else ""
