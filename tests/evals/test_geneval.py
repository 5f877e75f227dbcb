"""W-GenEval: true pictures score 1, others near 0; the suite is the frozen one; tables own up to what is missing."""

import copy
import functools
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from starflow2.core.ledger import append_line
from starflow2.errors import ConfigError, DataError
from starflow2.evals.geneval import GenevalSuite, captioned_scenes
from starflow2.evals.report import write_json
from starflow2.evals.statistics import Score
from starflow2.evals.suite import Report, ceiling, check_lock, evaluate, lock_text, verify_lock
from starflow2.evals.tables import ledger_record, table
from starflow2.world.captions import SCENE_FAMILIES
from starflow2.world.grammar import FAMILIES
from starflow2.world.scene import render
from world_cases import picture


class Drawer:
    """Draws the truth, but for every `wrong_every`-th prompt an empty picture; remembers what it was asked."""

    def __init__(self, wrong_every=0):
        self.truth = {d.prompt: picture(d.scene) for part in ("id", "cg") for d in captioned_scenes("dev", part)}
        self.wrong = set(sorted(self.truth)[::wrong_every]) if wrong_every else set()
        self.asked = []

    def __call__(self, prompts, seeds):
        self.asked += zip(prompts, seeds, strict=True)
        blank = np.full((64, 64, 3), 250, np.uint8)
        return np.stack([blank if prompt in self.wrong else self.truth[prompt] for prompt in prompts])


@pytest.fixture(scope="module")
def report():
    return evaluate(GenevalSuite(), Drawer(wrong_every=3), "dev", quick=True)


def codec_ceiling(quick=False):
    """Scores of true images after a codec that loses nothing."""
    return ceiling(GenevalSuite(samples=1, parts=("id",)), "dev", lambda images: images, quick=quick)["id"]


def test_a_drawer_of_the_truth_is_always_right_and_the_identity_codec_loses_nothing():
    whole = evaluate(GenevalSuite(samples=1), Drawer(), "dev")
    assert (whole.n, whole.parts["id"].n, whole.parts["cg"].n) == (704, 384, 320)
    for scores in (*whole.parts.values(), codec_ceiling()):
        assert scores["lenient"] == scores["strict"] == Score(1.0, 1.0, 1.0)
        assert scores.value("template_iou") > 0.94 and scores.value("unknown_share") == scores.value("empty_share") == 0
    assert whole.gap.value("strict") == 0


def test_the_scores_are_the_shares_of_right_pictures_with_an_interval_over_prompts():
    drawer = Drawer(wrong_every=3)
    scores = evaluate(GenevalSuite(parts=("cg",)), drawer, "dev", quick=True).parts["cg"]
    right = 1 - np.mean([prompt in drawer.wrong for prompt, _ in drawer.asked])
    overall = scores["lenient"]
    assert overall.score == pytest.approx(right) == pytest.approx(1 - scores.value("empty_share"))
    assert overall.low < overall.score < overall.high
    by_prompt = np.sqrt(right * (1 - right) / 40)  # 40 prompts; over the 160 pictures it would be half of that
    assert overall.high - overall.low == pytest.approx(2 * 1.96 * by_prompt, rel=0.35)


def test_who_never_reads_the_caption_scores_little():
    floor = evaluate(GenevalSuite(samples=1, parts=("id",)), Drawer(), "dev").bounds["floor"]["id"]
    assert list(floor.by_kind) == list(FAMILIES)
    assert 0.1 < floor.by_kind["single_object"].value("lenient") < 0.25
    assert all(floor.by_kind[name].value("lenient") < 0.06 for name in FAMILIES[1:])
    assert floor.value("strict") < floor.value("lenient")


def test_a_quick_run_draws_a_share_of_the_same_pictures_from_the_same_seeds():
    quick, full = Drawer(), Drawer()
    done = []
    suite = GenevalSuite(parts=("id",))
    evaluate(suite, quick, "dev", quick=True, progress=lambda n, total: done.append((n, total)))
    evaluate(suite, full, "dev")
    assert len(quick.asked) == 6 * 8 * 4 and len(set(full.asked)) == 6 * 64 * 4
    assert set(quick.asked) < set(full.asked)
    assert len({seed for _, seed in full.asked}) == len(full.asked)
    assert done[-1] == (192, 192)


@pytest.mark.parametrize(
    ("generate", "options", "error"),
    [
        (lambda prompts, seeds: np.zeros((len(prompts), 64, 64, 3)), {}, DataError),
        (lambda prompts, seeds: np.zeros((1, 64, 64, 3), np.uint8), {}, DataError),
        (None, {"samples": 5}, ConfigError),
        (None, {"parts": ("ood",)}, ConfigError),
    ],
)
def test_what_cannot_be_scored_is_refused(generate, options, error):
    with pytest.raises(error):
        evaluate(GenevalSuite(**options), generate, "dev", quick=True)


