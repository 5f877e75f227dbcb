"""The demo page and the score of a model, with a drawer that is never wrong and one that always is."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model_cases import STAGES, tiny_components
from starflow2.cli.demo_conversations import DemoSuites, ModelLog, score_conversations, sections
from starflow2.cli.demo_page import check_folder, make_demo
from starflow2.core.images import read_metadata, to_bytes, to_floats, to_pil
from starflow2.errors import OutputError
from starflow2.evals.edit import EditSuite
from starflow2.evals.geneval import captioned_scenes, score_geneval
from starflow2.evals.gqa import GqaSuite
from starflow2.evals.mme import MmeSuite
from starflow2.evals.story import StorySuite
from starflow2.pipeline import StarFlow2
from starflow2.world.edit_operations import OPERATIONS
from starflow2.world.grammar import FAMILIES
from world_cases import picture


class Oracle:
    """Draws the true picture of every prompt of the quick suites, and of no other."""

    sampling_noise = 0.5
    is_joint = False

    def __init__(self, split: str, wrong: str = "") -> None:
        drawings = [d for part in ("id", "cg") for d in captioned_scenes(split, part)]
        self.truth, self.wrong = {d.prompt: picture(d.scene) for d in drawings}, wrong
        self.components = SimpleNamespace(cfg=SimpleNamespace(name="oracle"), state_dict=dict)
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
    assert report.parts["id"].value("lenient") == 1 > report.bounds["floor"]["id"].value("lenient")
    assert report.bounds["clean"]["id"].value("lenient") == 1
    assert report.bounds["noise"]["id"].value("lenient") == 0
    assert {level for level, _ in oracle.levels} == {0.0, 0.5} and seen[-1] == (48, 48)


def test_the_demo_shows_what_it_scored(tmp_path):
    (tmp_path / "card.json").write_text('{"hours": 2.5, "w_geneval": {"id": 0.9}, "how": "<b>"}')
    made = make_demo(Oracle("test", wrong="two"), str(tmp_path), tmp_path / "out")

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == made.summary()
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


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        check_folder(tmp_path / "file")


# -- conversations ----------------------------------------------------------------------------------------------------

TALKED = {"w_mme", "w_gqa", "w_edit", "w_story", "encode_calls"}


FEW = DemoSuites(  # suites of a few items, and guessers who have read little
    mme=MmeSuite(images=2),
    gqa=GqaSuite(scenes=(("id", 2), ("cg", 1)), prior_items=20),
    edit=EditSuite(per_operation=(("id", 2), ("cg", 1))),
    story=StorySuite(stories=2, prior_stories=40),
)


def tasks(suite):
    """The edits or stories of both parts of the test split."""
    return [item.task for items in suite.items("test").values() for item in items]


class Talker(Oracle):
    """Knows every answer, target and story of the test suites; `spoil` may change the blocks of a story."""

    is_joint = True
    roundtrip = staticmethod(lambda images, noise_level=0.0, seed=0: images)

    def __init__(self, wrong: str = "", spoil=lambda story, replies: None) -> None:
        super().__init__("test", wrong)
        self.components.codec, self.spoil = SimpleNamespace(encoder=torch.nn.Identity()), spoil
        items = (*FEW.mme.items("test")["all"], *FEW.gqa.items("test")["all"])
        self.known = {(i.question.text, picture(i.scene).tobytes()): i.question.answer for i in items}
        self.targets = {(e.instruction, picture(e.source).tobytes()): e for e in tasks(FEW.edit)}
        self.stories = {(*(step.instruction for step in s.steps), s.question): s for s in tasks(FEW.story)}

    def answers(self, images, questions):
        return [
            self.known[q, to_bytes(shown[0][None])[0].tobytes()] for shown, q in zip(images, questions, strict=True)
        ]

    def tower_answers(self, images, questions):
        return ["no"] * len(questions)

    def answers_after(self, pasts, questions):
        rows = zip(pasts, questions, strict=True)
        return [self.stories[(*(user[0] for user, _ in past), question)].answer for past, question in rows]

    def edits(self, images, instructions, seeds):
        rows = zip(to_bytes(images), instructions, strict=True)
        edits = [self.targets[instruction, image.tobytes()] for image, instruction in rows]
        return to_floats(np.stack([picture(e.source if e.operation == "move" else e.target) for e in edits]))

    def tell(self, talks, seeds):
        return [self.story(self.stories[tuple(turns)]) for turns in talks]

    def story(self, story):
        replies = [[step.sentence, to_floats(np.stack([picture(step.scene)]))[0]] for step in story.steps]
        replies.append([story.answer])
        self.spoil(story, replies)
        return replies


def test_a_model_that_knows_all_but_moves_is_scored_and_shown_so(tmp_path):
    seen: list[tuple[int, int]] = []
    made = make_demo(Talker(), str(tmp_path), tmp_path, progress=lambda *now: seen.append(now), suites=FEW)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == made.summary() and set(report) >= TALKED | {"w_geneval"}
    assert report["w_mme"]["id"] == report["w_mme"]["cg"] == 1200 > max(report["w_mme"]["vlm"].values())
    assert report["w_gqa"]["id"] == report["w_gqa"]["cg"] == 1 > max(report["w_gqa"]["vlm"].values())
    assert report["w_edit"] == {"id": pytest.approx(6 / 7), "cg": pytest.approx(6 / 7), "preserved": 1}, "but moves"
    assert report["w_story"] == {"structure": 1, "prefix": 4, "answers": 1} and report["encode_calls"] == 0
    assert seen[-1] == (2, 2), "two stories"

    shown = made.conversations
    assert [len(turn.marks) for turn in shown.story] == [3, 3, 3, 3, 1]
    assert all(fits for turn in shown.story for _, fits in turn.marks)
    assert [(e.operation, e.part) for e in shown.edits] == [(o, part) for o in OPERATIONS for part in ("id", "cg")]
    assert {e.operation for e in shown.edits if e.faults} == {"move"} and {e.faults for e in shown.edits} == {
        "",
        "not done",
    }
    assert len(shown.questions) == 8 and all(q.is_right and q.answer == q.truth for q in shown.questions)

    page = made.page.read_text()
    order = [page.index(f'id="{name}"') for name in ("story", "edits", "questions", "scores")]
    assert order == sorted(order), "the scores come last"
    pictures = len(made.shown) + 4 + 2 * 14 + 8
    assert page.count("data:image/png;base64,") == pictures and page.count("<figure>") == pictures - 4 - 14
    assert all(turn.user in page and turn.assistant[0] in page for turn in shown.story)
    assert "stories, answers" in page and "<td>1,200<td>1,200<td>" in page and "<td>0.86<td>0.86<td>" in page
    assert "{" not in re.sub(r"<style>.*</style>", "", page, flags=re.DOTALL)


def test_faults_of_the_shown_story_are_marked_at_their_step_and_escaped():
    def spoil(story, replies):
        replies[1][0] = "there is <nothing>."
        replies[2].pop()
        replies[4] = []

    shown = score_conversations(Talker(spoil=spoil), suites=FEW)
    grades = [[fits for _, fits in turn.marks] for turn in shown.story]
    assert grades == [[True] * 3, [False, True, True], [False] * 3, [True, False, False], [False]]
    assert shown.summary()["w_story"] == {"structure": 0, "prefix": 1, "answers": 0}
    page = sections(shown)
    assert "there is &lt;nothing&gt;." in page and "<nothing>" not in page and "should be “" in page
    assert page.count("✗") == 1 + 3 + 2 + 1 + 2


def test_a_real_model_of_stage_three_is_measured_and_shown():
    shown = score_conversations(StarFlow2(tiny_components(STAGES)), suites=FEW)
    summary = shown.summary()
    assert set(summary) == TALKED and summary["encode_calls"] == 0
    assert json.loads(json.dumps(summary)) == summary
    assert 0 <= summary["w_mme"]["vlm"]["id"] <= 1200 and 0 <= summary["w_edit"]["preserved"] <= 1
    asked = [turn.user for turn in shown.story]
    assert asked in [[*(s.instruction for s in story.steps), story.question] for story in tasks(FEW.story)]
    assert (len(shown.story), len(shown.edits), len(shown.questions)) == (5, 14, 8)
    assert sections(shown).count("data:image/png") >= 2 * 14 + 8


def test_encodings_while_a_story_is_told_are_counted():
    class Encoding(StarFlow2):
        """Encodes once per conversation."""

        def tell(self, talks, seeds):
            return [[["a", self.roundtrip(torch.zeros(1, 3, 64, 64))[0]]] for _ in talks]

    model = Encoding(tiny_components(STAGES))
    log = ModelLog(model)
    log.tell([["one"], ["two"]], [1, 2])
    model.roundtrip(torch.zeros(1, 3, 64, 64))  # beside any story
    assert [story.encode_calls for story in log.stories] == [2, 2]
