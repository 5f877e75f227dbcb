"""Scores of rows: means, intervals over units, kinds and gaps; the share of a quick run."""

from __future__ import annotations

import numpy as np
import pytest

from starflow2.evals.statistics import Row, Score, Scores, by_part, gap, quick_share, score_rows

NAMES = ("right", "share")


def rows(count=60, seed=0, names=("a", "b", "c")):
    rng = np.random.default_rng(seed)
    marks = rng.random((count, 2)).round(2)
    return [Row(names[i % len(names) if i % 5 else 0], i // 2, marks[i].tolist()) for i in range(count)]


def scored(kinds, **options):
    return score_rows(rows(**options), NAMES, np.random.default_rng(0), kinds)


@pytest.mark.parametrize("kinds", ["plain", "resampled"])
def test_an_overall_score_is_the_mean_of_rows_within_its_interval(kinds):
    scores = scored(kinds).scores
    assert scores.n == 60 and scores.units == 30
    assert scores.value("right") == pytest.approx(np.mean([row.marks[0] for row in rows()]))
    assert scores["right"].low < scores["right"].score < scores["right"].high
    assert list(scores.by_kind) == ["a", "b", "c"] and sum(row.n for row in scores.by_kind.values()) == 60
    assert (scores.by_kind["b"]["share"].low is None) == (kinds == "plain")


def test_an_average_of_kinds_weighs_each_kind_the_same():
    scores = scored("averaged").scores
    assert scores.value("right") == pytest.approx(np.mean([row.value("right") for row in scores.by_kind.values()]))


def test_rows_of_one_unit_are_resampled_together():
    pairs = [Row("", i // 2, (i // 2 % 2,)) for i in range(100)]
    alone = [Row("", i, row.marks) for i, row in enumerate(pairs)]
    wide, narrow = (score_rows(r, ("x",), np.random.default_rng(0), "plain").scores["x"] for r in (pairs, alone))
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(np.sqrt(2), rel=0.2)


def test_a_gap_is_over_the_kinds_that_both_have():
    seen, unseen = scored("averaged"), scored("averaged", seed=1, names=("b", "c", "d"))
    found = gap(seen, unseen)
    assert set(found.by_kind) == {"b", "c"}
    for kind, row in found.by_kind.items():
        difference = seen.scores.by_kind[kind].value("right") - unseen.scores.by_kind[kind].value("right")
        assert row.value("right") == pytest.approx(difference)
    assert found.value("right") == pytest.approx(np.mean([row.value("right") for row in found.by_kind.values()]))
    assert gap(seen, scored("averaged", names=("d",))) is None
    plain = gap(scored("plain"), scored("plain", seed=1))
    assert plain.value("share") == pytest.approx(
        scored("plain").scores.value("share") - scored("plain", seed=1).scores.value("share")
    )


def test_scores_survive_json_with_and_without_intervals():
    scores = scored("plain").scores.with_columns(guess=0.25, nothing=None, known=Score(1.0, 0.5, 1.0))
    assert Scores.from_json(scores.to_json()) == scores
    assert scores.to_json()["guess"] == 0.25 and scores.to_json()["nothing"] is None
    assert np.isnan(scores.value("nothing"))


def test_a_quick_share_takes_whole_units_of_every_stratum_and_always_the_same():
    items = [(stratum, 10 * stratum + unit // 2) for stratum in range(3) for unit in range(20)]
    chosen = quick_share(items, stratum=lambda item: item[0], unit=lambda item: item[1])
    assert chosen == quick_share(items, stratum=lambda item: item[0], unit=lambda item: item[1])
    assert [sum(s == stratum for s, _ in chosen) for stratum in range(3)] == [4, 4, 4], (
        "two units of ten, two rows each"
    )
    assert chosen == [item for item in items if item in chosen]


def test_items_by_part_come_with_all_of_them():
    parts = by_part(["ix", "iy", "cz"], lambda item: {"i": "id", "c": "cg"}[item[0]])
    assert parts == {"id": ["ix", "iy"], "cg": ["cz"], "all": ["ix", "iy", "cz"]}
