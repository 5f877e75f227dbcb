"""Training conversations for the language model and its adapter: about images, or about words alone.

`understanding_dialogue` mixes kinds by `MIX`: one image with several turns, lessons about halves, places, sides and
details, several images, lettered options, a caption that has to be read for its answers, a rule game in words, and
checks of pictures. Everything is a pure function of seed and index and combines nothing that `splits.WITHHELD`
reserves. No answer is an image: drawing is not trained here.
Our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np

from starflow2.core.dialogue import Dialogue, Turn
from starflow2.errors import ConfigError
from starflow2.world.captions import caption_task
from starflow2.world.checks import check_dialogue, check_words
from starflow2.world.content import Content, Group
from starflow2.world.edit_requests import edit_words
from starflow2.world.lessons import LESSONS, lesson, lesson_words
from starflow2.world.multiple_choice import DIMENSIONS, choice_about, choice_words
from starflow2.world.questions import LIST, known_words, understanding_task
from starflow2.world.riddles import game, riddle, riddle_words
from starflow2.world.sampling import sample_split_scene
from starflow2.world.scene import (
    BACKGROUND_NAMES,
    COLORS,
    OPPOSITES,
    SHAPES,
    SIZES,
    Scene,
    SceneDialogue,
    chance,
    pick,
    stream,
)
from starflow2.world.several_images import several_images_dialogue, several_images_words
from starflow2.world.splits import withheld
from starflow2.world.story_text import story_words
from starflow2.world.words import PLACES, PLURALS, POINTS, article, yes_or_no

__all__ = ["MIX", "READ_MIX", "understanding_dialogue", "understanding_words"]

MIX: Final[Mapping[str, float]] = MappingProxyType(
    {
        "picture": 0.38,  # descriptions and short answers, the form of most questions
        "places": 0.07,
        "sides": 0.13,
        "details": 0.07,
        "pictures": 0.08,
        "choice": 0.08,  # letters are soon learnt; the questions themselves are those of "picture"
        "reading": 0.05,  # colours, counts and places bound to objects by words: what a drawer must read
        "game": 0.02,
        "check": 0.12,  # whether a picture shows a caption, or a request was done
        "halves": 0.0,  # left or right of one thing: columns are learnt from much of it, early in stage vlm
    }
)
READ_MIX: Final[Mapping[str, float]] = MappingProxyType(  # families of captions to be read
    {
        "two_object": 0.1,
        "counting": 0.12,
        "colors": 0.05,
        "position": 0.2,
        "color_attr": 0.23,
        "dense": 0.1,
        "mixed": 0.07,
        "many": 0.05,
        "placed": 0.05,
        "sized": 0.03,
    }
)
RIDDLE_SHARE: Final = 0.25  # of "choice": a rule to be applied to the image
WHOLE_SHARE: Final = 0.4  # of "picture", each for the description and the list: they teach seeing, the rest reasoning
SIMPLE_SHARE: Final = 0.6  # of "picture": mostly whether an object is there; without these no yes or no is learnt

_OPTIONS: Final = (0.35, 0.15, 0.5)  # shares of two, three and four options: two are where letters are learnt

_MIX_STREAM: Final = 11  # third number of a stream, so that no other task repeats its draws


# ------------------------------------------------------------------------------------------ reading


class _Colored(NamedTuple):
    """A single object whose colour a caption names."""

    shape: int
    color: int


@dataclass(frozen=True, slots=True)
class _Reader:
    """Asks about a caption: only about what follows from its words, whatever else the image would show."""

    content: Content
    rng: np.random.Generator

    @property
    def found(self) -> Sequence[Group]:
        return self.content.groups

    def _lone(self) -> list[Group]:
        """Single objects that their shape tells apart."""
        shapes = [m.shape for m in self.found]
        return [m for m in self.found if m.count == 1 and shapes.count(m.shape) == 1]

    def _colored(self) -> list[_Colored]:
        """Those of `_lone` whose colour is named."""
        return [_Colored(m.shape, m.color) for m in self._lone() if m.color is not None]

    def listing(self) -> tuple[str, str]:
        return LIST, ", ".join(m.words for m in self.found) + "."

    def color(self) -> tuple[str, str] | None:
        known = self._colored()
        if not known:
            return None
        one = pick(self.rng, known)
        return f"what color is the {SHAPES[one.shape]}?", COLORS[one.color]

    def is_color(self) -> tuple[str, str] | None:
        known = self._colored()
        if not known:
            return None
        one = pick(self.rng, known)
        if self.rng.random() < 0.5:
            return f"is the {SHAPES[one.shape]} {COLORS[one.color]}?", "yes"
        may_pair = withheld().allows_pair
        named = [m.color for m in self.found if m.color is not None and m.color != one.color]
        near = [color for color in named if may_pair(one.shape, color)]
        others = [color for color in range(len(COLORS)) if color != one.color and may_pair(one.shape, color)]
        return f"is the {SHAPES[one.shape]} {COLORS[pick(self.rng, near or others)]}?", "no"

    def shape(self) -> tuple[str, str] | None:
        colors = [m.color for m in self.found]
        known = [
            _Colored(m.shape, m.color)
            for m in self.found
            if m.count == 1 and m.color is not None and colors.count(m.color) == 1
        ]
        if not known or None in colors:
            return None
        one = pick(self.rng, known)
        return f"what shape is the {COLORS[one.color]} object?", SHAPES[one.shape]

    def size(self) -> tuple[str, str] | None:
        known = [(m.shape, m.size) for m in self._lone() if m.size is not None]
        if not known:
            return None
        shape, size = pick(self.rng, known)
        return f"what size is the {SHAPES[shape]}?", SIZES[size]

    def there(self) -> tuple[str, str]:
        here = sorted({m.shape for m in self.found})
        is_yes = self.rng.random() < 0.5
        shape = pick(self.rng, here if is_yes else [s for s in range(len(SHAPES)) if s not in here])
        return f"is there {article(SHAPES[shape])}?", yes_or_no(is_yes)

    def count(self) -> tuple[str, str]:
        """The number of a shape, or of all objects; one time in five of a shape that is not there."""
        total = sum(m.count for m in self.found)
        if self.rng.random() < 0.4:
            return "how many objects are there?", POINTS[total]
        here = sorted({m.shape for m in self.found})
        gone = [s for s in range(len(SHAPES)) if s not in here]
        shape = pick(self.rng, gone if self.rng.random() < 0.2 else here)
        return f"how many {PLURALS[shape]} are there?", POINTS[sum(m.count for m in self.found if m.shape == shape)]

    def beside(self) -> tuple[str, str] | None:
        """A question about the one relation of a caption, from either side of it."""
        relation = self.content.relation
        if relation is None:
            return None
        a, b = (SHAPES[group.shape] for group in self.found[:2])
        return (
            (f"what is {OPPOSITES[relation]} the {a}?", b)
            if chance(self.rng, 0.5)
            else (f"what is {relation} the {b}?", a)
        )

    def place(self) -> tuple[str, str] | None:
        """Where a single object is said to be."""
        known = [(m.shape, m.cell) for m in self._lone() if m.cell is not None]
        if not known:
            return None
        shape, (row, column) = pick(self.rng, known)
        return f"where is the {SHAPES[shape]}?", PLACES[row][column]

    def tint(self) -> tuple[str, str] | None:
        tint = self.content.background
        return None if tint is None else ("what color is the background?", BACKGROUND_NAMES[tint])


_READ: Final[tuple[Callable[[_Reader], tuple[str, str] | None], ...]] = (
    _Reader.listing,
    _Reader.color,
    _Reader.is_color,
    _Reader.shape,
    _Reader.size,
    _Reader.there,
    _Reader.count,
    _Reader.beside,
    _Reader.place,
    _Reader.tint,
)


# -------------------------------------------------------------------------------------------- kinds


def _words_only(asked: Sequence[tuple[str, str]], kind: str) -> SceneDialogue:
    return Dialogue(turns=tuple(Turn((question,), (answer,)) for question, answer in asked), kind=kind)


def _simple(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question whether an object of some shape, colour or both is there; a wrong one may be any that is absent.

    The harder questions of `questions` choose wrong answers so near to the truth that they are no start for learning.
    """
    by, is_yes = ("shape", "shape", "color", "both")[int(rng.integers(4))], rng.random() < 0.5
    here = {(obj.shape, obj.color) for obj in scene.objects}
    if by == "both":
        may_pair = withheld().allows_pair
        all_pairs = [(s, c) for s in range(len(SHAPES)) for c in range(len(COLORS)) if may_pair(s, c)]
        options = sorted(here) if is_yes else [pair for pair in all_pairs if pair not in here]
        shape, color = options[int(rng.integers(len(options)))]
        words = f"{COLORS[color]} {SHAPES[shape]}"
    else:
        column, names = (0, SHAPES) if by == "shape" else (1, COLORS)
        present = sorted({pair[column] for pair in here})
        values = present if is_yes else [v for v in range(len(names)) if v not in present]
        value = names[values[int(rng.integers(len(values)))]]
        words = value if by == "shape" else f"{value} object"
    form = ("is there {np} in the picture?", "is there {np}?")[int(rng.integers(2))]
    return form.format(np=article(words)), yes_or_no(is_yes)


