"""A grammar of wordings: sentence forms written as patterns, and captions drawn from them at random.

A pattern stands for many forms: "(a|b)" is a choice and "[x]" may be absent, while {fields} stay for the words of a
scene. Training draws a pattern, then one of its forms, so that a long pattern is no likelier than a short one. The
plain forms of `WORDINGS` are those in which suites ask; its forms for dev and test are never drawn in training. All
words are in the form in which the model reads them: lower case, numbers as words, "color", "gray".
Our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import numpy as np

from starflow2.world.content import Content, Group
from starflow2.world.scene import (
    BACKGROUND_NAMES,
    COLORS,
    OPPOSITES,
    SHAPES,
    Cell,
    Relation,
    chance,
    pick,
)
from starflow2.world.words import NUMBERS, PLURALS, Wording, article, words_in

__all__ = [
    "FAMILIES",
    "PLACE_WORDS",
    "SIDE_WORDS",
    "SIZE_WORDS",
    "WORDINGS",
    "Grammar",
    "Requests",
    "expand",
    "grammar_words",
    "place_words",
    "request_words",
    "say",
    "several_words",
    "with_synonyms",
]


# ------------------------------------------------------------------------------------------------ patterns

_FIELD: Final = re.compile(r"\{(\w+)\}")
_CHOICE: Final = re.compile(r"\(([^()\[\]]*)\)|\[([^()\[\]]*)\]")


@functools.cache
def expand(pattern: str) -> tuple[str, ...]:
    """Every form that a pattern stands for.

    >>> expand("[please] (draw|show me) {c}")
    ('draw {c}', 'show me {c}', 'please draw {c}', 'please show me {c}')
    """
    match = _CHOICE.search(pattern)
    if match is None:
        return (re.sub(r" +(?=[,.?])", "", " ".join(pattern.split())),)
    options = match[1].split("|") if match[1] is not None else ["", *match[2].split("|")]
    return tuple(
        form for option in options for form in expand(f"{pattern[: match.start()]}{option}{pattern[match.end() :]}")
    )


class Grammar:
    """Forms by pattern, without those that are reserved."""

    def __init__(self, patterns: Iterable[str], reserved: Iterable[str] = ()) -> None:
        kept = frozenset(reserved)
        groups = (tuple(form for form in expand(pattern) if form not in kept) for pattern in patterns)
        self.groups = tuple(group for group in groups if group)

    @classmethod
    def of(cls, wording: Wording, more: Sequence[str]) -> Grammar:
        """The forms of training and those of further patterns, without the forms reserved for dev and test."""
        return cls([*[f"({'|'.join(wording.train)})"] * max(1, len(more) // 3), *more], (*wording.dev, *wording.test))

    def form(self, rng: np.random.Generator) -> str:
        """A random form of a random pattern."""
        return pick(rng, pick(rng, self.groups))

    @property
    def forms(self) -> tuple[str, ...]:
        """All forms."""
        return tuple(dict.fromkeys(form for group in self.groups for form in group))


# ------------------------------------------------------------------------------- plain and reserved forms

FAMILIES: Final = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
_PHRASE: Final = Wording(  # {c} is the content, {is} is "is" or "are"
    train=(
        "{c}",
        "a photo of {c}",
        "a picture of {c}",
        "an image of {c}",
        "a drawing of {c}",
        "draw {c}",
        "paint {c}",
        "show {c}",
        "please draw {c}",
        "make a picture of {c}",
        "there {is} {c}",
        "in the picture there {is} {c}",
        "an image that shows {c}",
    ),
    dev=(
        "please make a drawing of {c}",
        "the image shows {c}",
        "could you please draw {c}?",
        "i need a picture with {c} in it",
    ),
    test=(
        "please paint an image that shows {c}",
        "show a drawing with {c} in it",
        "in the photo there {is} {c}",
        "could you please paint {c}?",
        "i would like a photo with {c} in it",
        "make one image, {c}",
    ),
)
_POSITION: Final = Wording(  # {a} and {b} with article, {kind_a} and {kind_b} without
    train=(
        "{a} {rel} {b}",
        "a photo of {a} {rel} {b}",
        "a picture of {a} {rel} {b}",
        "an image of {a} {rel} {b}",
        "draw {a} {rel} {b}",
        "show {a} {rel} {b}",
        "{a} is {rel} {b}",
        "there is {a} {rel} {b}",
        "{rel} {b} there is {a}",
        "{rel} {b} is {a}",
        "{b} with {a} {rel} it",
        "{a} and {b}, the {kind_a} is {rel} the {kind_b}",
        "{b} and {a}, the {kind_a} is {rel} the {kind_b}",
    ),
    dev=(
        "show {a} that is {rel} {b}",
        "in the image {a} is {rel} {b}",
        "i need {b}, and {rel} it {a}",
        "can you paint {a} {rel} {b}, please?",
    ),
    test=(
        "please paint {a} that is {rel} {b}",
        "there is {b} and {rel} it is {a}",
        "a drawing that shows {b}, and {a} is {rel} it",
        "could you please put {a} {rel} {b}?",
        "i would like {b} with {a} {rel} it",
        "a photo with {b} in it, and {rel} it {a}",
    ),
)
_DENSE: Final = Wording(  # one sentence per object
    train=(
        "there is {a} {place}.",
        "{a} is {place}.",
        "{place} there is {a}.",
        "{place} is {a}.",
    ),
    dev=(),  # no suite asks in other words for a whole scene
    test=(),
)
WORDINGS: Final[Mapping[str, Wording]] = MappingProxyType(
    {family: _PHRASE for family in FAMILIES} | {"position": _POSITION, "dense": _DENSE}
)


# ------------------------------------------------------------------------------------------------ words

SIZE_WORDS: Final = (("small", "small", "small", "little", "tiny"), ("large", "large", "large", "big", "big"))
SIDE_WORDS: Final[Mapping[Relation, tuple[str, ...]]] = MappingProxyType(
    {
        "left of": ("left of", "to the left of", "on the left side of", "on the left of"),
        "right of": ("right of", "to the right of", "on the right side of", "on the right of"),
        "above": ("above", "on top of", "over", "higher than"),
        "below": ("below", "under", "beneath", "underneath", "lower than"),
    }
)
_CORNER: Final = "(in the {v} {h}|at the {v} {h}|in the {v} {h} corner)"
_EDGE_PATTERNS: Final[Mapping[Cell, str]] = MappingProxyType(
    {
        (0, 1): "(at the top|at the top in the middle|at the top center)",
        (1, 0): "(on the left|on the left side|at the left|in the middle left)",
        (1, 1): "(in the middle|in the center)",
        (1, 2): "(on the right|on the right side|at the right|in the middle right)",
        (2, 1): "(at the bottom|at the bottom in the middle|at the bottom center)",
    }
)


def _cell_words(row: int, column: int) -> tuple[str, ...]:
    pattern = _EDGE_PATTERNS.get((row, column))
    if pattern is not None:
        return expand(pattern)
    sides = ("left", "", "right")[column]
    heights = (("upper", "top"), (), ("lower", "bottom"))[row]
    return tuple(form for v in heights for form in expand(_CORNER.replace("{v}", v).replace("{h}", sides)))


PLACE_WORDS: Final[Mapping[Cell, tuple[str, ...]]] = MappingProxyType(
    {(row, column): _cell_words(row, column) for row in range(3) for column in range(3)}
)
_OF_PICTURE: Final = ("", "", "", " of the picture", " of the image")
_NUMBERED: Final = (*["{n} {k}"] * 8, "exactly {n} {k}")
_COLORED: Final = ("{a} that is {v}", "{a} which is {v}", "{a} in {v}")
_ALL_COLORED: Final = ("{a} that are {v}", "{a} which are {v}", "{a} in {v}")


def place_words(cell: Cell, rng: np.random.Generator) -> str:
    """Words for a cell of the 3 x 3 grid, such as "in the lower left corner of the picture"."""
    return pick(rng, PLACE_WORDS[cell]) + pick(rng, _OF_PICTURE)


def _group_words(group: Group, rng: np.random.Generator) -> str:
    """A group with its article or number: "a big red circle", "two stars that are blue", "one ring"."""
    size = [] if group.size is None else [pick(rng, SIZE_WORDS[group.size])]
    color = [] if group.color is None else [COLORS[group.color]]
    is_late = bool(color) and chance(rng, 0.1)  # a colour in a relative clause
    before = size + ([] if is_late else color)
    if group.count == 1:
        noun = " ".join([*before, SHAPES[group.shape]])
        text = f"one {noun}" if chance(rng, 0.1) else article(noun)
        return pick(rng, _COLORED).format(a=text, v=color[0]) if is_late else text
    noun = " ".join([*before, PLURALS[group.shape]])
    number = NUMBERS[group.count]
    if is_late:
        return pick(rng, _ALL_COLORED).format(a=f"{number} {noun}", v=color[0])
    return pick(rng, _NUMBERED).format(n=number, k=noun)


# ------------------------------------------------------------------------------------------------ captions

_OPENINGS: Final = (  # {c} is the content, {is} is "is" or "are"
    "{c}",
    "{c}",
    "{c}",
    "(draw|paint|make|show|sketch|create) {c}",
    "[please|now|just] (draw|paint|make|show|sketch|create) [me] {c}",
    "(draw|paint|make|show|give) me {c}",
    "[please] (draw|paint|make|create|show) [me] (a picture|an image|a drawing|one photo) (of|with|showing) {c}",
    "(a picture|an image|a drawing|a photo|a painting) (of|with|showing|that shows) {c}",
    "(picture|image|drawing|photo) of {c}",
    "there {is} {c} [in the picture|in the image]",
    "(in|on) the (picture|image) there {is} {c}",
    "i (want|would like|need) [to see] {c}",
    "i want (a picture|an image|a drawing) (of|with) {c}",
    "(can|could) you (draw|paint|make|show me|draw me) {c}?",
    "(draw|paint|make|show) {c}, please",
    "{c}, please",
    "{c} in (a picture|the picture|one image|a drawing)",
    "(only|just) {c}",
    "{c} and nothing else",
    "(let me|i want to) see {c}",
    "the (picture|drawing|photo) (shows|should show|has) {c}",
    "(one|this) (picture|image) (shows|has|with) {c}",
    "there should be {c}",
    "{c} (on|in) (it|the picture)",
)
_BACKGROUNDS: Final = (
    "{c} on a {tint} background",
    "{c} on a {tint} background",
    "{c} with a {tint} background",
    "{c}, {tint} background",
    "{c}, on a {tint} background",
    "{c} on {tint}",
    "{c} in front of a {tint} background",
)
_BACKGROUND_SENTENCES: Final = (
    "the background is {tint}",
    "the background should be {tint}",
    "make the background {tint}",
    "use a {tint} background",
    "{tint} background",
)
_JOINS: Final = (  # of two
    "{a} and {b}",
    "{a} and {b}",
    "{a} and {b}",
    "{a} with {b}",
    "both {a} and {b}",
    "{a}, {b}",
    "{a} and also {b}",
    "{a} together with {b}",
    "{a} as well as {b}",
    "{a} beside {b}",
    "{a} next to {b}",
    "{a} plus {b}",
)
_LISTS: Final = ("{most} and {last}", "{most} and {last}", "{most}, and {last}", "{most}, {last}", "{ands}")
_SAME: Final = ("{c}, both {v}", "{c}, both of them {v}", "{c}, they are {v}", "{c}, all {v}")
_RELATED: Final = (  # {opp}: the opposite of {rel}
    "{a} {rel} {b}",
    "{a} {rel} {b}",
    "{a} {rel} {b}",
    "{a} (that|which) is {rel} {b}",
    "{b} with {a} {rel} it",
    "{a} with {b} {opp} it",
    "{b} and {a} {rel} it",
    "{a} and {b}, the {kind_a} (is|should be) {rel} the {kind_b}",
    "{b} and {a}, the {kind_a} (is|should be) {rel} the {kind_b}",
    "{a} and {b}, the {kind_b} [is] {opp} the {kind_a}",
    "{a} and {b} with the {kind_a} {rel} the {kind_b}",
    "{b} and, {rel} it, {a}",
)
_RELATED_SENTENCES: Final = (
    "{a} (is|stands|sits) {rel} {b}",
    "[please] (put|place|draw|paint) {a} {rel} {b}",
    "there (is|should be) {a} {rel} {b}",
    "{rel} {b} (there is|is|draw|put|place) {a}",
    "(draw|paint|make) {b}, then {a} {rel} it",
    "(draw|paint|make) {b} and put {a} {rel} it",
    "(draw|paint) {b}. {rel} it (draw|put|add) {a}",
    "there is {b}. {rel} it [there] is {a}",
    "{a} and {b}. the {kind_a} is {rel} the {kind_b}",
    "{b} and {a}. the {kind_b} is {opp} the {kind_a}",
    "put {a} and {b} in the picture, the {kind_a} {rel} the {kind_b}",
)
_AT: Final = ("{a} {at}", "{a} {at}", "{a} {at}", "{at} {a}", "{a} that is {at}")
_AT_SENTENCES: Final = (
    "{a} is {at}",
    "[please] (put|place|draw|paint|show) {a} {at}",
    "{at} (there is|is|put|draw) {a}",
    "there (is|should be) {a} {at}",
    "{a}. it is {at}",
)
_TOTALS: Final = ("{n} objects: {c}", "{n} objects, {c}", "{c}, {n} objects in all")


def _joined(parts: Sequence[str], rng: np.random.Generator) -> str:
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return pick(rng, _JOINS).format(a=parts[0], b=parts[1])
    most, ands = ", ".join(parts[:-1]), " and ".join(parts)
    return pick(rng, _LISTS).format(most=most, last=parts[-1], ands=ands)


# ------------------------------------------------------------------------------------------------ saying it

_OPEN: Final = Grammar.of(_PHRASE, _OPENINGS)
_RESERVED: Final = frozenset((*_PHRASE.dev, *_PHRASE.test, *_POSITION.dev, *_POSITION.test))
_RELATED_FORMS: Final = Grammar(_RELATED, _RESERVED)
_RELATED_SENTENCE_FORMS: Final = Grammar(_RELATED_SENTENCES, _RESERVED)
_AT_FORMS: Final = Grammar(_AT)
_AT_SENTENCE_FORMS: Final = Grammar(_AT_SENTENCES)


def say(content: Content, rng: np.random.Generator) -> str:
    """A caption of the content in a random wording that training may use.

    >>> say(Content((Group(3, color=0),)), np.random.default_rng(1))
    'a photo of a red star'
    """
    text, form, is_whole = _clause(content, rng)
    tint = None if content.background is None else BACKGROUND_NAMES[content.background]
    is_apart = tint is not None and (is_whole or chance(rng, 0.2))
    if tint is not None and not is_apart:
        text = pick(rng, _BACKGROUNDS).format(c=text, tint=tint)
    if not is_whole:
        text = _opened(content, text, form, rng)
    if tint is not None and is_apart:
        text = f"{text.removesuffix('?')}. {pick(rng, _BACKGROUND_SENTENCES).format(tint=tint)}"
    return f"{text}." if text[-1] not in ".?" and chance(rng, 0.15) else text


def _clause(content: Content, rng: np.random.Generator) -> tuple[str, str, bool]:
    """The objects in words, the form of these words, and whether they are a sentence that no opening may precede."""
    words = [_group_words(group, rng) for group in content.groups]
    if content.relation is not None:
        return _related(content, words, rng)
    if any(group.cell is not None for group in content.groups):
        return _placed(content, words, rng)
    colors = {group.color for group in content.groups}
    if len(content.groups) > 1 and len(colors) == 1 and None not in colors and chance(rng, 0.3):
        bare = [_group_words(Group(g.shape, g.count, size=g.size), rng) for g in content.groups]
        same = _SAME if len(bare) == 2 and len(content.slots) == 2 else _SAME[2:]
        return pick(rng, same).format(c=_joined(bare, rng), v=COLORS[content.groups[0].color or 0]), "{c}", False
    text = _joined(words, rng)
    if len(content.slots) > 2 and len(words) > 1 and chance(rng, 0.12):
        text = pick(rng, _TOTALS).format(n=NUMBERS[len(content.slots)], c=text)
    return text, "{c}", False


def _opened(content: Content, text: str, clause: str, rng: np.random.Generator) -> str:
    """Words behind an opening such as "draw me"; `clause` is their form, which decides what is reserved."""
    verb, form = "are" if content.groups[0].count > 1 else "is", _OPEN.form(rng)
    while form.format(**{"c": clause, "is": verb}) in _RESERVED:
        form = _OPEN.form(rng)
    return form.format(**{"c": text, "is": verb})


def _related(content: Content, words: Sequence[str], rng: np.random.Generator) -> tuple[str, str, bool]:
    """Two objects, one in relation to the other, and any others behind them."""
    is_whole = chance(rng, 0.35)
    form = (_RELATED_SENTENCE_FORMS if is_whole else _RELATED_FORMS).form(rng)
    assert content.relation is not None
    sides = SIDE_WORDS[content.relation], SIDE_WORDS[OPPOSITES[content.relation]]
    a, b = content.groups[:2]
    kinds = [SHAPES[group.shape] for group in (a, b)]
    if a.color is not None and b.color is not None and (a.shape == b.shape or chance(rng, 0.2)):
        kinds = [f"{COLORS[group.color or 0]} {SHAPES[group.shape]}" for group in (a, b)]
    fields = {"a": words[0], "b": words[1], "kind_a": kinds[0], "kind_b": kinds[1]}
    return form.format(**fields, rel=pick(rng, sides[0]), opp=pick(rng, sides[1])), form, is_whole


def _placed(content: Content, words: Sequence[str], rng: np.random.Generator) -> tuple[str, str, bool]:
    """Objects with their places in the picture."""
    is_whole = chance(rng, 0.35)
    grammar = _AT_SENTENCE_FORMS if is_whole else _AT_FORMS
    parts = [
        text if group.cell is None else grammar.form(rng).format(a=text, at=place_words(group.cell, rng))
        for group, text in zip(content.groups, words, strict=True)
    ]
    if not is_whole:
        return _joined(parts, rng), "{c}", False
    return pick(rng, (". ", ", ", " and ")).join(parts), "{c}", True


# ------------------------------------------------------------------------------------------------ requests

_ASKED: Final = (  # {r} is a request in the imperative
    *["{r}"] * 6,
    "please {r}",
    "please {r}",
    "now {r}",
    "then {r}",
    "next, {r}",
    "just {r}",
    "{r}, please",
    "{r} please",
    "{r} now",
    "can you {r}?",
    "could you {r}?",
    "i want you to {r}",
    "now please {r}",
)
_SYNONYMS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "large": ("large", "large", "big"),
        "small": ("small", "small", "little", "tiny"),
        "larger": ("larger", "larger", "bigger"),
        "picture": ("picture", "picture", "image"),
    }
)


def _words_of(form: str) -> str:
    """A form without commas and full stop: with or without them it is the same wording."""
    return form.replace(",", "").rstrip(".?")


class Requests:
    """Forms of one kind of request: imperatives, which fillers and questions may surround, and whole statements."""

    def __init__(
        self,
        reserved: Iterable[str],
        plain: Sequence[str],
        imperatives: Sequence[str],
        statements: Sequence[str] = (),
    ) -> None:
        """plain: forms drawn more often. Forms of `reserved` are never drawn, whatever surrounds a shorter one."""
        self.reserved = frozenset(_words_of(form) for form in reserved)
        self.plain = tuple(form.removesuffix(".") for form in plain)
        self.imperatives, self.statements = Grammar(imperatives), Grammar(statements)

    @classmethod
    def of(cls, wording: Wording, imperatives: Sequence[str], statements: Sequence[str] = ()) -> Requests:
        """Requests whose plain forms are those of training, and whose reserved forms those of dev and test."""
        return cls((*wording.dev, *wording.test), wording.train, imperatives, statements)

    def say(self, rng: np.random.Generator, fields: Mapping[str, str]) -> str:
        """A random form that uses no other fields, with these filled in."""
        while True:
            form = self._form(rng)
            if _words_of(form) not in self.reserved and set(_FIELD.findall(form)) <= fields.keys():
                return form.format(**fields)

    def _form(self, rng: np.random.Generator) -> str:
        kind = rng.random()
        if kind < 0.25:
            return pick(rng, self.plain)
        if kind < 0.4 and self.statements.groups:
            return self.statements.form(rng)
        return pick(rng, _ASKED).format(r=self.imperatives.form(rng))

    @property
    def forms(self) -> tuple[str, ...]:
        """All forms, without fillers."""
        return (*self.plain, *self.imperatives.forms, *self.statements.forms)


_MANY: Final = ("the {k}", "the {k}", "all {k}", "all the {k}", "every {s}", "each {s}", "both {k}", "the {n} {k}")
_ALL: Final = ("everything", "all objects", "all the objects", "every object", "all of them")


def several_words(shapes: Sequence[int], rng: np.random.Generator) -> str:
    """Words for several objects at once: all of a shape, or all there are if shapes differ.

    >>> several_words([4, 4], np.random.default_rng(0))
    'both hearts'
    """
    if len(set(shapes)) > 1:
        return pick(rng, _ALL)
    forms = [form for form in _MANY if "both" not in form or len(shapes) == 2]
    return pick(rng, forms).format(k=PLURALS[shapes[0]], s=SHAPES[shapes[0]], n=NUMBERS[len(shapes)])


def with_synonyms(text: str, rng: np.random.Generator) -> str:
    """The text with some of its words exchanged for others that mean the same."""
    return re.sub(r"[a-z]+", lambda m: pick(rng, _SYNONYMS[m[0]]) if m[0] in _SYNONYMS else m[0], text)


@functools.cache
def request_words() -> frozenset[str]:
    """Every word that fillers, synonyms and names for several objects can bring into a request."""
    names = (*_MANY, *_ALL, *SHAPES, *PLURALS, *NUMBERS)
    synonyms = (word for row in _SYNONYMS.values() for word in row)
    return words_in([*(form.replace("{r}", "") for form in _ASKED), *synonyms, *names])


# ------------------------------------------------------------------------------------------------ vocabulary


@functools.cache
def grammar_words() -> frozenset[str]:
    """Every word that a caption of this grammar, plain or reserved, can contain."""
    grammars = (_OPEN, _RELATED_FORMS, _RELATED_SENTENCE_FORMS, _AT_FORMS, _AT_SENTENCE_FORMS)
    tables: tuple[Iterable[str], ...] = (
        *(grammar.forms for grammar in grammars),
        *((*w.train, *w.dev, *w.test) for w in WORDINGS.values()),
        *SIZE_WORDS,
        *SIDE_WORDS.values(),
        *PLACE_WORDS.values(),
        (_OF_PICTURE[-2], _OF_PICTURE[-1], *_NUMBERED, *_COLORED, *_ALL_COLORED),
        (*_BACKGROUNDS, *_BACKGROUND_SENTENCES, *_JOINS, *_LISTS, *_SAME, *_TOTALS),
        (*SHAPES, *PLURALS, *COLORS, *NUMBERS, *BACKGROUND_NAMES, "a an one is are and"),
    )
    return words_in(text for table in tables for text in table)
