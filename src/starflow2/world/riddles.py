"""Questions that need a stated rule or several images, and small rule games in words alone.

A riddle is a `Choice` with images made for it: RIDDLES have lettered options, OPEN_RIDDLES are answered by a number.
Whatever the split, options and images of one riddle put together only shapes that training may show together.
Our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from starflow2.errors import ConfigError
from starflow2.world.multiple_choice import Choice
from starflow2.world.sampling import sample_split_scene
from starflow2.world.scene import COLORS, MAX_OBJECTS, SHAPES, SIZES, Bucket, Scene, chance, pick, shuffled
from starflow2.world.splits import withheld
from starflow2.world.words import NUMBERS, ORDINALS, POINTS, article, joined, value_of, words_in

__all__ = ["OPEN_RIDDLES", "RIDDLES", "game", "riddle", "riddle_words"]

RIDDLES: Final = ("beats", "odd", "turns")  # with options
OPEN_RIDDLES: Final = ("points", "together", "next")  # answered by a number

_STEMS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "beats": "in this game {rules}. which object wins?",
        "odd": "which picture is the odd one out in {attribute}?",
        "turns": "the pictures take turns. which shape comes next?",
        "points": "in this game a {shape} counts two and any other object counts one. how many points are there?",
        "together": "how many objects are in the two pictures together?",
        "next": "the number of objects changes by one each time. how many objects come next?",
    }
)


def _may_meet(shapes: Sequence[int]) -> bool:
    return withheld().allows_together(shapes)


@dataclass(frozen=True, slots=True)
class _RiddleMaker:
    """Makes questions that need a stated rule or several images; the first image may be novel."""

    rng: np.random.Generator
    split: Bucket
    novel: bool

    def _scene(self, num_objects: int | None = None, shape: int | None = None, first: bool = False) -> Scene:
        novel = self.novel and first
        return sample_split_scene(self.rng, self.split, novel=novel, num_objects=num_objects, shape=shape)

    def _apart(self, right: int, near: Sequence[int], size: int) -> tuple[str, ...]:
        """Shape options in random order: the right one, then `near` and others as far as training may show them
        together."""
        chosen = [right]
        for shape in [*near, *shuffled(self.rng, range(len(SHAPES)))]:
            if shape not in chosen and len(chosen) < size and _may_meet([*chosen, shape]):
                chosen.append(shape)
        return tuple(SHAPES[shape] for shape in shuffled(self.rng, chosen))

    def beats(self) -> Choice:
        while True:
            scene = self._scene(int(self.rng.integers(2, 4)), first=True)
            objects = shuffled(self.rng, scene.objects)
            if len({t.color for t in objects}) == len({t.shape for t in objects}) == len(objects):
                break
        rules = [f"{COLORS[a.color]} beats {COLORS[b.color]}" for a, b in itertools.pairwise(objects)]
        question = _STEMS["beats"].format(rules=joined(shuffled(self.rng, rules)))
        options = self._apart(objects[0].shape, [t.shape for t in objects[1:]], 4)
        answer = SHAPES[objects[0].shape]
        return Choice(scenes=(scene,), question=question, options=options, answer=answer, kind="beats")

    def odd(self) -> Choice:
        attribute = pick(self.rng, ("color", "shape"))
        while True:
            scenes = tuple(shuffled(self.rng, [self._scene(1, first=place == 0) for place in range(3)]))
            values = [value_of(scene.objects[0], attribute) for scene in scenes]
            lone = [place for place, value in enumerate(values) if values.count(value) == 1]
            if len(lone) == 1 and _may_meet([scene.objects[0].shape for scene in scenes]):
                break
        question = _STEMS["odd"].format(attribute=attribute)
        options = tuple(shuffled(self.rng, ORDINALS))
        return Choice(scenes=scenes, question=question, options=options, answer=ORDINALS[lone[0]], kind="odd")

    def turns(self) -> Choice:
        first = self._scene(1, first=True)
        shape = first.objects[0].shape
        other = shape
        while other == shape or not _may_meet([shape, other]):
            other = int(self.rng.integers(len(SHAPES)))
        scenes = (first, self._scene(1, other), self._scene(1, shape))
        options = self._apart(other, [shape], 4)
        return Choice(scenes=scenes, question=_STEMS["turns"], options=options, answer=SHAPES[other], kind="turns")

    def points(self) -> Choice:
        scene = self._scene(first=True)
        shapes = [t.shape for t in scene.objects]
        may = [s for s in range(len(SHAPES)) if _may_meet([*shapes, s])]
        shape = pick(self.rng, shapes if chance(self.rng, 0.8) else may)
        question = _STEMS["points"].format(shape=SHAPES[shape])
        answer = POINTS[len(shapes) + shapes.count(shape)]
        return Choice(scenes=(scene,), question=question, options=(), answer=answer, kind="points")

    def together(self) -> Choice:
        counts = self.rng.integers(1, MAX_OBJECTS + 1, size=2).tolist()
        scenes = (self._scene(counts[0], first=True), self._scene(counts[1]))
        answer = POINTS[sum(counts)]
        return Choice(scenes=scenes, question=_STEMS["together"], options=(), answer=answer, kind="together")

    def next(self) -> Choice:
        *counts, last = pick(self.rng, ((1, 2, 3, 4), (2, 3, 4, 5), (4, 3, 2, 1), (3, 2, 1, 0)))
        scenes = tuple(self._scene(count, first=place == 0) for place, count in enumerate(counts))
        return Choice(scenes=scenes, question=_STEMS["next"], options=(), answer=POINTS[last], kind="next")


_RIDDLES: Final[Mapping[str, Callable[[_RiddleMaker], Choice]]] = MappingProxyType(
    {
        "beats": _RiddleMaker.beats,
        "odd": _RiddleMaker.odd,
        "turns": _RiddleMaker.turns,
        "points": _RiddleMaker.points,
        "together": _RiddleMaker.together,
        "next": _RiddleMaker.next,
    }
)


def riddle(rng: np.random.Generator, kind: str, *, split: Bucket = "train", novel: bool = False) -> Choice:
    """A question of RIDDLES or OPEN_RIDDLES with one to three images made for it, all of the split's bucket.

    novel: one image shows a colour-shape pair that `split` holds out. Raises ConfigError for an unknown kind.
    """
    if kind not in _RIDDLES:
        raise ConfigError(f"kind={kind!r}: expected one of {', '.join((*RIDDLES, *OPEN_RIDDLES))}")
    return _RIDDLES[kind](_RiddleMaker(rng, split, novel))


# ------------------------------------------------------------------------------------- games in words

_Asked = tuple[str, str]  # question, answer


def game(rng: np.random.Generator) -> list[_Asked]:
    """Two or three (question, answer) pairs about a small rule in words alone; the first question states it."""
    rule, asked = pick(rng, (_game_beats, _game_ladder, _game_sizes, _game_sum, _game_take))(rng)
    (question, answer), *more = shuffled(rng, asked)[:3]
    return [(f"{rule} {question}", answer), *more]


def _three_colors(rng: np.random.Generator) -> list[str]:
    return [COLORS[int(index)] for index in rng.permutation(len(COLORS))[:3]]


def _game_beats(rng: np.random.Generator) -> tuple[str, list[_Asked]]:
    order = _three_colors(rng)
    rules = joined(shuffled(rng, [f"{a} beats {b}" for a, b in itertools.pairwise(order)]))
    asked = []
    for a, b in itertools.combinations(order, 2):
        one, two = shuffled(rng, [a, b])
        asked += [(f"which wins, {one} or {two}?", a), (f"does {one} beat {two}?", "yes" if one == a else "no")]
    return f"in this game {rules}.", asked


def _game_ladder(rng: np.random.Generator) -> tuple[str, list[_Asked]]:
    order = _three_colors(rng)
    relation, first, last = pick(rng, (("above", "highest", "lowest"), ("left of", "furthest left", "furthest right")))
    pairs = list(itertools.pairwise(order))
    rules = joined(shuffled(rng, [f"the {a} object is {relation} the {b} object" for a, b in pairs]))
    one, two = shuffled(rng, [order[0], order[2]])
    asked = [
        (f"which is {first}?", order[0]),
        (f"which is {last}?", order[2]),
        (f"is the {one} object {relation} the {two} object?", "yes" if one == order[0] else "no"),
    ]
    return f"{rules}.", asked


def _game_sizes(rng: np.random.Generator) -> tuple[str, list[_Asked]]:
    colors, sizes = _three_colors(rng)[:2], shuffled(rng, SIZES)
    rules = joined([f"{color} objects are {size}" for color, size in zip(colors, sizes, strict=True)])
    asked = [(f"what size is {article(c)} object?", s) for c, s in zip(colors, sizes, strict=True)]
    asked += [(f"what color is a {s} object?", c) for c, s in zip(colors, sizes, strict=True)]
    return f"in this game {rules}.", asked


def _objects(count: int, color: str = "") -> str:
    return " ".join([NUMBERS[count], *color.split(), "object" if count == 1 else "objects"])


def _game_sum(rng: np.random.Generator) -> tuple[str, list[_Asked]]:
    colors, counts = _three_colors(rng), rng.integers(1, MAX_OBJECTS + 1, size=2).tolist()
    rules = joined([_objects(n, color) for n, color in zip(counts, colors, strict=False)])
    asked = [("how many objects are there?", POINTS[sum(counts)])]
    asked += [(f"how many {c} objects are there?", POINTS[n]) for n, c in zip((*counts, 0), colors, strict=True)]
    if counts[0] != counts[1]:
        more, less = shuffled(rng, colors[:2])
        answer = colors[counts.index(max(counts))]
        asked.append((f"are there more {more} objects or more {less} objects?", answer))
    return f"there {'is' if counts[0] == 1 else 'are'} {rules}.", asked


def _game_take(rng: np.random.Generator) -> tuple[str, list[_Asked]]:
    change, start = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    if chance(rng, 0.5):
        start += change
        return f"there are {POINTS[start]} objects, and {NUMBERS[change]} of them go away.", [
            ("how many objects are left?", POINTS[start - change]),
            ("how many objects were there before?", POINTS[start]),
        ]
    rule = f"there {'is' if start == 1 else 'are'} {_objects(start)}, and {NUMBERS[change]} more"
    return f"{rule} {'comes' if change == 1 else 'come'}.", [
        ("how many objects are there now?", POINTS[start + change]),
        ("how many objects were there before?", POINTS[start]),
    ]


@functools.cache
def riddle_words() -> frozenset[str]:
    """Every word that riddles and games can contain beside `questions.known_words`."""
    games = (
        "in this game beats beat wins which does is are the object objects above left of highest lowest furthest right "
        "what size color how many there and more or them go away come comes now were before a an yes no"
    )
    return words_in([games, *POINTS, *ORDINALS, *_STEMS.values()])
