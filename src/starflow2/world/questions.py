"""Questions about one image of the drawn world: yes or no as in MME, and programs of one to three hops as in GQA.

A question carries the program that finds its answer. Training never asks a chain of operators in HELD_OUT_CHAINS, nor
names a combination that `splits.WITHHELD` reserves. `known_words()` lists every word of captions and questions.
Our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np

from starflow2.errors import ConfigError
from starflow2.world.captions import (
    BACKGROUND_WORDS,
    DENSE_BACKGROUND,
    DENSE_COUNT,
    DENSE_RELATION,
    RELATION_WORDS,
    TOGETHER,
    noun,
)
from starflow2.world.grammar import grammar_words
from starflow2.world.sampling import sample_count, sample_crowd
from starflow2.world.scene import (
    BACKGROUND_NAMES,
    COLORS,
    MAX_OBJECTS,
    OPPOSITES,
    RELATIONS,
    SHAPES,
    SIZES,
    Bucket,
    Relation,
    Scene,
    SceneObject,
    Split,
    chance,
    pick,
    relations,
    shuffled,
    stream,
)
from starflow2.world.splits import is_trainable, withheld
from starflow2.world.words import (
    ATTRIBUTES,
    NUMBERS,
    PLACES,
    PLURALS,
    Namer,
    article,
    kind_of,
    value_of,
    words_in,
    yes_or_no,
)

__all__ = [
    "DESCRIBE",
    "HELD_OUT_CHAINS",
    "LIST",
    "SUBTASKS",
    "YES_NO",
    "Question",
    "chain",
    "describe",
    "known_words",
    "list_objects",
    "questions",
    "understanding_task",
    "yes_no_pair",
]


# ---------------------------------------------------------------------------------------- questions


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about an image, its one right answer, and the operators that find it, in order of execution."""

    text: str
    answer: str
    program: tuple[str, ...]
    kind: str


SUBTASKS: Final = ("existence", "count", "position", "color", "shape", "size")  # yes or no, as in MME
HELD_OUT_CHAINS: Final[Mapping[Split, tuple[tuple[str, ...], ...]]] = MappingProxyType(
    {"test": (("relate", "compare"), ("relate", "filter", "count")), "dev": (("relate", "logical"),)}
)
DESCRIBE: Final = "describe the picture."
LIST: Final = "list every object."
YES_NO: Final = "please answer yes or no."

_FORMS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "existence": ("is there {np} in the picture?", "is there {np}?"),
        "count": ("{is} there exactly {n} in the picture?", "{is} there exactly {n}?"),
        "position": ("is {a} {rel} {b}?",),
        "is": ("is {a} {value}?",),
        "query": ("what {attribute} is {a}?",),
        "how many": ("how many {objects} are there?", "how many {objects} are in the picture?"),
        "choose": ("is {a} {value} or {other}?",),
        "choose place": ("is {a} {value} {b}?",),
        "related": ("the object {rel} {b}",),
        "related filtered": ("the {value} object {rel} {b}",),
        "related count": ("how many objects are {rel} {b}?",),
        "related filtered count": ("how many {value} objects are {rel} {b}?",),
        "same": ("are {a} and {b} the same {attribute}?", "is {a} the same {attribute} as {b}?"),
        "related same": ("is {a} the same {attribute} as {b}?",),
        "logical": ("is there {a} {op} {b}?", "is there {a} {op} {b} in the picture?"),
        "related logical": ("is {a} {value} {op} {other}?",),
    }
)
_SIDES: Final[tuple[tuple[str, tuple[Relation, Relation]], ...]] = (
    ("left or right of", ("left of", "right of")),
    ("above or below", ("above", "below")),
)
_NAMINGS: Final = (("shape",), ("color",), ("color", "shape"), ("size", "shape"), ("size", "color"), ("size",))
_ASK: Final = 2  # third number of a stream, so that no other task repeats these draws for the same seed and index


def chain(program: Sequence[str]) -> tuple[str, ...]:
    """The operators of a program without `select`; HELD_OUT_CHAINS lists those that training never asks."""
    return tuple(operator for operator in program if operator != "select")


