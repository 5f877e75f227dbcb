"""Words shared by the world's tasks: names single out one object, places are cells of the grid."""

from __future__ import annotations

import itertools

import pytest

from starflow2.world.scene import Scene, stream
from starflow2.world.words import ATTRIBUTES, PLACES, Namer, names_of, place_of
from world_cases import random_scenes, scene_object, words

NAMINGS = [
    combination for size in (1, 2, 3) for combination in itertools.combinations(("size", "color", "shape"), size)
]


def test_a_name_fits_its_object_and_no_other_and_every_clear_naming_is_found():
    for scene in random_scenes(300, seed=8):
        tokens = [set(str(obj).split()) for obj in scene.objects]
        for index, obj in enumerate(scene.objects):
            names = names_of(scene, obj, NAMINGS)
            for name in names:
                meant = [i for i, named in enumerate(tokens) if set(words(name.words)) - {"the", "object"} <= named]
                assert meant == [index]
                assert words(name.words)[-1] == (words(str(obj))[-1] if "shape" in name.attributes else "object")
            if tokens.count(tokens[index]) == 1:
                assert ("size", "color", "shape") in [name.attributes for name in names]


def test_a_namer_hides_an_attribute_and_gives_up_where_nothing_tells_objects_apart():
    twins = Scene(objects=(scene_object(x=16.0), scene_object(x=48.0)), background=0)
    assert Namer(twins, stream(0), NAMINGS).named_object() is None
    red, blue = scene_object(x=16.0, color=0), scene_object(x=48.0, color=4)
    namer = Namer(Scene(objects=(red, blue), background=0), stream(0), NAMINGS)
    assert all("red" in namer.name(red) for _ in range(20)) and namer.name(red, hide="color") is None
    assert {namer.named_object()[0] for _ in range(50)} == {red, blue}


def test_names_use_the_values_of_all_attributes():
    assert {len(values) for values in ATTRIBUTES.values()} == {8, 2}


@pytest.mark.parametrize(("row", "column"), list(itertools.product(range(3), range(3))))
def test_a_place_is_the_cell_of_the_centre_and_none_near_a_line_of_the_grid(row, column):
    centre = scene_object(x=(column + 0.5) * 64 / 3, y=(row + 0.5) * 64 / 3)
    assert place_of(centre) == place_of(centre, edge=1.5) == PLACES[row][column]
    near = scene_object(x=64 / 3 + 1, y=(row + 0.5) * 64 / 3)
    assert place_of(near) == PLACES[row][1] and place_of(near, edge=1.5) is None


def test_places_found_outside_the_image_count_for_the_nearest_cell():
    assert place_of(scene_object(x=-3.0, y=70.0)) == PLACES[2][0]
