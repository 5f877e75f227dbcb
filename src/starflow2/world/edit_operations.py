"""The seven operations of edits: how each changes a scene. `edit_requests` puts them into words.

Whatever an operation does not name keeps its exact place, size, angle and colour. Training
also changes several objects at once ("the hearts"), or adds an object without a place or beside another one, whose
exact place is then open. A place is one of nine: the centre of
that third of the image across and down, moved inwards as far as the object needs to stay clear of the border. Moving
"left by a third" and the like is by a third of the image, 21.3 pixels.
Which edits are made for training and for suites is decided in `edits`. Our choice: docs/choices.md#world.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

import numpy as np

from starflow2.world.scene import (
    BACKGROUND_NAMES,
    COLORS,
    IMAGE_SIZE,
    MARGIN,
    MAX_ANGLE,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Bucket,
    Relation,
    Scene,
    SceneObject,
    fits,
    half_box,
    pick,
    relations,
    shuffled,
)
from starflow2.world.splits import bucket, recolor_step
from starflow2.world.words import names_of

__all__ = [
    "NUM_GOALS",
    "NUM_PLACES",
    "OPERATIONS",
    "SEVERAL",
    "EditStep",
    "Operation",
    "names_in",
    "propose_plain_steps",
    "propose_steps",
    "with_object",
]

Operation = Literal["recolor", "reshape", "resize", "move", "add", "remove", "background"]

OPERATIONS: Final[tuple[Operation, ...]] = ("recolor", "reshape", "resize", "move", "add", "remove", "background")
CLEAR: Final = 12.0  # pixels that a move covers at least
THIRD: Final = IMAGE_SIZE / 3  # pixels
PROPOSALS: Final = 64  # edits of one scene that are tried
NUM_PLACES: Final = 9  # of the 3 x 3 grid, row by row
NUM_GOALS: Final = NUM_PLACES + 4  # of a move: those, then left, right, up and down by a third
_FEW: Final = 6  # likewise, for operations that have few different edits of one scene
_DIRECTIONS: Final = ((-1, 0), (1, 0), (0, -1), (0, 1))
_NAMINGS: Final = (("shape",), ("color", "shape"), ("size", "shape"), ("size", "color", "shape"))


def names_in(scene: Scene, index: int) -> list[str]:
    """Every name that fits the object at `index` alone, such as "the red star"."""
    return [name.words for name in names_of(scene, scene.objects[index], _NAMINGS)]


# --------------------------------------------------------------------------------------- operations


@dataclass(frozen=True, slots=True, kw_only=True)
class EditStep:
    """An edit before it is put into words.

    before, after: indices of the changed object in `source` and `target`; None where there is no such object.
    value: index of the requested colour, shape, size, place, goal or background; of the object to be removed.
    also: indices in `source` of further objects that change likewise. is_free: the place of an added object is open,
    or only its relation to the object of `beside` (an index in `source`) is asked for. names_size: whether the size of
    an added object is asked for.
    """

    source: Scene
    target: Scene
    operation: Operation
    before: int | None
    after: int | None
    value: int
    also: tuple[int, ...] = ()
    is_free: bool = False
    beside: tuple[Relation, int] | None = None
    names_size: bool = True

    @property
    def color_step(self) -> int:
        """By how many colours a recolouring moves on, see `splits.recolor_step`; 0 for other edits."""
        if self.operation != "recolor" or self.before is None:
            return 0
        return recolor_step(self.source.objects[self.before].color, self.value)

    @property
    def color_steps(self) -> frozenset[int]:
        """Those of all recoloured objects; none for other edits."""
        is_recoloring = self.operation == "recolor"
        return frozenset(recolor_step(self.source.objects[i].color, self.value) for i in self.changed if is_recoloring)

    @property
    def changed(self) -> tuple[int, ...]:
        """Indices in `source` of all objects that change."""
        return () if self.before is None else (self.before, *self.also)


def _other(rng: np.random.Generator, count: int, value: int) -> int:
    """One of range(count), but not `value`."""
    return int(value + rng.integers(1, count)) % count


def _goal(obj: SceneObject, value: int) -> tuple[float, float]:
    """Centre of an object after a move, in pixels; `value` is below NUM_GOALS."""
    if value >= NUM_PLACES:
        right, down = _DIRECTIONS[value - NUM_PLACES]
        return obj.x + right * THIRD, obj.y + down * THIRD
    row, column = divmod(value, 3)
    low_x, low_y = (half + MARGIN for half in half_box(obj))
    x, y = (column + 0.5) * THIRD, (row + 0.5) * THIRD
    return min(max(x, low_x), IMAGE_SIZE - low_x), min(max(y, low_y), IMAGE_SIZE - low_y)


def with_object(scene: Scene, index: int, *new: SceneObject) -> Scene:
    """The scene with the object at `index` replaced by `new`, or removed if nothing is given."""
    return replace(scene, objects=(*scene.objects[:index], *new, *scene.objects[index + 1 :]))


def _changed(scene: Scene, operation: Operation, index: int, obj: SceneObject, value: int) -> EditStep:
    target = with_object(scene, index, obj)
    return EditStep(source=scene, target=target, operation=operation, before=index, after=index, value=value)


def _recolor(rng: np.random.Generator, scene: Scene) -> EditStep:
    index = int(rng.integers(len(scene.objects)))
    color = _other(rng, len(COLORS), scene.objects[index].color)
    return _changed(scene, "recolor", index, replace(scene.objects[index], color=color), color)


def _reshape(rng: np.random.Generator, scene: Scene) -> EditStep:
    index = int(rng.integers(len(scene.objects)))
    shape = _other(rng, len(SHAPES), scene.objects[index].shape)
    return _changed(scene, "reshape", index, replace(scene.objects[index], shape=shape), shape)


def _resize(rng: np.random.Generator, scene: Scene) -> EditStep:
    index = int(rng.integers(len(scene.objects)))
    size = 1 - scene.objects[index].size
    return _changed(scene, "resize", index, replace(scene.objects[index], size=size), size)


def _move(rng: np.random.Generator, scene: Scene) -> EditStep | None:
    index = int(rng.integers(len(scene.objects)))
    obj = scene.objects[index]
    value = int(rng.integers(NUM_PLACES) if rng.random() < 0.5 else rng.integers(NUM_PLACES, NUM_GOALS))
    x, y = _goal(obj, value)
    if np.hypot(x - obj.x, y - obj.y) < CLEAR or not (0 <= x < IMAGE_SIZE and 0 <= y < IMAGE_SIZE):
        return None
    return _changed(scene, "move", index, replace(obj, x=x, y=y), value)


def _add(rng: np.random.Generator, scene: Scene) -> EditStep | None:
    if len(scene.objects) == MAX_OBJECTS:
        return None
    value, shape = int(rng.integers(NUM_PLACES)), int(rng.integers(len(SHAPES)))
    color, size = int(rng.integers(len(COLORS))), int(rng.integers(len(SIZES)))
    obj = SceneObject(shape=shape, color=color, size=size, x=0, y=0, angle=float(rng.uniform(-MAX_ANGLE, MAX_ANGLE)))
    x, y = _goal(obj, value)
    target = replace(scene, objects=(*scene.objects, replace(obj, x=x, y=y)))
    return EditStep(source=scene, target=target, operation="add", before=None, after=len(scene.objects), value=value)


def _remove(rng: np.random.Generator, scene: Scene) -> EditStep | None:
    if len(scene.objects) == 1:
        return None
    index = int(rng.integers(len(scene.objects)))
    return EditStep(
        source=scene, target=with_object(scene, index), operation="remove", before=index, after=None, value=index
    )


def _background(rng: np.random.Generator, scene: Scene) -> EditStep:
    tint = _other(rng, len(BACKGROUND_NAMES), scene.background)
    target = replace(scene, background=tint)
    return EditStep(source=scene, target=target, operation="background", before=None, after=None, value=tint)


_MAKE: Final[Mapping[Operation, Callable[[np.random.Generator, Scene], EditStep | None]]] = MappingProxyType(
    {
        "recolor": _recolor,
        "reshape": _reshape,
        "resize": _resize,
        "move": _move,
        "add": _add,
        "remove": _remove,
        "background": _background,
    }
)


# --------------------------------------------------------------------------------- several, and free places


def _alike(rng: np.random.Generator, scene: Scene) -> list[int]:
    """Indices of all objects of a shape that is there more than once; now and then of all objects."""
    shapes = [obj.shape for obj in scene.objects]
    many = sorted({shape for shape in shapes if shapes.count(shape) > 1})
    if len(shapes) > 1 and (not many or rng.random() < 0.2):
        return list(range(len(shapes)))
    shape = pick(rng, many) if many else -1
    return [i for i, own in enumerate(shapes) if own == shape]


def _several(rng: np.random.Generator, scene: Scene, operation: Operation) -> EditStep | None:
    """All objects of a shape changed at once; None if no such change was drawn."""
    indices = _alike(rng, scene)
    objects = [scene.objects[i] for i in indices]
    if len(indices) < 2 or (operation == "remove" and len(indices) == len(scene.objects)):
        return None
    value, attribute = _common_value(rng, objects, operation)
    if attribute and any(getattr(obj, attribute) == value for obj in objects):
        return None  # one of them would stay as it is
    changed = {} if operation == "remove" else {i: replace(scene.objects[i], **{attribute: value}) for i in indices}
    kept = [changed.get(i, obj) for i, obj in enumerate(scene.objects) if i in changed or i not in indices]
    target = replace(scene, objects=tuple(kept))
    first, *also = indices
    after = None if operation == "remove" else first
    return EditStep(
        source=scene, target=target, operation=operation, before=first, after=after, value=value, also=tuple(also)
    )


def _common_value(rng: np.random.Generator, objects: Sequence[SceneObject], operation: Operation) -> tuple[int, str]:
    """A new value for all objects, and its attribute; "" for a removal."""
    if operation == "resize":
        return 1 - objects[0].size, "size"
    if operation == "recolor":
        return int(rng.integers(len(COLORS))), "color"
    if operation == "reshape":
        return int(rng.integers(len(SHAPES))), "shape"
    return 0, ""


def _add_freely(rng: np.random.Generator, scene: Scene) -> EditStep | None:
    """An object added wherever there is room; half of the time in a relation to an object that is there."""
    step = _add(rng, scene)
    if step is None:
        return None
    new = step.target.objects[-1]
    low_x, low_y = (half + MARGIN for half in half_box(new))
    x, y = rng.uniform(low_x, IMAGE_SIZE - low_x), rng.uniform(low_y, IMAGE_SIZE - low_y)
    new = replace(new, x=float(x), y=float(y))
    target = replace(scene, objects=(*scene.objects, new))
    beside = _beside(rng, scene, new) if rng.random() < 0.5 else None
    return replace(step, target=target, is_free=True, beside=beside, names_size=bool(rng.random() < 0.4))


def _beside(rng: np.random.Generator, scene: Scene, new: SceneObject) -> tuple[Relation, int] | None:
    """A relation of a new object to one that can be named."""
    for index in shuffled(rng, range(len(scene.objects))):
        sides = sorted(relations(new, scene.objects[index]))
        if len(sides) == 1 and names_in(scene, index):
            return sides[0], index
    return None


SEVERAL: Final[tuple[Operation, ...]] = ("recolor", "reshape", "resize", "remove")  # of several objects


def propose_plain_steps(
    rng: np.random.Generator, scene: Scene, operation: Operation, target_bucket: Bucket
) -> Iterator[EditStep]:
    """Edits as `propose_steps` gives them, but of several objects, or additions whose place is open."""
    for _ in range(PROPOSALS):
        step = _add_freely(rng, scene) if operation == "add" else _several(rng, scene, operation)
        if step is not None and bucket(step.target) == target_bucket and fits(step.target):
            yield step


def propose_steps(
    rng: np.random.Generator, scene: Scene, operation: Operation, target_bucket: Bucket
) -> Iterator[EditStep]:
    """Some edits of a scene whose results lie in a bucket, keep objects apart, and can be worded unambiguously."""
    for _ in range(_FEW if operation in ("resize", "remove", "background") else PROPOSALS):
        step = _MAKE[operation](rng, scene)
        if step is None or bucket(step.target) != target_bucket:
            continue
        if fits(step.target) and (step.before is None or names_in(scene, step.before)):
            yield step
