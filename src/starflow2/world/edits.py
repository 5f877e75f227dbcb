"""Edits of the drawn world: an image, an instruction, and the one image that follows it exactly.

Training edits are pure functions of seed and index, and both their images are trainable; suites are frozen. The
operations and their wordings are in `edit_operations`, grading in `evals.edit`.
Nothing here is from the paper; our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

import numpy as np

from starflow2.core.dialogue import Dialogue, Turn
from starflow2.errors import ConfigError, DataError
from starflow2.world.edit_operations import (
    OPERATIONS,
    SEVERAL,
    EditStep,
    Operation,
    propose_plain_steps,
    propose_steps,
    with_object,
)
from starflow2.world.edit_requests import instruction, plain_request
from starflow2.world.sampling import COUNT_SHARES, with_repeats
from starflow2.world.scene import (
    MAX_OBJECTS,
    SHAPES,
    Bucket,
    Relation,
    Scene,
    SceneDialogue,
    Split,
    pick,
    sample_scene,
    stream,
)
from starflow2.world.splits import HELD_OUT, RECOLOR_HELD_OUT, Row, bucket, colors_of, held_out, reserved, scene_key

__all__ = [
    "Edit",
    "EditSession",
    "Part",
    "chain_steps",
    "edit_chain_dialogue",
    "edit_dialogue",
    "edit_task",
    "may_train",
    "random_edit",
    "suite_edits",
    "suite_plain_edits",
    "suite_sessions",
]

Part = Literal["id", "cg", "paraphrase"]

_HARD: Final[tuple[Operation, ...]] = ("recolor", "reshape", "move")  # learnt last: one object among several
_TRAINED: Final = (*OPERATIONS, *_HARD, *_HARD, "resize", "add")  # shares of training; suites have equal ones
_PLAIN: Final[Mapping[Operation, float]] = MappingProxyType(  # shares that change several objects, or leave places open
    {operation: 0.25 for operation in SEVERAL} | {"add": 0.5}
)
_IT: Final = 0.5  # share of edits of a lone object, or of the object of the last edit, that call it "it"
_EDIT, _CHAIN = 21, 22  # third number of a stream, so that no other task repeats its draws
_SUITE_SEED, _SUITE, _SESSIONS, _PLAIN_SUITE = (
    2026,
    20,
    21,
    22,
)  # frozen: another seed or order of draws makes another benchmark
_RECOLORINGS: Final = 64  # colourings of a layout that are tried before another is drawn
_SOURCES: Final = 2_000  # scenes to start from; a handful is enough for anything possible


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """An edit in words: two images and the instruction that leads from one to the other."""

    step: EditStep
    instruction: str

    @property
    def source(self) -> Scene:
        """The image before."""
        return self.step.source

    @property
    def target(self) -> Scene:
        """The image after; one of many where the place of an added object is open."""
        return self.step.target

    @property
    def operation(self) -> Operation:
        """The operation of the edit."""
        return self.step.operation

    @property
    def before(self) -> int | None:
        """Index of the changed object in `source`, of the first of several; None where there is none."""
        return self.step.before

    @property
    def after(self) -> int | None:
        """Index of the changed object in `target`; None where there is none."""
        return self.step.after


@dataclass(frozen=True, slots=True, kw_only=True)
class EditSession:
    """Three edits in a row with an undo before the third.

    undo_to: number of edits that stay; 0 goes back to the source. The third edit starts from there.
    """

    edits: tuple[Edit, Edit, Edit]
    undo_to: Literal[0, 1]

    @property
    def source(self) -> Scene:
        """The image before any edit."""
        return self.edits[0].source

    @property
    def instructions(self) -> tuple[str, ...]:
        """The requests, turn by turn."""
        return tuple(edit.instruction for edit in self.edits)

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The image after each turn."""
        return tuple(edit.target for edit in self.edits)

    @property
    def undone(self) -> Scene:
        """The image that the undo brings back."""
        return self.edits[2].source


def _worded(step: EditStep, rng: np.random.Generator, wording: Bucket) -> Edit:
    return Edit(step=step, instruction=instruction(step, rng, wording))


# ----------------------------------------------------------------------------------------- sources

_Reserved = frozenset[tuple[Split, Row]]  # kinds of held-out combination, with the split that reserves them


