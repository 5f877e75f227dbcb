"""Scenes: relations by the box rule, the renderer, random placement."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from starflow2.errors import ConfigError
from starflow2.world import scene as world
from starflow2.world.scene import PALETTE, SHAPES, render, sample_scene, stream
from world_cases import random_scenes, scene_object

K = range(len(SHAPES))


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


@pytest.mark.parametrize("relation", world.RELATIONS)
def test_a_wanted_relation_holds_between_the_first_two_objects(relation):
    for index in range(50):
        scene = sample_scene(stream(index), shapes=[0, 1, 2], relation=relation)
        assert relation in world.relations(*scene.objects[:2])


# Images


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
    with pytest.raises(ConfigError, match="numbers"):
        stream(-1)


@pytest.mark.slow
def test_one_core_draws_a_thousand_scenes_a_second():
    scenes = list(random_scenes(1000, seed=5))
    start = time.process_time()
    for scene in scenes:
        render(scene)
    assert len(scenes) / (time.process_time() - start) > 1000  # about 4,500 on a quiet core
