"""Questions about one image with two to four lettered options.

A `Choice` is a question about images with its options, or without options if the answer is a number; `choice_about`
makes one about a given scene, `riddles` makes those that need a stated rule or several images. The suites that ask them
are in `evals.mcq`. No text made with split="train" combines what `splits.WITHHELD` reserves for dev and test.
Our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np

from starflow2.errors import ConfigError
from starflow2.world.scene import (
    BACKGROUND_NAMES,
    COLORS,
    EDGE,
    OPPOSITES,
    RELATIONS,
    SHAPES,
    SIZES,
    Bucket,
    Scene,
    SceneObject,
    chance,
    pick,
    relations,
    shuffled,
)
from starflow2.world.splits import withheld
from starflow2.world.words import (
    NUMBERS,
    PLACES,
    PLURALS,
    Namer,
    article,
    joined,
    kind_of,
    place_of,
    value_of,
    words_in,
)

__all__ = ["DIMENSIONS", "HINT", "LETTERS", "NAMINGS", "Choice", "choice_about", "choice_words"]

LETTERS: Final = ("a", "b", "c", "d")
DIMENSIONS: Final = ("identity", "attribute", "location", "counting", "relation", "scene")
HINT: Final = "answer with the letter."
COUNT_WEIGHTS: Final = (1.0, 1.0, 2.0, 3.0, 4.0)  # by which zero to four are asked for; large counts are rare
NAMINGS: Final = (("shape",), ("color", "shape"), ("size", "shape"), ("color",))

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
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A question about images. `answer` is the right answer in words; with options it is one of them."""

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
        """The expected reply: the letter of the right option, or the answer itself if there are no options."""
        return LETTERS[self.options.index(self.answer)] if self.options else self.answer

    def rotated(self, steps: int) -> Choice:
        """This question with its options moved on by `steps` letters, the last ones to the front."""
        size = len(self.options)
        return replace(self, options=tuple(self.options[(i - steps) % size] for i in range(size)))


