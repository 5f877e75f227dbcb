"""Held-out combinations, and which scenes and words each part of the drawn world may have.

`HELD_OUT[split]` lists the combinations that are reserved for "dev" or "test". `WITHHELD[bucket]` is the guard for
everything made for one part of the world: training combines nothing that either split holds out, in an image or in
words; dev and test may combine anything. No other module decides what is held out. `everything_trains` opens the guard
for a last stage of training, after which nothing can be said of combinations that a model has not seen.
Nothing here is from the paper; our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from starflow2.world.scene import (
    COLORS,
    IMAGE_SIZE,
    MAX_OBJECTS,
    OPPOSITES,
    SHAPES,
    Bucket,
    Relation,
    Scene,
    Split,
    relations,
)

__all__ = [
    "HELD_OUT",
    "RECOLOR_HELD_OUT",
    "WITHHELD",
    "Fact",
    "HeldOut",
    "Row",
    "as_fact",
    "bucket",
    "colors_of",
    "everything_trains",
    "facts",
    "held_out",
    "is_trainable",
    "may_recolor",
    "recolor_step",
    "reserved",
    "scene_key",
    "withheld",
]

Row = Literal["pair", "fact", "shapes", "count"]  # the kinds of combination in a table of held-out ones
Fact = tuple[int, Literal["left of", "above"], int]  # (shape, relation, shape)


def as_fact(a: int, relation: Relation, b: int) -> Fact:
    """The fact that shape a is in `relation` to shape b; "a left of b" and "b right of a" are one fact.

    >>> as_fact(3, "below", 5)
    (5, 'above', 3)
    """
    if relation == "left of" or relation == "above":
        return (a, relation, b)
    return (b, "left of" if OPPOSITES[relation] == "left of" else "above", a)


def facts(scene: Scene) -> frozenset[Fact]:
    """Every fact between two different shapes that is true of the scene."""
    return frozenset(
        as_fact(a.shape, relation, b.shape)
        for a, b in itertools.combinations(scene.objects, 2)
        if a.shape != b.shape
        for relation in relations(a, b)
    )


# --------------------------------------------------------------------------------------------- the tables


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Combinations that are reserved: none may be in a training image, caption, question or edit."""

    pairs: frozenset[tuple[int, int]]  # (shape, color)
    facts: frozenset[Fact]
    shapes: frozenset[frozenset[int]]  # two shapes in one image
    counts: frozenset[tuple[int, int]]  # (shape, exactly this many of it)

    def allows_pair(self, shape: int, color: int) -> bool:
        """True if a shape of this colour is not held out."""
        return (shape, color) not in self.pairs

    def allows_fact(self, a: int, relation: Relation, b: int) -> bool:
        """True if shape a in `relation` to shape b is not held out, whichever of its two wordings is used."""
        return as_fact(a, relation, b) not in self.facts

    def allows_together(self, shapes: Sequence[int]) -> bool:
        """True if no two of the shapes are held out from being in one image."""
        return not any(pair.issubset(shapes) for pair in self.shapes)

    def allows_count(self, shape: int, count: int) -> bool:
        """True if exactly `count` objects of this shape are not held out."""
        return (shape, count) not in self.counts

    def rows_of_shapes(self, shapes: Sequence[int]) -> frozenset[Row]:
        """Those of "shapes" and "count" that an image shows whose objects have exactly these shapes."""
        found: set[Row] = set()
        if not self.allows_together(shapes):
            found.add("shapes")
        if not all(self.allows_count(shape, shapes.count(shape)) for shape in shapes):
            found.add("count")
        return frozenset(found)

    def rows_of(self, scene: Scene) -> frozenset[Row]:
        """Kinds of held-out combination that the scene shows."""
        shapes = [obj.shape for obj in scene.objects]
        found: set[Row] = set(self.rows_of_shapes(shapes))
        if not all(self.allows_pair(obj.shape, obj.color) for obj in scene.objects):
            found.add("pair")
        if len(shapes) > 1 and not self.facts.isdisjoint(facts(scene)):
            found.add("fact")
        return frozenset(found)


def _held_out_table(rest: int, shapes: Sequence[tuple[int, int]]) -> HeldOut:
    """The split whose residue is `rest` (0 test, 4 dev): each colour and shape once, each shape once on each side."""
    k, parity = len(SHAPES), 0 if rest == 0 else 1
    left = {(a, b) for a in range(k) for b in range(k) if (a + 3 * b + 2) % k == 0 and a % 2 == parity}
    above = {(a, b) for a in range(k) for b in range(k) if (a + 3 * b + 6) % k == 0 and a % 2 != parity}
    return HeldOut(
        pairs=frozenset((s, c) for s in range(k) for c in range(len(COLORS)) if (c + 3 * s) % k == rest),
        facts=frozenset([(a, "left of", b) for a, b in left]) | frozenset([(a, "above", b) for a, b in above]),
        shapes=frozenset(frozenset(pair) for pair in shapes),
        counts=frozenset((s, n) for s in range(k) for n in range(2, MAX_OBJECTS + 1) if (s + 3 * n) % k == rest),
    )


