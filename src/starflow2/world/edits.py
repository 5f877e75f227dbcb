"""Edits of the drawn world: a picture, an instruction, and the one picture that follows it exactly.

Training edits are pure functions of seed and index, and both their pictures are trainable; suites are frozen. Whatever
an instruction does not name keeps its exact place, size, angle and colour. Grading is in `evals.editing`.
A place is one of nine: the centre of that third of the picture across and down, moved inwards as far as the object
needs to stay clear of the border. Moving "left by a third" and the like is by a third of the picture, 21.3 pixels.
One file in spite of its length: training and suites share words, places and the guard against held-out results.
Nothing here is from the paper; our choice: docs/choices.md#world.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

import numpy as np

from starflow2.data.dialogue import Dialogue, Turn
from starflow2.errors import ConfigError, DataError
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
    SceneDialogue,
    SceneObject,
    Split,
    fits,
    half_box,
    pick,
    sample_scene,
    stream,
)
from starflow2.world.splits import HELD_OUT, RECOLOR_HELD_OUT, bucket, held_out, scene_key
from starflow2.world.words import Wording

__all__ = [
    "EDIT_WORDINGS",
    "OPERATIONS",
    "Edit",
    "EditSession",
    "Operation",
    "Part",
    "edit_chain_dialogue",
    "edit_dialogue",
    "edit_task",
    "edit_words",
    "suite_edits",
    "suite_sessions",
]

Operation = Literal["recolor", "reshape", "resize", "move", "add", "remove", "background"]
Part = Literal["id", "cg", "paraphrase"]

OPERATIONS: Final[tuple[Operation, ...]] = ("recolor", "reshape", "resize", "move", "add", "remove", "background")
_HARD: Final[tuple[Operation, ...]] = ("recolor", "reshape", "move")  # learnt last: one object among several
_TRAINED: Final = (*OPERATIONS, *_HARD, *_HARD, "resize", "add")  # in training; suites have all alike
CLEAR: Final = 12.0  # pixels that a move covers at least
THIRD: Final = IMAGE_SIZE / 3  # pixels

_EDIT, _CHAIN = 21, 22  # third number of a stream
_SUITE_SEED, _SUITE, _SESSIONS = 2026, 20, 21  # frozen: another seed or order of draws makes another benchmark
_COUNT_SHARES: Final = (0.15, 0.3, 0.3, 0.25)  # shares of training pictures with one to four objects
_REPEATS: Final = 0.35  # share of pictures of several objects in which some have the same shape
_TRIES: Final = 64  # recolourings of a layout, and edits of a picture, before another is drawn
_SOURCES: Final = 2_000  # pictures to start from; a handful is enough for anything possible
_FEW: Final = 6  # likewise, edits of an operation that has few on one picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Two pictures and the words between them.

    `before` and `after` say which of `source.objects` and `target.objects` changed; None where there is no such object.
    """

    source: Scene
    target: Scene
    operation: Operation
    instruction: str
    before: int | None
    after: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EditSession:
    """Three edits in a row, but before the third the second is taken back, or both are.

    `undo_to` is the number of edits that stay: 0 goes back to the first version of the picture. The third edit starts
    from there.
    """

    edits: tuple[Edit, Edit, Edit]
    undo_to: Literal[0, 1]

    @property
    def source(self) -> Scene:
        """The picture before any edit."""
        return self.edits[0].source

    @property
    def instructions(self) -> tuple[str, ...]:
        """What is asked for, turn by turn."""
        return tuple(edit.instruction for edit in self.edits)

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The picture after each turn."""
        return tuple(edit.target for edit in self.edits)

    @property
    def undone(self) -> Scene:
        """The picture that the undo brings back."""
        return self.edits[2].source


# -------------------------------------------------------------------------------------------- words

EDIT_WORDINGS: Final[Mapping[Operation, Wording]] = MappingProxyType(  # {a} the object, {v} what becomes of it
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
_NAMES: Final = (("shape",), ("color", "shape"), ("size", "shape"), ("size", "color", "shape"))
_VALUES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({"size": SIZES, "color": COLORS, "shape": SHAPES})


def edit_words() -> frozenset[str]:
    """Every word that any instruction can contain.

    >>> {"erase", "should", "mint", "third"} <= edit_words()
    True
    """
    forms = [form for w in EDIT_WORDINGS.values() for split in ("train", "dev", "test") for form in w.forms(split)]
    words = (*forms, *_GOALS, *_PLACES, *_COMPARED, *SIZES, *COLORS, *SHAPES, *BACKGROUND_NAMES, "the a")
    return frozenset(word for text in words for word in re.findall(r"[a-z]+", re.sub(r"\{[^}]*\}", " ", text)))


def _names(scene: Scene, index: int) -> list[str]:
    """Every wording that fits this object alone."""
    clear = []
    for attributes in _NAMES:
        values = [[getattr(obj, k) for k in attributes] for obj in scene.objects]
        if values.count(values[index]) == 1:
            words = (_VALUES[k][value] for k, value in zip(attributes, values[index], strict=True))
            clear.append(" ".join(["the", *words]))
    return clear


# -------------------------------------------------------------------------------------------- edits


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """An edit before it is put into words. `value` indexes what is asked for: a colour, a shape, a goal, ..."""

    source: Scene
    target: Scene
    operation: Operation
    before: int | None
    after: int | None
    value: int


def _other(rng: np.random.Generator, count: int, value: int) -> int:
    """One of range(count), but not `value`."""
    return int(value + rng.integers(1, count)) % count


def _goal(obj: SceneObject, value: int) -> tuple[float, float]:
    """Where an object stands after a move; `value` indexes _GOALS."""
    if value >= len(_PLACES):
        right, down = _DIRECTIONS[value - len(_PLACES)]
        return obj.x + right * THIRD, obj.y + down * THIRD
    row, column = divmod(value, 3)
    low_x, low_y = (half + MARGIN for half in half_box(obj))
    x, y = (column + 0.5) * THIRD, (row + 0.5) * THIRD
    return min(max(x, low_x), IMAGE_SIZE - low_x), min(max(y, low_y), IMAGE_SIZE - low_y)


def _with(scene: Scene, index: int, *objects: SceneObject) -> Scene:
    """The scene with one object replaced, or with none in its place."""
    return replace(scene, objects=(*scene.objects[:index], *objects, *scene.objects[index + 1 :]))


def _changed(scene: Scene, operation: Operation, index: int, obj: SceneObject, value: int) -> _Step:
    target = _with(scene, index, obj)
    return _Step(source=scene, target=target, operation=operation, before=index, after=index, value=value)


def _recolor(rng: np.random.Generator, scene: Scene) -> _Step:
    index = int(rng.integers(len(scene.objects)))
    color = _other(rng, len(COLORS), scene.objects[index].color)
    return _changed(scene, "recolor", index, replace(scene.objects[index], color=color), color)


def _reshape(rng: np.random.Generator, scene: Scene) -> _Step:
    index = int(rng.integers(len(scene.objects)))
    shape = _other(rng, len(SHAPES), scene.objects[index].shape)
    return _changed(scene, "reshape", index, replace(scene.objects[index], shape=shape), shape)


def _resize(rng: np.random.Generator, scene: Scene) -> _Step:
    index = int(rng.integers(len(scene.objects)))
    size = 1 - scene.objects[index].size
    return _changed(scene, "resize", index, replace(scene.objects[index], size=size), size)


def _move(rng: np.random.Generator, scene: Scene) -> _Step | None:
    index = int(rng.integers(len(scene.objects)))
    obj, places = scene.objects[index], len(_PLACES)
    value = int(rng.integers(places) if rng.random() < 0.5 else rng.integers(places, len(_GOALS)))
    x, y = _goal(obj, value)
    if np.hypot(x - obj.x, y - obj.y) < CLEAR or not (0 <= x < IMAGE_SIZE and 0 <= y < IMAGE_SIZE):
        return None
    return _changed(scene, "move", index, replace(obj, x=x, y=y), value)


def _add(rng: np.random.Generator, scene: Scene) -> _Step | None:
    if len(scene.objects) == MAX_OBJECTS:
        return None
    value, shape = int(rng.integers(len(_PLACES))), int(rng.integers(len(SHAPES)))
    color, size = int(rng.integers(len(COLORS))), int(rng.integers(len(SIZES)))
    obj = SceneObject(shape=shape, color=color, size=size, x=0, y=0, angle=float(rng.uniform(-MAX_ANGLE, MAX_ANGLE)))
    x, y = _goal(obj, value)
    target = replace(scene, objects=(*scene.objects, replace(obj, x=x, y=y)))
    return _Step(source=scene, target=target, operation="add", before=None, after=len(scene.objects), value=value)


def _remove(rng: np.random.Generator, scene: Scene) -> _Step | None:
    if len(scene.objects) == 1:
        return None
    index = int(rng.integers(len(scene.objects)))
    return _Step(source=scene, target=_with(scene, index), operation="remove", before=index, after=None, value=index)


def _background(rng: np.random.Generator, scene: Scene) -> _Step:
    tint = _other(rng, len(BACKGROUND_NAMES), scene.background)
    target = replace(scene, background=tint)
    return _Step(source=scene, target=target, operation="background", before=None, after=None, value=tint)


_MAKE: Final[Mapping[Operation, Callable[[np.random.Generator, Scene], _Step | None]]] = MappingProxyType(
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


def _steps(rng: np.random.Generator, scene: Scene, operation: Operation, where: Bucket) -> Iterator[_Step]:
    """Some edits of a scene that lead into a bucket, can be said, and leave everything clear of everything else."""
    for _ in range(_FEW if operation in ("resize", "remove", "background") else _TRIES):
        step = _MAKE[operation](rng, scene)
        if step is None or bucket(step.target) != where:
            continue
        if fits(step.target) and (step.before is None or _names(scene, step.before)):
            yield step


def _asked(step: _Step) -> dict[str, str]:
    """The fields of a sentence form, but for the name of the object."""
    value = step.value
    if step.operation == "add":
        return {"v": f"a {step.target.objects[-1]}", "at": _PLACES[value]}
    if step.operation == "resize":
        return {"v": SIZES[value], "more": _COMPARED[value]}
    words = {
        "recolor": COLORS,
        "reshape": tuple(f"a {shape}" for shape in SHAPES),
        "move": _GOALS,
        "background": BACKGROUND_NAMES,
    }.get(step.operation)
    return {"v": words[value]} if words else {}


def _worded(step: _Step, rng: np.random.Generator, wording: Bucket) -> Edit:
    form = pick(rng, EDIT_WORDINGS[step.operation].forms(wording))
    named = {} if step.before is None else {"a": pick(rng, _names(step.source, step.before))}
    return Edit(
        source=step.source,
        target=step.target,
        operation=step.operation,
        instruction=form.format(**named, **_asked(step)),
        before=step.before,
        after=step.after,
    )


# ------------------------------------------------------------------------------------ what is shown


def _color_step(step: _Step) -> int:
    """By how much a recolouring moves on the colour wheel, 0 for other edits."""
    if step.operation != "recolor" or step.before is None:
        return 0
    return (step.value - step.source.objects[step.before].color) % len(COLORS)


def _shows(scene: Scene) -> frozenset[tuple[Split, str]]:
    """Everything held out that a scene shows, and for which split."""
    return frozenset((split, row) for split in HELD_OUT for row in held_out(scene, split))


def _is_seen(step: _Step) -> bool:
    """True if neither an edit nor its result is held out."""
    return _color_step(step) not in RECOLOR_HELD_OUT.values() and not _shows(step.target)


def _meets(shapes: Sequence[int]) -> frozenset[tuple[Split, str]]:
    """What of the counts and shape pairs that are held out these shapes show, as in `_shows`."""
    counts = {(shape, shapes.count(shape)) for shape in shapes}
    found: set[tuple[Split, str]] = set()
    for split, table in HELD_OUT.items():
        found |= {(split, "count")} if counts & table.counts else set()
        found |= {(split, "shapes")} if any(pair.issubset(shapes) for pair in table.shapes) else set()
    return frozenset(found)


@functools.cache
def _colors_of(shape: int, novel: Split | None) -> tuple[int, ...]:
    """The colours that a shape has in training, or those that one split holds out."""
    tables = HELD_OUT.values() if novel is None else (HELD_OUT[novel],)
    held = {color for table in tables for s, color in table.pairs if s == shape}
    return tuple(color for color in range(len(COLORS)) if (color in held) == (novel is not None))


def _colors(rng: np.random.Generator, shapes: Sequence[int], novel: Split | None) -> list[int]:
    """A colour per shape, all as in training; with `novel` the first is one that this split holds out."""
    return [pick(rng, _colors_of(shape, None if place else novel)) for place, shape in enumerate(shapes)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cast:
    """What a source must be like."""

    where: Bucket
    most: int = MAX_OBJECTS
    least: int = 2
    first: tuple[int, ...] = ()  # shapes that must be there
    relation: Relation | None = None  # what the first is with respect to the second
    shows: frozenset[tuple[Split, str]] = frozenset()  # what is held out, and no more


def _shapes(rng: np.random.Generator, cast: _Cast) -> list[int]:
    """The shapes of a source: those required first, others after them."""
    plain = cast.shows - {(split, row) for split in HELD_OUT for row in ("pair", "fact")}
    low = max(cast.least, len(cast.first))
    shares = np.array(_COUNT_SHARES[low - 1 : cast.most])
    count = low + int(rng.choice(len(shares), p=shares / shares.sum()))
    while True:
        others = [shape for shape in rng.permutation(len(SHAPES)).tolist() if shape not in cast.first]
        shapes = [*cast.first, *others][:count]
        if not cast.first and count > 1 and rng.random() < _REPEATS:
            same = int(rng.integers(2, count + 1))
            shapes = [shapes[0]] * same + shapes[same:]
        if _meets(shapes) == plain:
            return shapes


def _source(rng: np.random.Generator, cast: _Cast) -> Scene:
    """A scene of a bucket that shows what is asked for and nothing else that is held out.

    A layout is costly to draw and its colours are not, so several colourings are tried for a rare bucket.
    """
    novel = next((split for split, row in cast.shows if row == "pair"), None)
    while True:
        shapes = _shapes(rng, cast)
        scene = sample_scene(rng, shapes=shapes, colors=_colors(rng, shapes, novel), relation=cast.relation)
        if _shows(scene) != cast.shows:
            continue
        for place in itertools.islice(itertools.cycle(range(len(shapes))), _TRIES):
            if bucket(scene) == cast.where:
                return scene
            color = pick(rng, _colors_of(shapes[place], None if place else novel))
            scene = _with(scene, place, replace(scene.objects[place], color=color))


# ----------------------------------------------------------------------------------------- training


def edit_task(seed: int, index: int) -> Edit:
    """Training edit number `index`: a pure function of its arguments, free of anything held out.

    >>> edit_task(0, 5) == edit_task(0, 5)
    True
    """
    rng = stream(seed, index, _EDIT)
    operation = pick(rng, _TRAINED)
    (step,) = _chain(rng, "train", [operation])
    return _worded(step, rng, "train")


def _chain(
    rng: np.random.Generator, where: Bucket, operations: Sequence[Operation], *, undo_to: int | None = None
) -> list[_Step]:
    """Edits one after another, all seen in training and all their pictures in one bucket; the last may start from an
    earlier picture, the one after `undo_to` edits."""
    least = max(2 if where != "train" else 1, operations.count("remove") + 1)
    spare = max(operations.count("add"), len(operations) > 1)  # four objects leave several edits too little room
    cast = _Cast(where=where, least=least, most=MAX_OBJECTS - spare)
    for _ in range(_SOURCES if cast.least <= cast.most else 0):
        steps = _rest(rng, where, operations, [_source(rng, cast)], undo_to)
        if steps is not None:
            return steps
    raise DataError(f"operations={tuple(operations)}: no picture was found that allows them one after another.")


def _rest(
    rng: np.random.Generator, where: Bucket, operations: Sequence[Operation], scenes: list[Scene], undo_to: int | None
) -> list[_Step] | None:
    """Edits that lead on from the scenes so far, never to one of them; None if none were found."""
    if not operations:
        return []
    start = scenes[-1 if undo_to is None or len(operations) > 1 else undo_to]
    for step in _steps(rng, start, operations[0], where):
        if _is_seen(step) and step.target not in scenes:
            rest = _rest(rng, where, operations[1:], [*scenes, step.target], undo_to)
            if rest is not None:
                return [step, *rest]
    return None


def edit_dialogue(edit: Edit) -> SceneDialogue:
    """One turn: the picture and what to do with it, answered by the edited picture."""
    return _dialogue([edit], "edit")


def _dialogue(edits: Sequence[Edit], kind: str) -> SceneDialogue:
    first, *rest = edits
    turns = [Turn(user=(first.source, first.instruction), assistant=(first.target,))]
    turns += [Turn(user=(edit.instruction,), assistant=(edit.target,)) for edit in rest]
    return Dialogue(turns=tuple(turns), kind=kind)


def edit_chain_dialogue(seed: int, index: int) -> SceneDialogue:
    """Training dialogue number `index` of two or three edits in a row, each of the picture that the last one made.

    >>> len(edit_chain_dialogue(0, 0).turns) in (2, 3)
    True
    """
    rng = stream(seed, index, _CHAIN)
    operations = [pick(rng, OPERATIONS) for _ in range(int(rng.integers(2, 4)))]
    while operations.count("remove") > 2:  # four objects, and room for others, leave nothing for a third
        operations = [pick(rng, OPERATIONS) for _ in operations]
    steps = _chain(rng, "train", operations)
    return _dialogue([_worded(step, rng, "train") for step in steps], "edit chain")


# ------------------------------------------------------------------------------------------- suites

_ANY_ROW: Final = ("pair", "fact", "shapes", "count")
_ROWS: Final[Mapping[Operation, tuple[str, ...]]] = MappingProxyType(  # what the results of "cg" show that is held out
    {
        "recolor": (),  # the colour step itself
        "reshape": _ANY_ROW,
        "resize": _ANY_ROW,
        "move": ("fact",),
        "add": _ANY_ROW,
        "remove": _ANY_ROW,
        "background": _ANY_ROW,
    }
)


def suite_edits(split: Split, part: Part, per_operation: int) -> list[Edit]:
    """Frozen edits, operation by operation; the first n of each are the same whatever `per_operation` is.

    "id": unseen pictures, both of the split's bucket, seen combinations, training wording. "cg": recolouring by the
    split's held-out step, or a result with one combination that the split holds out: made by the edit where it can make
    it, else in the source too. "paraphrase": the edits of "id" in the split's own wording.
    """
    for name, value, known in (("split", split, tuple(HELD_OUT)), ("part", part, ("id", "cg", "paraphrase"))):
        if value not in known:
            raise ConfigError(f"{name}={value!r}: expected one of {', '.join(known)}")
    wording: Bucket = split if part == "paraphrase" else "train"
    return [
        _worded(step, stream(*_where(split, part, operation), item, 1), wording)  # not the stream of the scenes
        for operation in OPERATIONS
        for item, step in enumerate(_suite_steps(split, "cg" if part == "cg" else "id", operation, per_operation))
    ]


def _where(split: Split, part: Part, operation: Operation) -> tuple[int, ...]:
    """The numbers that name a suite's stream."""
    parts = ("id", "cg", "paraphrase")
    return (_SUITE_SEED, _SUITE, ("dev", "test").index(split), parts.index(part), OPERATIONS.index(operation))


