"""Words for the drawn world: captions that ask for a picture, and questions about one.

Everything is a pure function of its seed and index. A `Brief` is a scene plus what its caption says about it; what
the caption leaves out is random, and the scene holds nothing that the caption does not mention. Training never words or
shows a combination that `world.HELD_OUT` keeps for dev or test, nor a sentence form that `WORDINGS` keeps for them.
All text is lower case, numbers are words, and `known_words()` lists every word there is.
Our choice: docs/choices.md#world. GenEval's six families and metadata format: Ghosh et al. 2023.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from starflow2.errors import ConfigError
from starflow2.world.captions import (
    ASK_STREAM,
    BACKGROUND_WORDS,
    DENSE_BACKGROUND,
    DENSE_COUNT,
    DENSE_RELATION,
    NUMBERS,
    PLACES,
    PLURALS,
    RELATION_WORDS,
    TOGETHER,
    WORDINGS,
    article,
    canonical,
    crowd,
    make_menu,
    noun,
)
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
from starflow2.world.splits import HELD_OUT, HeldOut, is_trainable

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
    """A question about a picture, its one right answer, and the operators that find it, in order of execution."""

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
_ATTRIBUTES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({"color": COLORS, "shape": SHAPES, "size": SIZES})
_NAMES: Final = (("shape",), ("color",), ("color", "shape"), ("size", "shape"), ("size", "color"), ("size",))


def chain(program: Sequence[str]) -> tuple[str, ...]:
    """A program's operators without `select`, by which unseen compositions are told from seen ones."""
    return tuple(operator for operator in program if operator != "select")


def _banned(split: Bucket) -> HeldOut:
    """What a question's words may not combine: all that is held out in training, nothing in dev and test."""
    tables = tuple(HELD_OUT.values()) if split == "train" else ()
    return HeldOut(
        pairs=frozenset().union(*(t.pairs for t in tables)),
        facts=frozenset().union(*(t.facts for t in tables)),
        shapes=frozenset().union(*(t.shapes for t in tables)),
        counts=frozenset().union(*(t.counts for t in tables)),
    )


_BANNED: Final[Mapping[Bucket, HeldOut]] = MappingProxyType(
    {"train": _banned("train"), "dev": _banned("dev"), "test": _banned("test")}
)


def _value(obj: SceneObject, attribute: str) -> str:
    return _ATTRIBUTES[attribute][getattr(obj, attribute)]


