"""Lettered options: answers are true, letters are fair, the suites hold what they promise and grade as they say."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest

from starflow2.errors import ConfigError, DataError
from starflow2.evals.mcq import BENCHMARKS, McqSuite, choice_items, first_letter, leading_letter, text_prior
from starflow2.evals.statistics import Score
from starflow2.evals.suite import Report, evaluate, verify_lock
from starflow2.world.multiple_choice import DIMENSIONS, choice_about, choice_words
from starflow2.world.questions import known_words
from starflow2.world.riddles import OPEN_RIDDLES, RIDDLES, riddle, riddle_words
from starflow2.world.sampling import sample_split_scene
from starflow2.world.scene import COLORS, SHAPES, relations, render, stream
from starflow2.world.splits import bucket, held_out, is_trainable, scene_key
from starflow2.world.words import NUMBERS


def all_items(split="dev"):
    return [item for suite in BENCHMARKS for item in choice_items(suite, split)]


def key(images, text):
    return (b"".join(image.tobytes() for image in images), text)


class Knower:
    """Looks the right answer up by pictures and words; remembers how much it was asked."""

    def __init__(self, split="dev"):
        self.truth = {
            key([render(scene) for scene in item.choice.scenes], item.choice.text): item.choice.reply
            for item in all_items(split)
        }
        self.asked = 0

    def __call__(self, images, texts):
        self.asked += len(texts)
        return [self.truth[key(shown, text)].upper() for shown, text in zip(images, texts, strict=True)]


@pytest.fixture(scope="module")
def knower():
    return Knower()


def true_answer(choice) -> str | None:
    """An independent reading of the plainest questions; None for the others."""
    things = choice.scenes[0].objects
    named = {f"{COLORS[t.color]} {SHAPES[t.shape]}" for t in things}
    if choice.question == "which object is in the picture?":
        (found,) = [o for o in choice.options if o.split(" ", 1)[1] in named]
        return found
    if match := re.fullmatch(r"what color is the (\w+)\?", choice.question):
        return next((COLORS[t.color] for t in things if SHAPES[t.shape] == match[1]), None)
    if match := re.fullmatch(r"where is the ([\w ]+), seen from the ([\w ]+)\?", choice.question):
        a, b = ([t for t in things if set(name.split()) - {"object"} <= set(str(t).split())] for name in match.groups())
        return next(iter(relations(a[0], b[0]))) if len(a) == len(b) == 1 else None
    if match := re.fullmatch(r"how many (\w+) objects are there\?", choice.question):
        return NUMBERS[sum(COLORS[t.color] == match[1] for t in things)]
    if match := re.fullmatch(r"in this game (.*)\. which object wins\?", choice.question):
        beaten = {rule.split(" beats ")[1] for rule in match[1].split(" and ")}
        (winner,) = [t for t in things if COLORS[t.color] not in beaten]
        return SHAPES[winner.shape]
    if match := re.match(r"in this game a (\w+) counts two", choice.question):
        words = ("one", "two", "three", "four", "five", "six", "seven", "eight")
        return words[sum(1 + (SHAPES[t.shape] == match[1]) for t in things) - 1]
    return None


def test_answers_are_true_by_another_reading_of_the_questions():
    checked = Counter()
    for item in all_items():
        truth = true_answer(item.choice)
        if truth is not None:
            assert truth == item.choice.answer, item.choice
            checked[item.choice.kind] += 1
    assert set(checked) >= {"identity", "attribute", "relation", "counting", "beats", "points"}
    assert checked.total() > 200


@pytest.mark.parametrize("kind", (*RIDDLES, *OPEN_RIDDLES))
def test_training_riddles_show_trainable_pictures_and_only_known_words(kind):
    for index in range(40):
        made = riddle(stream(5, index), kind)
        assert all(is_trainable(scene) for scene in made.scenes)
        known = choice_words() | riddle_words() | known_words()
        assert set(re.findall(r"[a-z]+", made.text + " " + made.answer)) <= known
        assert made.answer in (made.options or (made.answer,)) and len(set(made.options)) == len(made.options)


@pytest.mark.parametrize("kind", DIMENSIONS)
def test_wrong_options_in_training_name_nothing_held_out_and_are_all_different(kind):
    for index in range(60):
        rng = stream(6, index)
        made = choice_about(sample_split_scene(rng), rng, kind, num_options=2 + index % 3)
        if made is not None:
            assert len(set(made.options)) == 2 + index % 3
            for option in made.options:
                for color, shape in re.findall(r"(\w+) (\w+)", re.sub(r"\b(?:an?|and) ", "", option)):
                    if color in COLORS and shape in SHAPES:
                        assert (COLORS.index(color) + 3 * SHAPES.index(shape)) % 4 != 0, option


def test_rotations_move_every_option_through_every_letter():
    made = next(item.choice for item in choice_items("mmb", "dev") if len(item.choice.options) == 4)
    turned = [made.rotated(steps) for steps in range(4)]
    assert {t.reply for t in turned} == set("abcd") and {t.answer for t in turned} == {made.answer}
    assert made.rotated(4) == made


# --------------------------------------------------------------------------------------------------------- items


@pytest.mark.parametrize("split", ["dev", "test"])
def test_suites_hold_what_they_promise(split):
    for suite, count in BENCHMARKS.items():
        items = choice_items(suite, split)
        by_base = {item.base: item for item in reversed(items)}
        assert len(by_base) == count and sum(item.part == "cg" for item in by_base.values()) == count // 2
        shown = {tuple((s.background, *scene_key(s)) for s in item.choice.scenes) for item in by_base.values()}
        assert len(shown) == count
        other = {"dev": "test", "test": "dev"}[split]
        for item in by_base.values():
            assert all(bucket(s) == split and not held_out(s, other) for s in item.choice.scenes)
            found = set().union(*(held_out(s, split) for s in item.choice.scenes))
            assert found == ({"pair"} if item.part == "cg" else set())
    sizes = Counter(len(item.choice.options) for item in choice_items("mmb", split))
    assert sizes[2] % 2 == sizes[3] % 3 == sizes[4] % 4 == 0 and set(sizes) == {2, 3, 4}
    assert {len(item.choice.options) for item in choice_items("seed", split)} == {4}
    riddles = choice_items("mmmu", split)
    assert sum(not item.choice.options for item in riddles) == 38, "three in ten are open"
    assert {item.choice.kind for item in riddles} == {*RIDDLES, *OPEN_RIDDLES}
    for item in riddles:
        assert len(item.choice.scenes) >= 2 or item.choice.text.startswith("in this game")


def test_letters_of_right_answers_are_fair():
    letters = Counter(item.choice.reply for item in choice_items("seed", "dev"))
    assert set(letters) == set("abcd") and max(letters.values()) < 0.32 * letters.total()


def test_the_suites_are_the_frozen_ones():
    verify_lock(McqSuite())


# ------------------------------------------------------------------------------------------------------- grading


def test_who_knows_the_truth_scores_all_of_it_and_the_report_survives_json(knower):
    before, done = knower.asked, []
    report = evaluate(McqSuite(), knower, "dev", progress=lambda n, total: done.append((n, total)))
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert report.n == knower.asked - before == len(all_items()) and done[-1] == (report.n, report.n)
    for benchmark, count in BENCHMARKS.items():
        assert report.gap.by_kind[benchmark].value("accuracy") == 0
        for name, scores in report.parts.items():
            part, floor = scores.by_kind[benchmark], report.bounds["floor"][name].by_kind[benchmark]
            assert part.n == count // (1 if name == "all" else 2)
            assert part["accuracy"] == Score(1.0, 1.0, 1.0) and part.value("parsed") == 1
            assert set(floor.columns) >= {"chance", "prior"}
            assert ("circular" in part.columns) == ("circular_chance" in floor.columns) == (benchmark == "mmb")


def test_who_answers_by_chance_scores_near_the_floor():
    rng = np.random.default_rng(0)
    report = evaluate(McqSuite(), lambda images, texts: rng.choice(list("abcd"), len(texts)).tolist(), "dev")
    scores, floor = report.parts["all"].by_kind, report.bounds["floor"]["all"].by_kind
    assert 0.19 < scores["seed"].value("accuracy") < 0.31 and floor["seed"].value("chance") == 0.25
    assert scores["mmb"].value("circular") < 0.08 < scores["mmb"].value("accuracy") < 0.42
    assert floor["mmb"].value("circular_chance") == pytest.approx(np.mean([1 / 4, 1 / 27, 1 / 256]), abs=0.03)


def test_who_always_says_the_same_letter_fails_every_rotation_but_not_every_question():
    report = evaluate(McqSuite(), lambda images, texts: ["a"] * len(texts), "dev", quick=True)
    part = report.parts["all"].by_kind["mmb"]
    assert part.value("circular") == 0 < part.value("accuracy")


def test_the_question_only_prior_is_near_chance():
    """It reads what training's questions give away; were it far above a guess, the options would."""
    rates = {}
    for benchmark in BENCHMARKS:
        items = [item for item in choice_items(benchmark, "dev") if item.choice.options]
        rates[benchmark] = np.mean([text_prior(i.choice) == i.choice.answer for i in items]) - np.mean(
            [i.chance for i in items]
        )
    assert all(rate < 0.1 for rate in rates.values()), rates


