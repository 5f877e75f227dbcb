"""What the language model and its adapter are trained on: conversations about pictures, or about words alone.

`understanding_dialogue` mixes five kinds by `MIX`: one picture with several turns, several pictures, lettered options,
a caption that has to be read for its answers, and a rule game in words. Everything is a pure function of seed and
index and free of anything that `world.HELD_OUT` keeps. Drawing is not trained here: no answer holds a picture.
Our choice: docs/choices.md#world.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from starflow2.data.dialogue import Dialogue, Turn
from starflow2.errors import ConfigError
from starflow2.world.captions import NUMBERS, PLURALS, caption_task
from starflow2.world.multiple_choice import (
    DIMENSIONS,
    POINTS,
    choice_about,
    choice_words,
    draw_scene,
    game,
    riddle,
    several_pictures,
)
from starflow2.world.questions import LIST, known_words, understanding_task
from starflow2.world.scene import BACKGROUND_NAMES, COLORS, OPPOSITES, SHAPES, SIZES, Scene, SceneDialogue, pick, stream
from starflow2.world.splits import HELD_OUT

__all__ = ["MIX", "READ_MIX", "Mention", "mentions", "understanding_dialogue", "understanding_words"]

MIX: Final[Mapping[str, float]] = MappingProxyType(
    {
        "picture": 0.62,  # describing and short answers, what most questions are
        "pictures": 0.14,
        "choice": 0.10,  # letters are soon learnt; the questions behind them are those of "picture"
        "reading": 0.09,  # colours, counts and places bound to objects by words: what a drawer must read
        "game": 0.05,
    }
)
READ_MIX: Final[Mapping[str, float]] = MappingProxyType(  # families of captions to be read
    {"two_object": 0.1, "counting": 0.15, "colors": 0.05, "position": 0.25, "color_attr": 0.3, "dense": 0.15}
)
RIDDLE_SHARE: Final = 0.25  # of "choice": a rule to be applied to the picture
WHOLE_SHARE: Final = 0.4  # of "picture", each for the description and the list: they teach to see, the rest to reason
SIMPLE_SHARE: Final = 0.6  # of "picture": mostly whether something is there; without these no yes or no is learnt

_MIX_STREAM: Final = 11  # third number of a stream


# ------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True, slots=True)
class Mention:
    """What a caption introduces at one place: so many objects of a shape, with the colour and size that it names."""

    shape: int
    count: int = 1
    color: int | None = None
    size: int | None = None

    @property
    def words(self) -> str:
        """As in a list of objects: "a small red circle", "two blue stars"."""
        names = [SIZES[self.size]] if self.size is not None else []
        names += [COLORS[self.color]] if self.color is not None else []
        names.append(SHAPES[self.shape] if self.count == 1 else PLURALS[self.shape])
        first = NUMBERS[self.count] if self.count > 1 else "an" if names[0][0] in "aeiou" else "a"
        return " ".join([first, *names])


def _any(words: Sequence[str]) -> str:
    return "|".join(words)


_MENTION: Final = re.compile(
    rf"\b(an?|{_any(NUMBERS[2:])}) (?:({_any(SIZES)}) )?(?:({_any(COLORS)}) )?({_any((*SHAPES, *PLURALS))})\b"
)
_TINT: Final = re.compile(rf"\b({_any(BACKGROUND_NAMES)}) background|background is ({_any(BACKGROUND_NAMES)})\b")


def mentions(caption: str) -> list[Mention]:
    """What a caption introduces ("a ...", "two ..."), in order; "the ..." only refers back.

    >>> [mention.words for mention in mentions("a red circle left of two small stars")]
    ['a red circle', 'two small stars']
    """
    found = []
    for number, size, color, noun in _MENTION.findall(caption):
        shape = PLURALS.index(noun) if noun in PLURALS else SHAPES.index(noun)
        count = NUMBERS.index(number) if number in NUMBERS else 1
        found.append(Mention(shape, count, COLORS.index(color) if color else None, SIZES.index(size) if size else None))
    return found


@dataclass(frozen=True, slots=True)
class _Reader:
    """Asks what a caption says: only what follows from its words, whatever else the picture would show."""

    caption: str
    metadata: Mapping[str, Any]
    rng: np.random.Generator

    @property
    def found(self) -> list[Mention]:
        return mentions(self.caption)

    def _lone(self) -> list[Mention]:
        """Single objects that their shape tells apart."""
        shapes = [m.shape for m in self.found]
        return [m for m in self.found if m.count == 1 and shapes.count(m.shape) == 1]

    def listing(self) -> tuple[str, str]:
        return LIST, ", ".join(m.words for m in self.found) + "."

    def color(self) -> tuple[str, str] | None:
        known: list[Any] = [m for m in self._lone() if m.color is not None]
        if not known:
            return None
        one = pick(self.rng, known)
        return f"what color is the {SHAPES[one.shape]}?", COLORS[one.color]

    def is_color(self) -> tuple[str, str] | None:
        known: list[Any] = [m for m in self._lone() if m.color is not None]
        if not known:
            return None
        one = pick(self.rng, known)
        if self.rng.random() < 0.5:
            return f"is the {SHAPES[one.shape]} {COLORS[one.color]}?", "yes"
        near = [m.color for m in self.found if m.color not in (None, one.color) and _may_pair(one.shape, m.color)]
        others = [c for c in range(len(COLORS)) if c != one.color and _may_pair(one.shape, c)]
        return f"is the {SHAPES[one.shape]} {COLORS[pick(self.rng, near or others)]}?", "no"

    def shape(self) -> tuple[str, str] | None:
        colors = [m.color for m in self.found]
        known: list[Any] = [
            m for m in self.found if m.count == 1 and m.color is not None and colors.count(m.color) == 1
        ]
        if not known or None in colors:
            return None
        one = pick(self.rng, known)
        return f"what shape is the {COLORS[one.color]} object?", SHAPES[one.shape]

    def size(self) -> tuple[str, str] | None:
        known: list[Any] = [m for m in self._lone() if m.size is not None]
        if not known:
            return None
        one = pick(self.rng, known)
        return f"what size is the {SHAPES[one.shape]}?", SIZES[one.size]

    def there(self) -> tuple[str, str]:
        here = sorted({m.shape for m in self.found})
        is_yes = self.rng.random() < 0.5
        shape = pick(self.rng, here if is_yes else [s for s in range(len(SHAPES)) if s not in here])
        noun = SHAPES[shape]
        return f"is there {'an' if noun[0] in 'aeiou' else 'a'} {noun}?", "yes" if is_yes else "no"

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
        """Which object stands where, from either side of what the caption says."""
        placed = [row for row in self.metadata["include"] if "position" in row]
        if not placed:
            return None
        subject, reference = placed[0]["class"], self.metadata["include"][0]["class"]
        relation = placed[0]["position"][0]
        if self.rng.random() < 0.5:
            subject, relation, reference = reference, OPPOSITES[relation], subject
        return f"what is {relation} the {reference}?", subject

    def tint(self) -> tuple[str, str] | None:
        match = _TINT.search(self.caption)
        return ("what color is the background?", match[1] or match[2]) if match else None


def _may_pair(shape: int, color: int | None) -> bool:
    return not any((shape, color) in table.pairs for table in HELD_OUT.values())


_READ: Final[tuple[Callable[[_Reader], tuple[str, str] | None], ...]] = (
    _Reader.listing,
    _Reader.color,
    _Reader.is_color,
    _Reader.shape,
    _Reader.size,
    _Reader.there,
    _Reader.count,
    _Reader.beside,
    _Reader.tint,
)


# -------------------------------------------------------------------------------------------- kinds


def _words_only(asked: Sequence[tuple[str, str]], kind: str) -> SceneDialogue:
    return Dialogue(turns=tuple(Turn((question,), (answer,)) for question, answer in asked), kind=kind)


def _simple(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Is there such a thing? By shape, by colour, or by both, the answer no being any that is absent.

    The harder questions of `tasks` choose their wrong answers so near that nothing is to be learnt from them first.
    """
    by, is_yes = ("shape", "shape", "color", "both")[int(rng.integers(4))], rng.random() < 0.5
    here = {(t.shape, t.color) for t in scene.objects}
    if by == "both":
        all_pairs = [(s, c) for s in range(len(SHAPES)) for c in range(len(COLORS)) if _may_pair(s, c)]
        options = sorted(here) if is_yes else [pair for pair in all_pairs if pair not in here]
        shape, color = options[int(rng.integers(len(options)))]
        words = f"{COLORS[color]} {SHAPES[shape]}"
    else:
        place, names = (0, SHAPES) if by == "shape" else (1, COLORS)
        seen = sorted({pair[place] for pair in here})
        values = seen if is_yes else [v for v in range(len(names)) if v not in seen]
        value = names[values[int(rng.integers(len(values)))]]
        words = value if by == "shape" else f"{value} object"
    form = ("is there {np} in the picture?", "is there {np}?")[int(rng.integers(2))]
    return form.format(np=f"{'an' if words[0] in 'aeiou' else 'a'} {words}"), "yes" if is_yes else "no"


