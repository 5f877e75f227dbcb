"""Benchmarks: a variant that differs from the reference has no time, and counts are of what was dispatched."""

from __future__ import annotations

import json

import pytest
import torch

from model_cases import STAGES, tiny_components
from starflow2.errors import UsageError
from starflow2.research.bench import OperationCounter, Variant, measured, table
from starflow2.research.bench_cases import run_benches


def test_a_variant_that_differs_is_not_timed_and_one_that_agrees_has_a_ratio():
    x = torch.ones(3)
    variants = [
        Variant(bench="b", name=name, run=lambda add=add: x + add, tolerance=1e-3)  # type: ignore[misc]
        for name, add in (("reference", 0.0), ("near", 1e-4), ("far", 1.0), ("not a number", float("nan")))
    ]
    rows = list(measured(variants, rounds=2))
    assert [row["check"]["ok"] for row in rows] == [True, True, False, False]
    assert [row["n"] for row in rows] == [2, 2, 0, 0] and rows[1]["ratio"] > 0
    assert table(rows).count("differs") == 2


def test_variants_of_one_group_must_give_the_same_bits():
    variants = [
        Variant(bench="b", name=str(add), run=lambda add=add: torch.ones(1) + add, tolerance=1, exact_group=group)  # type: ignore[misc]
        for add, group in ((0.0, ""), (0.1, "g"), (0.2, "g"))
    ]
    assert [row["check"]["bitwise"] for row in measured(variants, 1, times=False)] == [None, False, False]


def test_operations_views_and_waits_are_told_apart():
    x = torch.ones(4, 2)
    with OperationCounter() as counter:
        (x.t() * 2).sum().item()
    assert (counter.counts.ops, counter.counts.kernels, counter.counts.syncs) == (4, 3, 1)


def test_benches_of_a_model_agree_with_the_reference_and_are_json():
    rows = list(
        run_benches(lambda: tiny_components(STAGES, side=4), ["latent", "shallow", "text"], rounds=1, times=False)
    )
    assert {row["variant"] for row in rows} >= {"reference", "lean float64", "Jacobi"}
    assert all(row["check"]["ok"] for row in rows), [row for row in rows if not row["check"]["ok"]]
    for row in rows:
        assert json.loads(json.dumps(row, allow_nan=False)) == row
    lean = [row for row in rows if row["variant"] == "lean float64" and row["guided"]]
    reference = [row for row in rows if row["variant"] == "reference" and row.get("guided")]
    assert lean[0]["ops"] < reference[0]["ops"] / 2 and lean[0]["syncs"] == 0


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(UsageError, match='Did you mean "latent"'):
        list(run_benches(tiny_components, ["latents"], 1, times=False))
