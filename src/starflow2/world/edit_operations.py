"""The seven operations of edits: how each changes a scene, and how a request words it.

Whatever an operation does not name keeps its exact place, size, angle and colour. A place is one of nine: the centre of
that third of the image across and down, moved inwards as far as the object needs to stay clear of the border. Moving
"left by a third" and the like is by a third of the image, 21.3 pixels.
Which edits are made for training and for suites is decided in `edits`. Our choice: docs/choices.md#world.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    Scene,
    SceneObject,
    fits,
    half_box,
    pick,
)
from starflow2.world.splits import bucket, recolor_step
from starflow2.world.words import Wording, article, names_of, words_in

__all__ = [
    "EDIT_WORDINGS",
    "OPERATIONS",
    "EditStep",
    "Operation",
    "edit_words",
    "instruction",
    "propose_steps",
    "with_object",
]

Operation = Literal["recolor", "reshape", "resize", "move", "add", "remove", "background"]

OPERATIONS: Final[tuple[Operation, ...]] = ("recolor", "reshape", "resize", "move", "add", "remove", "background")
CLEAR: Final = 12.0  # pixels that a move covers at least
THIRD: Final = IMAGE_SIZE / 3  # pixels
PROPOSALS: Final = 64  # edits of one scene that are tried
_FEW: Final = 6  # likewise, for operations that have few different edits of one scene

# -------------------------------------------------------------------------------------------- words

EDIT_WORDINGS: Final[Mapping[Operation, Wording]] = MappingProxyType(  # {a} the object, {v} its new value
    {
        "recolor": Wording(
            train=(
                "make {a} {v}",
                "turn {a} {v}",
                "paint {a} {v}",
                "change {a} to {v}",
                "change the color of {a} to {v}",
                "please make {a} {v}",
            ),
            dev=("let {a} be {v}", "give {a} a {v} color"),
            test=("{a} should be {v}", "please paint {a} in {v}", "draw {a} again in {v}"),
        ),
        "reshape": Wording(
            train=(
                "turn {a} into {v}",
                "change {a} into {v}",
                "make {a} into {v}",
                "make {a} {v}",
                "change the shape of {a} to {v}",
                "please turn {a} into {v}",
            ),
            dev=("let {a} become {v}", "give {a} the shape of {v}"),
            test=("{a} should be {v}", "please change {a} to {v}", "draw {a} again as {v}"),
        ),
        "resize": Wording(  # {more} is "larger" or "smaller"
            train=(
                "make {a} {v}",
                "make {a} {more}",
                "change {a} to {v}",
                "change the size of {a} to {v}",
                "please make {a} {v}",
            ),
            dev=("let {a} be {v}", "give {a} a {v} size"),
            test=("{a} should be {v}", "please paint {a} {v}", "draw {a} again but {v}"),
        ),
        "move": Wording(
            train=("move {a} {v}", "shift {a} {v}", "bring {a} {v}", "take {a} {v}", "please move {a} {v}"),
            dev=("let {a} go {v}", "change the place of {a}, move it {v}"),
            test=("{a} should move {v}", "please shift {a} {v}", "take {a} and move it {v}"),
        ),
        "add": Wording(  # {v} the new object, {at} its place
            train=("add {v} {at}", "put {v} {at}", "place {v} {at}", "{at} add {v}", "please add {v} {at}"),
            dev=("let there be {v} {at}", "{at} draw {v} too"),
            test=("there should be {v} {at}", "please put {v} {at}", "{at} there should be {v}"),
        ),
        "remove": Wording(
            train=(
                "remove {a}",
                "delete {a}",
                "erase {a}",
                "take away {a}",
                "remove {a} from the picture",
                "please remove {a}",
            ),
            dev=("let {a} go away", "make the picture without {a}"),
            test=("{a} should go", "please take {a} away", "take {a} out of the picture"),
        ),
        "background": Wording(
            train=(
                "change the background to {v}",
                "make the background {v}",
                "turn the background {v}",
                "paint the background {v}",
                "use a {v} background",
                "please make the background {v}",
            ),
            dev=("let the background be {v}", "give the picture a {v} background"),
            test=("the background should be {v}", "please use {v} for the background", "draw the background in {v}"),
        ),
    }
)
_GOALS: Final = (  # the nine places, row by row, then the four directions
    "to the upper left", "to the top", "to the upper right",
    "to the left side", "to the middle", "to the right side",
    "to the lower left", "to the bottom", "to the lower right",
    "left by a third", "right by a third", "up by a third", "down by a third",
)  # fmt: skip
_PLACES: Final = (
    "in the upper left", "at the top", "in the upper right",
    "on the left side", "in the middle", "on the right side",
    "in the lower left", "at the bottom", "in the lower right",
)  # fmt: skip
_DIRECTIONS: Final = ((-1, 0), (1, 0), (0, -1), (0, 1))
_COMPARED: Final = ("smaller", "larger")
_NAMINGS: Final = (("shape",), ("color", "shape"), ("size", "shape"), ("size", "color", "shape"))


def edit_words() -> frozenset[str]:
    """Every word that any instruction can contain.

    >>> {"erase", "should", "mint", "third"} <= edit_words()
    True
    """
    forms = [form for w in EDIT_WORDINGS.values() for form in (*w.train, *w.dev, *w.test)]
    return words_in((*forms, *_GOALS, *_PLACES, *_COMPARED, *SIZES, *COLORS, *SHAPES, *BACKGROUND_NAMES, "the a"))


def _names(scene: Scene, index: int) -> list[str]:
    """Every name that fits this object alone."""
    return [name.words for name in names_of(scene, scene.objects[index], _NAMINGS)]


# --------------------------------------------------------------------------------------- operations


@dataclass(frozen=True, slots=True, kw_only=True)
class EditStep:
    """An edit before it is put into words.

    before, after: indices of the changed object in `source` and `target`; None where there is no such object.
    value: index of the requested colour, shape, size, place, goal or background; of the object to be removed.
    """

    source: Scene
    target: Scene
    operation: Operation
    before: int | None
    after: int | None
    value: int

    @property
    def color_step(self) -> int:
        """By how many colours a recolouring moves on, see `splits.recolor_step`; 0 for other edits."""
        if self.operation != "recolor" or self.before is None:
            return 0
        return recolor_step(self.source.objects[self.before].color, self.value)


def _other(rng: np.random.Generator, count: int, value: int) -> int:
    """One of range(count), but not `value`."""
    return int(value + rng.integers(1, count)) % count


def _goal(obj: SceneObject, value: int) -> tuple[float, float]:
    """Centre of an object after a move, in pixels; `value` indexes _GOALS."""
    if value >= len(_PLACES):
        right, down = _DIRECTIONS[value - len(_PLACES)]
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
    obj, places = scene.objects[index], len(_PLACES)
    value = int(rng.integers(places) if rng.random() < 0.5 else rng.integers(places, len(_GOALS)))
    x, y = _goal(obj, value)
    if np.hypot(x - obj.x, y - obj.y) < CLEAR or not (0 <= x < IMAGE_SIZE and 0 <= y < IMAGE_SIZE):
        return None
    return _changed(scene, "move", index, replace(obj, x=x, y=y), value)


def _add(rng: np.random.Generator, scene: Scene) -> EditStep | None:
    if len(scene.objects) == MAX_OBJECTS:
        return None
    value, shape = int(rng.integers(len(_PLACES))), int(rng.integers(len(SHAPES)))
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


def propose_steps(
    rng: np.random.Generator, scene: Scene, operation: Operation, target_bucket: Bucket
) -> Iterator[EditStep]:
    """Some edits of a scene whose results lie in a bucket, keep objects apart, and can be worded unambiguously."""
    for _ in range(_FEW if operation in ("resize", "remove", "background") else PROPOSALS):
        step = _MAKE[operation](rng, scene)
        if step is None or bucket(step.target) != target_bucket:
            continue
        if fits(step.target) and (step.before is None or _names(scene, step.before)):
            yield step


def instruction(step: EditStep, rng: np.random.Generator, wording: Bucket) -> str:
    """The request for an edit, by one of the sentence forms of that split."""
    form = pick(rng, EDIT_WORDINGS[step.operation].forms(wording))
    name = {} if step.before is None else {"a": pick(rng, _names(step.source, step.before))}
    return form.format(**name, **_fields(step))


def _fields(step: EditStep) -> dict[str, str]:
    """Fields of a sentence form, without the name of the object."""
    value = step.value
    if step.operation == "add":
        return {"v": f"a {step.target.objects[-1]}", "at": _PLACES[value]}
    if step.operation == "resize":
        return {"v": SIZES[value], "more": _COMPARED[value]}
    words = {
        "recolor": COLORS,
        "reshape": tuple(article(shape) for shape in SHAPES),
        "move": _GOALS,
        "background": BACKGROUND_NAMES,
    }.get(step.operation)
    return {"v": words[value]} if words else {}