def _picture(seed: int, index: int, rng: np.random.Generator) -> SceneDialogue:
    scene, (described, listed, *asked) = understanding_task(seed, index)
    if rng.random() < SIMPLE_SHARE:
        asked = asked[:3] + [_simple(scene, rng) for _ in range(5)]
    asked += [whole for whole in (described, listed) if rng.random() < WHOLE_SHARE]
    (question, answer), *more = [asked[int(i)] for i in rng.permutation(len(asked))]
    shown = Turn((scene, question), (answer,))
    return Dialogue(turns=(shown, *_words_only(more, "").turns), kind="picture")


def _pictures(seed: int, index: int, rng: np.random.Generator) -> SceneDialogue:
    return several_pictures(rng)


def _choice(seed: int, index: int, rng: np.random.Generator) -> SceneDialogue:
    """Two or three questions with options about one picture, or a rule to be applied to it."""
    if rng.random() < RIDDLE_SHARE:
        asked = riddle(rng, ("beats", "points")[int(rng.integers(2))])
        return Dialogue(turns=(Turn((*asked.scenes, asked.text), (asked.reply,)),), kind="choice")
    scene = draw_scene(rng)
    kinds = [DIMENSIONS[int(i)] for i in rng.permutation(len(DIMENSIONS))]
    sizes = rng.choice((2, 3, 4), size=len(kinds), p=(0.15, 0.15, 0.7)).tolist()
    made = (choice_about(scene, rng, kind, num_options=size) for kind, size in zip(kinds, sizes, strict=True))
    first, *more = [(choice.text, choice.reply) for choice in made if choice is not None][:3]
    return Dialogue(turns=(Turn((scene, first[0]), (first[1],)), *_words_only(more, "").turns), kind="choice")


def _reading(seed: int, index: int, rng: np.random.Generator) -> SceneDialogue:
    drawing = caption_task(seed, index, weights=READ_MIX)
    reader = _Reader(drawing.prompt, drawing.metadata, rng)
    made = [_READ[int(i)](reader) for i in rng.permutation(len(_READ))]
    (question, answer), *more = [asked for asked in made if asked is not None][: int(rng.integers(3, 6))]
    caption = drawing.prompt if drawing.prompt.endswith(".") else f"{drawing.prompt}."
    return _words_only([(f"{caption} {question}", answer), *more], "reading")


def _game(seed: int, index: int, rng: np.random.Generator) -> SceneDialogue:
    return _words_only(game(rng), "game")


_KINDS: Final[Mapping[str, Callable[[int, int, np.random.Generator], SceneDialogue]]] = MappingProxyType(
    {"picture": _picture, "pictures": _pictures, "choice": _choice, "reading": _reading, "game": _game}
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
    """Every word, in lower case, that these conversations can contain; a superset of `tasks.known_words()`.

    >>> {"beats", "third", "letter", "circle"} <= understanding_words()
    True
    """
    return known_words() | choice_words()