class _QuestionMaker:
    """Makes questions about one scene. A method returns None where the scene allows no such question.

    Yes/no methods return (yes, no), the "no" being a minimal change of the "yes"; the others return one question.
    """

    def __init__(self, scene: Scene, rng: np.random.Generator, split: Bucket) -> None:
        self.objects, self.rng, self.guard = scene.objects, rng, withheld(split)
        self.namer = Namer(scene, rng, _NAMINGS)
        self.sides = {(id(a), id(b)): relations(a, b) for a, b in itertools.permutations(scene.objects, 2)}

    def _may_say(self, a: SceneObject, relation: Relation, b: SceneObject) -> bool:
        return self.guard.allows_fact(a.shape, relation, b.shape)

    def _may_count(self, shape: int | None, count: int) -> bool:
        return shape is None or self.guard.allows_count(shape, count)

    def _text(self, form: str, **fields: str) -> str:
        return pick(self.rng, _FORMS[form]).format(**fields)

    # Objects by their relations

    def _related(self) -> list[tuple[list[SceneObject], Relation, SceneObject, str]]:
        """Every (objects, relation, reference, its name) with all the objects that stand so, in random order."""
        rows = []
        for obj in self.objects:
            name = self.namer.name(obj)
            if name is not None:
                for relation in RELATIONS:
                    found = [t for t in self.objects if t is not obj and relation in self.sides[id(t), id(obj)]]
                    rows.append((found, relation, obj, name))
        return shuffled(self.rng, rows)

    def _related_one(self) -> tuple[SceneObject, str] | None:
        """An object that is alone in some relation to another, and words for it by that relation."""
        for found, relation, _, name in self._related():
            if len(found) == 1:
                return found[0], self._text("related", rel=self._side(relation), b=name)
        return None

    def _side(self, relation: Relation) -> str:
        return pick(self.rng, RELATION_WORDS[relation])

    def _other_value(self, obj: SceneObject, attribute: str) -> str | None:
        """Another value of an attribute: that of another object if possible, so that only binding tells them apart."""
        pool = {
            "color": [COLORS[c] for c in range(len(COLORS)) if c != obj.color and self.guard.allows_pair(obj.shape, c)],
            "shape": [SHAPES[s] for s in range(len(SHAPES)) if s != obj.shape and self.guard.allows_pair(s, obj.color)],
            "size": [SIZES[1 - obj.size]],
        }[attribute]
        present = [value for value in pool if any(value_of(t, attribute) == value for t in self.objects)]
        return pick(self.rng, present or pool) if pool else None

    def _some_count(self, counts: Iterable[int]) -> int:
        """One of the counts that can be asked for; zero, always the easiest to find, one time in five."""
        known = sorted(counts)
        some = [count for count in known if count > 0]
        return pick(self.rng, some) if some and (known[0] > 0 or chance(self.rng, 0.8)) else known[0]

    # Yes or no, in pairs

    def _both(self, yes: str, no: str, kind: str, *program: str) -> tuple[Question, Question]:
        return (
            Question(text=yes, answer="yes", program=program, kind=kind),
            Question(text=no, answer="no", program=program, kind=kind),
        )

    def existence(self) -> tuple[Question, Question] | None:
        obj = pick(self.rng, self.objects)
        if chance(self.rng, 0.5):
            absent = [s for s in range(len(SHAPES)) if all(t.shape != s for t in self.objects)]
            yes, no = SHAPES[obj.shape], SHAPES[pick(self.rng, absent)]
            program: tuple[str, ...] = ("select", "exist")
        else:
            there = {(t.shape, t.color) for t in self.objects}
            near = [(obj.shape, c) for c in range(len(COLORS))] + [(s, obj.color) for s in range(len(SHAPES))]
            near = [pair for pair in near if pair not in there and self.guard.allows_pair(*pair)]
            if not near:
                return None
            shape, color = pick(self.rng, near)
            yes, no = kind_of(obj), f"{COLORS[color]} {SHAPES[shape]}"
            program = ("select", "filter", "exist")
        form = pick(self.rng, _FORMS["existence"])
        return self._both(form.format(np=article(yes)), form.format(np=article(no)), "existence", *program)

    def count(self) -> tuple[Question, Question] | None:
        shape: int | None = pick(self.rng, self.objects).shape if chance(self.rng, 0.7) else None
        right = sum(shape is None or t.shape == shape for t in self.objects)
        wrong = [n for n in (right - 1, right + 1) if 1 <= n <= MAX_OBJECTS and self._may_count(shape, n)]
        if not wrong:
            return None
        form = pick(self.rng, _FORMS["count"])

        def ask(n: int) -> str:
            one, many = ("object", "objects") if shape is None else (SHAPES[shape], PLURALS[shape])
            return form.format(**{"is": "is" if n == 1 else "are", "n": f"{NUMBERS[n]} {one if n == 1 else many}"})

        return self._both(ask(right), ask(pick(self.rng, wrong)), "count", "select", "count", "verify")

    def position(self) -> tuple[Question, Question] | None:
        for a, b in shuffled(self.rng, list(itertools.permutations(self.objects, 2))):
            found, names = sorted(self.sides[id(a), id(b)]), (self.namer.name(a), self.namer.name(b))
            if len(found) == 1 and names[0] is not None and names[1] is not None:
                sides = (found[0], OPPOSITES[found[0]])
                if self._may_say(a, sides[1], b):
                    form, which = pick(self.rng, _FORMS["position"]), int(self.rng.integers(3))
                    yes, no = (form.format(a=names[0], b=names[1], rel=RELATION_WORDS[side][which]) for side in sides)
                    return self._both(yes, no, "position", "select", "relate", "verify")
        return None

    def _attribute(self, attribute: str) -> tuple[Question, Question] | None:
        found = self.namer.named_object(hide=attribute)
        other = self._other_value(found[0], attribute) if found else None
        if found is None or other is None:
            return None
        values = (value_of(found[0], attribute), other)
        yes, no = (article(v) if attribute == "shape" else v for v in values)
        form = pick(self.rng, _FORMS["is"])
        return self._both(
            form.format(a=found[1], value=yes), form.format(a=found[1], value=no), attribute, "select", "verify"
        )

    def color(self) -> tuple[Question, Question] | None:
        return self._attribute("color")

    def shape(self) -> tuple[Question, Question] | None:
        return self._attribute("shape")

    def size(self) -> tuple[Question, Question] | None:
        return self._attribute("size")

    # One word, by a program of one to three hops

    def query(self) -> Question | None:
        attribute = pick(self.rng, ("color", "color", "shape", "shape", "size"))
        found = self.namer.named_object(hide=attribute)
        if found is None:
            return None
        text = self._text("query", attribute=attribute, a=found[1])
        return Question(text=text, answer=value_of(found[0], attribute), program=("select", "query"), kind="query")

    def how_many(self) -> Question:
        """The count is drawn before the kind of object, or "one" would be the answer to nearly everything."""
        groups: dict[int, list[tuple[str, tuple[str, ...]]]] = {len(self.objects): [("objects", ("select", "count"))]}
        for s, c in itertools.product((None, *range(len(SHAPES))), (None, *range(len(COLORS)))):
            if (s is None) != (c is None) or (s is not None and c is not None and self.guard.allows_pair(s, c)):
                n = sum(s in (None, t.shape) and c in (None, t.color) for t in self.objects)
                words = [] if c is None else [COLORS[c]]
                program = ("select", "filter", "count") if c is not None else ("select", "count")
                groups.setdefault(n, []).append((" ".join([*words, "objects" if s is None else PLURALS[s]]), program))
        count = self._some_count(groups)
        objects, operators = pick(self.rng, groups[count])
        text = self._text("how many", objects=objects)
        return Question(text=text, answer=NUMBERS[count], program=operators, kind="count")

    def choose(self) -> Question | None:
        attribute = pick(self.rng, ("color", "size"))
        found = self.namer.named_object(hide=attribute)
        other = self._other_value(found[0], attribute) if found else None
        if found is None or other is None:
            return None
        answer = value_of(found[0], attribute)
        first, second = shuffled(self.rng, [answer, other])
        text = self._text("choose", a=found[1], value=first, other=second)
        return Question(text=text, answer=answer, program=("select", "choose"), kind="choose")

    def choose_place(self) -> Question | None:
        for a, b in shuffled(self.rng, list(itertools.permutations(self.objects, 2))):
            names = (self.namer.name(a), self.namer.name(b))
            for words, sides in shuffled(self.rng, _SIDES):
                true = [side for side in sides if side in self.sides[id(a), id(b)]]
                if true and None not in names and all(self._may_say(a, side, b) for side in sides):
                    text = self._text("choose place", a=str(names[0]), b=str(names[1]), value=words)
                    program = ("select", "relate", "choose")
                    return Question(text=text, answer=true[0].removesuffix(" of"), program=program, kind="choose")
        return None

    def related_query(self) -> Question | None:
        found = self._related_one()
        if found is None:
            return None
        attribute = pick(self.rng, ("color", "shape", "size"))
        text = self._text("query", attribute=attribute, a=found[1])
        program = ("select", "relate", "query")
        return Question(text=text, answer=value_of(found[0], attribute), program=program, kind="relate")

    def related_verify(self) -> Question | None:
        found = self._related_one()
        attribute = pick(self.rng, ("color", "shape", "size"))
        other = self._other_value(found[0], attribute) if found else None
        if found is None or other is None:
            return None
        is_yes = chance(self.rng, 0.5)
        value = value_of(found[0], attribute) if is_yes else other
        text = self._text("is", a=found[1], value=article(value) if attribute == "shape" else value)
        return Question(text=text, answer=yes_or_no(is_yes), program=("select", "relate", "verify"), kind="relate")

    def related_filtered_query(self) -> Question | None:
        for found, relation, _, name in self._related():
            for obj in shuffled(self.rng, found):
                by, asked = pick(self.rng, (("color", "shape"), ("size", "color"), ("size", "shape")))
                value = value_of(obj, by)
                if len(found) > 1 and sum(value_of(t, by) == value for t in found) == 1:
                    words = self._text("related filtered", value=value, rel=self._side(relation), b=name)
                    text = self._text("query", attribute=asked, a=words)
                    program = ("select", "relate", "filter", "query")
                    return Question(text=text, answer=value_of(obj, asked), program=program, kind="relate")
        return None

    def related_twice_query(self) -> Question | None:
        for found, relation, reference, name in self._related():
            if len(found) == 1:
                middle = self._text("related", rel=self._side(relation), b=name)
                for side in shuffled(self.rng, RELATIONS):
                    last = [t for t in self.objects if t is not found[0] and side in self.sides[id(t), id(found[0])]]
                    if len(last) == 1 and last[0] is not reference:
                        attribute = pick(self.rng, ("color", "shape", "size"))
                        words = self._text("related", rel=self._side(side), b=middle)
                        text = self._text("query", attribute=attribute, a=words)
                        program = ("select", "relate", "relate", "query")
                        return Question(text=text, answer=value_of(last[0], attribute), program=program, kind="relate")
        return None

    def related_count(self) -> Question | None:
        rows = self._related()
        if not rows or len(self.objects) == 1:
            return None
        count = self._some_count({len(found) for found, *_ in rows})
        relation, name = next((r, name) for found, r, _, name in rows if len(found) == count)
        text = self._text("related count", rel=self._side(relation), b=name)
        return Question(text=text, answer=NUMBERS[count], program=("select", "relate", "count"), kind="count")

    def compare(self) -> Question | None:
        attribute, is_yes = pick(self.rng, ("color", "shape", "size")), chance(self.rng, 0.5)
        options: dict[bool, tuple[str, str]] = {}
        for a, b in shuffled(self.rng, list(itertools.permutations(self.objects, 2))):
            names = (self.namer.name(a, attribute), self.namer.name(b, attribute))
            if names[0] is not None and names[1] is not None:
                options.setdefault(value_of(a, attribute) == value_of(b, attribute), (names[0], names[1]))
        if len(options) < 2:  # both answers must be possible, or the rarer one would give itself away
            return None
        text = self._text("same", a=options[is_yes][0], b=options[is_yes][1], attribute=attribute)
        return Question(text=text, answer=yes_or_no(is_yes), program=("select", "select", "compare"), kind="compare")

    def logical(self) -> Question | None:
        here = sorted({t.shape for t in self.objects})
        op = pick(self.rng, ("and", "or")) if len(here) > 1 else "or"  # else "and" could only be answered no
        is_yes = chance(self.rng, 0.5)
        gone = [s for s in range(len(SHAPES)) if s not in here]
        pools = {("and", True): (here, here), ("or", False): (gone, gone)}.get((op, is_yes), (here, gone))
        for _ in range(8):
            a, b = (pick(self.rng, pool) for pool in shuffled(self.rng, pools))
            if a != b and self.guard.allows_together((a, b)):
                text = self._text("logical", a=article(SHAPES[a]), b=article(SHAPES[b]), op=op)
                return Question(
                    text=text, answer=yes_or_no(is_yes), program=("select", "select", "logical"), kind="logical"
                )
        return None

    # Compositions never asked in training

    def related_compare(self) -> Question | None:
        attribute, is_yes = pick(self.rng, ("color", "shape", "size")), chance(self.rng, 0.5)
        for found, relation, reference, name in self._related():
            for obj in shuffled(self.rng, self.objects):
                other = self.namer.name(obj, attribute)
                if len(found) != 1 or other is None or obj is reference or obj is found[0]:
                    continue
                if (value_of(found[0], attribute) == value_of(obj, attribute)) == is_yes:
                    words = self._text("related", rel=self._side(relation), b=name)
                    text = self._text("related same", a=words, b=other, attribute=attribute)
                    program = ("select", "relate", "select", "compare")
                    return Question(text=text, answer=yes_or_no(is_yes), program=program, kind="compare")
        return None

    def related_filtered_count(self) -> Question | None:
        rows = [
            (sum(value_of(t, by) == value for t in found), value, relation, name)
            for found, relation, _, name in self._related()
            if found
            for by in ("color", "size")
            for value in sorted({value_of(t, by) for t in self.objects})
        ]
        if not rows:
            return None
        count = self._some_count({row[0] for row in rows})
        _, value, relation, name = pick(self.rng, [row for row in rows if row[0] == count])
        text = self._text("related filtered count", value=value, rel=self._side(relation), b=name)
        return Question(text=text, answer=NUMBERS[count], program=("select", "relate", "filter", "count"), kind="count")

    def related_logical(self) -> Question | None:
        found, op, is_yes = self._related_one(), pick(self.rng, ("and", "or")), chance(self.rng, 0.5)
        if found is None:
            return None
        holds = {("and", True): (True, True), ("or", False): (False, False)}.get((op, is_yes))
        holds = (True, False) if holds is None else holds
        values = [
            value_of(found[0], k) if is_true else self._other_value(found[0], k)
            for k, is_true in zip(("color", "size"), shuffled(self.rng, holds), strict=True)
        ]
        text = self._text("related logical", a=found[1], value=str(values[0]), op=op, other=str(values[1]))
        return Question(text=text, answer=yes_or_no(is_yes), program=("select", "relate", "logical"), kind="logical")


