"""The demo page and the score of a model, with a drawer that is never wrong and one that always is."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from starflow2.data.tasks import FAMILIES, suite_drawings
from starflow2.data.world import render
from starflow2.demo import make_demo
from starflow2.errors import OutputError
from starflow2.evals.world import score_geneval, to_bytes, to_floats
from starflow2.images import read_metadata, to_pil
from starflow2.model import StarFlow2


class Oracle:
    """Draws the true picture of every prompt of the quick suites, and of no other."""

    sampling_noise = 0.5

    def __init__(self, split: str, wrong: str = "") -> None:
        drawings = [d for part in ("id", "cg") for d in suite_drawings("geneval", split, part)]
        self.truth, self.wrong = {d.prompt: render(d.scene) for d in drawings}, wrong
        self.parts = SimpleNamespace(cfg=SimpleNamespace(name="oracle"), state_dict=dict)
        self.levels: list[tuple[float, int]] = []

    def draw(self, prompts, seeds):
        blank = np.full((64, 64, 3), 230, np.uint8)
        return to_floats(np.stack([blank if self.wrong and self.wrong in p else self.truth[p] for p in prompts]))

    def roundtrip(self, images, noise_level=0.0, seed=0):
        self.levels.append((noise_level, seed))
        return images if not noise_level else torch.zeros_like(images)


def test_bytes_and_floats_are_the_pictures_that_are_saved():
    images = torch.rand(2, 3, 8, 8) * 2.4 - 1.2
    assert np.array_equal(to_bytes(images), np.stack([np.asarray(to_pil(image)) for image in images]))
    assert np.array_equal(to_bytes(to_floats(to_bytes(images))), to_bytes(images))


def test_a_drawer_of_true_pictures_scores_one_between_its_floor_and_ceilings():
    oracle, seen = Oracle("dev"), []
    report = score_geneval(oracle, "dev", quick=True, samples=1, parts=("id",), progress=lambda *now: seen.append(now))
    scores = report["parts"]["id"]
    assert scores["overall"]["lenient"]["score"] == 1 > scores["floor"]["lenient"]
    assert report["ceiling"]["clean"]["overall"]["lenient"]["score"] == 1
    assert report["ceiling"]["noise"]["overall"]["lenient"]["score"] == 0
    assert {level for level, _ in oracle.levels} == {0.0, 0.5} and seen[-1] == (48, 48)


def test_the_demo_shows_what_it_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(StarFlow2, "from_pretrained", lambda *_, **__: Oracle("test", wrong="two"))
    (tmp_path / "card.json").write_text('{"hours": 2.5, "w_geneval": {"id": 0.9}, "how": "<b>"}')
    made = make_demo(str(tmp_path), tmp_path / "out")

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == made.report
    assert set(report) == {"commit", "weights_mb", "seconds_per_image", "w_geneval", "card"}
    found = report["w_geneval"]
    assert set(found) == {"id", "cg", "n", "by_category", "fae_ceiling_clean", "fae_ceiling_noise"}
    assert found["n"] == len(made.shown) >= 48 and found["fae_ceiling_clean"] == 1
    assert report["card"]["hours"] == 2.5

    for part in ("id", "cg"):  # the ticks on the page add up to the scores
        for category, score in found["by_category"][part].items():
            verdicts = [s.verdict.correct for s in made.shown if (s.part, s.category) == (part, category)]
            assert np.mean(verdicts) == pytest.approx(score)
    assert set(found["by_category"]["id"]) == {s.category for s in made.shown} == set(FAMILIES)
    assert 0 < found["id"] < 1, "some prompts say two"

    page = made.page.read_text()
    assert page.count("<figure>") == page.count("data:image/png;base64,") == found["n"]
    assert page.count("✗") == sum(not s.verdict.correct for s in made.shown) > 0
    assert "&lt;b&gt;" in page and "{" not in re.sub(r"<style>.*</style>", "", page, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(https?:|//)', page), "the page needs no network"
    assert read_metadata(tmp_path / "out" / "sheet.png")["model"] == "oracle"


def test_a_folder_that_cannot_be_written_is_found_before_drawing(tmp_path, monkeypatch):
    monkeypatch.setattr(StarFlow2, "from_pretrained", lambda *_, **__: pytest.fail("it began"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        make_demo("nano", tmp_path / "file")
