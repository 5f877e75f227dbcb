"""Suites by name: tensors meet bytes at the seam, sessions go on and back, and reports say what a suite measured."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from starflow2.errors import ConfigError
from starflow2.evals.edit import EditSuite
from starflow2.evals.gqa import GqaSuite
from starflow2.evals.mme import MmeSuite
from starflow2.evals.runner import ByteModel, Scorer, SuiteName, score_suite
from starflow2.world.stories import suite_stories


class Talking:
    """A session that draws in turn what is darker by one step; `log` is everything that it was ever given."""

    def __init__(self) -> None:
        self.history: list[object] = []
        self.log: list[object] = []
        self.tries: list[int | None] = []

    def add(self, *parts: object) -> Talking:
        words = [p if isinstance(p, str) else "picture" for p in parts]
        self.history += words
        self.log += words
        return self

    def draw(self, *, tries: int | None = None) -> Any:
        self.tries.append(tries)
        image = torch.full((3, 64, 64), 1 - 0.1 * len(self.history))
        return SimpleNamespace(picture=SimpleNamespace(image=image))

    def mark(self) -> int:
        return len(self.history)

    def rewind(self, mark: int) -> None:
        del self.history[mark:]


class Fake:
    """A talker that does nothing well, and remembers what it was given."""

    sampling_noise = 0.5

    def __init__(self) -> None:
        self.noise: list[float] = []
        self.pasts: Sequence[Any] = ()
        self.shown: list[int] = []
        self.sessions: list[Talking] = []

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return torch.ones(len(prompts), 3, 64, 64)

    def roundtrip(self, images: Tensor, noise_level: float = 0.0, seed: int = 0) -> Tensor:
        self.noise.append(noise_level)
        return images

    def answers(self, images: Sequence[Sequence[Tensor]], questions: Sequence[str]) -> list[str]:
        self.shown += [len(some) for some in images]
        return ["yes"] * len(questions)

    def answers_after(self, pasts: Sequence[Any], questions: Sequence[str]) -> list[str]:
        self.pasts = pasts
        return ["after"] * len(questions)

    def session(self, *, seed: int = 0) -> Any:
        self.sessions.append(Talking())
        return self.sessions[-1]

    def tower_answers(self, images: Tensor, questions: Sequence[str]) -> list[str]:
        return ["no"] * len(questions)

    def edits(self, images: Tensor, instructions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return -images

    def tell(self, talks: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[list[list[str | Tensor]]]:
        return [[["words", torch.zeros(3, 64, 64)] for _ in talk] for talk in talks]


def test_every_suite_has_a_file_of_its_name():
    assert all(find_spec(f"starflow2.evals.{name}") for name in get_args(SuiteName))


def test_pictures_cross_the_seam_as_bytes_and_back():
    images = np.zeros((2, 64, 64, 3), np.uint8)
    images[1] = 255
    assert (ByteModel(Fake()).edit(images, ["a", "b"], [0, 1]) == 255 - images).all()
    assert (ByteModel(Fake()).draw(["a"], [0]) == 255).all()


def test_replies_come_back_as_words_and_bytes():
    ((first, _),) = ByteModel(Fake()).reply([["one", "two"]], [0])
    words, image = first
    assert words == "words" and image.shape == (64, 64, 3) and image.dtype == np.uint8


@pytest.mark.parametrize("images", [np.full((1, 4, 64, 64, 3), 255, np.uint8), None], ids=["pictures", "words"])
def test_questions_after_the_true_story_come_after_its_words_with_and_without_its_pictures(images):
    story, fake = suite_stories("dev", "id", 1)[0], Fake()
    assert ByteModel(fake).answer_story([story], images) == ["after"]
    (past,) = fake.pasts
    assert [user for user, _ in past] == [[step.instruction] for step in story.steps]
    for step, (_, reply) in zip(story.steps, past, strict=True):
        assert reply[0] == step.sentence and len(reply) == (1 if images is None else 2)
        assert images is None or (reply[1] == 1).all()


def test_questions_about_any_number_of_pictures():
    picture, fake = np.zeros((64, 64, 3), np.uint8), Fake()
    assert len(ByteModel(fake).answer_many([[picture, picture], [], [picture]], ["a", "b", "c"])) == 3
    assert fake.shown == [2, 0, 1]


def test_edits_of_a_session_go_on_from_the_picture_there_is_and_going_back_forgets():
    source, fake = np.full((64, 64, 3), 255, np.uint8), Fake()
    for turns in (1, 2):
        edited = ByteModel(fake).start(source, 7)
        first, second = edited.edit("a"), edited.edit("b")
        assert first.mean() > second.mean()
        assert np.array_equal(edited.undo(turns), first if turns == 1 else source)
        third = edited.edit("c")
        assert np.array_equal(third, second if turns == 1 else first), "as many words since, so as dark"
    logs = [session.log for session in fake.sessions]
    assert logs == [["picture", "a", "b", "c"], ["picture", "a", "b", "picture", "c"]]
    assert all(session.tries == [1, 1, 1] for session in fake.sessions), "the plain sample, whatever the model's own"
    ByteModel(fake, 4).start(source, 7).edit("a")
    assert fake.sessions[-1].tries == [4]


def test_understanding_is_set_beside_the_language_models_own():
    scorer = Scorer(Fake(), "dev", quick=True)
    report = scorer.mme(MmeSuite(images=8))
    assert report.parts["all"].value("yes_share") == 1 and report.bounds["vlm"]["all"].value("yes_share") == 0
    report = scorer.gqa(GqaSuite(scenes=(("id", 8), ("cg", 8)), prior_items=20))
    assert set(report.bounds["vlm"]) == set(report.parts) == {"id", "cg", "all"}


def test_a_quick_run_of_edits_leaves_the_costly_control_out_and_looks_through_the_clean_codec():
    fake = Fake()
    report = Scorer(fake, "dev", quick=True).edit(EditSuite(per_operation=(("id", 2), ("cg", 1))))
    assert set(report.bounds) == {"copy", "ceiling"} and report.settings["has_codec"] and set(fake.noise) == {0.0}


def test_an_unknown_suite_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match='Did you mean "story"'):
        score_suite(Fake(), "storys", "dev")


@pytest.mark.parametrize("suite", ["mme", "gqa", "mcq", "dpg"])
def test_several_tries_of_a_suite_without_them_are_refused(suite):
    with pytest.raises(ConfigError, match="suite with several tries"):
        score_suite(Fake(), suite, "dev", tries=4)