def _union(tables: Sequence[HeldOut]) -> HeldOut:
    return HeldOut(
        pairs=frozenset().union(*(table.pairs for table in tables)),
        facts=frozenset().union(*(table.facts for table in tables)),
        shapes=frozenset().union(*(table.shapes for table in tables)),
        counts=frozenset().union(*(table.counts for table in tables)),
    )


HELD_OUT: Final[Mapping[Split, HeldOut]] = MappingProxyType(
    {"test": _held_out_table(0, [(0, 4), (1, 5)]), "dev": _held_out_table(4, [(2, 6), (3, 7)])}
)
WITHHELD: Final[Mapping[Bucket, HeldOut]] = MappingProxyType(
    {"train": _union(tuple(HELD_OUT.values())), "dev": _union(()), "test": _union(())}
)
RECOLOR_HELD_OUT: Final[Mapping[Split, int]] = MappingProxyType({"test": 3, "dev": 5})  # see `recolor_step`

_OPEN: Final[ContextVar[bool]] = ContextVar("open_guard", default=False)


@contextmanager
def everything_trains() -> Iterator[None]:
    """Inside it, in this thread, nothing is held out from training but the scenes of the dev and test buckets.

    For the data of a last stage; suites must be made outside.

    >>> with everything_trains():
    ...     len(colors_of(0)), withheld("train").allows_pair(0, 0)
    (8, True)
    """
    token = _OPEN.set(True)
    try:
        yield
    finally:
        _OPEN.reset(token)


def reserved() -> Mapping[Split, HeldOut]:
    """`HELD_OUT`, or no table at all inside `everything_trains`."""
    return {} if _OPEN.get() else HELD_OUT


def withheld(part: Bucket = "train") -> HeldOut:
    """`WITHHELD` of a part of the world; inside `everything_trains` the guard of training is open, too."""
    return WITHHELD["dev" if _OPEN.get() else part]


# ---------------------------------------------------------------------------------------------- questions to them


def held_out(scene: Scene, split: Split) -> frozenset[Row]:
    """Kinds of combination that `split` holds out and this scene shows."""
    tables = reserved()
    return tables[split].rows_of(scene) if split in tables else frozenset()


def colors_of(shape: int, split: Split | None = None) -> tuple[int, ...]:
    """Colours in which training may show a shape, or those that `split` holds out for it, in rising order."""
    return tuple(range(len(COLORS))) if split is None and _OPEN.get() else _colors_of(shape, split)


@functools.cache
def _colors_of(shape: int, split: Split | None) -> tuple[int, ...]:
    table = WITHHELD["train"] if split is None else HELD_OUT[split]
    return tuple(color for color in range(len(COLORS)) if table.allows_pair(shape, color) == (split is None))


def recolor_step(old: int, new: int) -> int:
    """By how many colours a change moves on, modulo the number of colours."""
    return (new - old) % len(COLORS)


def may_recolor(old: int, new: int) -> bool:
    """True if training may turn colour `old` into `new`: they differ, and the step between them is not held out."""
    return old != new and (_OPEN.get() or recolor_step(old, new) not in RECOLOR_HELD_OUT.values())


def scene_key(scene: Scene) -> tuple[int, ...]:
    """Identity of a scene for the split: sorted objects with their attributes, places on an 8 x 8 grid.

    The background and the angle are left out, so that neither makes a known scene new.
    """
    cell = IMAGE_SIZE / 8
    rows = sorted((t.shape, t.color, t.size, int(t.x // cell), int(t.y // cell)) for t in scene.objects)
    return tuple(itertools.chain.from_iterable(rows))


def bucket(scene: Scene) -> Bucket:
    """Part of the world that a scene belongs to: 90 % train, 5 % dev, 5 % test, by a hash of its key alone."""
    digest = hashlib.blake2b(bytes(scene_key(scene)), digest_size=8).digest()
    number = int.from_bytes(digest, "big") % 100
    return "train" if number < 90 else "dev" if number < 95 else "test"


def is_trainable(scene: Scene) -> bool:
    """True if the scene lies in the train bucket and shows nothing that dev or test holds out."""
    return bucket(scene) == "train" and (_OPEN.get() or not WITHHELD["train"].rows_of(scene))
