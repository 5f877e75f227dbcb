"""Several tries of each item: the first, the confirmed and the best are graded by the suite's own rules."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from starflow2.errors import ConfigError, DataError
from starflow2.evals.edit import EditSuite
from starflow2.evals.geneval import GenevalSuite, captioned_scenes
from starflow2.evals.runner import ByteModel, Scorer
from starflow2.evals.suite import Report, evaluate
from starflow2.evals.tables import ledger_record, lines, notes, table
from starflow2.evals.tries import CHECKED, PASSED, SELF_CHECK, Choice, auc, evaluate_tries
from world_cases import picture

TRIES = 3
QUICK = {"split": "dev", "quick": True}
SUITE = GenevalSuite(samples=2)


class Trier:
    """Draws the truth in some tries and blank images in others; the model is as sure as `sure` says of each."""

    def __init__(self, sure: Callable[[np.ndarray], np.ndarray]) -> None:
        self.truth = {d.prompt: picture(d.scene) for part in ("id", "cg") for d in captioned_scenes("dev", part)}
        self.sure, self.calls = sure, 0

    def right(self, seeds: list[int]) -> np.ndarray:
        """(n, T): which tries are right, by seed: now all, now none, now some."""
        return np.array([np.random.default_rng(seed).random(TRIES) < 0.5 for seed in seeds])

    def __call__(self, prompts: list[str], seeds: list[int]) -> tuple[np.ndarray, np.ndarray]:
        self.calls += 1
        right, blank = self.right(seeds), np.full((64, 64, 3), 250, np.uint8)
        images = [
            [self.truth[p] if is_right else blank for is_right in row] for p, row in zip(prompts, right, strict=True)
        ]
        return np.array(images), self.sure(right)


@pytest.fixture(scope="module")
def knowing() -> Report:
    """The report on a model that knows which of its tries is right."""
    return evaluate_tries(SUITE, Choice(Trier(lambda right: 0.2 + 0.6 * right), TRIES), **QUICK)


def test_first_tries_are_graded_as_a_run_of_one_try(knowing):
    trier = Trier(lambda right: 1.0 * right)
    plain = evaluate(SUITE, lambda prompts, seeds: trier(prompts, seeds)[0][:, 0], **QUICK)
    assert knowing.parts == plain.parts and knowing.gap == plain.gap and knowing.n == plain.n
    assert {name: knowing.bounds[name] for name in plain.bounds} == plain.bounds
    assert knowing.settings == plain.settings | {"tries": TRIES}


def test_who_knows_the_right_try_reaches_the_judges_choice(knowing):
    for part in ("id", "cg"):
        one, passed = knowing.parts[part].value("lenient"), knowing.bounds[PASSED][part].value("lenient")
        assert one < passed < 1 and knowing.bounds[CHECKED][part] == knowing.bounds[PASSED][part]
        check = knowing.bounds[SELF_CHECK][part]
        assert check.value("auc") == 1 and check.value("confirmed") == pytest.approx(passed, abs=0.05)


def test_who_is_sure_of_the_wrong_ones_chooses_them(knowing):
    report = evaluate_tries(SUITE, Choice(Trier(lambda right: 1.0 - right), TRIES), **QUICK)
    assert report.parts == knowing.parts and report.bounds[PASSED] == knowing.bounds[PASSED]
    worst = report.bounds[CHECKED]["id"].value("lenient")
    assert worst < report.parts["id"].value("lenient") and report.bounds[SELF_CHECK]["id"].value("auc") == 0


def test_every_try_is_drawn_once(knowing):
    trier = Trier(lambda right: 0.5 + 0 * right)
    report = evaluate_tries(SUITE, Choice(trier, TRIES), **QUICK)
    assert trier.calls == sum(-(-scores.n // SUITE.chunk) for scores in report.parts.values())
    assert report.bounds[CHECKED] == report.parts, "of equal ones the first"
    assert report.bounds[SELF_CHECK]["id"].value("auc") == 0.5


def test_area_is_the_share_of_pairs_in_order():
    """Compared with a count over all pairs."""
    rng = np.random.default_rng(0)
    sure, right = rng.integers(4, size=30) / 4, rng.random(30) < 0.4
    pairs = [(a, b) for (a, x), (b, y) in product(zip(sure, right, strict=True), repeat=2) if x and not y]
    by_hand = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert auc(sure.tolist(), right.tolist()) == pytest.approx(by_hand)
    assert auc([0.3, 0.4], [True, True]) is None


def test_tables_and_ledger_hold_all_three_choices(knowing):
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(table(knowing))
    text = " ".join(console.export_text().split())
    assert all(heading in text for heading in ("confirmed", "passed", "AUC", "twins of 100"))
    assert {len(row) for row in lines(knowing)} == {len(table(knowing).columns)}
    assert any("% confirmed" in note for note in notes(knowing))
    whole = Report.from_json(json.loads(json.dumps(knowing.to_json() | {"quick": False, "split": "test"})))
    record = ledger_record(whole)
    assert record["tries"] == TRIES and record["self_check_auc"] == {"id": 1.0, "cg": 1.0}
    assert record["checked_id"]["lenient"] == record["passed_id"]["lenient"] > record["id"]["lenient"]


@pytest.mark.parametrize("made", [(2, TRIES - 1), (1, TRIES)], ids=["too few tries", "too few items"])
def test_other_numbers_of_images_are_refused(made):
    def call(*_: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((*made, 64, 64, 3), np.uint8), np.zeros(made)

    with pytest.raises(DataError, match="images and finite confidences"):
        evaluate_tries(GenevalSuite(samples=1), Choice(call, TRIES), **QUICK)


@pytest.mark.parametrize("tries", [0, -1, 1.5, 10**6])
def test_a_number_of_tries_that_is_none_is_refused(tries):
    with pytest.raises(ConfigError, match="tries"):
        Choice(lambda *_: (np.zeros(1), np.zeros(1)), tries)


class Hopeful:
    """A talker whose second try of an edit is dark, the others light; it trusts the second one."""

    sampling_noise = 0.5

    def __init__(self) -> None:
        self.turns: list[Any] = []

    def tried(self, turns: Any, seeds: Any, tries: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.turns += turns
        images = torch.ones(len(turns), tries, 3, 64, 64)
        images[:, 1] = -1
        return images, torch.tensor([[0.1, 0.9, *[0.2] * (tries - 2)]] * len(turns))

    def roundtrip(self, images: torch.Tensor, noise_level: float = 0.0, seed: int = 0) -> torch.Tensor:
        return images


def test_tries_of_a_model_cross_the_seam_as_bytes():
    model = Hopeful()
    images, sure = ByteModel(model, 3).edit_tries(np.zeros((2, 64, 64, 3), np.uint8), ["a", "b"], [0, 1])
    assert images.shape == (2, 3, 64, 64, 3) and images.dtype == np.uint8 and sure.shape == (2, 3)
    assert (images[:, 1] == 0).all() and (images[:, [0, 2]] == 255).all()
    ((shown, words), _) = model.turns
    assert (shown == -1).all() and words == "a"


def test_edits_are_scored_with_several_tries():
    report = Scorer(Hopeful(), "dev", quick=True, tries=3).edit(EditSuite(per_operation=(("id", 2), ("cg", 1))))
    assert report.settings["tries"] == 3 and {CHECKED, PASSED, SELF_CHECK} < report.bounds.keys()
    titles = [line[0] for line in lines(report)]
    assert "success, the confirmed one of 3 tries" in titles and "AUC of the self-check" in titles