_YES_NO: Final[Mapping[str, Callable[[_QuestionMaker], tuple[Question, Question] | None]]] = MappingProxyType(
    {
        "existence": _QuestionMaker.existence,
        "count": _QuestionMaker.count,
        "position": _QuestionMaker.position,
        "color": _QuestionMaker.color,
        "shape": _QuestionMaker.shape,
        "size": _QuestionMaker.size,
    }
)
_PROGRAMS: Final[tuple[Callable[[_QuestionMaker], Question | None], ...]] = (
    _QuestionMaker.query,
    _QuestionMaker.how_many,
    _QuestionMaker.choose,
    _QuestionMaker.choose_place,
    _QuestionMaker.related_query,
    _QuestionMaker.related_verify,
    _QuestionMaker.related_filtered_query,
    _QuestionMaker.related_twice_query,
    _QuestionMaker.related_count,
    _QuestionMaker.compare,
    _QuestionMaker.logical,
)
_UNSEEN_PROGRAMS: Final[Mapping[Split, tuple[Callable[[_QuestionMaker], Question | None], ...]]] = MappingProxyType(
    {
        "test": (_QuestionMaker.related_compare, _QuestionMaker.related_filtered_count),
        "dev": (_QuestionMaker.related_logical,),
    }
)


def yes_no_pair(
    scene: Scene, rng: np.random.Generator, subtask: str, *, split: Bucket = "train"
) -> tuple[Question, Question] | None:
    """An MME question answered yes and its minimal change answered no, or None if the scene has no such question.

    With split="train" the words combine nothing that is held out; with "dev" or "test" they may.
    """
    if subtask not in _YES_NO:
        raise ConfigError(f"subtask={subtask!r}: expected one of {', '.join(SUBTASKS)}")
    return _YES_NO[subtask](_QuestionMaker(scene, rng, split))


