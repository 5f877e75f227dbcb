"""Benchmarks: a variant that differs from the reference has no time, and counts are of what was dispatched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from model_cases import STAGES, tiny_components
from starflow2.cli.bench import Bench
from starflow2.core.serialize import JsonObject
from starflow2.errors import ConfigError, UsageError
from starflow2.inference.engine import Engine
from starflow2.inference.sampler import Sampler
from starflow2.research.bench import Counts, OperationCounter, Variant, graph_breaks, measured, report, table
from starflow2.research.bench_before import Earlier
from starflow2.research.bench_goals import GOALS, goals
from starflow2.research.bench_rows import SLACK, Crowd
from starflow2.research.bench_shapes import at_nano_size, at_paper_size, counted, narrow
from starflow2.research.bench_suite import run_benches
from starflow2.training.recipes import nano_model, paper_model


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


def test_a_variant_is_made_ready_before_each_run_and_ratios_are_unit_by_unit():
    calls: list[str] = []
    x = torch.ones(1)

    def run() -> torch.Tensor:
        calls.append("run")
        return x

    whole = Variant(bench="b", name="whole", run=run, before=lambda: calls.append("before"), units=2, work=6.0)
    (row,) = measured([whole], rounds=2)
    assert calls == ["before", "run"] * 3
    assert row["ratio"] == 1.0 and row["rate"] == pytest.approx(6.0 / row["median"])


def test_a_result_may_have_to_be_another_than_the_baseline_s():
    ones, twos = torch.ones(2), 2 * torch.ones(2)
    group = [
        Variant(bench="b", name="one", run=lambda: ones, expected=ones),
        Variant(bench="b", name="two", run=lambda: twos, expected=twos),
        Variant(bench="b", name="not two", run=lambda: ones, expected=twos),
    ]
    assert [row["check"]["ok"] for row in measured(group, 1, times=False)] == [True, True, False]


def test_how_often_the_matrices_of_products_are_read_is_counted():
    a, b, x = torch.ones(8, 8), torch.ones(8, 4), torch.ones(2, 8)
    with OperationCounter() as counter:
        for _ in range(3):
            x @ a
        x @ b
    assert counter.counts.weights == 3 * a.nbytes + b.nbytes
    assert counter.counts.passes == pytest.approx((3 * a.nbytes + b.nbytes) / (a.nbytes + b.nbytes))


def test_a_step_that_looks_at_a_value_breaks_its_graph():
    x = torch.ones(2)

    def looks() -> torch.Tensor:
        return x + 1 if bool(x.sum() > 1) else x - 1

    assert graph_breaks(lambda: x + 1) == 0
    assert graph_breaks(looks) > 0


# -- what a latent takes: no weights, no values -----------------------------------------------------------------------


def latent_counts(variants: Sequence[Variant], name: str) -> tuple[Counts, int]:
    """Counts of a variant, and the latents that it draws."""
    variant = next(v for v in variants if v.name == name)
    assert variant.before is not None
    variant.before()
    with OperationCounter() as counter:
        variant.run()
    return counter.counts, variant.units


def test_a_guided_latent_at_the_paper_s_size_is_one_pass_of_700_kernels_that_waits_for_nothing():
    counts, latents = latent_counts(next(at_paper_size()), "lean")
    assert counts.kernels <= 700 * latents
    assert counts.syncs == 0
    assert counts.passes / latents == pytest.approx(1.0)
    layers = 2 * 28 * 233e6 + 4 * 24 * 113e6  # bytes: the language model's weights take two each, the flow's four
    assert counts.weights / latents == pytest.approx(layers, rel=0.05)


def test_the_plain_form_reads_the_weights_once_for_each_branch():
    counts, latents = latent_counts(next(at_nano_size()), "reference")
    lean, _ = latent_counts(next(at_nano_size()), "lean")
    assert counts.passes / latents == pytest.approx(2.0, abs=0.1) and lean.passes / latents == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("cfg", "language"), [(paper_model(), torch.bfloat16), (nano_model(), torch.float32)], ids=["paper", "nano"]
)
def test_a_latent_is_one_graph_for_a_compiler_and_equals_the_reference_with_numbers(cfg, language):
    shallow = replace(narrow(cfg), vlm=replace(narrow(cfg).vlm, depth=2))
    deep = replace(shallow.flow.deep, stack=replace(shallow.flow.deep.stack, depth=2))
    variants = next(counted(replace(shallow, flow=replace(shallow.flow, deep=deep)), language))
    reference, lean = measured(variants, 1, times=False)
    assert lean["check"]["ok"] and lean["check"]["max_abs"] > 0 and reference["check"]["ok"]
    assert lean["graph_breaks"] == 0 and "graph_breaks" not in reference


# -- benches of a model -----------------------------------------------------------------------------------------------


def test_benches_of_a_model_agree_with_the_reference_and_are_json():
    names = ["latent", "shallow", "deep", "text", "turns"]
    rows = list(run_benches(lambda: tiny_components(STAGES, side=3), names, rounds=1, times=False))
    assert {row["bench"] for row in rows} == {*names, "prefill"}
    assert all(row["check"]["ok"] for row in rows), [row for row in rows if not row["check"]["ok"]]
    for row in rows:
        assert json.loads(json.dumps(row, allow_nan=False)) == row
    lean = [row for row in rows if row["variant"] == "lean float64" and row["guided"]]
    reference = [row for row in rows if row["variant"] == "reference" and row.get("guided")]
    assert lean[0]["ops"] < reference[0]["ops"] / 2 and lean[0]["syncs"] == 0
    again = [row for row in rows if row["variant"] == "lean, turn 8, all read anew"]
    cached = [row for row in rows if row["variant"] == "lean, turn 8"]
    assert again[0]["ops"] > 1.1 * cached[0]["ops"]


def test_what_an_engine_keeps_does_not_grow_with_the_requests_that_it_has_answered():
    engine = Engine(Sampler(tiny_components(STAGES, side=3)))
    crowd, kept = Crowd(engine), list[int]()
    for requests in (20, 40):
        crowd.serve(requests)
        kept.append(engine.backend.nbytes)
    assert kept[0] == kept[1] and 0 < crowd.beyond <= SLACK


@pytest.mark.slow
def test_rows_flows_data_and_training_steps_agree_with_what_they_must_be():
    names = ["many", "calls", "flow", "data", "train"]
    rows = list(run_benches(lambda: tiny_components(STAGES), names, rounds=1, times=True))
    assert all(row["check"]["ok"] for row in rows), [row for row in rows if not row["check"]["ok"]]
    steps = {row["variant"]: row for row in rows}
    crowd = next(row for row in rows if row["variant"].endswith("1000 mixed requests"))
    assert crowd["more"] == 0 and crowd["beyond"] <= SLACK and crowd["n"] == 0
    assert steps["joint, bfloat16, step"]["check"]["max_abs"] > 0
    assert steps["t2i, float32, step"]["rate"] > 0


def test_a_report_says_what_was_run_where_and_has_a_table_for_each_bench():
    x = torch.ones(1)
    rows = list(measured([Variant(bench=name, name="same", run=lambda: x) for name in ("one", "two")], 1))
    page = report(rows, "starflow2 bench one two")
    assert "Written by `starflow2 bench one two`" in page and page.index("## one") < page.index("## two")
    assert "| kernels of a guided latent at the paper's size | ≤ 700 | not measured | |" in page


# -- goals ------------------------------------------------------------------------------------------------------------


def a_row(bench: str, variant: str, **found: object) -> JsonObject:
    return {"bench": bench, "variant": variant, "n": 3, "units": 1, **found}


def test_a_goal_compares_a_unit_of_one_row_with_that_of_another():
    rows = [
        a_row("many", "native, one row", median=0.08),
        a_row("many", "native, 16 rows", median=0.64, units=16),
        a_row("many", "native, one of 16 rows, the others idle", median=0.09),
        a_row("start", "first image", median=2.0),
        a_row("start", "import torch", median=1.0),
        a_row("start", "import starflow2.pipeline", n=0),
    ]
    found = {goal.text: goal.find(rows) for goal in GOALS}
    assert found["an image among 16 rows to one alone"] == pytest.approx(0.5)
    assert found["one client of an engine of 16 rows to a session"] is None
    assert found["CPU seconds to a first image"] == 2.0
    assert found["importing the library to importing torch"] is None, "a variant that differs has no time"
    lines = goals(rows)
    assert "| CPU seconds to a first image | ≤ 2.5 | 2 | yes |" in lines
    assert "| an image among 16 rows to one alone | ≤ 0.166667 | 0.5 | **no** |" in lines


# -- an earlier checkout ----------------------------------------------------------------------------------------------

EARLIER = """
import torch
from types import SimpleNamespace
class StarFlow2:
    @classmethod
    def from_pretrained(cls, name, device): return cls()
    def draw(self, prompts, seeds):
        for _ in range(200): torch.ones(300, 300) @ torch.ones(300, 300)
        return torch.full((len(prompts), 3, 2, 2), 0.25 * len(prompts))
    def ask(self, image, question): return question.upper()
