"""Questions with lettered options, questions that need several pictures, and small rule games.

A `Choice` is a question about no, one or several pictures with two to four options, or with none and then the answer is
a number; `choice_about` makes one about a given picture, `riddle` draws its pictures itself, `game` needs none.
`several_pictures` makes a whole conversation for training; the suites that ask such questions are in `evals.choices`.
Nothing that training draws combines what `world.HELD_OUT` keeps, in a picture, a question, or its options.
All text is lower case and numbers are words. Our choice: docs/choices.md#world.
"""

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np

from starflow2.data.dialogue import Dialogue, Turn
from starflow2.errors import ConfigError
from starflow2.world.captions import NUMBERS, PLACES, PLURALS, article
from starflow2.world.scene import (
    BACKGROUND_NAMES,
    COLORS,
    IMAGE_SIZE,
    MAX_OBJECTS,
    OPPOSITES,
    RELATIONS,
    SHAPES,
    SIZES,
    Bucket,
    Relation,
    Scene,
    SceneDialogue,
    SceneObject,
    SceneTurn,
    chance,
    pick,
    relations,
    sample_scene,
    shuffled,
)
from starflow2.world.splits import HELD_OUT, Fact, HeldOut, bucket, held_out, is_trainable

__all__ = [
    "DIMENSIONS",
    "LETTERS",
    "OPEN_RIDDLES",
    "POINTS",
    "RIDDLES",
    "Choice",
    "choice_about",
    "choice_words",
    "draw_scene",
    "game",
    "place_of",
    "riddle",
    "several_pictures",
]


LETTERS: Final = ("a", "b", "c", "d")
POINTS: Final = (*NUMBERS, "five", "six", "seven", "eight")
DIMENSIONS: Final = ("identity", "attribute", "location", "counting", "relation", "scene")
RIDDLES: Final = ("beats", "odd", "turns")  # with options
OPEN_RIDDLES: Final = ("points", "together", "next")  # answered by a number
HINT: Final = "answer with the letter."
ORDINALS: Final = ("first", "second", "third")
EDGE: Final = 1.5  # pixels from a line of the 3 x 3 grid within which nobody is asked where an object is
SCENE_SHARES: Final = (0.15, 0.3, 0.3, 0.25)  # one to four objects
REPEATS: Final = 0.35  # share of scenes of several objects in which some have the same shape

RECOLORINGS: Final = 20  # colours tried for one layout until the scene lies in the wanted bucket
COUNT_WEIGHTS: Final = (1.0, 1.0, 2.0, 3.0, 4.0)  # by which zero to four are asked for; large counts are rare

_NAMES: Final = (("shape",), ("color", "shape"), ("size", "shape"), ("color",))
_ATTRIBUTES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({"color": COLORS, "shape": SHAPES, "size": SIZES})
_STEMS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "what": "what {attribute} is {a}?",
        "which": "which object is in the picture?",
        "where": "where is {a}?",
        "count": "how many {objects} are there?",
        "stand": "where is {a}, seen from {b}?",
        "beside": "what is {rel} {b}?",
        "background": "what color is the background?",
        "shows": "what does the picture show?",
        "beats": "in this game {rules}. which object wins?",
        "odd": "which picture is the odd one out in {attribute}?",
        "turns": "the pictures take turns. which shape comes next?",
        "points": "in this game a {shape} counts two and any other object counts one. how many points are there?",
        "together": "how many objects are in the two pictures together?",
        "next": "the number of objects changes by one each time. how many objects come next?",
    }
)