def list_objects(scene: Scene) -> str:
    """Every object, top to bottom: "a small red circle, a large blue square."."""
    full = frozenset({"color", "size"})
    objects = sorted(scene.objects, key=lambda t: (t.y, t.x))
    return ", ".join(noun(obj, full) for obj in objects) + "."


def describe(scene: Scene) -> str:
    """One sentence with everything: objects top to bottom, the relation if there are two, and the background."""
    full = frozenset({"color", "size"})
    objects = sorted(scene.objects, key=lambda t: (t.y, t.x))
    nouns = [noun(obj, full) for obj in objects]
    found = sorted(relations(objects[0], objects[1])) if len(objects) == 2 else []
    if found:
        words = f"{nouns[0]} {found[0]} {nouns[1]}"
    else:
        words = " and ".join([", ".join(nouns[:-1])] * (len(nouns) > 1) + nouns[-1:])
    return f"{words} on a {BACKGROUND_NAMES[scene.background]} background."


def questions(scene: Scene, rng: np.random.Generator, *, split: Bucket = "train", most: int = 4) -> list[Question]:
    """Questions about a scene: first "list every object", then up to `most` of different kinds.

    split="train" never uses a program whose `chain` is in HELD_OUT_CHAINS; "dev" and "test" use only those of theirs.
    Half of the training kinds are yes/no as in MME, half are programs with one-word answers as in GQA.
    """
    asker = _QuestionMaker(scene, rng, split)
    if split != "train":
        made = (ask(asker) for ask in itertools.islice(itertools.cycle(_UNSEEN_PROGRAMS[split]), 4 * most))
        return list(dict.fromkeys(q for q in made if q is not None))[:most]
    asked = [Question(text=LIST, answer=list_objects(scene), program=("list",), kind="list")]
    single = [int(i) for i in rng.permutation(len(_PROGRAMS))]
    double = [SUBTASKS[int(i)] for i in rng.permutation(len(SUBTASKS))]
    while len(asked) <= most and (single or double):
        question: Question | None
        if double and (not single or chance(rng, 0.5)):
            pair = _YES_NO[double.pop()](asker)
            question = pick(rng, pair) if pair else None
        else:
            question = _PROGRAMS[single.pop()](asker)
        if question is not None:
            asked.append(_hinted(question, rng))
    return asked