def _reserved_in(scene: Scene) -> _Reserved:
    """Every kind of held-out combination that a scene shows."""
    return frozenset((split, row) for split in reserved() for row in held_out(scene, split))


def _reserved_in_shapes(shapes: Sequence[int]) -> _Reserved:
    """Those of them that shapes show, wherever they are and whatever their colours."""
    return frozenset((split, row) for split, table in reserved().items() for row in table.rows_of_shapes(shapes))


def may_train(step: EditStep) -> bool:
    """True if neither the change of colour nor anything in the result is held out."""
    is_seen_step = not reserved() or step.color_steps.isdisjoint(RECOLOR_HELD_OUT.values())
    return is_seen_step and not _reserved_in(step.target)


def _colors(rng: np.random.Generator, shapes: Sequence[int], novel: Split | None) -> list[int]:
    """A colour per shape, all as in training; with `novel` the first is one that this split holds out."""
    return [pick(rng, colors_of(shape, None if index else novel)) for index, shape in enumerate(shapes)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _SourceRules:
    """Conditions for the scene that an edit starts from."""

    bucket: Bucket
    most: int = MAX_OBJECTS
    least: int = 2
    first: tuple[int, ...] = ()  # shapes that must be there
    relation: Relation | None = None  # of the first object to the second
    shows: _Reserved = frozenset()  # exactly what is held out and shown


def _shapes(rng: np.random.Generator, rules: _SourceRules) -> list[int]:
    """The shapes of a source: those required first, others after them."""
    wanted = frozenset((split, row) for split, row in rules.shows if row in ("shapes", "count"))
    low = max(rules.least, len(rules.first))
    shares = np.array(COUNT_SHARES[low - 1 : rules.most])
    count = low + int(rng.choice(len(shares), p=shares / shares.sum()))
    while True:
        others = [shape for shape in rng.permutation(len(SHAPES)).tolist() if shape not in rules.first]
        shapes = [*rules.first, *others][:count]
        if not rules.first:
            shapes = with_repeats(rng, shapes)
        if _reserved_in_shapes(shapes) == wanted:
            return shapes


def _source(rng: np.random.Generator, rules: _SourceRules) -> Scene:
    """A scene by the rules.

    A layout is costly to draw and its colours are not, so several colourings are tried for a rare bucket.
    """
    novel = next((split for split, row in rules.shows if row == "pair"), None)
    while True:
        shapes = _shapes(rng, rules)
        scene = sample_scene(rng, shapes=shapes, colors=_colors(rng, shapes, novel), relation=rules.relation)
        if _reserved_in(scene) != rules.shows:
            continue
        for index in itertools.islice(itertools.cycle(range(len(shapes))), _RECOLORINGS):
            if bucket(scene) == rules.bucket:
                return scene
            color = pick(rng, colors_of(shapes[index], None if index else novel))
            scene = with_object(scene, index, replace(scene.objects[index], color=color))


# ----------------------------------------------------------------------------------------- training


def edit_task(seed: int, index: int) -> Edit:
    """Training edit number `index`: a pure function of its arguments, free of anything held out.

    >>> edit_task(0, 5) == edit_task(0, 5)
    True
    """
    return random_edit(stream(seed, index, _EDIT))


def random_edit(rng: np.random.Generator, scene_bucket: Bucket = "train", operation: Operation | None = None) -> Edit:
    """An edit that training may show, in the words of training's grammar, with both images in a bucket.

    Some change several objects at once, or add one without saying where; a lone object is called "it" by chance.
    """
    chosen: Operation = pick(rng, _TRAINED) if operation is None else operation
    if chosen in _PLAIN and rng.random() < _PLAIN[chosen]:
        step = _plain_step(rng, scene_bucket, chosen)
    else:
        (step,) = chain_steps(rng, scene_bucket, [chosen])
    is_it = len(step.source.objects) == 1 and bool(rng.random() < _IT)
    return Edit(step=step, instruction=plain_request(step, rng, is_it=is_it))


def _plain_step(rng: np.random.Generator, scene_bucket: Bucket, operation: Operation) -> EditStep:
    """An edit of several objects, or an addition whose place is open."""
    rules = _SourceRules(bucket=scene_bucket, least=1 if operation == "add" else 2, most=MAX_OBJECTS)
    while True:
        source = _source(rng, rules)
        for step in itertools.islice(propose_plain_steps(rng, source, operation, scene_bucket), 4):
            if may_train(step):
                return step


def chain_steps(
    rng: np.random.Generator, scene_bucket: Bucket, operations: Sequence[Operation], *, undo_to: int | None = None
) -> list[EditStep]:
    """Edits one after another that training may show, with all their images in one bucket.

    undo_to: start the last edit from the image after so many edits, instead of the last image. Raises DataError if no
    scene was found that allows the operations.
    """
    least = max(2 if scene_bucket != "train" else 1, operations.count("remove") + 1)
    spare = max(operations.count("add"), len(operations) > 1)  # four objects leave several edits too little room
    rules = _SourceRules(bucket=scene_bucket, least=least, most=MAX_OBJECTS - spare)
    for _ in range(_SOURCES if rules.least <= rules.most else 0):
        steps = _rest_of_chain(rng, scene_bucket, operations, [_source(rng, rules)], undo_to)
        if steps is not None:
            return steps
    raise DataError(f"operations={tuple(operations)}: no image was found that allows them one after another.")


def _rest_of_chain(
    rng: np.random.Generator,
    scene_bucket: Bucket,
    operations: Sequence[Operation],
    scenes: list[Scene],
    undo_to: int | None,
) -> list[EditStep] | None:
    """Edits that lead on from the scenes so far, never back to one of them; None if none were found."""
    if not operations:
        return []
    start = scenes[-1 if undo_to is None or len(operations) > 1 else undo_to]
    for step in propose_steps(rng, start, operations[0], scene_bucket):
        if may_train(step) and step.target not in scenes:
            rest = _rest_of_chain(rng, scene_bucket, operations[1:], [*scenes, step.target], undo_to)
            if rest is not None:
                return [step, *rest]
    return None


def edit_dialogue(edit: Edit) -> SceneDialogue:
    """One turn: the image and its instruction, answered by the edited image."""
    return _dialogue([edit], "edit")


def _dialogue(edits: Sequence[Edit], kind: str) -> SceneDialogue:
    first, *rest = edits
    turns = [Turn(user=(first.source, first.instruction), assistant=(first.target,))]
    turns += [Turn(user=(edit.instruction,), assistant=(edit.target,)) for edit in rest]
    return Dialogue(turns=tuple(turns), kind=kind)


def edit_chain_dialogue(seed: int, index: int) -> SceneDialogue:
    """Training dialogue number `index` of two or three edits in a row, each of the result of the last one.

    >>> len(edit_chain_dialogue(0, 0).turns) in (2, 3)
    True
    """
    rng = stream(seed, index, _CHAIN)
    operations = [pick(rng, OPERATIONS) for _ in range(int(rng.integers(2, 4)))]
    while operations.count("remove") > 2:  # four objects, and room for others, leave nothing for a third
        operations = [pick(rng, OPERATIONS) for _ in operations]
    return _dialogue(_in_a_row(chain_steps(rng, "train", operations), rng), "edit chain")


def _in_a_row(steps: Sequence[EditStep], rng: np.random.Generator) -> list[Edit]:
    """Steps in the words of training's grammar; the object of the last one may be called "it"."""
    edits = list[Edit]()
    for last, step in zip((None, *steps), steps, strict=False):
        named = None if last is None or last.after is None else last.target.objects[last.after]
        may_be_it = named is not None and step.before is not None and step.source.objects[step.before] == named
        is_it = may_be_it and bool(rng.random() < _IT)
        edits.append(Edit(step=step, instruction=plain_request(step, rng, is_it=is_it)))
    return edits


# ------------------------------------------------------------------------------------------- suites

_ANY_ROW: Final[tuple[Row, ...]] = ("pair", "fact", "shapes", "count")
_ROWS: Final[Mapping[Operation, tuple[Row, ...]]] = MappingProxyType(  # shown by results of "cg" and held out
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
    """Frozen edits, operation by operation; a larger `per_operation` only adds edits.

    "id": unseen images, both of the split's bucket, seen combinations, training wording. "cg": recolouring by the
    split's held-out step, or a result with one combination that the split holds out: made by the edit where it can make
    it, else in the source too. "paraphrase": the edits of "id" in the split's own wording. Raises ConfigError for an
    unknown split or part.
    """
    for name, value, known in (("split", split, tuple(HELD_OUT)), ("part", part, ("id", "cg", "paraphrase"))):
        if value not in known:
            raise ConfigError(f"{name}={value!r}: expected one of {', '.join(known)}")
    wording: Bucket = split if part == "paraphrase" else "train"
    edits = []
    for operation in OPERATIONS:
        numbers = _suite_stream(split, part, operation)
        for item, step in enumerate(_suite_steps(split, "cg" if part == "cg" else "id", operation, per_operation)):
            words_rng = stream(*numbers, item, 1)  # apart from that of the scenes, which wording must not change
            edits.append(_worded(step, words_rng, wording))
    return edits


@functools.cache
def suite_plain_edits(split: Split, per_operation: int) -> tuple[Edit, ...]:
    """Frozen edits in plain words, operation by operation: unseen images, seen combinations, training's grammar.

    Raises ConfigError for an unknown split.
    """
    if split not in HELD_OUT:
        raise ConfigError(f"split={split!r}: expected one of {', '.join(HELD_OUT)}")
    numbers = (_SUITE_SEED, _PLAIN_SUITE, ("dev", "test").index(split))
    return tuple(
        random_edit(stream(*numbers, row, item), split, operation)
        for row, operation in enumerate(OPERATIONS)
        for item in range(per_operation)
    )


def _suite_stream(split: Split, part: Part, operation: Operation) -> tuple[int, ...]:
    """The first numbers of all streams of one part and operation of a suite."""
    parts = ("id", "cg", "paraphrase")
    return (_SUITE_SEED, _SUITE, ("dev", "test").index(split), parts.index(part), OPERATIONS.index(operation))


@functools.cache
def _suite_steps(split: Split, part: Literal["id", "cg"], operation: Operation, count: int) -> tuple[EditStep, ...]:
    """`count` edits of one operation whose sources all differ."""
    steps: list[EditStep] = []
    shown: set[tuple[int, ...]] = set()
    for item in range(count):
        rng = stream(*_suite_stream(split, part, operation), item, 0)
        step = None
        while step is None or scene_key(step.source) in shown:
            if part == "id":
                (step,) = chain_steps(rng, split, [operation])
            else:
                step = _unseen_step(rng, split, operation, item)
        shown.add(scene_key(step.source))
        steps.append(step)
    return tuple(steps)


def _unseen_step(rng: np.random.Generator, split: Split, operation: Operation, item: int) -> EditStep:
    """An edit of a suite's "cg" part: a held-out change of colour, or a result with a held-out combination."""
    rows = _ROWS[operation]
    row = rows[item % len(rows)] if rows else None
    wanted: _Reserved = frozenset({(split, row)}) if row else frozenset()
    color_step = 0 if row else RECOLOR_HELD_OUT[split]
    while True:
        source = _source(rng, _unseen_source(rng, split, operation, row))
        for step in propose_steps(rng, source, operation, split):
            if step.color_step == color_step and _reserved_in(step.target) == wanted:
                return step


def _unseen_source(rng: np.random.Generator, split: Split, operation: Operation, row: Row | None) -> _SourceRules:
    """Rules for a source from which `operation` can lead to an image that shows `row` of the split."""
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
    shows: _Reserved = frozenset({(split, row)}) if is_kept and row else frozenset()
    least = max(2, len(first) + spare)
    return _SourceRules(bucket=split, most=most, least=least, first=first, relation=relation, shows=shows)


@functools.cache
def suite_sessions(split: Split, count: int) -> tuple[EditSession, ...]:
    """Frozen sessions of three different operations, as in "id" of `suite_edits`.

    The undo takes back both edits and one edit in turn. Raises ConfigError for an unknown split.
    """
    if split not in HELD_OUT:
        raise ConfigError(f"split={split!r}: expected one of {', '.join(HELD_OUT)}")
    sessions = []
    for item in range(count):
        rng = stream(_SUITE_SEED, _SESSIONS, ("dev", "test").index(split), item)
        operations: list[Operation] = []
        while not operations or {"resize", "remove"} <= set(operations):  # few results of both lie in a rare bucket
            operations = [OPERATIONS[int(index)] for index in rng.permutation(len(OPERATIONS))[:3]]
        undo_to: Literal[0, 1] = 0 if item % 2 == 0 else 1
        first, second, third = (_worded(s, rng, "train") for s in chain_steps(rng, split, operations, undo_to=undo_to))
        sessions.append(EditSession(edits=(first, second, third), undo_to=undo_to))
    return tuple(sessions)
