"""A newcomer's first prompts: true images are right, near misses are not, and every prompt is understood."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from starflow2.errors import PromptError
from starflow2.evals.newcomers import SAMPLES, NewcomersSuite, is_right
from starflow2.evals.runner import ByteModel
from starflow2.evals.suite import evaluate, verify_lock
from starflow2.evals.tables import lines
from starflow2.models.prompts import check_words
from starflow2.models.wording import respelled, words_of
from starflow2.world.content import scene_of
from starflow2.world.detector import detect
from starflow2.world.newcomers import FIRST_PROMPTS
from starflow2.world.questions import known_words
from starflow2.world.scene import Scene, render, stream
from starflow2.world.splits import everything_trains


@pytest.fixture(scope="module")
def scenes() -> dict[str, Scene]:
    """A true scene of every prompt."""
    with everything_trains():
        found = {p.text: scene_of(p.content, stream(5, i)) for i, p in enumerate(FIRST_PROMPTS)}
    assert all(found.values())
    return found


def test_true_images_are_right_and_twins_are_not(scenes):
    truth = evaluate(
        NewcomersSuite(samples=1), lambda prompts, _: np.stack([render(scenes[p]) for p in prompts]), "dev"
    )
    scores = truth.parts["id"]
    assert scores.value("right") == 1 and scores.value("twins") == 0 and truth.n == len(FIRST_PROMPTS) >= 24
    assert lines(truth)[0][0] == "exactly as said" and len(lines(truth)) == len(FIRST_PROMPTS) + 2


def changed(scene: Scene) -> list[Scene]:
    """The scene with one object more, with one less, with another shape, and in another colour."""
    first, *rest = scene.objects
    wrong = [
        (*rest,),
        (replace(first, shape=(first.shape + 1) % 8), *rest),
        (replace(first, color=(first.color + 3) % 8), *rest),
    ]
    return [replace(scene, objects=objects) for objects in wrong if objects]


def test_an_image_with_one_thing_wrong_is_wrong(scenes):
    for prompt in FIRST_PROMPTS:
        if prompt.content.groups[0].color is None:
            continue
        near = changed(scenes[prompt.text])
        scans = detect(np.stack([render(scene) for scene in near]))
        assert not any(is_right(prompt, scan) for scan in scans), prompt.text


def test_a_wrong_background_or_place_is_wrong(scenes):
    tinted = next(p for p in FIRST_PROMPTS if p.content.background is not None)
    other = replace(scenes[tinted.text], background=(tinted.content.background + 2) % 5)
    placed = next(p for p in FIRST_PROMPTS if p.content.groups[0].cell == (1, 1))
    (obj,) = scenes[placed.text].objects
    moved = replace(scenes[placed.text], objects=(replace(obj, x=13.0, y=13.0),))
    wrong, misplaced = detect(np.stack([render(other), render(moved)]))
    assert not is_right(tinted, wrong) and not is_right(placed, misplaced)


def test_every_prompt_is_understood_by_a_model_that_learns_the_world():
    model = SimpleNamespace(
        vocabulary=known_words(),
        tokenizer=SimpleNamespace(drawing_prompt=str.split),
        cfg=SimpleNamespace(max_prompt_tokens=99),
    )
    for prompt in FIRST_PROMPTS:
        check_words(model, prompt.text)
        assert set(words_of(respelled(prompt.text, known_words()))) <= known_words()


class Picky:
    """A talker that refuses every prompt with "me" in it and draws black images for others."""

    def check_prompt(self, prompt: str) -> None:
        if " me " in f" {prompt} ":
            raise PromptError("no")

    def draw(self, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        assert prompts == ["b"] and seeds == [2]
        return -torch.ones(1, 3, 64, 64)

    def tried(self, turns: list[list[str]], seeds: list[int], tries: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert turns == [["b"]] and seeds == [2]
        return -torch.ones(1, tries, 3, 64, 64), torch.ones(1, tries)


def test_a_refused_prompt_is_wrong_and_stops_nothing():
    model, asked = ByteModel(Picky(), 2), (["draw me a", "b", "me"], [1, 2, 3])
    assert [image.mean() for image in model.draw_known(*asked)] == [255, 0, 255]
    images, sure = model.draw_known_tries(*asked)
    assert [image.mean() for image in images] == [255, 0, 255] and sure.tolist() == [[0, 0], [1, 1], [0, 0]]


def test_the_list_is_the_frozen_one_and_test_begins_with_the_seeds_of_users():
    verify_lock(NewcomersSuite())
    items = NewcomersSuite().items("test")["id"]
    assert [job.seed for job in items[:SAMPLES]] == list(range(SAMPLES)) and SAMPLES >= 8
    assert len(NewcomersSuite().quick(items)) == len(FIRST_PROMPTS)