def _picture(seed: int, index: int, rng: np.random.Generator) -> SceneDialogue:
    scene, (described, listed, *asked) = understanding_task(seed, index)
    if rng.random() < SIMPLE_SHARE:
        asked = asked[:3] + [_simple(scene, rng) for _ in range(5)]
    asked += [whole for whole in (described, listed) if rng.random() < WHOLE_SHARE]
    (question, answer), *more = [asked[int(i)] for i in rng.permutation(len(asked))]
    shown = Turn((scene, question), (answer,))
    return Dialogue(turns=(shown, *_words_only(more, "").turns), kind="picture")


def _pictures(seed: int, index: int, rng: np.random.Generator) -> SceneDialogue:
    return several_images_dialogue(rng)


def _choice(seed: int, index: int, rng: np.random.Generator) -> SceneDialogue:
    """Two or three questions with options about one image, or a rule to be applied to it."""
    if rng.random() < RIDDLE_SHARE:
        asked = riddle(rng, ("beats", "points")[int(rng.integers(2))])
        return Dialogue(turns=(Turn((*asked.scenes, asked.text), (asked.reply,)),), kind="choice")
    scene = sample_split_scene(rng)
    kinds = [DIMENSIONS[int(i)] for i in rng.permutation(len(DIMENSIONS))]
    sizes = rng.choice((2, 3, 4), size=len(kinds), p=_OPTIONS).tolist()
    made = (choice_about(scene, rng, kind, num_options=size) for kind, size in zip(kinds, sizes, strict=True))
    first, *more = [(choice.text, choice.reply) for choice in made if choice is not None][:3]
    return Dialogue(turns=(Turn((scene, first[0]), (first[1],)), *_words_only(more, "").turns), kind="choice")


