"""Splits: the tables of held-out combinations, the guard made of them, buckets and keys of scenes."""

from __future__ import annotations

import itertools

import pytest

from starflow2.world.captions import suite_drawings
from starflow2.world.scene import BACKGROUNDS, COLORS, MAX_OBJECTS, RELATIONS, SHAPES, Scene, SceneObject, relations
from starflow2.world.splits import (
    HELD_OUT,
    WITHHELD,
    as_fact,
    bucket,
    colors_of,
    facts,
    held_out,
    is_trainable,
    may_recolor,
    scene_key,
)
from world_cases import RULES, leaks, random_scenes, scene_object, text_leaks

K = range(len(SHAPES))


@pytest.mark.parametrize("split", ["dev", "test"])
def test_held_out_pairs_use_every_shape_and_every_colour_once(split):
    shapes, colors = zip(*HELD_OUT[split].pairs, strict=True)
    assert sorted(shapes) == list(K) and sorted(colors) == list(range(len(COLORS)))


@pytest.mark.parametrize("split", ["dev", "test"])
def test_held_out_facts_have_every_shape_once_as_subject_and_once_as_object(split):
    subjects, words, objects = zip(*HELD_OUT[split].facts, strict=True)
    assert sorted(subjects) == sorted(objects) == list(K)
    assert words.count("left of") == words.count("above") == 4


def test_the_tables_are_those_written_down_and_test_and_dev_share_nothing():
    test, dev = HELD_OUT["test"], HELD_OUT["dev"]
    assert test.counts == {(2, 2), (7, 3), (4, 4)} and dev.counts == {(6, 2), (3, 3), (0, 4)}
    assert test.shapes == {frozenset({0, 4}), frozenset({1, 5})}
    assert dev.shapes == {frozenset({2, 6}), frozenset({3, 7})}
    assert test.pairs == {(s, c) for s in K for c in K if (c + 3 * s) % 8 == 0}
    assert (0, "left of", 2) in test.facts and (1, "above", 3) in test.facts and (1, "left of", 7) in dev.facts
    for row in ("pairs", "facts", "shapes", "counts"):
        assert getattr(test, row).isdisjoint(getattr(dev, row))


def test_held_out_names_exactly_what_a_picture_shows():
    def names(*objects: SceneObject) -> frozenset[str]:
        return held_out(Scene(objects=objects, background=0), "test")

    assert names(scene_object(shape=0, color=0)) == {"pair"}
    assert names(scene_object(shape=0, color=1)) == set()
    assert names(scene_object(0, x=16, color=1), scene_object(2, x=48, color=0)) == {
        "fact"
    }  # a circle left of a triangle
    assert names(scene_object(0, x=48, color=1), scene_object(2, x=16, color=0)) == set()
    assert names(scene_object(0, x=48, color=1), scene_object(4, x=16, color=0)) == {"shapes"}
    assert names(scene_object(2, x=16, color=0), scene_object(2, x=48, color=0)) == {"count"}


def test_buckets_depend_on_objects_and_coarse_places_alone_and_have_their_shares():
    scenes = list(random_scenes(4000))
    shares = {name: sum(bucket(s) == name for s in scenes) / len(scenes) for name in ("train", "dev", "test")}
    assert 0.88 < shares["train"] < 0.92 and 0.035 < shares["dev"] < 0.065 and 0.035 < shares["test"] < 0.065
    for scene in scenes[:200]:
        other = Scene(objects=scene.objects[::-1], background=(scene.background + 1) % len(BACKGROUNDS))
        assert scene_key(other) == scene_key(scene) and bucket(other) == bucket(scene)


def test_facts_are_pictures_so_both_wordings_of_one_relation_are_one_fact():
    a, b = scene_object(shape=3, x=15), scene_object(shape=5, x=45)
    assert relations(a, b) == {"left of"} and relations(b, a) == {"right of"}
    one, other = Scene(objects=(a, b), background=0), Scene(objects=(b, a), background=0)
    assert facts(one) == facts(other) == {(3, "left of", 5)}


# The rules of these tests


def test_the_rules_of_world_cases_notice_every_kind_of_leak():
    shown = [leaks(item.scene) for item in suite_drawings("geneval", "test", "cg", 2)]
    assert all(shown) and set().union(*shown) == {"pair", "count", "shapes", "fact"}
    for text in ("is there a red circle?", "two small triangles", "a circle left of a triangle", "draw a red circle"):
        assert text_leaks(text), text
    for text in ("a green circle", "one small triangle", "a circle right of a triangle", "a circle and a triangle"):
        assert not text_leaks(text), text


# The guard


def test_the_guard_of_training_is_the_rules_written_down_a_second_time():
    guard = WITHHELD["train"]
    for a, b in itertools.product(K, range(len(COLORS))):
        assert guard.allows_pair(a, b) == (not RULES["pair"](a, b)) == (b in colors_of(a))
    for a, b in itertools.permutations(K, 2):
        assert guard.allows_together([a, b]) == (not RULES["shapes"](a, b))
        assert guard.allows_fact(a, "left of", b) == (not RULES["left of"](a, b)) == guard.allows_fact(b, "right of", a)
        assert guard.allows_fact(a, "above", b) == (not RULES["above"](a, b)) == guard.allows_fact(b, "below", a)
    for shape, count in itertools.product(K, range(MAX_OBJECTS + 1)):
        assert guard.allows_count(shape, count) == (not RULES["count"](shape, count))


def test_dev_and_test_may_combine_anything():
    for name in ("dev", "test"):
        assert not any((WITHHELD[name].pairs, WITHHELD[name].facts, WITHHELD[name].shapes, WITHHELD[name].counts))


def test_a_scene_is_trainable_if_it_is_of_the_bucket_and_leaks_nothing():
    for scene in random_scenes(2000, seed=6):
        assert WITHHELD["train"].rows_of(scene) == leaks(scene) == held_out(scene, "dev") | held_out(scene, "test")
        assert is_trainable(scene) == (bucket(scene) == "train" and not leaks(scene))
        shapes = [obj.shape for obj in scene.objects]
        assert WITHHELD["train"].rows_of_shapes(shapes) == leaks(scene) & {"shapes", "count"}


def test_training_recolours_by_the_steps_that_neither_split_holds_out():
    steps = {(new - old) % 8 for old, new in itertools.product(range(8), repeat=2) if may_recolor(old, new)}
    assert steps == {1, 2, 4, 6, 7}


def test_both_wordings_of_a_relation_are_one_fact():
    assert as_fact(3, "right of", 5) == as_fact(5, "left of", 3) and as_fact(3, "below", 5) == as_fact(5, "above", 3)
    assert len({as_fact(3, relation, 5) for relation in RELATIONS}) == 4
