"""Words shared by everything that the drawn world says: numbers, plurals, places, and names of objects.

All text of the world is lower case, numbers are words, and an object is named by its size, colour and shape.
Our choice: docs/choices.md#world.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from starflow2.world.scene import COLORS, IMAGE_SIZE, SHAPES, SIZES, Bucket, Cell, Scene, SceneObject, pick, shuffled

__all__ = [
    "ATTRIBUTES",
    "NUMBERS",
    "ORDINALS",
    "PLACES",
    "PLURALS",
    "POINTS",
    "Name",
    "Namer",
    "Wording",
    "article",
    "cell_of",
    "joined",
    "kind_of",
    "names_of",
    "place_of",
    "value_of",
    "words_in",
    "yes_or_no",
]

NUMBERS: Final = ("zero", "one", "two", "three", "four")
POINTS: Final = (*NUMBERS, "five", "six", "seven", "eight")  # sums over two images and games can exceed four
ORDINALS: Final = ("first", "second", "third")
PLURALS: Final = ("circles", "squares", "triangles", "stars", "hearts", "rings", "crosses", "diamonds")
PLACES: Final = (  # rows of the 3 x 3 grid, top first
    ("in the upper left", "at the top", "in the upper right"),
    ("on the left", "in the middle", "on the right"),
    ("in the lower left", "at the bottom", "in the lower right"),
)
ATTRIBUTES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({"color": COLORS, "shape": SHAPES, "size": SIZES})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """Sentence forms with {fields}: those used in training, and those reserved for testing other wording."""

    train: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]

    def forms(self, split: Bucket) -> tuple[str, ...]:
        """The forms of one split."""
        return {"train": self.train, "dev": self.dev, "test": self.test}[split]


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def joined(words: Iterable[str]) -> str:
    """The words with "and" between them."""
    return " and ".join(words)


def yes_or_no(is_yes: bool) -> str:
    """The answer "yes" if true, else "no"."""
    return "yes" if is_yes else "no"


def words_in(texts: Iterable[str]) -> frozenset[str]:
    """Every word of the texts, which may be sentence forms: a {field} is no word.

    >>> sorted(words_in(["is {a} {value}?", "a star."]))
    ['a', 'is', 'star']
    """
    return frozenset(word for text in texts for word in re.findall(r"[a-z]+", re.sub(r"\{[^}]*\}", " ", text)))


# ------------------------------------------------------------------------------------ one object in words


def value_of(obj: SceneObject, attribute: str) -> str:
    """An object's "color", "shape" or "size" in words."""
    return ATTRIBUTES[attribute][getattr(obj, attribute)]


def kind_of(obj: SceneObject) -> str:
    """Colour and shape of an object, such as "red star"."""
    return f"{COLORS[obj.color]} {SHAPES[obj.shape]}"


def place_of(obj: SceneObject, *, edge: float = 0.0) -> str | None:
    """Words for the cell that holds the object's centre, such as "at the top"; None where `cell_of` gives none."""
    cell = cell_of(obj, edge=edge)
    return None if cell is None else PLACES[cell[0]][cell[1]]


def cell_of(obj: SceneObject, *, edge: float = 0.0) -> Cell | None:
    """Cell of the 3 x 3 grid that holds the object's centre.

    None if the centre lies within `edge` pixels of a line of the grid, where a place would be debatable.
    """
    if any(abs(v - line * IMAGE_SIZE / 3) < edge for v in (obj.x, obj.y) for line in (1, 2)):
        return None
    row, column = (min(max(int(3 * v / IMAGE_SIZE), 0), 2) for v in (obj.y, obj.x))
    return row, column


@dataclass(frozen=True, slots=True)
class Name:
    """Words for one object, such as "the red star", and the attributes that they tell."""

    attributes: tuple[str, ...]
    words: str


def names_of(scene: Scene, obj: SceneObject, namings: Sequence[tuple[str, ...]]) -> list[Name]:
    """Every name that fits `obj` and nothing else in the scene.

    namings: combinations of ATTRIBUTES to try, in order, such as ("color", "shape").

    >>> star = SceneObject(shape=3, color=0, size=1, x=16, y=32, angle=0)
    >>> scene = Scene(objects=(star, SceneObject(shape=3, color=4, size=1, x=48, y=32, angle=0)), background=0)
    >>> [name.words for name in names_of(scene, star, [("shape",), ("color",), ("color", "shape")])]
    ['the red object', 'the red star']
    """
    found = []
    for attributes in namings:
        values = [value_of(obj, k) for k in attributes]
        if sum([value_of(other, k) for k in attributes] == values for other in scene.objects) == 1:
            noun = [] if "shape" in attributes else ["object"]
            found.append(Name(attributes, " ".join(["the", *values, *noun])))
    return found


class Namer:
    """Picks random names for the objects of one scene; see `names_of`."""

    def __init__(self, scene: Scene, rng: np.random.Generator, namings: Sequence[tuple[str, ...]]) -> None:
        self.scene, self.rng = scene, rng
        self._names = {id(obj): names_of(scene, obj, namings) for obj in scene.objects}

    def name(self, obj: SceneObject, hide: str = "") -> str | None:
        """Words that fit this object alone and do not tell the attribute `hide`; None if there are none."""
        names = [name.words for name in self._names[id(obj)] if hide not in name.attributes]
        return pick(self.rng, names) if names else None

    def named_object(self, hide: str = "") -> tuple[SceneObject, str] | None:
        """A random object with a name that does not tell the attribute `hide`; None if no object has one."""
        for obj in shuffled(self.rng, self.scene.objects):
            name = self.name(obj, hide)
            if name is not None:
                return obj, name
        return None
