"""Combinations that no training item may show, and which scenes and facts belong to which split."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from starflow2.world.scene import COLORS, IMAGE_SIZE, MAX_OBJECTS, SHAPES, Bucket, Scene, Split, relations

__all__ = [
    "HELD_OUT",
    "RECOLOR_HELD_OUT",
    "Fact",
    "HeldOut",
    "bucket",
    "facts",
    "held_out",
    "is_trainable",
    "scene_key",
]


Fact = tuple[int, Literal["left of", "above"], int]


def facts(scene: Scene) -> frozenset[Fact]:
    """Every (shape, "left of" or "above", other shape) true in the picture, whichever words would say it."""
    found: set[Fact] = set()
    for a, b in itertools.permutations(scene.objects, 2):
        if a.shape != b.shape:
            for relation in relations(a, b):
                if relation == "left of" or relation == "above":
                    found.add((a.shape, relation, b.shape))
    return frozenset(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """The combinations that one split keeps for itself; none is in any training picture, caption or question."""

    pairs: frozenset[tuple[int, int]]  # (shape, color)
    facts: frozenset[Fact]
    shapes: frozenset[frozenset[int]]  # two shapes in one picture
    counts: frozenset[tuple[int, int]]  # (shape, exactly this many of it)


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


HELD_OUT: Final[Mapping[Split, HeldOut]] = MappingProxyType(
    {"test": _held_out_table(0, [(0, 4), (1, 5)]), "dev": _held_out_table(4, [(2, 6), (3, 7)])}
)
RECOLOR_HELD_OUT: Final[Mapping[Split, int]] = MappingProxyType({"test": 3, "dev": 5})  # colour c to c + step, modulo 8


def held_out(scene: Scene, split: Split) -> frozenset[str]:
    """Which of "pair", "fact", "shapes", "count" a split holds out and this picture shows."""
    table = HELD_OUT[split]
    shapes = [obj.shape for obj in scene.objects]
    found = set()
    if any((obj.shape, obj.color) in table.pairs for obj in scene.objects):
        found.add("pair")
    if any((shape, shapes.count(shape)) in table.counts for shape in shapes):
        found.add("count")
    if any(pair.issubset(shapes) for pair in table.shapes):
        found.add("shapes")
    if len(shapes) > 1 and not table.facts.isdisjoint(facts(scene)):
        found.add("fact")
    return frozenset(found)


def scene_key(scene: Scene) -> tuple[int, ...]:
    """What makes two scenes the same for the split: sorted objects with attributes, places on an 8 x 8 grid.

    The background and the angle are left out, so neither makes a seen scene new.
    """
    cell = IMAGE_SIZE / 8
    rows = sorted((t.shape, t.color, t.size, int(t.x // cell), int(t.y // cell)) for t in scene.objects)
    return tuple(itertools.chain.from_iterable(rows))


def bucket(scene: Scene) -> Bucket:
    """Which part of the world a scene belongs to: 90 % train, 5 % dev, 5 % test, by a hash of its key alone."""
    digest = hashlib.blake2b(bytes(scene_key(scene)), digest_size=8).digest()
    number = int.from_bytes(digest, "big") % 100
    return "train" if number < 90 else "dev" if number < 95 else "test"


def is_trainable(scene: Scene) -> bool:
    """True if the scene lies in the train bucket and shows nothing that dev or test holds out."""
    return bucket(scene) == "train" and not held_out(scene, "test") and not held_out(scene, "dev")
