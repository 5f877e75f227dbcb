"""Contents of captions as data: groups of like objects, a relation, places, a background; and when a scene shows it.

A `Content` says everything about the objects of its scene that a caption names, and a scene shows it only if nothing
else is there. `grammar` puts it into words, `scene_of` draws a scene for it, and `wrong_content` changes it in one
point, which is how pictures that nearly fit a caption are made.
What training may combine is decided by `splits`; our choice: docs/choices.md#world.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np

from starflow2.world.scene import (
    BACKGROUND_NAMES,
    COLORS,
    MAX_OBJECTS,
    OPPOSITES,
    SHAPES,
    SIZES,
    Bucket,
    Cell,
    Relation,
    Scene,
    SceneObject,
    pick,
    relations,
    sample_scene,
    scene_in_cells,
)
from starflow2.world.splits import bucket, colors_of, held_out, reserved, withheld
from starflow2.world.words import NUMBERS, PLURALS, article, cell_of

__all__ = ["CELLS", "FAULTS", "Content", "Group", "is_allowed", "prompt_part", "scene_of", "shows", "wrong_content"]

CELLS: Final[tuple[Cell, ...]] = tuple(itertools.product(range(3), range(3)))
_RICH: Final = 2  # colours, sizes, places and backgrounds that a content names to be one of many
_TRIES: Final = 24  # scenes drawn for one content, of which some are held out or of another bucket


@dataclass(frozen=True, slots=True)
class Group:
    """Objects of one shape that a caption names together, with the colour, size and cell that it names."""

    shape: int
    count: int = 1
    color: int | None = None
    size: int | None = None
    cell: Cell | None = None

    @property
    def words(self) -> str:
        """The group as an item of a list: "a small red circle", "two blue stars"."""
        names = [SIZES[self.size]] if self.size is not None else []
        names += [COLORS[self.color]] if self.color is not None else []
        if self.count > 1:
            return " ".join([NUMBERS[self.count], *names, PLURALS[self.shape]])
        return article(" ".join([*names, SHAPES[self.shape]]))

    def fits(self, obj: SceneObject, edge: float = 0.0) -> bool:
        """True if an object is as the group says; `edge`: distance to the lines of the grid at which a place counts."""
        looks = obj.shape == self.shape and self.color in (None, obj.color) and self.size in (None, obj.size)
        return looks and (self.cell is None or self.cell == cell_of(obj, edge=edge))


@dataclass(frozen=True, slots=True)
class Content:
    """Content of a caption: all objects in groups, the relation of the first to the second, the background."""

    groups: tuple[Group, ...]
    relation: Relation | None = None
    background: int | None = None

    @property
    def slots(self) -> tuple[Group, ...]:
        """The group of every object."""
        return tuple(group for group in self.groups for _ in range(group.count))


def shows(scene: Scene, content: Content) -> bool:
    """True if the scene has exactly the objects that the content names, as it names them.

    >>> star, ring = (SceneObject(shape=s, color=0, size=1, x=x, y=32, angle=0) for s, x in ((3, 16), (5, 48)))
    >>> content = Content((Group(3), Group(5, color=0)), relation="left of")
    >>> [shows(Scene(objects=objects, background=0), content) for objects in ((ring, star), (star,))]
    [True, False]
    """
    slots = content.slots
    if len(slots) != len(scene.objects) or content.background not in (None, scene.background):
        return False
    return any(
        all(group.fits(obj) for group, obj in zip(slots, order, strict=True))
        and (content.relation is None or content.relation in relations(order[0], order[1]))
        for order in itertools.permutations(scene.objects)
    )


def is_allowed(content: Content, part: Bucket = "train") -> bool:
    """True if nothing that the content combines is withheld from this part of the world."""
    guard, shapes = withheld(part), [group.shape for group in content.slots]
    stands = content.relation is None or guard.allows_fact(shapes[0], content.relation, shapes[1])
    pairs = all(g.color is None or guard.allows_pair(g.shape, g.color) for g in content.groups)
    counts = all(
        guard.allows_count(g.shape, g.count) for g in content.groups
    )  # as named; the scene may show more of it
    return stands and pairs and counts and len(shapes) <= MAX_OBJECTS and not guard.rows_of_shapes(shapes)


def scene_of(content: Content, rng: np.random.Generator, part: Bucket = "train") -> Scene | None:
    """A random scene of a part of the world that shows the content and nothing held out; None if none was found.

    What the content leaves open is random.
    """
    if not is_allowed(content):
        return None
    for _ in range(_TRIES):
        scene = _random_scene(content, rng)
        if scene is not None and bucket(scene) == part and not any(held_out(scene, split) for split in reserved()):
            return scene
    return None


def _random_scene(content: Content, rng: np.random.Generator) -> Scene | None:
    slots = content.slots
    shapes = [group.shape for group in slots]
    colors = [pick(rng, colors_of(g.shape)) if g.color is None else g.color for g in slots]
    sizes = [int(rng.integers(len(SIZES))) if g.size is None else g.size for g in slots]
    background = int(rng.integers(len(BACKGROUND_NAMES))) if content.background is None else content.background
    if any(group.cell for group in slots):
        cells = [group.cell for group in slots]
        return scene_in_cells(rng, shapes=shapes, colors=colors, sizes=sizes, background=background, cells=cells)
    return sample_scene(
        rng, shapes=shapes, colors=colors, sizes=sizes, background=background, relation=content.relation
    )


def prompt_part(content: Content) -> Bucket:
    """The part of the world whose prompts may say this: contents that name much are shared out, all others train.

    So a suite can ask for what no training prompt asked for, though everything that it combines was seen.
    """
    named = sum(value is not None for group in content.groups for value in (group.color, group.size, group.cell))
    if not reserved() or named + (content.background is not None) < _RICH:
        return "train"
    number = int.from_bytes(hashlib.blake2b(repr(_key(content)).encode(), digest_size=8).digest(), "big") % 100
    return "train" if number < 90 else "dev" if number < 95 else "test"


def _key(content: Content) -> tuple[object, ...]:
    """A content in one order, however it was written: "a left of b" and "b right of a" are one."""
    groups, relation = list(content.groups), content.relation
    if relation in ("right of", "below"):
        groups[:2], relation = groups[1::-1], OPPOSITES[relation]
    rows = [tuple(-1 if v is None else v for v in (g.shape, g.count, g.color, g.size, g.cell)) for g in groups]
    return (*(rows if relation else sorted(rows, key=repr)), relation, content.background)


# --------------------------------------------------------------------------------------- one thing wrong


def _with_group(content: Content, index: int, **changes: object) -> Content:
    groups = list(content.groups)
    groups[index] = replace(groups[index], **changes)  # type: ignore[arg-type]
    return replace(content, groups=tuple(groups))


def _other(rng: np.random.Generator, values: Sequence[int], value: int) -> int:
    return pick(rng, [other for other in values if other != value])


def _some_group(content: Content, rng: np.random.Generator, attribute: str) -> int | None:
    """Index of a random group whose attribute the content names."""
    named = [i for i, group in enumerate(content.groups) if getattr(group, attribute) is not None]
    return pick(rng, named) if named else None


def _wrong_color(content: Content, rng: np.random.Generator) -> Content | None:
    index = _some_group(content, rng, "color")
    if index is None:
        return None
    group = content.groups[index]
    return _with_group(content, index, color=_other(rng, colors_of(group.shape), group.color or 0))


def _wrong_shape(content: Content, rng: np.random.Generator) -> Content | None:
    index = int(rng.integers(len(content.groups)))
    return _with_group(content, index, shape=_other(rng, range(len(SHAPES)), content.groups[index].shape))


def _twin(content: Content, rng: np.random.Generator) -> Content | None:
    """One group has the shape of another."""
    if len({group.shape for group in content.groups}) < 2:
        return None
    index, other = rng.permutation(len(content.groups))[:2].tolist()
    return _with_group(content, index, shape=content.groups[other].shape)


def _wrong_size(content: Content, rng: np.random.Generator) -> Content | None:
    index = _some_group(content, rng, "size")
    return None if index is None else _with_group(content, index, size=1 - (content.groups[index].size or 0))


def _wrong_count(content: Content, rng: np.random.Generator) -> Content | None:
    many = [i for i, group in enumerate(content.groups) if group.count > 1] or [0]
    index = pick(rng, many)
    count = content.groups[index].count + pick(rng, (-1, 1))
    return _with_group(content, index, count=count) if count >= 1 and content.relation is None else None


def _wrong_side(content: Content, rng: np.random.Generator) -> Content | None:
    return None if content.relation is None else replace(content, relation=OPPOSITES[content.relation])


def _swapped(content: Content, rng: np.random.Generator) -> Content | None:
    """Two groups have exchanged their colours or sizes."""
    if len(content.groups) < 2:
        return None
    a, b = rng.permutation(len(content.groups))[:2].tolist()
    one, two = content.groups[a], content.groups[b]
    attribute = pick(rng, ("color", "color", "size"))
    values = getattr(one, attribute), getattr(two, attribute)
    if None in values or values[0] == values[1] or one.shape == two.shape:
        return None
    return _with_group(_with_group(content, a, **{attribute: values[1]}), b, **{attribute: values[0]})


def _missing(content: Content, rng: np.random.Generator) -> Content | None:
    if len(content.groups) < 2:
        return None
    index = int(rng.integers(len(content.groups)))
    return replace(content, groups=(*content.groups[:index], *content.groups[index + 1 :]), relation=None)


def _extra(content: Content, rng: np.random.Generator) -> Content | None:
    """One more object, of a shape that is there or of another."""
    shapes = [group.shape for group in content.groups]
    shape = pick(rng, shapes) if rng.random() < 0.5 else int(rng.integers(len(SHAPES)))
    group = pick(rng, content.groups)
    color = group.color if group.color in colors_of(shape) else None
    return replace(content, groups=(*content.groups, Group(shape, color=color)))


def _wrong_place(content: Content, rng: np.random.Generator) -> Content | None:
    index = _some_group(content, rng, "cell")
    if index is None:
        return None
    full = {group.cell for group in content.groups}
    return _with_group(content, index, cell=pick(rng, [cell for cell in CELLS if cell not in full]))


def _wrong_background(content: Content, rng: np.random.Generator) -> Content | None:
    if content.background is None:
        return None
    return replace(content, background=_other(rng, range(len(BACKGROUND_NAMES)), content.background))


_MAKE: Final[Mapping[str, Callable[[Content, np.random.Generator], Content | None]]] = MappingProxyType(
    {
        "twin": _twin,
        "color": _wrong_color,
        "shape": _wrong_shape,
        "swap": _swapped,
        "side": _wrong_side,
        "count": _wrong_count,
        "place": _wrong_place,
        "missing": _missing,
        "extra": _extra,
        "size": _wrong_size,
        "background": _wrong_background,
    }
)
FAULTS: Final[Mapping[str, float]] = MappingProxyType(  # how often each is tried; what drawings get wrong most leads
    {
        "twin": 4.0,
        "color": 2.5,
        "shape": 2.0,
        "swap": 6.0,
        "side": 3.0,
        "count": 3.0,
        "place": 5.0,
        "missing": 1.0,
        "extra": 1.0,
        "size": 1.0,
        "background": 1.0,
    }
)
_ORDER: Final = (np.array(list(FAULTS.values())) / sum(FAULTS.values())).tolist()


def wrong_content(content: Content, rng: np.random.Generator) -> tuple[str, Content] | None:
    """The content with one fault of FAULTS, and which; None if it allows none of those tried.

    A scene that shows the faulty content need not show the right one wrongly (a place that words leave open may
    happen to be right): check with `shows`.
    """
    for fault in rng.choice(list(FAULTS), size=2 * len(FAULTS), p=_ORDER).tolist():
        wrong = _MAKE[fault](content, rng)
        if wrong is not None and is_allowed(wrong):
            return fault, wrong
    return None
