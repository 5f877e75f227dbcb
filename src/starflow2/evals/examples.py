"""The examples of the pages, done by a model at its default settings and judged.

What a reader copies from a page is what is done here: with the model's own number of tries, from the example's seed.
Not here: the list itself, which is `world.examples`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np

from starflow2.core.images import PILImage
from starflow2.evals.geneval import grade, name_scan
from starflow2.evals.suite import Images
from starflow2.world.detector import Scan, detect
from starflow2.world.examples import EXAMPLES, Example
from starflow2.world.scene import BACKGROUND_NAMES, BACKGROUNDS

__all__ = ["Done", "User", "do_examples", "faults_of", "working_seed"]

TINT: Final = 0.04  # distance of a background's colour, on [0, 1]
SEEDS: Final = 16  # tried to find one with which an example works


class User(Protocol):
    """A model as users call it. `StarFlow2` is one."""

    def generate(self, prompts: str, *, seed: int) -> Sequence[Any]:
        """Drawings, whose `image` is a PIL image."""
        ...

    def edit(self, image: Any, instruction: str, *, seed: int) -> Any:
        """A drawing."""
        ...

    def ask(self, image: Any, question: str) -> str: ...


@dataclass(frozen=True, slots=True)
class Done:
    """An example as a model does it. source: the picture that it is about; fault: "" if it is right."""

    example: Example
    source: PILImage | None
    image: PILImage
    answer: str
    fault: str


def do_examples(model: User, examples: Iterable[Example] = EXAMPLES) -> list[Done]:
    """All examples, each with its own seed; a picture that several are about is drawn once."""
    drawn: dict[tuple[str, int], PILImage] = {}
    return [_do(model, example, drawn) for example in examples]


def working_seed(model: User, example: Example) -> int | None:
    """The first seed with which an example works; None if none of the first SEEDS does."""
    changed = (replace(example, seed=seed) for seed in range(SEEDS))
    return next((e.seed for e in changed if not _do(model, e, {}).fault), None)


def _do(model: User, example: Example, drawn: dict[tuple[str, int], PILImage]) -> Done:
    key = (example.about or example.text, example.seed)
    if key not in drawn:
        drawn[key] = model.generate(key[0], seed=key[1])[0].image
    picture = drawn[key]
    if example.task == "draw":
        return Done(example, None, picture, "", faults_of(example, picture))
    if example.task == "edit":
        made = model.edit(picture, example.text, seed=example.seed).image
        return Done(example, picture, made, "", faults_of(example, made))
    answer = model.ask(picture, example.text)
    fault = "" if answer == example.answer else f"the answer is {answer!r}, not {example.answer!r}"
    return Done(example, picture, picture, answer, fault)


def faults_of(example: Example, image: PILImage | Images) -> str:
    """Faults that the judge finds in a picture that an example drew; "" if there is none."""
    (scan,) = detect(np.asarray(image)[None])
    verdict = grade({"include": list(example.shows)}, name_scan(scan))
    wrong = [] if verdict.strict_correct else [verdict.reason or "there is something else in the picture"]
    if example.background and _tint_gap(scan, example.background) >= TINT:
        wrong.append(f"the background is not {example.background}")
    return "; ".join(wrong)


def _tint_gap(scan: Scan, name: str) -> float:
    asked = BACKGROUNDS[BACKGROUND_NAMES.index(name)] / 255
    return float(np.linalg.norm(asked - np.array(scan.background)))
