"""Suites with several tries of each item: the first, the one that the model's own answer confirms, and the judge's.

One run draws all tries, and the suite's own rules grade three choices among them. The first is the plain sample; the
confirmed one is what a user gets; the judge's choice bounds what any way of choosing could reach. How well the answers
tell right tries from wrong ones is their AUC within a prompt. Not here: how tries are drawn and asked about, which is
the model's business.

Letters: M items, T tries of each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np

from starflow2.core.fields import Range, whole
from starflow2.errors import DataError
from starflow2.evals.statistics import Grades, Row, Score, Scores, chunks, indices_by, score_rows
from starflow2.evals.suite import Images, Progress, Report, Suite, select
from starflow2.world.scene import Split

__all__ = ["CHECKED", "PASSED", "SELF_CHECK", "Attempts", "Choice", "Tried", "TriedSuite", "auc", "evaluate_tries"]

CHECKED: Final = "checked"  # names of bounds: scores of the confirmed tries,
PASSED: Final = "passed"  # of the judge's choice,
SELF_CHECK: Final = "self_check"  # and of the answers themselves: auc, and the share of items with a confirmed try
SURE: Final = 0.5  # confidence above which the model says yes
MAX_TRIES: Final = 64  # of each item, so that a suite's images fit into memory

# what a suite gives to its callable -> images (n, T, 64, 64, 3) uint8, and confidences (n, T) in [0, 1]
Attempts = Callable[..., tuple[Images, Grades]]

_Item = TypeVar("_Item")
_Output = TypeVar("_Output")


class TriedSuite(Suite[Any, _Item, _Output], Protocol[_Item, _Output]):
    """A suite that can grade tries of its items."""

    def are_right(self, items: Sequence[_Item], outputs: Sequence[_Output]) -> list[bool]:
        """Verdicts of the judge, one for each output."""
        ...

    def unit(self, item: _Item) -> tuple[str, Hashable]:
        """Kind of an item, and what it shares with those whose tries are compared with its own, such as the prompt."""
        ...

    def without_controls(self) -> TriedSuite[_Item, _Output]:
        """This suite without controls that are drawn, which need no second drawing."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """How many tries a model makes of each item, and the function that draws them and says how sure it is of each.

    Raises ConfigError for less than one try, or more than fit into memory.
    """

    attempts: Attempts
    tries: int

    def __post_init__(self) -> None:
        whole(self.tries, "tries", Range(least=1, most=MAX_TRIES))


@dataclass(frozen=True, slots=True)
class Tried(Generic[_Output]):
    """Outputs of all tries of one item (T), with the model's confidence in each and the judge's verdicts."""

    outputs: tuple[_Output, ...]
    confidences: tuple[float, ...]
    verdicts: tuple[bool, ...]

    @property
    def confirmed(self) -> _Output:
        """The output in which the model has most confidence, the first of equal ones."""
        return self.outputs[int(np.argmax(self.confidences))]

    @property
    def best(self) -> _Output:
        """The first output that the judge finds right, else the first of all."""
        return self.outputs[self.verdicts.index(True) if any(self.verdicts) else 0]


def auc(confidences: Sequence[float], verdicts: Sequence[bool]) -> float | None:
    """Probability that a right try has a higher confidence than a wrong one; None without one of each.

    >>> auc([0.9, 0.2, 0.4], [True, False, False]), auc([0.3, 0.3], [True, False]), auc([0.3], [True])
    (1.0, 0.5, None)
    """
    sure, right = np.asarray(confidences, np.float64), np.asarray(verdicts, np.bool_)
    if right.all() or not right.any():
        return None
    gaps = sure[right][:, None] - sure[~right][None]
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())


def evaluate_tries(
    suite: TriedSuite[_Item, _Output],
    choice: Choice,
    split: Split,
    *,
    quick: bool = False,
    progress: Progress | None = None,
) -> Report:
    """The report on the first tries, with bounds CHECKED, PASSED and SELF_CHECK; arguments as in `evaluate`.

    choice: draws several images where the suite's callable would draw one; the first has the item's own seed. Raises
    DataError for other numbers of images or confidences.
    """
    sets, runs, done = select(suite, split, quick=quick), dict[str, list[tuple[_Item, Tried[_Output]]]](), 0
    total = sum(map(len, sets.values()))
    for name, items in sets.items():
        runs[name] = []
        for chunk in chunks(items, suite.chunk):
            runs[name] += zip(chunk, _tried(suite, choice, chunk), strict=True)
            done += len(chunk)
            if progress:
                progress(done, total)
    first = suite.grade({name: [(item, tried.outputs[0]) for item, tried in rows] for name, rows in runs.items()})
    plain = suite.without_controls()
    checked = plain.grade({name: [(item, tried.confirmed) for item, tried in rows] for name, rows in runs.items()})
    passed = plain.grade({name: [(item, tried.best) for item, tried in rows] for name, rows in runs.items()})
    more = {CHECKED: checked.parts, PASSED: passed.parts}
    more[SELF_CHECK] = {name: _self_check(suite, rows) for name, rows in runs.items()}
    scores = (first.parts, first.gap, first.bounds | more, first.settings | {"tries": choice.tries})
    return Report(*scores, suite=suite.name, split=split, quick=quick, n=total)


def _tried(suite: TriedSuite[_Item, _Output], choice: Choice, items: Sequence[_Item]) -> list[Tried[_Output]]:
    """All tries of some items. The suite runs once for each try; the first run draws those of all."""
    drawn: list[tuple[Images, Grades]] = []

    def of(number: int) -> Callable[..., Images]:
        def call(*words: Any) -> Images:
            if not drawn:
                drawn.append(_checked(choice.attempts(*words), len(items), choice.tries))
            return np.asarray(drawn[0][0][:, number])

        return call

    outputs = [suite.run(of(number), items) for number in range(choice.tries)]  # T x (n,)
    verdicts = [suite.are_right(items, own) for own in outputs]
    sure = drawn[0][1].tolist()
    return [
        Tried(tuple(own[i] for own in outputs), tuple(sure[i]), tuple(own[i] for own in verdicts))
        for i in range(len(items))
    ]


def _checked(made: tuple[Images, Grades], count: int, tries: int) -> tuple[Images, Grades]:
    """Images (n, T, ...) and confidences (n, T). Raises DataError for other numbers of them."""
    images, sure = np.asarray(made[0]), np.asarray(made[1], np.float64)
    if images.shape[:2] != (count, tries) or sure.shape != (count, tries) or not np.isfinite(sure).all():
        raise DataError(
            f"tries: expected {count} x {tries} images and finite confidences, got {images.shape} and {sure.shape}"
        )
    return images, sure


def _self_check(suite: TriedSuite[_Item, _Output], rows: Sequence[tuple[_Item, Tried[_Output]]]) -> Scores:
    """AUC within a prompt, of the prompts with right and wrong tries, and the share of items with a confirmed try."""
    units = [suite.unit(item) for item, _ in rows]
    found: list[Row] = []
    for (kind, unit), own in indices_by(range(len(rows)), lambda i: units[i]).items():
        tried = [rows[i][1] for i in own]
        area = auc([c for t in tried for c in t.confidences], [v for t in tried for v in t.verdicts])
        found += [] if area is None else [Row(kind, unit, (area,))]
    confirmed = float(np.mean([max(tried.confidences) > SURE for _, tried in rows]))
    if not found:
        return Scores(0, 0, {"auc": Score(None), "confirmed": Score(confirmed)})
    scores = score_rows(found, ("auc",), np.random.default_rng(0), "resampled").scores
    return replace(scores, columns=scores.columns | {"confirmed": Score(confirmed)})