class _Asker:
    """Makes questions about one scene. A method returns None where the scene allows no such question.

    Yes/no methods return (yes, no), the "no" being a minimal change of the "yes"; the others return one question.
    """

    def __init__(self, scene: Scene, rng: np.random.Generator, split: Bucket) -> None:
        self.objects, self.rng, self.banned = scene.objects, rng, _BANNED[split]
        self.names = {id(obj): self._names(obj) for obj in scene.objects}
        self.stands = {(id(a), id(b)): relations(a, b) for a, b in itertools.permutations(scene.objects, 2)}

    # What may be said

    def _may_pair(self, shape: int, color: int) -> bool:
        return (shape, color) not in self.banned.pairs

    def _may_say(self, a: SceneObject, relation: Relation, b: SceneObject) -> bool:
        return canonical(a.shape, relation, b.shape) not in self.banned.facts

    def _text(self, form: str, **fields: str) -> str:
        return pick(self.rng, _FORMS[form]).format(**fields)

    # Naming objects

    def _names(self, obj: SceneObject) -> list[tuple[tuple[str, ...], str]]:
        """Every (attributes, words such as "the red star") that fits this object alone."""
        clear: list[tuple[tuple[str, ...], str]] = []
        for attributes in _NAMES:
            values = [_value(obj, k) for k in attributes]
            if sum([_value(t, k) for k in attributes] == values for t in self.objects) == 1:
                clear.append((attributes, " ".join(["the", *values] + ["object"] * ("shape" not in attributes))))
        return clear

    def _name(self, obj: SceneObject, avoid: str = "") -> str | None:
        """Words that fit this object alone and do not tell the attribute to avoid."""
        clear = [words for attributes, words in self.names[id(obj)] if avoid not in attributes]
        return pick(self.rng, clear) if clear else None

    def _named(self, avoid: str = "") -> tuple[SceneObject, str] | None:
        """A random object that words can single out."""
        for obj in shuffled(self.rng, self.objects):
            name = self._name(obj, avoid)
            if name is not None:
                return obj, name
        return None

    def _related(self) -> list[tuple[list[SceneObject], Relation, SceneObject, str]]:
        """Every (objects, relation, reference, its name) with all the objects that stand so, in random order."""
        rows = []
        for obj in self.objects:
            name = self._name(obj)
            if name is not None:
                for relation in RELATIONS:
                    found = [t for t in self.objects if t is not obj and relation in self.stands[id(t), id(obj)]]
                    rows.append((found, relation, obj, name))
        return shuffled(self.rng, rows)

    def _related_one(self) -> tuple[SceneObject, str] | None:
        """The one object that stands somewhere, and words for it by its place."""
        for found, relation, _, name in self._related():
            if len(found) == 1:
                return found[0], self._text("related", rel=self._side(relation), b=name)
        return None

    def _side(self, relation: Relation) -> str:
        return pick(self.rng, RELATION_WORDS[relation])

    def _other_value(self, obj: SceneObject, attribute: str) -> str | None:
        """Another value of an attribute: that of another object if it can be, so that only binding tells."""
        pool = {
            "color": [COLORS[c] for c in range(len(COLORS)) if c != obj.color and self._may_pair(obj.shape, c)],
            "shape": [SHAPES[s] for s in range(len(SHAPES)) if s != obj.shape and self._may_pair(s, obj.color)],
            "size": [SIZES[1 - obj.size]],
        }[attribute]
        present = [value for value in pool if any(_value(t, attribute) == value for t in self.objects)]
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
            near = [pair for pair in near if pair not in there and self._may_pair(*pair)]
            if not near:
                return None
            shape, color = pick(self.rng, near)
            yes, no = f"{COLORS[obj.color]} {SHAPES[obj.shape]}", f"{COLORS[color]} {SHAPES[shape]}"
            program = ("select", "filter", "exist")
        form = pick(self.rng, _FORMS["existence"])
        return self._both(form.format(np=article(yes)), form.format(np=article(no)), "existence", *program)

    def count(self) -> tuple[Question, Question] | None:
        shape: int | None = pick(self.rng, self.objects).shape if chance(self.rng, 0.7) else None
        right = sum(shape is None or t.shape == shape for t in self.objects)
        wrong = [n for n in (right - 1, right + 1) if 1 <= n <= MAX_OBJECTS and (shape, n) not in self.banned.counts]
        if not wrong:
            return None
        form = pick(self.rng, _FORMS["count"])

        def ask(n: int) -> str:
            one, many = ("object", "objects") if shape is None else (SHAPES[shape], PLURALS[shape])
            return form.format(**{"is": "is" if n == 1 else "are", "n": f"{NUMBERS[n]} {one if n == 1 else many}"})

        return self._both(ask(right), ask(pick(self.rng, wrong)), "count", "select", "count", "verify")

    def position(self) -> tuple[Question, Question] | None:
        for a, b in shuffled(self.rng, list(itertools.permutations(self.objects, 2))):
            found, names = sorted(self.stands[id(a), id(b)]), (self._name(a), self._name(b))
            if len(found) == 1 and names[0] is not None and names[1] is not None:
                sides = (found[0], OPPOSITES[found[0]])
                if self._may_say(a, sides[1], b):
                    form, which = pick(self.rng, _FORMS["position"]), int(self.rng.integers(3))
                    yes, no = (form.format(a=names[0], b=names[1], rel=RELATION_WORDS[side][which]) for side in sides)
                    return self._both(yes, no, "position", "select", "relate", "verify")
        return None

    def _attribute(self, attribute: str) -> tuple[Question, Question] | None:
        found = self._named(avoid=attribute)
        other = self._other_value(found[0], attribute) if found else None
        if found is None or other is None:
            return None
        values = (_value(found[0], attribute), other)
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
        found = self._named(avoid=attribute)
        if found is None:
            return None
        text = self._text("query", attribute=attribute, a=found[1])
        return Question(text=text, answer=_value(found[0], attribute), program=("select", "query"), kind="query")

    def how_many(self) -> Question:
        """Counts are drawn before what is counted, so that "one" is not the answer to nearly everything."""
        groups: dict[int, list[tuple[str, tuple[str, ...]]]] = {len(self.objects): [("objects", ("select", "count"))]}
        for s, c in itertools.product((None, *range(len(SHAPES))), (None, *range(len(COLORS)))):
            if (s is None) != (c is None) or (s is not None and c is not None and self._may_pair(s, c)):
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
        found = self._named(avoid=attribute)
        other = self._other_value(found[0], attribute) if found else None
        if found is None or other is None:
            return None
        answer = _value(found[0], attribute)
        first, second = shuffled(self.rng, [answer, other])
        text = self._text("choose", a=found[1], value=first, other=second)
        return Question(text=text, answer=answer, program=("select", "choose"), kind="choose")

    def choose_place(self) -> Question | None:
        for a, b in shuffled(self.rng, list(itertools.permutations(self.objects, 2))):
            names = (self._name(a), self._name(b))
            for words, sides in shuffled(self.rng, _SIDES):
                true = [side for side in sides if side in self.stands[id(a), id(b)]]
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
        return Question(text=text, answer=_value(found[0], attribute), program=program, kind="relate")

    def related_verify(self) -> Question | None:
        found = self._related_one()
        attribute = pick(self.rng, ("color", "shape", "size"))
        other = self._other_value(found[0], attribute) if found else None
        if found is None or other is None:
            return None
        is_yes = chance(self.rng, 0.5)
        value = _value(found[0], attribute) if is_yes else other
        text = self._text("is", a=found[1], value=article(value) if attribute == "shape" else value)
        return Question(text=text, answer=_yes(is_yes), program=("select", "relate", "verify"), kind="relate")

    def related_filtered_query(self) -> Question | None:
        for found, relation, _, name in self._related():
            for obj in shuffled(self.rng, found):
                by, asked = pick(self.rng, (("color", "shape"), ("size", "color"), ("size", "shape")))
                value = _value(obj, by)
                if len(found) > 1 and sum(_value(t, by) == value for t in found) == 1:
                    words = self._text("related filtered", value=value, rel=self._side(relation), b=name)
                    text = self._text("query", attribute=asked, a=words)
                    program = ("select", "relate", "filter", "query")
                    return Question(text=text, answer=_value(obj, asked), program=program, kind="relate")
        return None

    def related_twice_query(self) -> Question | None:
        for found, relation, reference, name in self._related():
            if len(found) == 1:
                middle = self._text("related", rel=self._side(relation), b=name)
                for side in shuffled(self.rng, RELATIONS):
                    last = [t for t in self.objects if t is not found[0] and side in self.stands[id(t), id(found[0])]]
                    if len(last) == 1 and last[0] is not reference:
                        attribute = pick(self.rng, ("color", "shape", "size"))
                        words = self._text("related", rel=self._side(side), b=middle)
                        text = self._text("query", attribute=attribute, a=words)
                        program = ("select", "relate", "relate", "query")
                        return Question(text=text, answer=_value(last[0], attribute), program=program, kind="relate")
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
            names = (self._name(a, attribute), self._name(b, attribute))
            if names[0] is not None and names[1] is not None:
                options.setdefault(_value(a, attribute) == _value(b, attribute), (names[0], names[1]))
        if len(options) < 2:  # both answers must be possible, or the rarer one would give itself away
            return None
        text = self._text("same", a=options[is_yes][0], b=options[is_yes][1], attribute=attribute)
        return Question(text=text, answer=_yes(is_yes), program=("select", "select", "compare"), kind="compare")

    def logical(self) -> Question | None:
        here = sorted({t.shape for t in self.objects})
        op = pick(self.rng, ("and", "or")) if len(here) > 1 else "or"  # else "and" could only be answered no
        is_yes = chance(self.rng, 0.5)
        gone = [s for s in range(len(SHAPES)) if s not in here]
        pools = {("and", True): (here, here), ("or", False): (gone, gone)}.get((op, is_yes), (here, gone))
        for _ in range(8):
            a, b = (pick(self.rng, pool) for pool in shuffled(self.rng, pools))
            if a != b and frozenset((a, b)) not in self.banned.shapes:
                text = self._text("logical", a=article(SHAPES[a]), b=article(SHAPES[b]), op=op)
                return Question(text=text, answer=_yes(is_yes), program=("select", "select", "logical"), kind="logical")
        return None

    # Compositions never asked in training

    def related_compare(self) -> Question | None:
        attribute, is_yes = pick(self.rng, ("color", "shape", "size")), chance(self.rng, 0.5)
        for found, relation, reference, name in self._related():
            for obj in shuffled(self.rng, self.objects):
                other = self._name(obj, attribute)
                if len(found) != 1 or other is None or obj is reference or obj is found[0]:
                    continue
                if (_value(found[0], attribute) == _value(obj, attribute)) == is_yes:
                    words = self._text("related", rel=self._side(relation), b=name)
                    text = self._text("related same", a=words, b=other, attribute=attribute)
                    program = ("select", "relate", "select", "compare")
                    return Question(text=text, answer=_yes(is_yes), program=program, kind="compare")
        return None

    def related_filtered_count(self) -> Question | None:
        rows = [
            (sum(_value(t, by) == value for t in found), value, relation, name)
            for found, relation, _, name in self._related()
            if found
            for by in ("color", "size")
            for value in sorted({_value(t, by) for t in self.objects})
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
            _value(found[0], k) if is_true else self._other_value(found[0], k)
            for k, is_true in zip(("color", "size"), shuffled(self.rng, holds), strict=True)
        ]
        text = self._text("related logical", a=found[1], value=str(values[0]), op=op, other=str(values[1]))
        return Question(text=text, answer=_yes(is_yes), program=("select", "relate", "logical"), kind="logical")


