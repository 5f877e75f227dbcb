"""Random scenes of one part of the drawn world: shapes that may meet, colours seen with them, the right bucket.

`scene.sample_scene` places given objects and knows nothing of splits; these functions choose the objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from starflow2.errors import ConfigError
from starflow2.world.scene import MAX_OBJECTS, SHAPES, Bucket, Scene, Split, chance, pick, sample_scene
from starflow2.world.splits import Row, bucket, colors_of, held_out, reserved, withheld

__all__ = ["COUNT_SHARES", "REPEATS", "sample_count", "sample_crowd", "sample_split_scene", "with_repeats"]

COUNT_SHARES: Final = (0.15, 0.3, 0.3, 0.25)  # shares of scenes with one to four objects
REPEATS: Final = 0.35  # share of scenes of several objects in which some have the same shape

_RECOLORINGS: Final = 20  # colours tried for one layout until the scene lies in the wanted bucket
_NOVEL: Final = 0.4  # chance of a held-out colour for each further object of a novel scene


def sample_count(rng: np.random.Generator) -> int:
    """Number of objects of a scene, by COUNT_SHARES."""
    return int(rng.choice(MAX_OBJECTS, p=COUNT_SHARES)) + 1


def with_repeats(rng: np.random.Generator, shapes: Sequence[int]) -> list[int]:
    """The shapes, or by chance (REPEATS) with two or more of them replaced by the first."""
    if len(shapes) > 1 and chance(rng, REPEATS):
        same = int(rng.integers(2, len(shapes) + 1))
        return [shapes[0]] * same + [*shapes[same:]]
    return list(shapes)


def sample_crowd(rng: np.random.Generator, count: int) -> Scene:
    """A scene of `count` objects that training may show together, in colours seen with them; of any bucket."""
    shapes = _together(rng, count)
    return sample_scene(rng, shapes=shapes, colors=[pick(rng, colors_of(shape)) for shape in shapes])


def _together(rng: np.random.Generator, count: int, first: int | None = None) -> list[int]:
    """Shapes that training may show in one image, beginning with `first` if it is given."""
    while True:  # cheap, and most of what `is_trainable` would refuse later
        shapes: list[int] = rng.permutation(len(SHAPES)).tolist()
        if first is not None:
            shapes = [first, *[shape for shape in shapes if shape != first]]
        shapes = with_repeats(rng, shapes[:count])
        if not withheld().rows_of_shapes(shapes):
            return shapes


def sample_split_scene(
    rng: np.random.Generator,
    split: Bucket = "train",
    *,
    novel: bool = False,
    num_objects: int | None = None,
    shape: int | None = None,
) -> Scene:
    """A scene of the split's bucket that shows nothing held out, or with `novel` the split's colour-shape pairs alone.

    shape: that of the first object. Arguments that are None are drawn. Raises ConfigError for novel training scenes.
    """
    if novel and split == "train":
        raise ConfigError("novel=True with split='train': training shows nothing held out; pass split='dev' or 'test'")
    wanted: frozenset[Row] = frozenset({"pair"}) if novel else frozenset()
    count = sample_count(rng) if num_objects is None else num_objects
    pairs_of: Split | None = split if novel and split != "train" else None
    while True:
        shapes = _together(rng, count, shape)
        scene = sample_scene(rng, shapes=shapes, colors=_colors(rng, shapes, pairs_of))
        if any(held_out(scene, s) != (wanted if s == split else frozenset()) for s in reserved()):
            continue
        for _ in range(_RECOLORINGS):  # placing objects is slow, and one layout in twenty is of a test bucket
            if bucket(scene) == split:
                return scene
            scene = _painted(scene, _colors(rng, shapes, pairs_of))


def _painted(scene: Scene, colors: Sequence[int]) -> Scene:
    """The scene with its objects in other colours."""
    objects = (replace(obj, color=color) for obj, color in zip(scene.objects, colors, strict=True))
    return replace(scene, objects=tuple(objects))


def _colors(rng: np.random.Generator, shapes: Sequence[int], novel: Split | None) -> list[int]:
    """A colour per shape, seen with it in training; with `novel` that split's held-out one for one shape or more."""
    colors = []
    special = int(rng.integers(len(shapes)))
    for index, shape in enumerate(shapes):
        is_novel = novel is not None and (index == special or chance(rng, _NOVEL))
        colors.append(pick(rng, colors_of(shape, novel if is_novel else None)))
    return colors
