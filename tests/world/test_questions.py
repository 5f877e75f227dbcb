"""Questions about one image: nothing held out is asked in training, answers are true and balanced."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from starflow2.errors import ConfigError
from starflow2.world.questions import (
    HELD_OUT_CHAINS,
    SUBTASKS,
    chain,
    known_words,
    questions,
    understanding_task,
    yes_no_pair,
)
from starflow2.world.scene import SHAPES, Scene, relations, stream
from starflow2.world.splits import bucket
from world_cases import NUMBERS, PLURALS, leaks, text_leaks, words


@pytest.mark.timeout(900)
@pytest.mark.parametrize("items", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_training_question_shows_or_says_anything_held_out(items):
    for index in range(items):
        scene, pairs = understanding_task(11, index)
        assert not leaks(scene), scene
        assert not any(text_leaks(question) or text_leaks(answer) for question, answer in pairs), pairs


def test_training_questions_are_pure_functions_of_seed_and_index():
    items = [understanding_task(3, i) for i in range(50)]
    assert items == [understanding_task(3, i) for i in reversed(range(50))][::-1]
    assert all(bucket(understanding_task(4, i)[0]) == "train" for i in range(500))


@pytest.mark.parametrize("items", [200, pytest.param(2_000, marks=pytest.mark.slow)])
def test_the_list_of_known_words_covers_questions_and_answers(items):
    for index in range(items):
        assert all(known_words().issuperset(words(q + " " + a)) for q, a in understanding_task(9, index)[1])


def test_training_never_asks_a_held_out_chain_and_cg_asks_nothing_else():
    def has(program: tuple[str, ...], split: str) -> bool:
        found = chain(program)
        return any(
            found[start : start + len(part)] == part for part in HELD_OUT_CHAINS[split] for start in range(len(found))
        )

    made: Counter[str] = Counter()
    for index in range(200):
        scene, _ = understanding_task(13, index)
        for question in questions(scene, stream(index), most=20):
            assert not has(question.program, "dev") and not has(question.program, "test")
        for split in ("dev", "test"):
            for question in questions(scene, stream(index), split=split):
                assert has(question.program, split)
                made[split] += 1
    assert min(made.values()) > 200


def test_yes_and_no_are_balanced_in_every_kind_of_question():
    answers: dict[str, Counter[str]] = {}
    for index in range(1000):
        scene, _ = understanding_task(14, index)
        for question in questions(scene, stream(index), most=20):
            if question.answer in ("yes", "no"):
                answers.setdefault(question.kind, Counter())[question.answer] += 1
    assert set(answers) >= {*SUBTASKS, "logical", "compare"}
    for kind, counts in answers.items():
        assert 0.4 < counts["yes"] / counts.total() < 0.6, (kind, counts)


def test_one_word_answers_are_one_known_word_and_lists_name_every_object():
    for index in range(300):
        scene, pairs = understanding_task(15, index)
        (_, described), (_, listed), *asked = pairs
        for obj in scene.objects:
            assert str(obj) in described and str(obj) in listed
        assert listed.count(",") == len(scene.objects) - 1 and len(asked) + 1 >= 3
        assert all(len(words(answer)) == 1 for _, answer in asked)


def true_answer(scene: Scene, question: str) -> str | None:
    """An independent reading of the plainest questions; None for the others."""
    objects = [(t, str(t).split()) for t in scene.objects]
    if match := re.fullmatch(r"how many (\w+ )?(\w+) are (?:there|in the picture)\?", question):
        color, noun = (match[1] or "").strip(), match[2]
        shape = None if noun == "objects" else SHAPES[PLURALS.index(noun)]
        return NUMBERS[sum((not color or color in w) and shape in (None, w[2]) for _, w in objects)]
    if match := re.match(r"is there an? (?:(\w+) )?(\w+)(?: in the picture)?\?", question):
        return "yes" if any(match[2] == w[2] and match[1] in (None, w[1]) for _, w in objects) else "no"
    if match := re.fullmatch(r"what (color|shape|size) is the (.+)\?", question):
        named = [w for _, w in objects if set(match[2].split()) - {"object"} <= set(w)]
        return named[0][("size", "color", "shape").index(match[1])] if len(named) == 1 else None
    if match := re.match(r"is the (.+?) (left of|right of|above|below) the ([a-z ]+)\?", question):
        a, b = ([t for t, w in objects if set(m.split()) - {"object"} <= set(w)] for m in (match[1], match[3]))
        return ("no", "yes")[match[2] in relations(a[0], b[0])] if len(a) == len(b) == 1 else None
    return None


def test_answers_agree_with_an_independent_reading_of_the_picture():
    checked: Counter[str] = Counter()
    for index in range(800):
        scene, _ = understanding_task(16, index)
        for question in questions(scene, stream(index), most=20):
            answer = true_answer(scene, question.text)
            if answer is not None:
                assert answer == question.answer, (scene, question)
                checked[question.kind] += 1
    assert all(checked[kind] > 100 for kind in ("count", "existence", "query", "position")), checked


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_a_no_question_is_a_minimal_change_of_the_yes_question(subtask):
    made = 0
    for index in range(300):
        scene, _ = understanding_task(17, index)
        pair = yes_no_pair(scene, stream(index), subtask, split="test")
        if pair is not None:
            yes, no = pair
            made += 1
            assert (yes.answer, no.answer) == ("yes", "no") and yes.program == no.program
            changed = set(words(yes.text)) ^ set(words(no.text))
            assert 0 < len(changed - {"a", "an", "is", "are", "of", "to", "the", "on", "side"}) <= 4
    assert made > 100


def test_an_unknown_subtask_is_named():
    with pytest.raises(ConfigError, match="subtask"):
        yes_no_pair(understanding_task(0, 0)[0], stream(0), "colour")