@functools.cache
def _suite_steps(split: Split, part: Literal["id", "cg"], operation: Operation, count: int) -> tuple[_Step, ...]:
    """`count` edits of one operation whose sources all differ."""
    steps: list[_Step] = []
    shown: set[tuple[int, ...]] = set()
    for item in range(count):
        rng = stream(*_where(split, part, operation), item, 0)
        step = None
        while step is None or scene_key(step.source) in shown:
            if part == "id":
                (step,) = _chain(rng, split, [operation])
            else:
                step = _unseen_step(rng, split, operation, item)
        shown.add(scene_key(step.source))
        steps.append(step)
    return tuple(steps)


def _unseen_step(rng: np.random.Generator, split: Split, operation: Operation, item: int) -> _Step:
    rows = _ROWS[operation]
    row = rows[item % len(rows)] if rows else ""
    wanted = frozenset({(split, row)}) if row else frozenset()
    color_step = 0 if row else RECOLOR_HELD_OUT[split]
    while True:
        source = _source(rng, _unseen_cast(rng, split, operation, row))
        for step in _steps(rng, source, operation, split):
            if _color_step(step) == color_step and _shows(step.target) == wanted:
                return step


def _unseen_cast(rng: np.random.Generator, split: Split, operation: Operation, row: str) -> _Cast:
    """A source from which `operation` can lead to a picture that shows `row` of the split."""
    table = HELD_OUT[split]
    most = MAX_OBJECTS - (operation == "add")
    is_kept = operation in ("resize", "background") or (operation == "remove" and row != "count")
    spare = int(operation in ("reshape", "remove"))  # objects besides those that make the row
    first: tuple[int, ...] = ()
    relation: Relation | None = None
    if row == "count":
        change = 0 if is_kept else 1 if operation == "remove" else -1
        shape, count = pick(rng, [(s, n) for s, n in sorted(table.counts) if n + change <= most])
        first = (shape,) * (count + change)
        spare = int(operation == "reshape")
    elif row == "shapes" and is_kept:
        first = tuple(sorted(pick(rng, sorted(table.shapes, key=sorted))))
    elif row == "fact" and (is_kept or operation == "move"):
        a, relation, b = pick(rng, sorted(table.facts))
        first, relation = (a, b), relation if is_kept else None
    shows = frozenset({(split, row)}) if is_kept else frozenset()
    least = max(2, len(first) + spare)
    return _Cast(where=split, most=most, least=least, first=first, relation=relation, shows=shows)


@functools.cache
def suite_sessions(split: Split, count: int) -> tuple[EditSession, ...]:
    """Frozen sessions of three different operations, as in "id" of `suite_edits`.

    By turns the undo goes back to the first version and takes back one edit.
    """
    if split not in HELD_OUT:
        raise ConfigError(f"split={split!r}: expected one of {', '.join(HELD_OUT)}")
    sessions = []
    for item in range(count):
        rng = stream(_SUITE_SEED, _SESSIONS, ("dev", "test").index(split), item)
        operations: list[Operation] = []
        while not operations or {"resize", "remove"} <= set(operations):  # rare together, as pictures of a rare bucket
            operations = [OPERATIONS[int(index)] for index in rng.permutation(len(OPERATIONS))[:3]]
        undo_to: Literal[0, 1] = 0 if item % 2 == 0 else 1
        first, second, third = (_worded(s, rng, "train") for s in _chain(rng, split, operations, undo_to=undo_to))
        sessions.append(EditSession(edits=(first, second, third), undo_to=undo_to))
    return tuple(sessions)
