"""Scores of items and of their kinds, with bootstrap intervals over groups; the share of items that a quick run takes.

Letters: M rows, G groups of correlated rows, K score columns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from starflow2.core.fields import number

__all__ = [
    "QUICK_SHARE",
    "Estimate",
    "Grades",
    "Row",
    "Score",
    "Scored",
    "Scores",
    "bootstrap",
    "by_part",
    "chunks",
    "column_means",
    "gap",
    "indices_by",
    "quick_share",
    "score_rows",
]

QUICK_SHARE = 8  # a quick run takes one item in eight
RESAMPLES = 1000

Grades = NDArray[np.float64]
_Key = TypeVar("_Key", bound=Hashable)
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Score:
    """A number, None where there was nothing to score, and its 95 % interval if it has one."""

    score: float | None
    low: float | None = None
    high: float | None = None

    def to_json(self) -> object:
        """A number without an interval stands for itself."""
        return self.score if self.low is None else {"score": self.score, "low": self.low, "high": self.high}

    @classmethod
    def from_json(cls, data: Any) -> Score:
        """Undo `to_json`. Raises ConfigError for what is no number, TypeError for other names."""
        values = data if isinstance(data, dict) else {"score": data}
        return cls(**{name: None if value is None else number(value, name) for name, value in values.items()})


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of n rows by column, and of the rows of each kind.

    units: number of independent groups among the rows, over which they are resampled: prompts, images, scenes.
    """

    n: int
    units: int
    columns: dict[str, Score]
    by_kind: dict[str, Scores] = field(default_factory=dict)

    def __getitem__(self, column: str) -> Score:
        return self.columns[column]

    def value(self, column: str) -> float:
        """A score without its interval, NaN where there was nothing to score."""
        score = self.columns[column].score
        return float("nan") if score is None else score

    def with_columns(self, **more: Score | float | None) -> Scores:
        """These scores with further columns."""
        new = {name: score if isinstance(score, Score) else Score(score) for name, score in more.items()}
        return replace(self, columns=self.columns | new)

    def to_json(self) -> dict[str, object]:
        """Columns stand beside n and units."""
        kinds = {"by_kind": {name: scores.to_json() for name, scores in self.by_kind.items()}} if self.by_kind else {}
        columns = {name: score.to_json() for name, score in self.columns.items()}
        return {"n": self.n, "units": self.units, **columns, **kinds}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scores:
        """Undo `to_json`."""
        columns = {name: Score.from_json(value) for name, value in data.items() if name not in _NO_COLUMNS}
        kinds = {name: cls.from_json(scores) for name, scores in data.get("by_kind", {}).items()}
        return cls(data["n"], data["units"], columns, kinds)


_NO_COLUMNS = ("n", "units", "by_kind")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Scores (K,) of a set of rows, and the scores (RESAMPLES, K) of its bootstrap resamples."""

    scores: Grades
    resamples: Grades

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.scores - other.scores, self.resamples - other.resamples)

    @staticmethod
    def mean(estimates: Iterable[Estimate]) -> Estimate:
        """The mean of several estimates, each with the same weight."""
        rows = list(estimates)
        return Estimate(np.mean([row.scores for row in rows], axis=0), np.mean([row.resamples for row in rows], axis=0))

    def columns(self, names: Iterable[str]) -> dict[str, Score]:
        """The scores with their intervals by name."""
        low, high = np.percentile(self.resamples, (2.5, 97.5), axis=0).tolist()
        return dict(zip(names, map(Score, self.scores.tolist(), low, high), strict=True))


def bootstrap(groups: Sequence[object], grades: Grades, rng: np.random.Generator) -> Estimate:
    """Means of grades (M, K), resampled by whole groups: rows of one group are correlated."""
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    amount = np.bincount(group)  # (G,)
    sums = np.stack([np.bincount(group, column) for column in grades.T], axis=1)  # (G, K)
    draws = rng.integers(len(amount), size=(RESAMPLES, len(amount)))
    return Estimate(grades.mean(axis=0), sums[draws].sum(axis=1) / amount[draws].sum(axis=1)[:, None])


def column_means(grades: Grades) -> Grades:
    """(K,) means of grades (M, K), each column summed on its own: `mean(axis=0)` may end otherwise in the last bit."""
    return np.array([column.mean() for column in grades.T])


# ----------------------------------------------------------------------------------------------------- rows into scores


@dataclass(frozen=True, slots=True)
class Row:
    """One graded item. unit: rows of one unit are resampled together. marks: one per column."""

    kind: str
    unit: object
    marks: Sequence[float]


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores, and the estimates that a gap is taken of: those of kinds where there are any, else the overall one."""

    scores: Scores
    names: tuple[str, ...]
    overall: Estimate
    kinds: dict[str, Estimate]