# ------------------------------------------------------------------------------------------ choices


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A question about pictures. `answer` is the right answer in words; with options it is one of them."""

    scenes: tuple[Scene, ...]
    question: str
    options: tuple[str, ...]  # two to four, or none
    answer: str
    kind: str

    @property
    def text(self) -> str:
        """The question with its options and how to answer."""
        if not self.options:
            return self.question
        listed = ", ".join(f"{letter}: {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return f"{self.question} {listed}. {HINT}"

    @property
    def reply(self) -> str:
        """What is to be answered: the letter of the right option, or the answer itself if there are no options."""
        return LETTERS[self.options.index(self.answer)] if self.options else self.answer

    def rotated(self, steps: int) -> "Choice":
        """The same question with its options moved on by `steps` letters, the last ones to the front."""
        size = len(self.options)
        return replace(self, options=tuple(self.options[(place - steps) % size] for place in range(size)))


def _joined(words: Sequence[str]) -> str:
    return " and ".join(words)


# ------------------------------------------------------------------------------- what may be shown, said


@functools.cache
def _tables(split: Bucket) -> HeldOut:
    """What words may not combine: all that is held out in training, nothing in dev and test."""
    tables = tuple(HELD_OUT.values()) if split == "train" else ()
    return HeldOut(
        pairs=frozenset().union(*(table.pairs for table in tables)),
        facts=frozenset().union(*(table.facts for table in tables)),
        shapes=frozenset().union(*(table.shapes for table in tables)),
        counts=frozenset().union(*(table.counts for table in tables)),
    )


def _may_pair(shape: int, color: int, split: Bucket) -> bool:
    return (shape, color) not in _tables(split).pairs


def _may_say(a: int, relation: Relation, b: int, split: Bucket) -> bool:
    """Whether words may say that shape a is in `relation` to shape b, whichever of the two mirrored ways."""
    if relation == "left of" or relation == "above":
        fact: Fact = (a, relation, b)
    else:
        fact = (b, "left of" if relation == "right of" else "above", a)
    return fact not in _tables(split).facts


def _may_meet(shapes: Sequence[int], split: Bucket) -> bool:
    return not any(pair.issubset(shapes) for pair in _tables(split).shapes)


def draw_scene(
    rng: np.random.Generator,
    split: Bucket = "train",
    *,
    novel: bool = False,
    num_objects: int | None = None,
    shape: int | None = None,
) -> Scene:
    """A scene of the split's bucket that shows nothing held out, or if `novel` the split's colour-shape pairs alone.

    `shape`: that of the first object; what is None is random. Raises ConfigError for novel training scenes.
    """
    if novel and split == "train":
        raise ConfigError("novel: training may show nothing held out; expected split='dev' or 'test'")
    wanted: set[str] = {"pair"} if novel else set()
    count = int(rng.choice(MAX_OBJECTS, p=SCENE_SHARES)) + 1 if num_objects is None else num_objects
    colors_of: Bucket = split if novel else "train"
    while True:
        shapes = _draw_shapes(rng, count, shape)
        scene = sample_scene(rng, shapes=shapes, colors=_draw_colors(rng, shapes, colors_of))
        if any(held_out(scene, s) != (wanted if s == split else set()) for s in HELD_OUT):
            continue
        for _ in range(RECOLORINGS):  # placing objects is slow, and one layout in twenty is of a test bucket
            if bucket(scene) == split:
                return scene
            scene = _painted(scene, _draw_colors(rng, shapes, colors_of))


def _painted(scene: Scene, colors: Sequence[int]) -> Scene:
    """The same objects in other colours."""
    objects = (replace(obj, color=color) for obj, color in zip(scene.objects, colors, strict=True))
    return replace(scene, objects=tuple(objects))


def _draw_shapes(rng: np.random.Generator, count: int, first: int | None) -> list[int]:
    """Shapes of objects that may meet in training."""
    while True:
        shapes: list[int] = rng.permutation(len(SHAPES))[:count].tolist()
        if first is not None:
            shapes = [first, *[shape for shape in shapes if shape != first]][:count]
        if count > 1 and chance(rng, REPEATS):
            same = int(rng.integers(2, count + 1))
            shapes = [shapes[0]] * same + shapes[same:]
        counts = {(shape, shapes.count(shape)) for shape in shapes}
        if _may_meet(shapes, "train") and not counts & _tables("train").counts:
            return shapes


def _draw_colors(rng: np.random.Generator, shapes: Sequence[int], novel: Bucket) -> list[int]:
    """A colour per shape, seen with it in training; if `novel` is a split, its held-out one for some of them."""
    colors = []
    special = int(rng.integers(len(shapes)))
    for index, shape in enumerate(shapes):
        options = [color for color in range(len(COLORS)) if _may_pair(shape, color, "train")]
        if novel != "train" and (index == special or chance(rng, 0.4)):
            options = [color for s, color in sorted(HELD_OUT[novel].pairs) if s == shape]
        colors.append(pick(rng, options))
    return colors


# ----------------------------------------------------------------------------------- about one picture


def _value(obj: SceneObject, attribute: str) -> str:
    return _ATTRIBUTES[attribute][getattr(obj, attribute)]


def _pair(obj: SceneObject) -> str:
    return f"{COLORS[obj.color]} {SHAPES[obj.shape]}"


def _name(scene: Scene, obj: SceneObject, rng: np.random.Generator, hide: str = "") -> str | None:
    """Words for this object alone, such as "the red star", without the attribute to hide; None if there are none."""
    found = []
    for attributes in _NAMES:
        values = [_value(obj, k) for k in attributes]
        if hide not in attributes and sum([_value(t, k) for k in attributes] == values for t in scene.objects) == 1:
            found.append(" ".join(["the", *values] + ["object"] * ("shape" not in attributes)))
    return pick(rng, found) if found else None


def _named(scene: Scene, rng: np.random.Generator, hide: str = "") -> tuple[SceneObject, str] | None:
    for obj in shuffled(rng, scene.objects):
        name = _name(scene, obj, rng, hide)
        if name is not None:
            return obj, name
    return None


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes questions with options about one picture; a method returns None where the picture allows none.

    Wrong options are drawn first from what else is in the picture, so that only looking at the right object helps.
    """

    scene: Scene
    rng: np.random.Generator
    split: Bucket
    size: int  # number of options

    def _choice(self, kind: str, question: str, right: str, wrong: Sequence[str]) -> Choice | None:
        """wrong: the best distractors first."""
        others = list(dict.fromkeys(option for option in wrong if option != right))[: self.size - 1]
        if len(others) < self.size - 1:
            return None
        options = tuple(shuffled(self.rng, [right, *others]))
        return Choice(scenes=(self.scene,), question=question, options=options, answer=right, kind=kind)

    def _present_first(self, values: Sequence[str], attribute: str) -> list[str]:
        """Values in random order, but one that is in the picture in front, if there is any."""
        here = [v for v in shuffled(self.rng, values) if any(_value(t, attribute) == v for t in self.scene.objects)]
        return here[:1] + shuffled(self.rng, [v for v in values if v not in here[:1]])

    def _shapes_apart(self, right: int, allowed: Sequence[int]) -> list[str]:
        """Shapes of which no two, nor any with the right one, are kept from meeting."""
        chosen = [right]
        for word in self._present_first([SHAPES[s] for s in allowed if s != right], "shape"):
            if _may_meet([*chosen, SHAPES.index(word)], self.split):
                chosen.append(SHAPES.index(word))
        return [SHAPES[s] for s in chosen[1:]]

    def identity(self) -> Choice | None:
        if chance(self.rng, 0.4):
            return self._which()
        found = _named(self.scene, self.rng, hide="shape")
        if found is None:
            return None
        obj, name = found
        allowed = [s for s in range(len(SHAPES)) if _may_pair(s, obj.color, self.split)]
        question = _STEMS["what"].format(attribute="shape", a=name)
        return self._choice("identity", question, SHAPES[obj.shape], self._shapes_apart(obj.shape, allowed))

    def _which(self) -> Choice | None:
        obj = pick(self.rng, self.scene.objects)
        return self._choice("identity", _STEMS["which"], article(_pair(obj)), self._other_pairs(obj))

    def _other_pairs(self, obj: SceneObject) -> list[str]:
        """Two colours by two shapes without the true one, so that no option stands out; none of them in the picture."""
        there = {(t.shape, t.color) for t in self.scene.objects}
        for shape, color in shuffled(self.rng, list(itertools.product(range(len(SHAPES)), range(len(COLORS))))):
            others = [(shape, color), (obj.shape, color), (shape, obj.color)]
            is_grid = shape != obj.shape and color != obj.color and _may_meet([shape, obj.shape], self.split)
            if is_grid and all(_may_pair(*other, self.split) and other not in there for other in others):
                return [article(f"{COLORS[c]} {SHAPES[s]}") for s, c in shuffled(self.rng, others)]
        return []

    def attribute(self) -> Choice | None:
        attribute = "size" if self.size == 2 and chance(self.rng, 0.5) else "color"
        found = _named(self.scene, self.rng, hide=attribute)
        if found is None:
            return None
        obj, name = found
        colors = [COLORS[c] for c in range(len(COLORS)) if _may_pair(obj.shape, c, self.split) and c != obj.color]
        wrong = SIZES if attribute == "size" else self._present_first(colors, "color")
        question = _STEMS["what"].format(attribute=attribute, a=name)
        return self._choice("attribute", question, _value(obj, attribute), wrong)

    def location(self) -> Choice | None:
        for obj in shuffled(self.rng, self.scene.objects):
            place, name = place_of(obj), _name(self.scene, obj, self.rng)
            if place is not None and name is not None:
                places = [place_of(t) for t in self.scene.objects if t is not obj]
                here = [p for p in places if p is not None][:1]
                wrong = here + shuffled(self.rng, list(itertools.chain.from_iterable(PLACES)))
                return self._choice("location", _STEMS["where"].format(a=name), place, wrong)
        return None

    def counting(self) -> Choice | None:
        """Counts are drawn before what is counted, so that "one" is not nearly always right."""
        groups: dict[int, list[tuple[str, int | None]]] = {}
        objects: list[tuple[str, int | None, int | None]] = [("objects", None, None)]
        objects += [(PLURALS[s], s, None) for s in range(len(SHAPES))]
        objects += [(f"{COLORS[c]} objects", None, c) for c in range(len(COLORS))]
        for words, shape, color in objects:
            count = sum(shape in (None, t.shape) and color in (None, t.color) for t in self.scene.objects)
            groups.setdefault(count, []).append((words, shape))
        weights = np.array([COUNT_WEIGHTS[count] for count in sorted(groups)])
        count = sorted(groups)[int(self.rng.choice(len(weights), p=weights / weights.sum()))]
        words, shape = pick(self.rng, groups[count])
        wrong = [NUMBERS[n] for n in range(len(NUMBERS)) if (shape, n) not in _tables(self.split).counts]
        return self._choice(
            "counting", _STEMS["count"].format(objects=words), NUMBERS[count], shuffled(self.rng, wrong)
        )

    def relation(self) -> Choice | None:
        for a, b in shuffled(self.rng, list(itertools.permutations(self.scene.objects, 2))):
            found, names = sorted(relations(a, b)), (_name(self.scene, a, self.rng), _name(self.scene, b, self.rng))
            if len(found) != 1 or names[0] is None or names[1] is None:
                continue
            if chance(self.rng, 0.5):
                if all(_may_say(a.shape, side, b.shape, self.split) for side in RELATIONS):
                    question = _STEMS["stand"].format(a=names[0], b=names[1])
                    return self._choice("relation", question, found[0], [OPPOSITES[found[0]], *self._sides()])
            elif sum(found[0] in relations(t, b) for t in self.scene.objects if t is not b) == 1:
                allowed = [s for s in range(len(SHAPES)) if _may_say(s, found[0], b.shape, self.split)]
                if sum(t.shape == a.shape for t in self.scene.objects) == 1:
                    wrong = self._shapes_apart(a.shape, [s for s in allowed if s != b.shape])
                    question = _STEMS["beside"].format(rel=found[0], b=names[1])
                    return self._choice("relation", question, SHAPES[a.shape], wrong)
        return None

    def _sides(self) -> list[str]:
        return [str(side) for side in shuffled(self.rng, RELATIONS)]

    def background(self) -> Choice | None:
        tint = BACKGROUND_NAMES[self.scene.background]
        return self._choice("scene", _STEMS["background"], tint, shuffled(self.rng, BACKGROUND_NAMES))

    def scenery(self) -> Choice | None:
        objects = self.scene.objects
        if len(objects) != 2 or objects[0].shape == objects[1].shape or chance(self.rng, 0.4):
            return self.background()
        wrong = self._other_contents(*objects)
        return self._choice("scene", _STEMS["shows"], _contents(*objects), wrong) if wrong else self.background()

    def _other_contents(self, a: SceneObject, b: SceneObject) -> list[str]:
        """The same two shapes in other colours: exchanged if they differ, else one, the other or both changed."""
        colors = shuffled(self.rng, range(len(COLORS)))
        options = [(b.color, a.color)] if a.color != b.color else []
        options += [(c, d) for c, d in itertools.product(colors, colors) if c != a.color and d != b.color]
        for c, d in options:
            rows = [(c, d), *shuffled(self.rng, [(c, b.color), (a.color, d)])]
            if all(_may_pair(a.shape, x, self.split) and _may_pair(b.shape, y, self.split) for x, y in rows):
                return [_contents(replace(a, color=x), replace(b, color=y)) for x, y in rows]
        return []