def _reading(seed: int, index: int, rng: np.random.Generator) -> SceneDialogue:
    item = caption_task(seed, index, weights=READ_MIX)
    reader = _Reader(item.content, rng)
    made = [_READ[int(i)](reader) for i in rng.permutation(len(_READ))]
    (question, answer), *more = [asked for asked in made if asked is not None][: int(rng.integers(3, 6))]
    caption = item.prompt if item.prompt[-1] in ".?" else f"{item.prompt}."
    return _words_only([(f"{caption} {question}", answer), *more], "reading")


def _game(seed: int, index: int, rng: np.random.Generator) -> SceneDialogue:
    return _words_only(game(rng), "game")


def _lesson(seed: int, index: int, rng: np.random.Generator, topic: str) -> SceneDialogue:
    return lesson(rng, topic)


def _check(seed: int, index: int, rng: np.random.Generator) -> SceneDialogue:
    return check_dialogue(seed, index)


_KINDS: Final[Mapping[str, Callable[[int, int, np.random.Generator], SceneDialogue]]] = MappingProxyType(
    {
        "picture": _picture,
        **{topic: partial(_lesson, topic=topic) for topic in LESSONS},
        "pictures": _pictures,
        "choice": _choice,
        "reading": _reading,
        "game": _game,
        "check": _check,
    }
)


def understanding_dialogue(seed: int, index: int, *, weights: Mapping[str, float] = MIX) -> SceneDialogue:
    """Training conversation number `index`; its `kind` is one of MIX. Raises ConfigError for unusable weights.

    >>> understanding_dialogue(0, 3) == understanding_dialogue(0, 3)
    True
    """
    unknown = sorted(set(weights) - set(_KINDS))
    if unknown or not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ConfigError(f"weights={dict(weights)}: expected non-negative shares of {', '.join(_KINDS)}")
    rng = stream(seed, index, _MIX_STREAM)
    shares = np.array(list(weights.values()), np.float64)
    kind = list(weights)[int(rng.choice(len(shares), p=shares / shares.sum()))]
    return _KINDS[kind](seed, index, rng)


@functools.cache
def understanding_words() -> frozenset[str]:
    """Every word, in lower case, that these conversations can contain; a superset of `known_words()`.

    >>> {"beats", "third", "letter", "circle"} <= understanding_words()
    True
    """
    own = known_words() | choice_words() | riddle_words() | several_images_words() | lesson_words() | check_words()
    return own | edit_words() | story_words()
