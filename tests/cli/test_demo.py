"""The demo page and the score of a model, with a drawer that is never wrong and one that always is."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model_cases import STAGES, tiny_components
from starflow2.cli import demo_conversations as demo_talk
from starflow2.cli.demo import make_demo
from starflow2.core.images import read_metadata, to_bytes, to_floats, to_pil
from starflow2.errors import OutputError
from starflow2.evals import edit as editing
from starflow2.evals import gqa as answering
from starflow2.evals import mme
from starflow2.evals import story as stories
from starflow2.evals.world import score_geneval
from starflow2.pipeline import StarFlow2
from starflow2.world.captions import FAMILIES, suite_drawings
from starflow2.world.edit_operations import OPERATIONS
from starflow2.world.scene import render


class Oracle:
    """Draws the true picture of every prompt of the quick suites, and of no other."""

    sampling_noise = 0.5
    is_joint = False

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


# -- conversations ----------------------------------------------------------------------------------------------------

TALKED = {"w_mme", "w_gqa", "w_edit", "w_story", "encode_calls"}


@pytest.fixture
def _few(monkeypatch):
    """Suites of a few items, and guessers who have read little."""
    monkeypatch.setattr(answering, "MME_IMAGES", 2)
    monkeypatch.setattr(answering, "GQA_SCENES", {"id": 2, "cg": 1})
    monkeypatch.setattr(answering, "PRIOR_ITEMS", 20)
    monkeypatch.setattr(editing, "PER_OPERATION", {"id": 2, "cg": 1})
    monkeypatch.setattr(stories, "STORIES", 2)
    monkeypatch.setattr(stories, "PRIOR_STORIES", 40)
    found = (mme.mme_items, answering.gqa_items, answering._prior_counts, editing._suite)
    cached = (*found, stories._suite, stories._bounds, stories._guesses)
    for made in cached:
        made.cache_clear()
    yield
    for made in cached:
        made.cache_clear()


class Talker(Oracle):
    """Knows every answer, target and story of the test suites; `spoil` may change the blocks of a story."""

    is_joint = True
    roundtrip = staticmethod(lambda images, noise_level=0.0, seed=0: images)

    def __init__(self, wrong: str = "", spoil=lambda story, told: None) -> None:
        super().__init__("test", wrong)
        self.parts.encoder, self.spoil = torch.nn.Identity(), spoil
        items = (*mme.mme_items("test"), *answering.gqa_items("test"))
        self.known = {(i.question.text, render(i.scene).tobytes()): i.question.answer for i in items}
        edits = [edit for part in ("id", "cg") for edit in editing._suite("test", part)]
        self.targets = {(e.instruction, render(e.source).tobytes()): e for e in edits}
        told = [story for part in ("id", "cg") for story in stories._suite("test", part)]
        self.stories = {(*(step.instruction for step in s.steps), s.question): s for s in told}

    def answers(self, images, questions):
        return [
            self.known[q, to_bytes(shown[0][None])[0].tobytes()] for shown, q in zip(images, questions, strict=True)
        ]

    def tower_answers(self, images, questions):
        return ["no"] * len(questions)

    def answers_after(self, pasts, questions):
        rows = zip(pasts, questions, strict=True)
        return [self.stories[(*(said[0] for said, _ in past), question)].answer for past, question in rows]

    def edits(self, images, instructions, seeds):
        rows = zip(to_bytes(images), instructions, strict=True)
        edits = [self.targets[instruction, image.tobytes()] for image, instruction in rows]
        return to_floats(np.stack([render(e.source if e.operation == "move" else e.target) for e in edits]))

    def tell(self, talks, seeds):
        return [self.story(self.stories[tuple(turns)]) for turns in talks]

    def story(self, story):
        told = [[step.sentence, to_floats(render(step.scene)[None])[0]] for step in story.steps]
        told.append([story.answer])
        self.spoil(story, told)
        return told


@pytest.mark.usefixtures("_few")
def test_a_model_that_knows_all_but_moves_is_scored_and_shown_so(tmp_path, monkeypatch):
    monkeypatch.setattr(StarFlow2, "from_pretrained", lambda *_, **__: Talker())
    seen: list[tuple[int, int]] = []
    made = make_demo(str(tmp_path), tmp_path, progress=lambda *now: seen.append(now))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == made.report and set(report) >= TALKED | {"w_geneval"}
    assert report["w_mme"]["id"] == report["w_mme"]["cg"] == 1200 > max(report["w_mme"]["vlm"].values())
    assert report["w_gqa"]["id"] == report["w_gqa"]["cg"] == 1 > max(report["w_gqa"]["vlm"].values())
    assert report["w_edit"] == {"id": pytest.approx(6 / 7), "cg": pytest.approx(6 / 7), "preserved": 1}, "but moves"
    assert report["w_story"] == {"structure": 1, "prefix": 4, "answers": 1} and report["encode_calls"] == 0
    assert seen[-1] == (2, 2), "two stories"

    told = made.talk
    assert [len(turn.marks) for turn in told.story] == [3, 3, 3, 3, 1]
    assert all(fits for turn in told.story for _, fits in turn.marks)
    assert [(e.operation, e.part) for e in told.edits] == [(o, part) for o in OPERATIONS for part in ("id", "cg")]
    assert {e.operation for e in told.edits if e.why} == {"move"} and {e.why for e in told.edits} == {"", "not done"}
    assert len(told.questions) == 8 and all(q.is_right and q.said == q.answer for q in told.questions)

    page = made.page.read_text()
    order = [page.index(f'id="{name}"') for name in ("story", "edits", "questions", "scores")]
    assert order == sorted(order), "the scores come last"
    pictures = len(made.shown) + 4 + 2 * 14 + 8
    assert page.count("data:image/png;base64,") == pictures and page.count("<figure>") == pictures - 4 - 14
    assert all(turn.user in page and turn.assistant[0] in page for turn in told.story)
    assert "stories, answers" in page and "<td>1,200<td>1,200<td>" in page and "<td>0.86<td>0.86<td>" in page
    assert "{" not in re.sub(r"<style>.*</style>", "", page, flags=re.DOTALL)


@pytest.mark.usefixtures("_few")
def test_faults_of_the_shown_story_are_marked_at_their_step_and_escaped():
    def spoil(story, told):
        told[1][0] = "there is <nothing>."
        told[2].pop()
        told[4] = []

    told = demo_talk.talk(Talker(spoil=spoil))
    grades = [[fits for _, fits in turn.marks] for turn in told.story]
    assert grades == [[True] * 3, [False, True, True], [False] * 3, [True, False, False], [False]]
    assert told.report["w_story"] == {"structure": 0, "prefix": 1, "answers": 0}
    page = demo_talk.sections(told)
    assert "there is &lt;nothing&gt;." in page and "<nothing>" not in page and "should be “" in page
    assert page.count("✗") == 1 + 3 + 2 + 1 + 2


@pytest.mark.usefixtures("_few")
def test_a_real_model_of_stage_three_is_measured_and_shown(monkeypatch):
    model = StarFlow2(tiny_components(STAGES))
    told = demo_talk.talk(model)
    assert set(told.report) == TALKED and told.report["encode_calls"] == 0
    assert json.loads(json.dumps(told.report)) == told.report
    assert 0 <= told.report["w_mme"]["vlm"]["id"] <= 1200 and 0 <= told.report["w_edit"]["preserved"] <= 1
    asked = [turn.user for turn in told.story]
    assert asked in [[*(s.instruction for s in story.steps), story.question] for story in stories._suite("test", "id")]
    assert (len(told.story), len(told.edits), len(told.questions)) == (5, 14, 8)
    assert demo_talk.sections(told).count("data:image/png") >= 2 * 14 + 8


def test_encodings_while_a_story_is_told_are_counted(monkeypatch):
    model = StarFlow2(tiny_components(STAGES))
    picture = torch.zeros(1, 3, 64, 64)
    monkeypatch.setattr(model, "tell", lambda talks, seeds: [[["a", model.roundtrip(picture)[0]]] for _ in talks])
    listener = demo_talk._Listener(model)
    listener.tell([["one"], ["two"]], [1, 2])
    model.roundtrip(picture)  # beside any story
    assert [story.encode_calls for story in listener.stories] == [2, 2]