def test_a_split_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="split: expected one of dev, test"):
        evaluate(GenevalSuite(), Drawer(), "train")


def test_the_benchmark_is_the_frozen_one():
    verify_lock(GenevalSuite())


def test_a_lock_with_another_hash_names_the_part_that_changed():
    frozen, fresh = json.loads(lock_text()), GenevalSuite().lock()
    frozen["geneval"]["items"]["dev/cg"]["blake2b"] = "0" * 32
    with pytest.raises(DataError, match=r"changed: geneval\.items\.dev/cg\.blake2b$"):
        check_lock(frozen, fresh)
    with pytest.raises(DataError, match=r"changed: version$"):
        check_lock(frozen | {"version": 2}, {"version": 1})


def places(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all keys of nested dictionaries."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def test_every_change_of_the_lock_is_noticed_and_what_is_no_lock_is_refused():
    whole = json.loads(lock_text())
    check_lock(whole, whole)
    for path in places(whole):
        for new in (None, [], {}, 7, "x", math.nan):
            changed = copy.deepcopy(whole)
            functools.reduce(dict.__getitem__, path[:-1], changed)[path[-1]] = new
            if changed == whole:
                continue
            with pytest.raises(DataError, match=f"changed: .*{re.escape(path[0])}"):
                check_lock(changed, whole)
    for frozen in ([], None, 5, "x", 1.5, True):
        with pytest.raises(DataError, match="one section per suite"):
            check_lock(frozen, whole)  # type: ignore[arg-type]


def shown(report: Report) -> str:
    """The table as a terminal shows it, on one line."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(report))
    return " ".join(console.export_text().split())


def test_a_table_without_ceiling_says_so_and_one_with_it_shows_it(report):
    assert "No codec ceiling was measured" in shown(report) and "– / –" in shown(report)
    best = {"id": codec_ceiling(quick=True)}
    whole = report.with_bound("clean", best).with_bound("noise", best)
    assert "No codec ceiling" not in shown(whole) and "1.000 / 1.000" in shown(whole)
    assert "Quick run" in shown(whole)
    assert table(whole).row_count == 8  # six categories, twins, overall
    headings = ["category", "ID", "CG", "gap", "floor", "ceiling", "ID strict", "CG strict"]
    assert [str(column.header) for column in table(whole).columns] == headings


def test_reports_survive_json_and_only_full_test_runs_enter_the_ledger(report, tmp_path):
    write_json(report.to_json(), tmp_path / "report.json")
    assert Report.from_json(json.loads((tmp_path / "report.json").read_text())) == report
    for kind in ({"split": "test"}, {"quick": False}):
        with pytest.raises(ConfigError, match="only full test runs"):
            ledger_record(replace(report, **kind))
    record = ledger_record(replace(report, split="test", quick=False, model="tiny"))
    for _ in range(2):
        append_line(tmp_path / "results" / "ledger.jsonl", record)
    lines = (tmp_path / "results" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record, record]
    assert {"date", "commit", "id", "cg", "model"} <= record.keys()


def test_the_truth_fulfils_new_prompts_and_busy_scenes_and_their_order_in_the_prompt_does_not_matter():
    suite = GenevalSuite(samples=1, parts=("new", "scenes"))
    parts = ceiling(suite, "dev", lambda images: images, quick=True)
    for part in ("new", "scenes"):
        assert parts[part].value("lenient") == parts[part].value("strict") == 1 and parts[part].value("twins") == 0
    assert set(parts["scenes"].by_kind) == set(SCENE_FAMILIES)


def test_who_ignores_the_second_shape_draws_twins_and_fails_what_has_two():
    def alike(prompts, seeds):
        by_prompt = {job.task.prompt: job.task for job in items}
        tasks = [by_prompt[prompt] for prompt in prompts]
        firsts = [task.content.groups[0].shape for task in tasks]
        objects = [[replace(t, shape=s) for t in task.scene.objects] for task, s in zip(tasks, firsts, strict=True)]
        return np.stack([render(replace(t.scene, objects=tuple(row))) for t, row in zip(tasks, objects, strict=True)])

    suite = GenevalSuite(samples=1, parts=("scenes",))
    items = suite.items("dev")["scenes"]
    scores = evaluate(suite, alike, "dev", quick=True).parts["scenes"]
    assert scores.by_kind["sized"].value("lenient") == 0 and scores.value("twins") > 70