def _yes(is_yes: bool) -> str:
    return "yes" if is_yes else "no"


_YES_NO: Final[Mapping[str, Callable[[_Asker], tuple[Question, Question] | None]]] = MappingProxyType(
    {
        "existence": _Asker.existence,
        "count": _Asker.count,
        "position": _Asker.position,
        "color": _Asker.color,
        "shape": _Asker.shape,
        "size": _Asker.size,
    }
)
_PROGRAMS: Final[tuple[Callable[[_Asker], Question | None], ...]] = (
    _Asker.query,
    _Asker.how_many,
    _Asker.choose,
    _Asker.choose_place,
    _Asker.related_query,
    _Asker.related_verify,
    _Asker.related_filtered_query,
    _Asker.related_twice_query,
    _Asker.related_count,
    _Asker.compare,
    _Asker.logical,
)
_UNSEEN_PROGRAMS: Final[Mapping[Split, tuple[Callable[[_Asker], Question | None], ...]]] = MappingProxyType(
    {"test": (_Asker.related_compare, _Asker.related_filtered_count), "dev": (_Asker.related_logical,)}
)


def yes_no_pair(
    scene: Scene, rng: np.random.Generator, subtask: str, *, split: Bucket = "train"
) -> tuple[Question, Question] | None:
    """An MME question answered yes and its minimal change answered no, or None if the scene has no such question.

    With split="train" the words combine nothing that is held out; with "dev" or "test" they may.
    """
    if subtask not in _YES_NO:
        raise ConfigError(f"subtask={subtask!r}: expected one of {', '.join(SUBTASKS)}")
    return _YES_NO[subtask](_Asker(scene, rng, split))


