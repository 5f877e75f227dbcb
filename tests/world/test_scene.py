"""The drawn world: its split by enumeration, its relations, its renderer."""

import itertools
import time
from collections.abc import Iterator

import numpy as np
import pytest

from starflow2.errors import ConfigError
from starflow2.world import scene as world
from starflow2.world import splits
from starflow2.world.scene import COLORS, PALETTE, SHAPES, Scene, SceneObject, render, sample_scene, stream
from starflow2.world.splits import HELD_OUT

K = range(len(SHAPES))


def random_scenes(count: int, seed: int = 0) -> Iterator[Scene]:
    for index in range(count):
        rng = stream(seed, index)
        yield sample_scene(rng, shapes=rng.integers(8, size=1 + index % 4).tolist())


def scene_object(shape: int = 0, x: float = 32.0, y: float = 32.0, size: int = 1, color: int = 0) -> SceneObject:
    return SceneObject(shape=shape, color=color, size=size, x=x, y=y, angle=0.0)


def components(mask: np.ndarray) -> int:
    """How many 8-connected groups of true pixels there are."""
    left, groups = {(int(y), int(x)) for y, x in np.argwhere(mask)}, 0
    while left:
        groups, edge = groups + 1, [left.pop()]
        while edge:
            y, x = edge.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge.extend(near)
    return groups


# The split


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
        return splits.held_out(Scene(objects=objects, background=0), "test")

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
    shares = {name: sum(splits.bucket(s) == name for s in scenes) / len(scenes) for name in ("train", "dev", "test")}
    assert 0.88 < shares["train"] < 0.92 and 0.035 < shares["dev"] < 0.065 and 0.035 < shares["test"] < 0.065
    for scene in scenes[:200]:
        other = Scene(objects=scene.objects[::-1], background=(scene.background + 1) % len(world.BACKGROUNDS))
        assert splits.scene_key(other) == splits.scene_key(scene) and splits.bucket(other) == splits.bucket(scene)


# Relations


def test_relations_follow_the_box_rule_of_geneval_computed_from_boxes():
    for scene in random_scenes(400, seed=1):
        for a, b in itertools.permutations(scene.objects, 2):
            boxes = [np.array([[t.x - t.radius, t.y - t.radius], [t.x + t.radius, t.y + t.radius]]) for t in (a, b)]
            offset = boxes[0].mean(axis=0) - boxes[1].mean(axis=0)
            sides = sum(np.abs(np.diff(box, axis=0))[0] for box in boxes)
            x, y = np.maximum(np.abs(offset) - 0.1 * sides, 0) * np.sign(offset) / np.linalg.norm(offset)
            rule = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
            assert world.relations(a, b) == {name for name, holds in rule.items() if holds}


def test_facts_are_pictures_so_both_wordings_of_one_relation_are_one_fact():
    a, b = scene_object(shape=3, x=15), scene_object(shape=5, x=45)
    assert world.relations(a, b) == {"left of"} and world.relations(b, a) == {"right of"}
    one, other = Scene(objects=(a, b), background=0), Scene(objects=(b, a), background=0)
    assert splits.facts(one) == splits.facts(other) == {(3, "left of", 5)}


@pytest.mark.parametrize("relation", world.RELATIONS)
def test_a_wanted_relation_holds_between_the_first_two_objects(relation):
    for index in range(50):
        scene = sample_scene(stream(index), shapes=[0, 1, 2], relation=relation)
        assert relation in world.relations(*scene.objects[:2])


# Pictures


def test_objects_lie_inside_and_their_connected_components_are_as_many_as_they():
    for scene in random_scenes(200, seed=2):
        difference = np.abs(render(scene).astype(int) - world.BACKGROUNDS[scene.background]).sum(axis=-1)
        assert components(difference > 0) == len(scene.objects)
        border = np.concatenate([difference[[0, -1]].ravel(), difference[:, [0, -1]].ravel()])
        assert border.max() < 0.25 * 765, "a margin of a pixel, give or take the anti-aliasing"


@pytest.mark.parametrize("shape", K)
@pytest.mark.parametrize("size", [0, 1])
def test_the_drawn_box_is_centred_and_close_to_the_radius(shape, size):
    drawn = scene_object(shape=shape, size=size)
    rows, columns = np.nonzero(world.coverage(drawn) > 127)
    for places in (rows, columns):
        assert abs((places.min() + places.max() + 1) / 2 - 32) <= 0.5
    assert abs(max(np.ptp(rows), np.ptp(columns)) + 1 - 2 * drawn.radius) <= 0.2 * 2 * drawn.radius


def test_palette_and_backgrounds_are_far_apart():
    colors = np.concatenate([PALETTE, world.BACKGROUNDS]) / 255
    distance = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 9 * np.eye(len(colors))
    num = len(PALETTE)
    assert distance[:num].min() > 0.3, "nearest-colour judging needs this"
    assert distance[num:, num:].min() > 0.08, "a changed background must be told from noise"


def test_rendering_is_deterministic_and_scales():
    for scene in random_scenes(20, seed=3):
        assert np.array_equal(render(scene), render(scene))
        large = render(scene, 256).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        assert np.abs(large - render(scene)).mean() < 2.0  # grey levels; edges shift by 1/8 px


def test_coverage_is_where_the_picture_differs_from_the_background():
    for scene in random_scenes(20, seed=4):
        masks = sum((world.coverage(t) > 0).astype(int) for t in scene.objects)
        assert masks.max() == 1, "objects must not overlap"
        differs = (render(scene) != world.BACKGROUNDS[scene.background]).any(axis=-1)
        assert not (differs & (masks == 0)).any()


def test_scenes_are_pure_functions_of_their_numbers():
    assert list(random_scenes(20)) == list(random_scenes(20))
    assert stream(0, 1).random() != stream(1, 0).random()


def test_bad_requests_name_the_argument():
    with pytest.raises(ConfigError, match="shapes"):
        sample_scene(stream(0), shapes=[])
    with pytest.raises(ConfigError, match="shapes"):
        sample_scene(stream(0), shapes=[0], relation="above")
    with pytest.raises(ConfigError, match="0 or more"):
        stream(-1)


@pytest.mark.slow
def test_one_core_draws_a_thousand_scenes_a_second():
    scenes = list(random_scenes(1000, seed=5))
    start = time.process_time()
    for scene in scenes:
        render(scene)
    assert len(scenes) / (time.process_time() - start) > 1000  # about 4,500 on a quiet core