def test_a_quick_run_asks_an_eighth_with_all_rotations(knower):
    before = knower.asked
    report = evaluate(McqSuite(), knower, "dev", quick=True)
    assert report.n == knower.asked - before < len(all_items()) / 5
    scores = report.parts["all"].by_kind
    assert all(row.value("accuracy") == 1 for row in scores.values()) and scores["mmb"].value("circular") == 1


def test_letters_are_read_by_the_rules_of_their_suites():
    assert [first_letter(text) for text in (" B", "cat", "the answer is b", "")] == ["b", "c", "", ""]
    assert [leading_letter(text) for text in ("(d) red", "cat", "b. blue", "answer b")] == ["d", "", "b", ""]


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ConfigError, match="split"):
        evaluate(McqSuite(), lambda images, texts: texts, "train")
    for bad in (lambda images, texts: texts[1:], lambda images, texts: [None] * len(texts)):
        with pytest.raises(DataError, match="texts"):
            evaluate(McqSuite(), bad, "dev", quick=True)
    scene = sample_split_scene(stream(0))
    for wrong in ({"kind": "colour"}, {"kind": "scene", "num_options": 5}):
        with pytest.raises(ConfigError, match="expected"):
            choice_about(scene, stream(0), **wrong)
    with pytest.raises(ConfigError, match="kind"):
        riddle(stream(0), "sudoku")
    with pytest.raises(ConfigError, match="novel"):
        sample_split_scene(stream(0), novel=True)
