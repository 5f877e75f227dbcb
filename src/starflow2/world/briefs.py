"""Briefs: random scenes of GenEval's six families, and contents of busier scenes, with what a caption says of them.

A `Brief` is a scene plus what its caption says about it; what the caption leaves out is random, and every object of the
scene is mentioned. The frozen suites are drawn here, so the order of draws of `BRIEFS` must not change.
The six families are GenEval's (Ghosh et al. 2023). Our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np

from starflow2.world.content import CELLS, Content, Group, scene_of
from starflow2.world.sampling import sample_crowd
from starflow2.world.scene import (
    BACKGROUND_NAMES,
    MAX_OBJECTS,
    OPPOSITES,
    RELATIONS,
    SHAPES,
    SIZES,
    Bucket,
    Relation,
    Scene,
    SceneObject,
    Split,
    chance,
    pick,
    sample_scene,
)
from starflow2.world.splits import HELD_OUT, colors_of, reserved, withheld
from starflow2.world.words import cell_of

__all__ = ["BRIEFS", "SCENES", "Brief", "Menu", "content_of", "menu_of", "scene_content"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Brief:
    """A scene and what its caption has to say; objects are mentioned in the order of `scene.objects`."""

    scene: Scene
    family: str
    mentions: frozenset[str]  # of "color", "size", "background"
    relation: Relation | None = None  # what the first object is with respect to the second


@dataclass(frozen=True, slots=True, kw_only=True)
class Menu:
    """Combinations that a brief may be drawn from: those of training, one row replaced for a held-out suite."""

    colors: tuple[tuple[int, ...], ...]  # by shape
    second_colors: tuple[tuple[int, ...], ...]  # likewise, for the second object
    shapes: tuple[tuple[int, int], ...]  # two different shapes that may meet
    relations: tuple[tuple[int, Relation, int], ...]  # (shape, relation, shape)
    counts: tuple[tuple[int, int], ...]  # (shape, how many)


def menu_of(split: Split | None = None, row: str = "") -> Menu:
    """The training menu, or that menu with one row ("pair", "pairs", "fact", "shapes", "count") held out by `split`."""
    return _menu(split, row, bool(reserved()))


@functools.cache
def _menu(split: Split | None, row: str, is_guarded: bool) -> Menu:
    k, guard = range(len(SHAPES)), withheld()
    meets = tuple(pair for pair in itertools.combinations(k, 2) if guard.allows_together(pair))
    stands = [(a, r, b) for a, b in itertools.permutations(k, 2) for r in RELATIONS if tuple(sorted((a, b))) in meets]
    stands = [(a, r, b) for a, r, b in stands if guard.allows_fact(a, r, b)]
    counts = [(s, n) for s in k for n in range(2, MAX_OBJECTS + 1) if guard.allows_count(s, n)]
    colors = second = tuple(colors_of(shape) for shape in k)
    if split is not None:
        table = HELD_OUT[split]
        if row in ("pair", "pairs"):
            colors = tuple(colors_of(shape, split) for shape in k)
            second = colors if row == "pairs" else second
        elif row == "fact":
            ways = sorted(table.facts) + sorted((b, OPPOSITES[r], a) for a, r, b in table.facts)
            stands = [(a, r, b) for a, r, b in ways]
        elif row == "shapes":
            first_two = sorted(tuple(sorted(pair)) for pair in table.shapes)
            meets = tuple((pair[0], pair[1]) for pair in first_two)
        elif row == "count":
            counts = sorted(table.counts)
    return Menu(colors=colors, second_colors=second, shapes=meets, relations=tuple(stands), counts=tuple(counts))


def _pick_mentions(rng: np.random.Generator, **chances: float) -> frozenset[str]:
    return frozenset(name for name, probability in chances.items() if chance(rng, probability))


def _brief_one(rng: np.random.Generator, menu: Menu, family: str) -> Brief:
    shape = int(rng.integers(len(SHAPES)))
    scene = sample_scene(rng, shapes=[shape], colors=[pick(rng, menu.colors[shape])])
    mentions = _pick_mentions(rng, color=float(family == "colors"), size=0.3, background=0.25)
    return Brief(scene=scene, family=family, mentions=mentions)


def _brief_two(rng: np.random.Generator, menu: Menu, family: str) -> Brief:
    a, b = pick(rng, menu.shapes)
    if chance(rng, 0.5):
        a, b = b, a
    options = (menu.colors, menu.second_colors) if chance(rng, 0.5) else (menu.second_colors, menu.colors)
    colors = [pick(rng, options[0][a]), pick(rng, options[1][b])]
    while family == "color_attr" and colors[0] == colors[1]:
        colors = [pick(rng, options[0][a]), pick(rng, options[1][b])]
    scene = sample_scene(rng, shapes=[a, b], colors=colors)
    mentions = _pick_mentions(rng, color=float(family == "color_attr"), size=0.2, background=0.2)
    return Brief(scene=scene, family=family, mentions=mentions)


def _brief_counting(rng: np.random.Generator, menu: Menu, family: str) -> Brief:
    shape, count = pick(rng, menu.counts)
    one_color, one_size = chance(rng, 0.5), chance(rng, 0.5)
    colors = [pick(rng, menu.colors[shape]) for _ in range(count)]
    sizes = rng.integers(len(SIZES), size=count).tolist()
    scene = sample_scene(
        rng,
        shapes=[shape] * count,
        colors=colors[:1] * count if one_color else colors,
        sizes=sizes[:1] * count if one_size else sizes,
    )
    mentions = _pick_mentions(rng, color=0.6 * one_color, size=0.5 * one_size, background=0.2)
    return Brief(scene=scene, family=family, mentions=mentions)


def _brief_position(rng: np.random.Generator, menu: Menu, family: str) -> Brief:
    a, relation, b = pick(rng, menu.relations)
    colors = [pick(rng, menu.colors[a]), pick(rng, menu.colors[b])]
    scene = sample_scene(rng, shapes=[a, b], colors=colors, relation=relation)
    mentions = _pick_mentions(rng, color=0.35, size=0.15, background=0.15)
    return Brief(scene=scene, family=family, mentions=mentions, relation=relation)


def _brief_dense(rng: np.random.Generator, menu: Menu, family: str) -> Brief:
    scene = sample_crowd(rng, int(rng.integers(3, 5)))
    return Brief(scene=scene, family=family, mentions=frozenset({"color", "size", "background"}))


BRIEFS: Final[Mapping[str, Callable[[np.random.Generator, Menu, str], Brief]]] = MappingProxyType(
    {
        "single_object": _brief_one,
        "two_object": _brief_two,
        "counting": _brief_counting,
        "colors": _brief_one,
        "position": _brief_position,
        "color_attr": _brief_two,
        "dense": _brief_dense,
    }
)


# ------------------------------------------------------------------------------- scenes of several kinds

_MIXED_COUNTS: Final = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))


def _named(rng: np.random.Generator, shape: int, color: float, size: float) -> Group:
    """A single object of a shape whose colour and size are named with these chances."""
    colors = colors_of(shape)
    return Group(
        shape,
        color=pick(rng, colors) if chance(rng, color) else None,
        size=int(rng.integers(len(SIZES))) if chance(rng, size) else None,
    )


def _shapes(rng: np.random.Generator, count: int) -> list[int]:
    """Different shapes that training may show together."""
    while True:
        shapes: list[int] = rng.permutation(len(SHAPES))[:count].tolist()
        if withheld().allows_together(shapes):
            return shapes


def _tint(rng: np.random.Generator, share: float) -> int | None:
    return int(rng.integers(len(BACKGROUND_NAMES))) if chance(rng, share) else None


def _content_mixed(rng: np.random.Generator) -> Content:
    """Two kinds with counts, such as "two red hearts and a star"; sometimes of one shape in two colours."""
    color = 0.6 if chance(rng, 0.85) else 1.0
    shapes = _shapes(rng, 2) if color < 1 else _shapes(rng, 1) * 2
    has_colors, size = float(chance(rng, color)), 0.1
    groups = [_named(rng, shape, has_colors, size) for shape in shapes]
    counts = pick(rng, _MIXED_COUNTS)
    groups = [replace(group, count=count) for group, count in zip(groups, counts, strict=True)]
    return Content(tuple(groups), background=_tint(rng, 0.12))


def _content_many(rng: np.random.Generator) -> Content:
    """Three or four objects of different kinds, one by one."""
    has_colors, count = float(chance(rng, 0.75)), 3 + chance(rng, 0.4)
    groups = tuple(_named(rng, shape, has_colors, 0.12) for shape in _shapes(rng, count))
    return Content(groups, background=_tint(rng, 0.12))


def _content_placed(rng: np.random.Generator) -> Content:
    """One object or more, each with its place in the picture."""
    count = int(rng.choice((1, 2, 3), p=(0.5, 0.38, 0.12)))
    cells = [CELLS[int(i)] for i in rng.permutation(len(CELLS))[:count]]
    has_colors = float(chance(rng, 0.65))
    groups = [_named(rng, shape, has_colors, 0.1) for shape in _shapes(rng, count)]
    groups = [replace(group, cell=cell) for group, cell in zip(groups, cells, strict=True)]
    return Content(tuple(groups), background=_tint(rng, 0.15))


def _content_sized(rng: np.random.Generator) -> Content:
    """Two objects in a relation, with the size of one or both named."""
    a, relation, b = pick(rng, menu_of().relations)
    has_colors, both = float(chance(rng, 0.5)), chance(rng, 0.6)
    groups = [_named(rng, shape, has_colors, float(both)) for shape in (a, b)]
    if not both:
        index = int(rng.integers(2))
        groups[index] = replace(groups[index], size=int(rng.integers(len(SIZES))))
    return Content(tuple(groups), relation=relation, background=_tint(rng, 0.12))


SCENES: Final[Mapping[str, Callable[[np.random.Generator], Content]]] = MappingProxyType(
    {"mixed": _content_mixed, "many": _content_many, "placed": _content_placed, "sized": _content_sized}
)


def scene_content(rng: np.random.Generator, family: str, part: Bucket = "train") -> tuple[Content, Scene]:
    """A random content of one of SCENES that combines nothing withheld, and a scene of that part that shows it."""
    while True:
        content = SCENES[family](rng)
        scene = scene_of(content, rng, part)
        if scene is not None:
            return content, scene


def content_of(brief: Brief) -> Content:
    """Content of the caption of a brief."""
    named = brief.mentions

    def group(obj: SceneObject, count: int = 1) -> Group:
        return Group(obj.shape, count, obj.color if "color" in named else None, obj.size if "size" in named else None)

    objects = brief.scene.objects
    if brief.family == "dense":
        groups = tuple(Group(obj.shape, 1, obj.color, obj.size, cell_of(obj)) for obj in objects)
        return Content(groups, background=brief.scene.background)
    is_counted = brief.family == "counting"
    groups = (group(objects[0], len(objects)),) if is_counted else tuple(group(obj) for obj in objects)
    return Content(groups, brief.relation, brief.scene.background if "background" in named else None)