def _contents(a: SceneObject, b: SceneObject) -> str:
    return _joined([article(_pair(a)), article(_pair(b))])


def place_of(obj: SceneObject, *, edge: float = EDGE) -> str | None:
    """Where on the 3 x 3 grid, in words such as "at the top"; None within `edge` pixels of one of its lines."""
    cell = IMAGE_SIZE / 3
    if any(abs(v - line * cell) < edge for v in (obj.x, obj.y) for line in (1, 2)):
        return None
    row, column = (min(max(int(v // cell), 0), 2) for v in (obj.y, obj.x))
    return PLACES[row][column]


_MAKERS: Final[Mapping[str, Callable[[_Maker], Choice | None]]] = MappingProxyType(
    {
        "identity": _Maker.identity,
        "attribute": _Maker.attribute,
        "location": _Maker.location,
        "counting": _Maker.counting,
        "relation": _Maker.relation,
        "scene": _Maker.scenery,
    }
)


def choice_about(
    scene: Scene, rng: np.random.Generator, kind: str, *, split: Bucket = "train", num_options: int = 4
) -> Choice | None:
    """A question of one of DIMENSIONS with `num_options` options, or None if the scene has no such question.

    With split="train" no words combine what is held out; with "dev" or "test" they may. Raises ConfigError for an
    unknown kind or a number of options outside 2-4.
    """
    if kind not in _MAKERS:
        raise ConfigError(f"kind={kind!r}: expected one of {', '.join(DIMENSIONS)}")
    if not 2 <= num_options <= len(LETTERS):
        raise ConfigError(f"num_options={num_options}: expected 2 to {len(LETTERS)}")
    return _MAKERS[kind](_Maker(scene, rng, split, num_options))


# ------------------------------------------------------------------------------------------- riddles


@dataclass(frozen=True, slots=True)
class _Riddler:
    """Draws pictures and asks what needs a stated rule or all of them; the first picture may be novel."""

    rng: np.random.Generator
    split: Bucket
    novel: bool

    def _scene(self, num_objects: int | None = None, shape: int | None = None, first: bool = False) -> Scene:
        novel = self.novel and first
        return draw_scene(self.rng, self.split, novel=novel, num_objects=num_objects, shape=shape)

    def _apart(self, right: int, near: Sequence[int], size: int) -> tuple[str, ...]:
        """Shape options in random order: the right one, those near that may meet, and others."""
        chosen = [right]
        for shape in [*near, *shuffled(self.rng, range(len(SHAPES)))]:
            if shape not in chosen and len(chosen) < size and _may_meet([*chosen, shape], "train"):
                chosen.append(shape)
        return tuple(SHAPES[shape] for shape in shuffled(self.rng, chosen))

    def beats(self) -> Choice:
        while True:
            scene = self._scene(int(self.rng.integers(2, 4)), first=True)
            objects = shuffled(self.rng, scene.objects)
            if len({t.color for t in objects}) == len({t.shape for t in objects}) == len(objects):
                break
        rules = [f"{COLORS[a.color]} beats {COLORS[b.color]}" for a, b in itertools.pairwise(objects)]
        question = _STEMS["beats"].format(rules=_joined(shuffled(self.rng, rules)))
        options = self._apart(objects[0].shape, [t.shape for t in objects[1:]], 4)
        answer = SHAPES[objects[0].shape]
        return Choice(scenes=(scene,), question=question, options=options, answer=answer, kind="beats")

    def odd(self) -> Choice:
        attribute = pick(self.rng, ("color", "shape"))
        while True:
            scenes = tuple(shuffled(self.rng, [self._scene(1, first=place == 0) for place in range(3)]))
            values = [_value(scene.objects[0], attribute) for scene in scenes]
            lone = [place for place, value in enumerate(values) if values.count(value) == 1]
            if len(lone) == 1 and _may_meet([scene.objects[0].shape for scene in scenes], "train"):
                break
        question = _STEMS["odd"].format(attribute=attribute)
        options = tuple(shuffled(self.rng, ORDINALS))
        return Choice(scenes=scenes, question=question, options=options, answer=ORDINALS[lone[0]], kind="odd")

    def turns(self) -> Choice:
        first = self._scene(1, first=True)
        shape = first.objects[0].shape
        other = shape
        while other == shape or not _may_meet([shape, other], "train"):
            other = int(self.rng.integers(len(SHAPES)))
        scenes = (first, self._scene(1, other), self._scene(1, shape))
        options = self._apart(other, [shape], 4)
        return Choice(scenes=scenes, question=_STEMS["turns"], options=options, answer=SHAPES[other], kind="turns")

    def points(self) -> Choice:
        scene = self._scene(first=True)
        shapes = [t.shape for t in scene.objects]
        may = [s for s in range(len(SHAPES)) if _may_meet([*shapes, s], "train")]
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


_RIDDLES: Final[Mapping[str, Callable[[_Riddler], Choice]]] = MappingProxyType(
    {
        "beats": _Riddler.beats,
        "odd": _Riddler.odd,
        "turns": _Riddler.turns,
        "points": _Riddler.points,
        "together": _Riddler.together,
        "next": _Riddler.next,
    }
)


def riddle(rng: np.random.Generator, kind: str, *, split: Bucket = "train", novel: bool = False) -> Choice:
    """A question of RIDDLES or OPEN_RIDDLES with one to three pictures drawn for it, all of the split's bucket.

    novel: one picture shows a colour-shape pair that `split` holds out. Raises ConfigError for an unknown kind.
    """
    if kind not in _RIDDLES:
        raise ConfigError(f"kind={kind!r}: expected one of {', '.join((*RIDDLES, *OPEN_RIDDLES))}")
    return _RIDDLES[kind](_Riddler(rng, split, novel))


# ------------------------------------------------------------------------------------- games in words


def game(rng: np.random.Generator) -> list[tuple[str, str]]:
    """A small rule in words alone and what follows from it: two or three (question, answer), the rule in the first."""
    rule, asked = pick(rng, (_game_beats, _game_ladder, _game_sizes, _game_sum, _game_take))(rng)
    (question, answer), *more = shuffled(rng, asked)[:3]
    return [(f"{rule} {question}", answer), *more]


def _three_colors(rng: np.random.Generator) -> list[str]:
    return [COLORS[int(index)] for index in rng.permutation(len(COLORS))[:3]]


def _game_beats(rng: np.random.Generator) -> tuple[str, list[tuple[str, str]]]:
    order = _three_colors(rng)
    told = _joined(shuffled(rng, [f"{a} beats {b}" for a, b in itertools.pairwise(order)]))
    asked = []
    for a, b in itertools.combinations(order, 2):
        one, two = shuffled(rng, [a, b])
        asked += [(f"which wins, {one} or {two}?", a), (f"does {one} beat {two}?", "yes" if one == a else "no")]
    return f"in this game {told}.", asked


def _game_ladder(rng: np.random.Generator) -> tuple[str, list[tuple[str, str]]]:
    order = _three_colors(rng)
    relation, first, last = pick(rng, (("above", "highest", "lowest"), ("left of", "furthest left", "furthest right")))
    pairs = list(itertools.pairwise(order))
    told = _joined(shuffled(rng, [f"the {a} object is {relation} the {b} object" for a, b in pairs]))
    one, two = shuffled(rng, [order[0], order[2]])
    asked = [
        (f"which is {first}?", order[0]),
        (f"which is {last}?", order[2]),
        (f"is the {one} object {relation} the {two} object?", "yes" if one == order[0] else "no"),
    ]
    return f"{told}.", asked


def _game_sizes(rng: np.random.Generator) -> tuple[str, list[tuple[str, str]]]:
    colors, sizes = _three_colors(rng)[:2], shuffled(rng, SIZES)
    told = _joined([f"{color} objects are {size}" for color, size in zip(colors, sizes, strict=True)])
    asked = [(f"what size is {article(c)} object?", s) for c, s in zip(colors, sizes, strict=True)]
    asked += [(f"what color is a {s} object?", c) for c, s in zip(colors, sizes, strict=True)]
    return f"in this game {told}.", asked


def _objects(count: int, color: str = "") -> str:
    return " ".join([NUMBERS[count], *color.split(), "object" if count == 1 else "objects"])


def _game_sum(rng: np.random.Generator) -> tuple[str, list[tuple[str, str]]]:
    colors, counts = _three_colors(rng), rng.integers(1, MAX_OBJECTS + 1, size=2).tolist()
    told = _joined([_objects(n, color) for n, color in zip(counts, colors, strict=False)])
    asked = [("how many objects are there?", POINTS[sum(counts)])]
    asked += [(f"how many {c} objects are there?", POINTS[n]) for n, c in zip((*counts, 0), colors, strict=True)]
    if counts[0] != counts[1]:
        more, less = shuffled(rng, colors[:2])
        answer = colors[counts.index(max(counts))]
        asked.append((f"are there more {more} objects or more {less} objects?", answer))
    return f"there {'is' if counts[0] == 1 else 'are'} {told}.", asked


def _game_take(rng: np.random.Generator) -> tuple[str, list[tuple[str, str]]]:
    change, start = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    if chance(rng, 0.5):
        start += change
        return f"there are {POINTS[start]} objects, and {NUMBERS[change]} of them go away.", [
            ("how many objects are left?", POINTS[start - change]),
            ("how many objects were there before?", POINTS[start]),
        ]
    told = f"there {'is' if start == 1 else 'are'} {_objects(start)}, and {NUMBERS[change]} more"
    return f"{told} {'comes' if change == 1 else 'come'}.", [
        ("how many objects are there now?", POINTS[start + change]),
        ("how many objects were there before?", POINTS[start]),
    ]


# ------------------------------------------------------------------------------------ several pictures


def several_pictures(rng: np.random.Generator) -> SceneDialogue:
    """A training conversation about two or three pictures, shown together or one by one.

    >>> len(several_pictures(np.random.default_rng(0)).pictures) in (2, 3)
    True
    """
    make = pick(rng, (_conversation, _conversation, _comparison, _puzzle))
    return make(rng)


def _puzzle(rng: np.random.Generator) -> SceneDialogue:
    asked = riddle(rng, pick(rng, ("odd", "turns", "together", "next")))
    return Dialogue(turns=(Turn((*asked.scenes, asked.text), (asked.reply,)),), kind="pictures")


def _comparison(rng: np.random.Generator) -> SceneDialogue:
    """Two pictures that differ in one object or not at all."""
    before, after, told = _changed(rng)
    if is_same := chance(rng, 0.4):
        after, told = before, "nothing."
    same = ("are the two pictures the same?", "no" if not is_same else "yes")
    changed = ("what changed?", told)
    first, *more = shuffled(rng, [same, changed])
    return Dialogue(turns=(*_shown(rng, (before, after), first), *_later(more)), kind="pictures")


def _changed(rng: np.random.Generator) -> tuple[Scene, Scene, str]:
    """A scene, the same with one object of another colour, without it, or with one more, and that in words."""
    operation = pick(rng, ("recolor", "recolor", "remove", "add"))
    while True:
        scene = draw_scene(rng, num_objects=int(rng.integers(1 + (operation != "recolor"), MAX_OBJECTS + 1)))
        place = int(rng.integers(len(scene.objects)))
        obj = scene.objects[place]
        if sum(_pair(t) == _pair(obj) for t in scene.objects) > 1:
            continue
        if operation == "recolor":
            color = int(rng.integers(len(COLORS)))
            objects = [replace(t, color=color) if t is obj else t for t in scene.objects]
            told = f"the {_pair(obj)} is {COLORS[color]} now."
            may = _may_recolor(obj.color, color) and _may_pair(obj.shape, color, "train")
        else:
            objects, may = [t for t in scene.objects if t is not obj], True
            told = f"the {_pair(obj)} is gone." if operation == "remove" else f"there is a new {_pair(obj)}."
        other = replace(scene, objects=tuple(objects))
        if may and is_trainable(other):
            return (other, scene, told) if operation == "add" else (scene, other, told)


def _may_recolor(source: int, target: int) -> bool:
    """Training changes no colour into the third next (kept for test) or the fifth next (kept for dev)."""
    return (target - source) % len(COLORS) not in (0, 3, 5)


def _conversation(rng: np.random.Generator) -> SceneDialogue:
    """Two or three pictures and questions each about one of them, or about two."""
    scenes = tuple(draw_scene(rng) for _ in range(2 + chance(rng, 0.3)))
    asked = [_about_pictures(rng, scenes) for _ in range(3 + chance(rng, 0.5))]
    first, *more = dict(asked).items()
    return Dialogue(turns=(*_shown(rng, scenes, first), *_later(more)), kind="pictures")


def _later(asked: Sequence[tuple[str, str]]) -> list[SceneTurn]:
    return [Turn((question,), (answer,)) for question, answer in asked]


def _shown(rng: np.random.Generator, scenes: Sequence[Scene], asked: tuple[str, str]) -> list[SceneTurn]:
    """The turns that show all pictures: all in the first turn, or each with a question about it, then what is asked."""
    question, answer = asked
    if chance(rng, 0.5):
        parts: tuple[str | Scene, ...] = (*scenes, question)
        return [Turn(parts, (answer,))]
    turns = []
    for scene in scenes:
        counts = "how many objects are in the picture?", NUMBERS[len(scene.objects)]
        tint = "what color is the background?", BACKGROUND_NAMES[scene.background]
        own, said = pick(rng, (counts, tint))
        turns.append(Turn((scene, own), (said,)))
    return [*turns, Turn((question,), (answer,))]


def _about_pictures(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str]:
    while True:
        asked = pick(rng, (_ask_more, _ask_there, _ask_value, _ask_count))(rng, scenes)
        if asked is not None:
            return asked


def _which_picture(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[int, str]:
    """The number of a picture, and its name: the last one is called so half of the time."""
    place = int(rng.integers(len(scenes)))
    return place, "last" if place == len(scenes) - 1 and chance(rng, 0.5) else ORDINALS[place]


def _ask_more(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str] | None:
    a, b = sorted(rng.permutation(len(scenes))[:2].tolist())
    objects = [t for scene in (scenes[a], scenes[b]) for t in scene.objects]
    obj = pick(rng, objects)
    words, attribute = pick(
        rng, (("objects", None), (PLURALS[obj.shape], "shape"), (f"{COLORS[obj.color]} objects", "color"))
    )
    counts = [
        len(scenes[i].objects)
        if attribute is None
        else sum(_value(t, attribute) == _value(obj, attribute) for t in scenes[i].objects)
        for i in (a, b)
    ]
    if counts[0] == counts[1]:
        return None
    answer = ORDINALS[a if counts[0] > counts[1] else b]
    return f"which picture has more {words}, the {ORDINALS[a]} or the {ORDINALS[b]}?", answer


def _ask_there(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str] | None:
    """Whether something is in a picture; if it is not, it is in another one."""
    place, name = _which_picture(rng, scenes)
    is_yes = chance(rng, 0.5)
    has_color = chance(rng, 0.5)
    words = [{_pair(t) if has_color else SHAPES[t.shape] for t in scene.objects} for scene in scenes]
    here = words.pop(place)
    elsewhere = set().union(*words) - here
    pool = sorted(here if is_yes else elsewhere)
    if not pool:
        return None
    return f"is there {article(pick(rng, pool))} in the {name} picture?", "yes" if is_yes else "no"


def _ask_value(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str] | None:
    place, name = _which_picture(rng, scenes)
    attribute = pick(rng, ("color", "color", "shape", "size"))
    found = _named(scenes[place], rng, hide=attribute)
    if found is None:
        return None
    return f"what {attribute} is {found[1]} in the {name} picture?", _value(found[0], attribute)


def _ask_count(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str] | None:
    place, name = _which_picture(rng, scenes)
    objects = scenes[place].objects
    if chance(rng, 0.5):
        return f"how many objects are in the {name} picture?", NUMBERS[len(objects)]
    shape = pick(rng, [t.shape for scene in scenes for t in scene.objects])
    count = sum(t.shape == shape for t in objects)
    if count == 1 and chance(rng, 0.6):  # the commonest count by far
        return None
    return f"how many {PLURALS[shape]} are in the {name} picture?", NUMBERS[count]


# ------------------------------------------------------------------------------------------- lexicon


@functools.cache
def choice_words() -> frozenset[str]:
    """Every word that the questions, options and answers here can contain beside those of `tasks.vocabulary`."""
    fixed = (
        "in this game beats beat wins which does is are the object objects above left of highest lowest furthest right "
        "what size color how many there and more or them go away come comes now were before a an to yes no gone new "
        "first second third last picture same pictures changed nothing seen from"
    )
    texts = [fixed, HINT, *LETTERS, *POINTS, *itertools.chain.from_iterable(PLACES), *_STEMS.values()]
    return frozenset(word for text in texts for word in re.findall(r"[a-z]+", re.sub(r"\{[^}]*\}", " ", text)))