class _ChoiceMaker:
    """Makes questions with options about one scene; a method returns None where the scene allows none.

    Wrong options are drawn first from what else is in the image, so that only looking at the right object helps.
    """

    def __init__(self, scene: Scene, rng: np.random.Generator, split: Bucket, num_options: int) -> None:
        self.scene, self.rng, self.num_options = scene, rng, num_options
        self.guard = withheld(split)
        self.namer = Namer(scene, rng, NAMINGS)

    def _choice(self, kind: str, question: str, right: str, wrong: Sequence[str]) -> Choice | None:
        """A choice with the right option and the first of the wrong ones; None if those are too few.

        wrong: distractors, the best first.
        """
        others = list(dict.fromkeys(option for option in wrong if option != right))[: self.num_options - 1]
        if len(others) < self.num_options - 1:
            return None
        options = tuple(shuffled(self.rng, [right, *others]))
        return Choice(scenes=(self.scene,), question=question, options=options, answer=right, kind=kind)

    def _present_first(self, values: Sequence[str], attribute: str) -> list[str]:
        """Values in random order, except that one which the image has comes first, if there is any."""
        here = [v for v in shuffled(self.rng, values) if any(value_of(t, attribute) == v for t in self.scene.objects)]
        return here[:1] + shuffled(self.rng, [v for v in values if v not in here[:1]])

    def _shapes_apart(self, right: int, allowed: Sequence[int]) -> list[str]:
        """Wrong shapes of which no two, nor any with the right one, are held out from being in one image."""
        chosen = [right]
        for word in self._present_first([SHAPES[s] for s in allowed if s != right], "shape"):
            if self.guard.allows_together([*chosen, SHAPES.index(word)]):
                chosen.append(SHAPES.index(word))
        return [SHAPES[s] for s in chosen[1:]]

    def identity(self) -> Choice | None:
        if chance(self.rng, 0.4):
            return self._which()
        found = self.namer.named_object(hide="shape")
        if found is None:
            return None
        obj, name = found
        allowed = [s for s in range(len(SHAPES)) if self.guard.allows_pair(s, obj.color)]
        question = _STEMS["what"].format(attribute="shape", a=name)
        return self._choice("identity", question, SHAPES[obj.shape], self._shapes_apart(obj.shape, allowed))

    def _which(self) -> Choice | None:
        obj = pick(self.rng, self.scene.objects)
        return self._choice("identity", _STEMS["which"], article(kind_of(obj)), self._other_pairs(obj))

    def _other_pairs(self, obj: SceneObject) -> list[str]:
        """The other three of two colours by two shapes, so that no option stands out; none of them is in the image."""
        there = {(t.shape, t.color) for t in self.scene.objects}
        for shape, color in shuffled(self.rng, list(itertools.product(range(len(SHAPES)), range(len(COLORS))))):
            others = [(shape, color), (obj.shape, color), (shape, obj.color)]
            is_grid = shape != obj.shape and color != obj.color and self.guard.allows_together([shape, obj.shape])
            if is_grid and all(self.guard.allows_pair(*other) and other not in there for other in others):
                return [article(f"{COLORS[c]} {SHAPES[s]}") for s, c in shuffled(self.rng, others)]
        return []

    def attribute(self) -> Choice | None:
        attribute = "size" if self.num_options == 2 and chance(self.rng, 0.5) else "color"
        found = self.namer.named_object(hide=attribute)
        if found is None:
            return None
        obj, name = found
        colors = [COLORS[c] for c in range(len(COLORS)) if self.guard.allows_pair(obj.shape, c) and c != obj.color]
        wrong = SIZES if attribute == "size" else self._present_first(colors, "color")
        question = _STEMS["what"].format(attribute=attribute, a=name)
        return self._choice("attribute", question, value_of(obj, attribute), wrong)

    def location(self) -> Choice | None:
        for obj in shuffled(self.rng, self.scene.objects):
            place, name = place_of(obj, edge=EDGE), self.namer.name(obj)
            if place is not None and name is not None:
                places = [place_of(t, edge=EDGE) for t in self.scene.objects if t is not obj]
                here = [p for p in places if p is not None][:1]
                wrong = here + shuffled(self.rng, list(itertools.chain.from_iterable(PLACES)))
                return self._choice("location", _STEMS["where"].format(a=name), place, wrong)
        return None

    def counting(self) -> Choice | None:
        """The count is drawn before the kind of object, or "one" would nearly always be right."""
        groups: dict[int, list[tuple[str, int | None]]] = {}
        countable: list[tuple[str, int | None, int | None]] = [("objects", None, None)]
        countable += [(PLURALS[s], s, None) for s in range(len(SHAPES))]
        countable += [(f"{COLORS[c]} objects", None, c) for c in range(len(COLORS))]
        for words, shape, color in countable:
            count = sum(shape in (None, t.shape) and color in (None, t.color) for t in self.scene.objects)
            groups.setdefault(count, []).append((words, shape))
        weights = np.array([COUNT_WEIGHTS[count] for count in sorted(groups)])
        count = sorted(groups)[int(self.rng.choice(len(weights), p=weights / weights.sum()))]
        words, shape = pick(self.rng, groups[count])
        wrong = [NUMBERS[n] for n in range(len(NUMBERS)) if shape is None or self.guard.allows_count(shape, n)]
        question = _STEMS["count"].format(objects=words)
        return self._choice("counting", question, NUMBERS[count], shuffled(self.rng, wrong))

    def relation(self) -> Choice | None:
        for a, b in shuffled(self.rng, list(itertools.permutations(self.scene.objects, 2))):
            found, names = sorted(relations(a, b)), (self.namer.name(a), self.namer.name(b))
            if len(found) != 1 or names[0] is None or names[1] is None:
                continue
            if chance(self.rng, 0.5):
                if all(self.guard.allows_fact(a.shape, side, b.shape) for side in RELATIONS):
                    question = _STEMS["stand"].format(a=names[0], b=names[1])
                    return self._choice("relation", question, found[0], [OPPOSITES[found[0]], *self._sides()])
            elif sum(found[0] in relations(t, b) for t in self.scene.objects if t is not b) == 1:
                allowed = [s for s in range(len(SHAPES)) if self.guard.allows_fact(s, found[0], b.shape)]
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
        """Both shapes in other colours: exchanged if they differ, else one, the other or both changed."""
        colors = shuffled(self.rng, range(len(COLORS)))
        options = [(b.color, a.color)] if a.color != b.color else []
        options += [(c, d) for c, d in itertools.product(colors, colors) if c != a.color and d != b.color]
        for c, d in options:
            rows = [(c, d), *shuffled(self.rng, [(c, b.color), (a.color, d)])]
            if all(self.guard.allows_pair(a.shape, x) and self.guard.allows_pair(b.shape, y) for x, y in rows):
                return [_contents(replace(a, color=x), replace(b, color=y)) for x, y in rows]
        return []


def _contents(a: SceneObject, b: SceneObject) -> str:
    return joined([article(kind_of(a)), article(kind_of(b))])


_MAKERS: Final[Mapping[str, Callable[[_ChoiceMaker], Choice | None]]] = MappingProxyType(
    {
        "identity": _ChoiceMaker.identity,
        "attribute": _ChoiceMaker.attribute,
        "location": _ChoiceMaker.location,
        "counting": _ChoiceMaker.counting,
        "relation": _ChoiceMaker.relation,
        "scene": _ChoiceMaker.scenery,
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
    return _MAKERS[kind](_ChoiceMaker(scene, rng, split, num_options))


@functools.cache
def choice_words() -> frozenset[str]:
    """Every word that these questions, options and answers can contain beside `questions.known_words`."""
    return words_in([HINT, *LETTERS, *itertools.chain.from_iterable(PLACES), *_STEMS.values(), "and"])
