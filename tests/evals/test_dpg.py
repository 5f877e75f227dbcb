"""W-DPG: prompts say what their scenes show, trees ask what prompts say, and the arithmetic is DPG-Bench's."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from starflow2.errors import ConfigError, DataError
from starflow2.evals.dpg import DpgSuite, answers, image_score, soft_score
from starflow2.evals.geneval import SAMPLES
from starflow2.evals.statistics import Score
from starflow2.evals.suite import Report, ceiling, evaluate, verify_lock
from starflow2.world.dense_prompts import CATEGORIES, PROMPTS, Node, suite_dense
from starflow2.world.detector import detect
from starflow2.world.questions import known_words
from starflow2.world.scene import BACKGROUND_NAMES, COLORS, SHAPES, relations, render
from starflow2.world.splits import bucket, held_out, scene_key
from starflow2.world.words import NUMBERS


def drawer(split="dev", change=lambda scene, seed: scene):
    """Draws the scene of each prompt, changed as asked."""
    scenes = {item.prompt: item.scene for item in suite_dense(split)}
    return lambda prompts, seeds: np.stack(
        [render(change(scenes[prompt], seed)) for prompt, seed in zip(prompts, seeds, strict=True)]
    )


def repainted(scene, seed=0):
    """Its first object in the next colour."""
    first, *rest = scene.objects
    return replace(scene, objects=(replace(first, color=(first.color + 1) % 8), *rest))


def emptied(scene, seed=0):
    """Without its first object."""
    return replace(scene, objects=scene.objects[1:])


def scan(scene):
    return detect(render(scene)[None])[0]


# ------------------------------------------------------------------------------------------------------- arithmetic


def tree(*parents: tuple[int, ...]) -> list[Node]:
    fields = {"category": "entity", "topic": "shape", "question": "is there a star?", "value": "star", "subject": 0}
    return [Node(number=number, parents=row, **fields) for number, row in enumerate(parents, 1)]


def test_a_failed_parent_fails_its_children_and_theirs_but_not_its_own_parent():
    chained = tree((), (1,), (2,), ())
    assert image_score(chained, [True, True, True, True]) == 1
    assert image_score(chained, [True, False, True, True]) == 0.5  # the third hangs on the second
    assert image_score(chained, [False, True, True, True]) == 0.25
    assert image_score(tree((), (), (1, 2)), [True, False, True]) == pytest.approx(1 / 3), "both parents must hold"


def test_the_soft_score_is_the_geometric_mean_with_a_hundredth_for_a_miss():
    assert soft_score([True, True]) == 1 and soft_score([False]) == pytest.approx(0.01)
    assert soft_score([True, True, True, False]) == pytest.approx(0.01**0.25)


# ----------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("split", ["dev", "test"])
def test_prompts_name_every_object_of_unseen_scenes_with_held_out_pairs_in_the_second_half(split):
    items = suite_dense(split)
    assert len(items) == PROMPTS == len({item.prompt for item in items}) == len({scene_key(i.scene) for i in items})
    assert [item.part for item in items] == ["id"] * 64 + ["cg"] * 64
    other = {"dev": "test", "test": "dev"}[split]
    for item in items:
        assert bucket(item.scene) == split and not held_out(item.scene, other)
        assert held_out(item.scene, split) == ({"pair"} if item.part == "cg" else set())
        assert all(str(thing) in item.prompt for thing in item.scene.objects) and len(item.scene.objects) in (3, 4)
        assert BACKGROUND_NAMES[item.scene.background] in item.prompt
        assert f"{NUMBERS[len(item.scene.objects)]} objects" in item.prompt
        assert 4 <= item.prompt.count(".") <= 6 and set(re.findall(r"[a-z]+", item.prompt)) <= known_words()


def test_relations_told_are_those_of_the_boxes():
    for item in suite_dense("dev"):
        things = {f"{COLORS[t.color]} {SHAPES[t.shape]}": t for t in item.scene.objects}
        side = "(left of|right of|above|below)"
        told = re.findall(rf"the (\w+ \w+) is {side} the (\w+ \w+)", item.prompt)
        assert len(told) == 2
        assert all(relation in relations(things[a], things[b]) for a, relation, b in told)


def test_trees_have_12_to_20_questions_parents_first_in_all_categories():
    for item in suite_dense("dev"):
        assert 12 <= len(item.tree) <= 20 and {node.category for node in item.tree} == set(CATEGORIES)
        assert [node.number for node in item.tree] == list(range(1, len(item.tree) + 1))
        assert all(parent < node.number for node in item.tree for parent in node.parents)
        for node in item.tree:
            roots = {"global": 0, "entity": 0, "attribute": 1, "relation": 2 - (node.topic == "place"), "other": 1}
            assert len(node.parents) == roots[node.category]


def test_the_suite_is_the_frozen_one():
    verify_lock(DpgSuite())


# ----------------------------------------------------------------------------------------------------------- answers


def test_the_truth_answers_every_question_with_yes_and_one_change_fails_what_hangs_on_it():
    for item in suite_dense("dev")[:48]:
        assert all(answers(item, scan(item.scene)))
        shapes = [thing.shape for thing in item.scene.objects]
        if shapes.count(shapes[0]) > 1:
            continue  # the other one of that shape may stand in
        failed = {
            node.topic
            for node, mark in zip(item.tree, answers(item, scan(repainted(item.scene))), strict=True)
            if not mark
        }
        assert failed == {"color"}
        missing = answers(item, scan(emptied(item.scene)))
        touched = [node.topic == "count" or 0 in (node.subject, node.other) for node in item.tree]
        assert [not mark for mark in missing] == touched


def test_objects_of_one_shape_are_matched_so_that_most_answers_are_yes_and_none_is_used_twice():
    item = next(i for i in suite_dense("dev") if len({t.shape for t in i.scene.objects}) == 1)
    turned = replace(item.scene, objects=item.scene.objects[::-1])
    assert all(answers(item, scan(turned))), "the order of detections does not matter"
    marks = answers(item, scan(replace(item.scene, objects=item.scene.objects[:1])))
    entities = [mark for node, mark in zip(item.tree, marks, strict=True) if node.topic == "shape"]
    assert sum(entities) == 1


# ----------------------------------------------------------------------------------------------------------- reports


def test_true_pictures_score_all_of_it_far_above_the_floor_and_the_report_survives_json():
    done = []
    report = evaluate(DpgSuite(), drawer(), "dev", quick=True, progress=lambda n, total: done.append((n, total)))
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert report.n == 16 * SAMPLES and done[-1] == (64, 64) and report.gap.value("overall") == 0
    for name, part in report.parts.items():
        assert part["overall"] == part["soft"] == Score(1.0, 1.0, 1.0)
        assert part.units == (16 if name == "all" else 8)
        floor = report.bounds["floor"][name]
        assert 0 < floor.value("soft") < floor.value("overall") < 0.4
        assert list(part.by_kind) == list(CATEGORIES)
        assert all(row.value("last_picture") == row.value("all_pictures") == 1 for row in part.by_kind.values())


def test_categories_come_from_the_last_picture_and_before_parents_and_overall_from_all_pictures_and_after():
    def change(scene, seed):
        return emptied(scene) if seed % SAMPLES == SAMPLES - 1 else scene

    part = evaluate(DpgSuite(), drawer(change=change), "dev", quick=True).parts["all"]
    last, every = (part.by_kind["entity"].value(name) for name in ("last_picture", "all_pictures"))
    assert last < every < 1
    assert every == pytest.approx(1 - (1 - last) / SAMPLES)
    assert part.value("overall") > last


def test_pictures_of_other_prompts_score_near_the_floor():
    items = suite_dense("dev")
    order = {item.prompt: items[(i + 5) % len(items)].scene for i, item in enumerate(items)}
    report = evaluate(DpgSuite(samples=1), lambda prompts, _: np.stack([render(order[p]) for p in prompts]), "dev")
    assert report.parts["all"].value("overall") == pytest.approx(
        report.bounds["floor"]["all"].value("overall"), abs=0.06
    )


def test_the_ceiling_of_a_perfect_codec_is_one_and_of_a_blurring_one_less():
    def blur(images):
        wide = np.pad(images.astype(float), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
        parts = [wide[:, i : i + 64, j : j + 64] for i in range(5) for j in range(5)]
        return np.mean(parts, axis=0).astype(np.uint8)

    sharp, blurred = (
        ceiling(DpgSuite(samples=1), "dev", codec, quick=True)["all"] for codec in (lambda images: images, blur)
    )
    assert sharp.value("overall") == 1 and blurred.value("overall") < 0.98


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ConfigError, match="split"):
        suite_dense("train")
    with pytest.raises(ConfigError, match="samples"):
        evaluate(DpgSuite(samples=5), drawer(), "dev")
    with pytest.raises(DataError, match="images: expected uint8"):
        evaluate(DpgSuite(), lambda prompts, seeds: np.zeros((len(prompts), 64, 64), np.uint8), "dev", quick=True)