"""


@pytest.fixture
def earlier(tmp_path):
    package = tmp_path / "src" / "starflow2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(EARLIER, "utf-8")
    return tmp_path


def test_an_earlier_checkout_makes_the_same_calls_in_a_process_of_its_own(earlier):
    there = Earlier(earlier)
    try:
        assert there.call("draw", ["a red star", "a blue star"]).tolist() == [0.5] * 12
        seconds = there.seconds
        assert bytes(there.call("ask", ["how many?"]).byte().tolist()).decode() == "HOW MANY?"
        assert seconds > there.seconds > 0
        with pytest.raises(ConfigError, match=r"before=.* stopped with status 1"):
            there.call("score", ["a red star"])
    finally:
        there.close()


def test_cpu_time_of_another_process_counts():
    here = Variant(bench="b", name="one", run=lambda: torch.ones(1), elsewhere=lambda: 5.0)
    (row,) = measured([here], rounds=2)
    assert 5.0 <= row["median"] < 6.0


def test_unknown_benchmarks_and_peers_are_refused(tmp_path):
    with pytest.raises(UsageError, match='Did you mean "latent"'):
        list(run_benches(tiny_components, ["latents"], 1, times=False))
    with pytest.raises(UsageError, match="--peer names 'google'"):
        list(run_benches(tiny_components, [], 1, times=False, peers={"google": tmp_path}))
    with pytest.raises(UsageError, match=r"there is no transformer_flow\.py"):
        list(run_benches(tiny_components, [], 1, times=False, peers={"apple": tmp_path}))
    with pytest.raises(UsageError, match=r"there is no src/starflow2"):
        list(run_benches(tiny_components, [], 1, times=False, peers={"before": tmp_path}))


def test_the_command_writes_rows_and_tables(tmp_path):
    command = Bench(names=("ceil",), rounds=1, json=tmp_path / "rows.jsonl", markdown=tmp_path / "page.md")
    assert command.run([]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert {"bench", "variant", "ops", "kernels", "syncs", "check", "rate", "quiet"} <= set(rows[0])
    assert (tmp_path / "page.md").read_text("utf-8").startswith("# Benchmarks\n\nWritten by `starflow2 bench ceil")
