"""Questions by which a model checks pictures: true answers, both equally frequent, nothing held out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from starflow2.core.dialogue import Dialogue
from starflow2.inference.self_check import check_of
from starflow2.training.recipes import nano
from starflow2.world.checks import check_dialogue, done_question, is_done, shows_question
from starflow2.world.content import FAULTS, Content, Group, scene_of, shows, wrong_content
from starflow2.world.edits import random_edit
from starflow2.world.scene import Scene, stream
from starflow2.world.splits import is_trainable
from world_cases import scene_object, text_leaks, texts


@pytest.fixture(scope="module")
def dialogues() -> list[Dialogue]:
    return [check_dialogue(31, index) for index in range(1200)]


def test_no_check_shows_or_says_anything_held_out_whether_right_or_wrong(dialogues):
    for dialogue in dialogues:
        assert all(is_trainable(scene) for scene in dialogue.pictures), dialogue
        assert not [leak for text in texts(dialogue) for leak in text_leaks(text)], dialogue


def test_yes_and_no_are_equally_frequent_for_captions_and_for_requests(dialogues):
    answers = Counter()
    for dialogue in dialogues:
        for turn in dialogue.turns:
            if turn.learns:
                answers[turn.user[-1].startswith("does the picture show"), turn.assistant[0]] += 1
    for is_caption in (True, False):
        yes, no = answers[is_caption, "yes"], answers[is_caption, "no"]
        assert yes + no > 300 and 0.42 < yes / (yes + no) < 0.58, answers


def test_a_picture_in_the_place_of_a_drawing_is_read_and_not_learnt(dialogues):
    in_place = [d for d in dialogues if not d.turns[0].learns]
    assert 0.55 < len(in_place) / len(dialogues) < 0.8
    for dialogue in in_place:
        *shown, asked = [turn for turn in dialogue.turns if not turn.learns] + [dialogue.turns[-1]]
        assert all(isinstance(turn.assistant[-1], Scene) for turn in shown) and asked.assistant[0] in ("yes", "no")


def test_each_fault_makes_a_scene_that_does_not_show_the_caption():
    content = Content((Group(0, color=1, size=0), Group(7, color=2)), "left of", background=1)
    seen = Counter()
    for index in range(300):
        rng = stream(32, index)
        fault, wrong = wrong_content(content if index % 2 else replace(content, relation=None), rng)
        scene = scene_of(wrong, rng)
        if scene is not None:
            seen[fault] += 1
            assert shows(scene, wrong)
            if fault == "twin":
                assert len({obj.shape for obj in scene.objects}) == 1 and not shows(scene, content)
            if fault in ("missing", "extra", "count"):
                assert len(scene.objects) != 2 and not shows(scene, content)
    assert set(seen) == set(FAULTS) - {"place"}


def test_a_scene_shows_a_content_only_if_nothing_else_is_there():
    star, ring = scene_object(3, x=12, y=12), scene_object(5, x=50, y=50, color=1)
    scene = Scene(objects=(star, ring), background=0)
    assert shows(scene, Content((Group(3), Group(5, color=1)))) and not shows(scene, Content((Group(3),)))
    assert shows(scene, Content((Group(3, cell=(0, 0)), Group(5, cell=(2, 2)))))
    assert not shows(scene, Content((Group(3, cell=(0, 1)), Group(5))))
    assert not shows(scene, Content((Group(3, size=0), Group(5)))), "the star is large"
    assert shows(scene, Content((Group(5), Group(3)), "right of")) and not shows(scene, Content((Group(3, count=2),)))


def test_an_added_object_whose_place_is_open_may_stand_anywhere_but_must_look_as_asked():
    steps = (random_edit(stream(33, index), operation="add").step for index in range(60))
    step = next(step for step in steps if step.is_free and step.beside is None)
    *rest, new = step.target.objects
    for obj, is_right in ((replace(new, x=new.x + 1), True), (replace(new, color=(new.color + 1) % 8), False)):
        assert is_done(step, replace(step.target, objects=(*rest, obj))) is is_right
    assert not is_done(step, step.source)


def test_questions_hold_the_words_of_the_prompt_without_their_full_stop():
    assert shows_question("two red hearts.") == "does the picture show two red hearts?"
    assert done_question("can you make it blue?") == "was can you make it blue done, and nothing else changed?"
    cfg = nano().model
    for words in ("two red hearts.", "can you draw a star?"):
        assert [q.text for q in check_of(cfg, words, follows=False)] == [shows_question(words)], (
            "the model asks what it was taught"
        )
        assert [q.text for q in check_of(cfg, words, follows=True)] == [done_question(words)]