def score_rows(
    rows: Sequence[Row],
    names: tuple[str, ...],
    rng: np.random.Generator,
    kinds: Literal["plain", "resampled", "averaged"],
) -> Scored:
    """Means of the rows' marks, and of those of each kind.

    kinds: "plain": without intervals; "resampled": with intervals; "averaged": likewise, and the overall score is the
    mean of kinds and not of rows. The order of draws and of sums is that of the published scores.
    """
    marks, units = np.array([row.marks for row in rows], np.float64), [row.unit for row in rows]  # (M, K)
    groups = indices_by(rows, lambda row: row.kind)
    estimates: dict[str, Estimate] = {}
    if kinds == "averaged":
        estimates = {kind: bootstrap([units[i] for i in own], marks[own], rng) for kind, own in groups.items()}
        overall = Estimate.mean(estimates.values())
    else:
        groups = dict(sorted(groups.items()))
        overall = replace(bootstrap(units, marks, rng), scores=column_means(marks))
        if kinds == "resampled":
            estimates = {kind: bootstrap([units[i] for i in own], marks[own], rng) for kind, own in groups.items()}
    by_kind = {}
    for kind, own in groups.items():
        plain = {name: Score(mean) for name, mean in zip(names, marks[own].mean(axis=0).tolist(), strict=True)}
        columns = estimates[kind].columns(names) if kind in estimates else plain
        by_kind[kind] = Scores(len(own), len({units[i] for i in own}), columns)
    return Scored(Scores(len(rows), len(set(units)), overall.columns(names), by_kind), names, overall, estimates)


def gap(id_part: Scored, cg_part: Scored) -> Scores | None:
    """ID minus CG.

    Where kinds have estimates, for each kind that both have, and the mean of these, so that like is compared with like;
    None if they share no kind.
    """
    if not cg_part.kinds:
        return _difference(id_part.overall - cg_part.overall, id_part.names, id_part.scores, cg_part.scores)
    gaps = {kind: id_part.kinds[kind] - estimate for kind, estimate in cg_part.kinds.items() if kind in id_part.kinds}
    if not gaps:
        return None
    by_kind = {
        kind: _difference(estimate, id_part.names, id_part.scores.by_kind[kind], cg_part.scores.by_kind[kind])
        for kind, estimate in gaps.items()
    }
    overall = _difference(Estimate.mean(gaps.values()), id_part.names, id_part.scores, cg_part.scores)
    return replace(overall, by_kind=by_kind)


def _difference(estimate: Estimate, names: tuple[str, ...], id_scores: Scores, cg_scores: Scores) -> Scores:
    return Scores(id_scores.n + cg_scores.n, id_scores.units + cg_scores.units, estimate.columns(names))


# -------------------------------------------------------------------------------------------------------- sets of items


def chunks(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    """The items in order, `size` at a time."""
    yield from (items[first : first + size] for first in range(0, len(items), size))


def indices_by(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[int]]:
    """Indices of the items with each key, keys in the order in which they first appear."""
    indices: dict[_Key, list[int]] = {}
    for index, item in enumerate(items):
        indices.setdefault(key(item), []).append(index)
    return indices


def by_part(items: Sequence[_Item], part: Callable[[_Item], str]) -> dict[str, list[_Item]]:
    """The items of each part, and of "all"."""
    parts = {name: [items[i] for i in own] for name, own in indices_by(items, part).items()}
    return {**parts, "all": list(items)}


def quick_share(
    items: Sequence[_Item], *, stratum: Callable[[_Item], Hashable], unit: Callable[[_Item], Hashable]
) -> list[_Item]:
    """All items of one unit in eight of each stratum, in order; every call chooses the same.

    unit: what items share that stay together; different in different strata.
    """
    rng, chosen = np.random.default_rng(0), set[Hashable]()
    for indices in indices_by(items, stratum).values():
        units = list(dict.fromkeys(unit(items[i]) for i in indices))
        chosen.update(units[i] for i in rng.choice(len(units), -(-len(units) // QUICK_SHARE), replace=False))
    return [item for item in items if unit(item) in chosen]