def list_objects(scene: Scene) -> str:
    """Every object, top to bottom: "a small red circle, a large blue square."."""
    full = frozenset({"color", "size"})
    objects = sorted(scene.objects, key=lambda t: (t.y, t.x))
    return ", ".join(noun(obj, full) for obj in objects) + "."


def describe(scene: Scene) -> str:
    """One sentence with everything: objects top to bottom, for two of them how they stand, and the background."""
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
    asker = _Asker(scene, rng, split)
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
    text = f"{question.text} {YES_NO}"
    return Question(text=text, answer=question.answer, program=question.program, kind=question.kind)


def understanding_task(seed: int, index: int) -> tuple[Scene, list[tuple[str, str]]]:
    """Understanding training item number `index`: a scene and (question, answer) pairs, the dense ones first.

    >>> scene, pairs = understanding_task(0, 0)
    >>> [question for question, _ in pairs[:2]]
    ['describe the picture.', 'list every object.']
    """
    rng = stream(seed, index, ASK_STREAM)
    count = int(rng.choice(MAX_OBJECTS, p=(0.15, 0.3, 0.3, 0.25))) + 1
    scene = crowd(rng, make_menu(), count, repeats=0.35)
    while not is_trainable(scene):
        scene = crowd(rng, make_menu(), count, repeats=0.35)
    asked = questions(scene, rng, most=int(rng.integers(6, 9)))
    return scene, [(DESCRIBE, describe(scene)), *((question.text, question.answer) for question in asked)]


# ------------------------------------------------------------------------------------------ lexicon


@functools.cache
def known_words() -> frozenset[str]:
    """Every word, in lower case, that any caption, question or answer can contain.

    >>> {"two", "hearts", "left"} <= known_words() and "tree" not in known_words()
    True
    """
    wordings = [form for w in WORDINGS.values() for split in ("train", "dev", "test") for form in w.forms(split)]
    tables: tuple[Sequence[str], ...] = (
        wordings,
        TOGETHER,
        BACKGROUND_WORDS,
        DENSE_BACKGROUND,
        DENSE_RELATION,
        DENSE_COUNT,
        *RELATION_WORDS.values(),
        *PLACES,
        *_FORMS.values(),
        [words for words, _ in _SIDES],
        tuple(_ATTRIBUTES),
        *_ATTRIBUTES.values(),
        PLURALS,
        NUMBERS,
        BACKGROUND_NAMES,
        RELATIONS,
        (DESCRIBE, LIST, YES_NO, "an are and is"),
    )
    texts = (re.sub(r"\{[^}]*\}", " ", text) for table in tables for text in table)
    return frozenset(word for text in texts for word in re.findall(r"[a-z]+", text))