def _hinted(question: Question, rng: np.random.Generator) -> Question:
    """A quarter of the yes/no questions say how to answer, as MME's do."""
    if question.answer not in ("yes", "no") or chance(rng, 0.75):
        return question
    return replace(question, text=f"{question.text} {YES_NO}")


def understanding_task(seed: int, index: int) -> tuple[Scene, list[tuple[str, str]]]:
    """Understanding training item number `index`: a scene and (question, answer) pairs, the dense ones first.

    >>> scene, pairs = understanding_task(0, 0)
    >>> [question for question, _ in pairs[:2]]
    ['describe the picture.', 'list every object.']
    """
    rng = stream(seed, index, _ASK)
    count = sample_count(rng)
    scene = sample_crowd(rng, count)
    while not is_trainable(scene):
        scene = sample_crowd(rng, count)
    asked = questions(scene, rng, most=int(rng.integers(6, 9)))
    return scene, [(DESCRIBE, describe(scene)), *((question.text, question.answer) for question in asked)]


# ------------------------------------------------------------------------------------------ lexicon


@functools.cache
def known_words() -> frozenset[str]:
    """Every word, in lower case, that any caption, question or answer can contain.

    >>> {"two", "hearts", "left"} <= known_words() and "tree" not in known_words()
    True
    """
    tables: tuple[Sequence[str], ...] = (
        TOGETHER,
        BACKGROUND_WORDS,
        DENSE_BACKGROUND,
        DENSE_RELATION,
        DENSE_COUNT,
        *RELATION_WORDS.values(),
        *PLACES,
        *_FORMS.values(),
        [words for words, _ in _SIDES],
        tuple(ATTRIBUTES),
        *ATTRIBUTES.values(),
        PLURALS,
        NUMBERS,
        BACKGROUND_NAMES,
        RELATIONS,
        (DESCRIBE, LIST, YES_NO, "an are and is"),
    )
    return words_in(itertools.chain.from_iterable(tables)) | grammar_words()
