"""Questions that teach places, sides, counts and comparisons from the easy end.

The questions of `questions` choose a wrong answer as near to the truth as can be, which is no start for learning.
Lessons begin with the halves of the picture, by which a model first sees columns; then places of the 3 x 3 grid, mostly
of a lone object; then sides, asked from both ends; then counting by kind, and which object is the green or the larger
one. `conversations` mixes them, a stage of training by its step.
Nothing that is said combines what `splits` withholds. Our choice: docs/choices.md#world.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from starflow2.core.dialogue import Dialogue, Turn
from starflow2.world.content import CELLS
from starflow2.world.multiple_choice import NAMINGS
from starflow2.world.questions import YES_NO
from starflow2.world.sampling import sample_split_scene
from starflow2.world.scene import (
    COLORS,
    EDGE,
    MAX_OBJECTS,
    OPPOSITES,
    SHAPES,
    SIZES,
    Relation,
    Scene,
    SceneDialogue,
    SceneObject,
    chance,
    pick,
    relations,
    shuffled,
)
from starflow2.world.splits import withheld
from starflow2.world.words import NUMBERS, PLACES, PLURALS, Namer, cell_of, value_of, words_in, yes_or_no

__all__ = ["LESSONS", "lesson", "lesson_words"]

Asked = tuple[str, str]  # question, answer

_TURNS: Final = 5  # questions about one image
_FORMS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "where": ("where is {a}?", "where in the picture is {a}?"),
        "is at": ("is {a} {place}?",),
        "left or right": ("is {a} on the left or on the right?", "is {a} on the left side or on the right side?"),
        "top or bottom": ("is {a} at the top or at the bottom?",),
        "what is at": ("what is {place}?", "which object is {place}?"),
        "is beside": ("is {a} {rel} {b}?",),
        "which side": ("is {a} left or right of {b}?", "is {a} on the left or on the right of {b}?"),
        "which height": ("is {a} above or below {b}?",),
        "what is beside": ("what is {rel} {b}?", "which object is {rel} {b}?"),
        "how many": ("how many {objects} are there?", "how many {objects} do you see?", "count the {objects}."),
        "are there": ("are there {n} {objects}?", "are there {n} {objects} in the picture?"),
        "which is": ("which object is {value}?", "what is {value}?"),
        "larger": ("which is {more}, {a} or {b}?", "which object is {more}, {a} or {b}?"),
    }
)
_SIDES: Final[Mapping[str, tuple[Relation, Relation]]] = MappingProxyType(
    {"which side": ("left of", "right of"), "which height": ("above", "below")}
)
_SPOKEN: Final[Mapping[Relation, tuple[str, ...]]] = MappingProxyType(
    {
        "left of": ("left of", "to the left of"),
        "right of": ("right of", "to the right of"),
        "above": ("above", "over"),
        "below": ("below", "under"),
    }
)


class _Teacher:
    """Asks about one scene; a method returns None where the scene allows no such question."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.objects, self.rng, self.guard = scene.objects, rng, withheld()
        self.namer = Namer(scene, rng, NAMINGS)

    def _say(self, form: str, **fields: str) -> str:
        return pick(self.rng, _FORMS[form]).format(**fields)

    def _lone(self, shape: int) -> bool:
        return sum(obj.shape == shape for obj in self.objects) == 1

    # Places

    def _somewhere(self) -> tuple[SceneObject, str, tuple[int, int]] | None:
        """An object that can be named and is clearly in a cell, with its name and the cell."""
        for obj in shuffled(self.rng, self.objects):
            name, cell = self.namer.name(obj), cell_of(obj, edge=EDGE)
            if name is not None and cell is not None:
                return obj, name, cell
        return None

    def where(self) -> Asked | None:
        found = self._somewhere()
        return found and (self._say("where", a=found[1]), PLACES[found[2][0]][found[2][1]])

    def is_at(self) -> Asked | None:
        """Question whether an object is in a cell; a wrong cell is mostly one that shares neither row nor column."""
        found = self._somewhere()
        if found is None:
            return None
        _, name, (row, column) = found
        is_yes = chance(self.rng, 0.5)
        if not is_yes:
            far = [cell for cell in CELLS if cell[0] != row and cell[1] != column]
            others = far if chance(self.rng, 0.6) else [cell for cell in CELLS if cell != (row, column)]
            row, column = pick(self.rng, others)
        return self._say("is at", a=name, place=PLACES[row][column]), yes_or_no(is_yes)

    def _halves(self) -> list[tuple[str, str, str]]:
        """Questions in which half an object is, as form, name and answer; left or right before top or bottom."""
        found = self._somewhere()
        if found is None:
            return []
        _, name, (row, column) = found
        level = [("left or right", name, ("left", "right")[column // 2])] if column != 1 else []
        upright = [("top or bottom", name, ("top", "bottom")[row // 2])] if row != 1 else []
        return level + upright

    def half(self) -> Asked | None:
        """Left or right, top or bottom."""
        asked = self._halves()
        return self._ask_half(*pick(self.rng, asked)) if asked else None

    def across(self) -> Asked | None:
        """Left or right; top or bottom only of what is in the middle column: columns are not learnt by themselves."""
        asked = self._halves()
        return self._ask_half(*asked[0]) if asked else None

    def _ask_half(self, form: str, name: str, answer: str) -> Asked:
        return self._say(form, a=name), answer

    def what_is_at(self) -> Asked | None:
        found = self._somewhere()
        if found is None or sum(cell_of(obj) == found[2] for obj in self.objects) > 1:
            return None
        return self._say("what is at", place=PLACES[found[2][0]][found[2][1]]), SHAPES[found[0].shape]

    # Sides

    def _two(self) -> tuple[SceneObject, str, SceneObject, str, Relation] | None:
        """Two objects with names and the only relation of the first to the second, whose opposite may be said, too."""
        for a, b in shuffled(self.rng, list(itertools.permutations(self.objects, 2))):
            found, names = sorted(relations(a, b)), (self.namer.name(a), self.namer.name(b))
            if len(found) == 1 and names[0] is not None and names[1] is not None:
                sides = (found[0], OPPOSITES[found[0]])
                if a.shape == b.shape or all(self.guard.allows_fact(a.shape, side, b.shape) for side in sides):
                    return a, names[0], b, names[1], found[0]
        return None

    def is_beside(self) -> Asked | None:
        found = self._two()
        if found is None:
            return None
        _, a, _, b, side = found
        is_yes = chance(self.rng, 0.5)
        words = pick(self.rng, _SPOKEN[side if is_yes else OPPOSITES[side]])
        return self._say("is beside", a=a, b=b, rel=words), yes_or_no(is_yes)

    def which_side(self) -> Asked | None:
        found = self._two()
        if found is None:
            return None
        form = next(form for form, sides in _SIDES.items() if found[4] in sides)
        return self._say(form, a=found[1], b=found[3]), found[4].removesuffix(" of")

    def what_is_beside(self) -> Asked | None:
        found = self._two()
        if found is None:
            return None
        obj, _, reference, name, side = found
        if sum(side in relations(other, reference) for other in self.objects if other is not reference) > 1:
            return None
        return self._say("what is beside", rel=pick(self.rng, _SPOKEN[side]), b=name), SHAPES[obj.shape]

    # Counts

    def _kind(self, is_there: bool) -> tuple[str, str, int] | None:
        """Words for a kind of object, one and many, and how many there are: "red heart", "red hearts", 2."""
        obj = pick(self.rng, self.objects)
        shape, color = obj.shape, obj.color
        if not is_there:
            shape = pick(self.rng, range(len(SHAPES))) if chance(self.rng, 0.5) else shape
            color = pick(self.rng, range(len(COLORS)))
        if not self.guard.allows_pair(shape, color):
            return None
        by = pick(
            self.rng, (("color", "shape"), ("color", "shape"), ("size", "shape"), ("color",), ("size",), ("shape",))
        )
        likeness = SceneObject(shape=shape, color=color, size=obj.size, x=0, y=0, angle=0)
        wanted = {name: value_of(likeness, name) for name in by}
        count = sum(all(value_of(t, k) == v for k, v in wanted.items()) for t in self.objects)
        adjectives = " ".join(wanted[k] for k in ("size", "color") if k in wanted)
        nouns = (SHAPES[shape], PLURALS[shape]) if "shape" in by else ("object", "objects")
        if not all(self.guard.allows_count(shape, n) for n in (count, count + 1)) and by == ("shape",):
            return None
        one, many = (f"{adjectives} {noun}".strip() for noun in nouns)
        return one, many, count

    def how_many(self) -> Asked | None:
        kind = self._kind(is_there=chance(self.rng, 0.75))
        if kind is None or (kind[2] == 1 and chance(self.rng, 0.5)):  # the commonest count by far
            return None
        return self._say("how many", objects=kind[1]), NUMBERS[kind[2]]

    def are_there(self) -> Asked | None:
        """Question whether there are exactly so many; a wrong number is one more or less."""
        kind = self._kind(is_there=True)
        if kind is None:
            return None
        _, many, count = kind
        is_yes = chance(self.rng, 0.5)
        number = count if is_yes else count + pick(self.rng, (-1, 1))
        if not 2 <= number <= MAX_OBJECTS or not self._may_count(many, number):
            return None
        return self._say("are there", n=NUMBERS[number], objects=many), yes_or_no(is_yes)

    def _may_count(self, words: str, number: int) -> bool:
        noun = words.split()[-1]
        return noun not in PLURALS or self.guard.allows_count(PLURALS.index(noun), number)

    # Which

    def which_is(self) -> Asked | None:
        attribute = pick(self.rng, ("color", "color", "size"))
        values = [value_of(obj, attribute) for obj in self.objects]
        alone = [i for i, value in enumerate(values) if values.count(value) == 1 and len(values) > 1]
        if not alone:
            return None
        index = pick(self.rng, alone)
        return self._say("which is", value=values[index]), SHAPES[self.objects[index].shape]

    def larger(self) -> Asked | None:
        for a, b in shuffled(self.rng, list(itertools.permutations(self.objects, 2))):
            names = self.namer.name(a, "size"), self.namer.name(b, "size")
            if a.size != b.size and a.shape != b.shape and names[0] is not None and names[1] is not None:
                more = pick(self.rng, ("larger", "bigger", "smaller"))
                wanted = SIZES.index("small" if more == "smaller" else "large")
                answer = a if a.size == wanted else b
                return self._say("larger", more=more, a=names[0], b=names[1]), SHAPES[answer.shape]
        return None


_Ask = Callable[[_Teacher], Asked | None]
LESSONS: Final[Mapping[str, tuple[_Ask, ...]]] = MappingProxyType(
    {
        "places": (_Teacher.where, _Teacher.is_at, _Teacher.is_at, _Teacher.half, _Teacher.what_is_at),
        "sides": (
            _Teacher.is_beside,
            _Teacher.is_beside,
            _Teacher.is_beside,
            _Teacher.which_side,
            _Teacher.what_is_beside,
            _Teacher.is_at,
        ),
        "details": (
            _Teacher.how_many,
            _Teacher.how_many,
            _Teacher.are_there,
            _Teacher.which_is,
            _Teacher.larger,
        ),
        "halves": (_Teacher.across,),
    }
)
_COUNTS: Final[Mapping[str, tuple[float, ...]]] = MappingProxyType(  # shares of images with one to four objects
    {
        "places": (0.6, 0.2, 0.1, 0.1),
        "sides": (0.0, 0.65, 0.2, 0.15),
        "details": (0.0, 0.25, 0.35, 0.4),
        "halves": (1.0, 0.0, 0.0, 0.0),
    }
)


def lesson(rng: np.random.Generator, topic: str) -> SceneDialogue:
    """Several questions of a topic of LESSONS about one image that training may show.

    >>> len(lesson(np.random.default_rng(0), "places").pictures)
    1
    """
    while True:
        scene = sample_split_scene(rng, num_objects=1 + int(rng.choice(MAX_OBJECTS, p=_COUNTS[topic])))
        teacher = _Teacher(scene, rng)
        made = (pick(rng, LESSONS[topic])(teacher) for _ in range(3 * _TURNS))
        asked = list(dict(pair for pair in made if pair is not None).items())[:_TURNS]
        if asked:
            (question, answer), *more = [_hinted(pair, rng) for pair in asked]
            turns = (Turn((scene, question), (answer,)), *(Turn((q,), (a,)) for q, a in more))
            return Dialogue(turns, topic)


def _hinted(asked: Asked, rng: np.random.Generator) -> Asked:
    """A quarter of the yes-or-no questions say how to answer, as MME's do."""
    is_hinted = asked[1] in ("yes", "no") and chance(rng, 0.25)
    return (f"{asked[0]} {YES_NO}", asked[1]) if is_hinted else asked


def lesson_words() -> frozenset[str]:
    """Every word of these questions and answers beside `questions.known_words`."""
    forms = [form for row in _FORMS.values() for form in row]
    return words_in([*forms, *(w for row in (*_SPOKEN.values(), *PLACES) for w in row), "larger smaller bigger yes no"])
