"""The language of stories: how requests and sentences are worded, read back, and held against objects.

A sentence has one grammar: `sentence` writes it, `parse_sentence` reads it into a `Claim`, `agrees` checks a claim
against objects, and `answer_question` answers a story's question from objects. None of them knows which story the
words come from, and the objects may be those of a scene or detections in an image.
Our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

import numpy as np

from starflow2.errors import ConfigError
from starflow2.world.grammar import SIDE_WORDS, Requests, request_words, several_words, with_synonyms
from starflow2.world.scene import (
    COLORS,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    SIZES,
    Bucket,
    Relation,
    SceneObject,
    pick,
    relations,
)
from starflow2.world.words import NUMBERS, Wording, article, words_in, yes_or_no

__all__ = [
    "HOW_MANY",
    "SIDES",
    "STORY_WORDINGS",
    "Change",
    "Claim",
    "Look",
    "Op",
    "agrees",
    "answer_question",
    "definite",
    "free_request",
    "parse_sentence",
    "request",
    "sentence",
    "story_words",
]

Op = Literal["start", "add", "remove", "recolor"]


@dataclass(frozen=True, slots=True)
class Look:
    """An object as described in words: indices into SHAPES, COLORS and SIZES; size None if it is not named."""

    shape: int
    color: int
    size: int | None = None

    def fits(self, obj: SceneObject) -> bool:
        """True if these words describe the object."""
        return (obj.shape, obj.color) == (self.shape, self.color) and self.size in (None, obj.size)

    def __str__(self) -> str:
        return " ".join([*([] if self.size is None else [SIZES[self.size]]), COLORS[self.color], SHAPES[self.shape]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The change that a request asks for.

    before: the object that is removed or recoloured. after: the object that is added or results. also: the same change
    of further objects, which the request names together with it.
    """

    op: Op
    before: Look | None = None
    after: Look | None = None
    relation: Relation | None = None  # of an added object to `reference`
    reference: Look | None = None
    also: tuple[Change, ...] = ()

    @property
    def all(self) -> tuple[Change, ...]:
        """The change of every object on its own."""
        return (replace(self, also=()), *self.also)


# ------------------------------------------------------------------------------------------ wording

STORY_WORDINGS: Final[Mapping[Op, Wording]] = MappingProxyType(  # {a} a new object; {b} one that is there, or "it"
    {
        "start": Wording(
            train=("start with {a}.", "begin with {a}.", "first draw {a}.", "please start with {a}."),
            dev=("please begin with {a}.", "first start with {a}."),
            test=("please first draw {a}.", "draw {a} to begin with.", "now start with {a}."),
        ),
        "add": Wording(
            train=(
                "put {a} {rel}.",
                "add {a} {rel}.",
                "now add {a} {rel}.",
                "now put {a} {rel}.",
                "draw {a} {rel}.",
                "please put {a} {rel}.",
                "{rel} put {a}.",
            ),
            dev=("please add {a} {rel}.", "{rel} now draw {a}."),
            test=("now please draw {a} {rel}.", "{rel} add {a}.", "please put {a} {rel} now."),
        ),
        "remove": Wording(
            train=(
                "take {b} away.",
                "remove {b}.",
                "now take {b} away.",
                "now remove {b}.",
                "please remove {b}.",
            ),
            dev=("please take {b} away.", "now please remove {b}."),
            test=("now please take {b} away.", "take {b} away now.", "please remove {b} now."),
        ),
        "recolor": Wording(
            train=(
                "make {b} {color}.",
                "now make {b} {color}.",
                "turn {b} {color}.",
                "paint {b} {color}.",
                "please make {b} {color}.",
            ),
            dev=("please paint {b} {color}.", "now turn {b} {color}."),
            test=("now paint {b} {color}.", "please turn {b} {color}.", "now please make {b} {color}."),
        ),
    }
)
_BESIDE: Final[Mapping[Relation, tuple[str, ...]]] = MappingProxyType(
    {
        "left of": ("left of {b}", "to the left of {b}"),
        "right of": ("right of {b}", "to the right of {b}"),
        "above": ("above {b}", "over {b}"),
        "below": ("below {b}", "under {b}"),
    }
)
_BESIDE_IT: Final[Mapping[Relation, tuple[str, ...]]] = MappingProxyType(
    {
        "left of": ("to its left", "left of it"),
        "right of": ("to its right", "right of it"),
        "above": ("above it", "over it"),
        "below": ("below it", "under it"),
    }
)
_REQUESTS: Final[Mapping[Op, Requests]] = MappingProxyType(  # of training, besides the plain forms above
    {
        "start": Requests.of(
            STORY_WORDINGS["start"],
            (
                "[first] (draw|paint|make|put|show) {a}",
                "(start|begin) with {a}",
                "(draw|paint|make|show) me {a} [first]",
            ),
            ("{a}", "{a}", "first {a}", "i want {a}", "let us (start|begin) with {a}", "there is {a}"),
        ),
        "add": Requests.of(
            STORY_WORDINGS["add"],
            ("(add|put|draw|paint|place|insert) {a} {rel}", "add {a}, {rel}"),
            (
                "{rel} (put|add|draw|place) {a}",
                "i want {a} {rel}",
                "{a} {rel}",
                "and {a} {rel}",
                "there is {a} {rel}",
                "{rel} there is {a}",
            ),
        ),
        "remove": Requests.of(
            STORY_WORDINGS["remove"],
            (
                "(remove|delete|erase|drop) {b}",
                "take {b} (away|out)",
                "take away {b}",
                "get rid of {b}",
                "leave out {b}",
            ),
            ("i do not want {b}", "{one} has to go", "without {b}"),
        ),
        "recolor": Requests.of(
            STORY_WORDINGS["recolor"],
            (
                "(make|turn|paint|color|recolor) {b} {color}",
                "(change|set) {b} to {color}",
                "change the color of {b} to {color}",
                "give {b} the color {color}",
            ),
            ("i want {b} in {color}", "i would like {b} to be {color}", "{b} in {color}", "{one} becomes {color}"),
        ),
    }
)
_OPEN_ADD: Final = Requests(
    (),
    ("add {a}", "now add {a}", "please add {a}"),
    ("(add|draw|paint|put in|insert) {a} [too]", "put {a} in the picture", "draw {a} as well", "add {a} somewhere"),
    ("and {a}", "i (want|would like) {a} too", "i also want {a}", "{a} as well", "there should also be {a}"),
)
HOW_MANY: Final = ("how many objects are left?", "how many objects are there now?")
SIDES: Final[Mapping[str, tuple[Relation, Relation]]] = MappingProxyType(
    {"left or right of": ("left of", "right of"), "above or below": ("above", "below")}
)


def definite(look: Look | SceneObject, others: Iterable[Look | SceneObject]) -> str:
    """Words for one of the objects, such as "the star": its shape, and its colour if another has that shape too."""
    is_alone = sum(other.shape == look.shape for other in others) == 1
    return f"the {SHAPES[look.shape]}" if is_alone else f"the {COLORS[look.color]} {SHAPES[look.shape]}"


def sentence(looks: Sequence[Look], change: Change) -> str:
    """The sentence that lists all objects, and for an added one where it stands.

    >>> sentence([Look(3, 0)], Change(op="start", after=Look(3, 0)))
    'there is a red star.'
    """
    nouns = [article(str(look)) for look in looks]
    if len(nouns) == 1:
        return f"there is {nouns[0]}."
    text = f"there are {', '.join(nouns[:-1])} and {nouns[-1]}"
    if change.after is not None and change.reference is not None:
        text += f", {definite(change.after, looks)} is {change.relation} {definite(change.reference, looks)}"
    return text + "."


def request(
    change: Change, looks: Sequence[Look], wording: Bucket, rng: np.random.Generator, *, uses_pronoun: bool
) -> str:
    """A request for the change, by one of the sentence forms of that split.

    looks: the objects before it. uses_pronoun: the object that the change refers to is called "it".
    """
    fields = dict[str, str]()
    if change.relation is not None and change.reference is not None:
        sides = (_BESIDE_IT if uses_pronoun else _BESIDE)[change.relation]
        fields["rel"] = pick(rng, sides).format(b=definite(change.reference, looks))
    if change.before is not None:
        fields["b"] = "it" if uses_pronoun else definite(change.before, looks)
    if change.after is not None:
        fields |= {"a": article(str(change.after)), "color": COLORS[change.after.color]}
    return pick(rng, STORY_WORDINGS[change.op].forms(wording)).format(**fields)


def free_request(change: Change, looks: Sequence[Look], rng: np.random.Generator, *, uses_pronoun: bool) -> str:
    """A request for the change in a random wording of training's grammar; arguments as in `request`.

    An addition in relation to nothing leaves the place open.
    """
    fields = dict[str, str]()
    if change.also and change.before is not None:
        fields["b"] = several_words([c.before.shape for c in change.all if c.before is not None], rng)
    elif change.before is not None:
        fields["b"] = fields["one"] = "it" if uses_pronoun else definite(change.before, looks)
    if change.relation is not None and change.reference is not None:
        name = definite(change.reference, looks)
        beside_it = pick(rng, _BESIDE_IT[change.relation]) if uses_pronoun else ""
        fields["rel"] = beside_it or f"{pick(rng, SIDE_WORDS[change.relation])} {name}"
    if change.after is not None:
        fields |= {"a": article(str(change.after)), "color": COLORS[change.after.color]}
    is_open = change.op == "add" and change.relation is None
    text = with_synonyms((_OPEN_ADD if is_open else _REQUESTS[change.op]).say(rng, fields), rng)
    return text if text.endswith("?") or rng.random() < 0.3 else f"{text}."


# ---------------------------------------------------------------------------- reading back


@dataclass(frozen=True, slots=True)
class Claim:
    """The content of a sentence: every object of the image, and (index, relation, index) between them."""

    objects: tuple[Look, ...]
    relations: tuple[tuple[int, Relation, int], ...] = ()


_ANY: Final = {name: "|".join(words) for name, words in (("s", SHAPES), ("c", COLORS), ("z", SIZES), ("r", RELATIONS))}
_NOUN: Final = "an? (?:({z}) )?({c}) ({s})".format(**_ANY)
_THE: Final = "the (?:({c}) )?({s})".format(**_ANY)
_CLAUSE: Final = f", {_THE} is ({_ANY['r']}) {_THE}"


def _plain(pattern: str) -> str:
    """The pattern without capturing groups."""
    return re.sub(r"\((?!\?)", "(?:", pattern)


_SENTENCE: Final = re.compile("there (is (?:{n})|are (?:{n}(?:, {n})* and {n}))((?:{t})*)\\.?".format(
    n=_plain(_NOUN), t=_plain(_CLAUSE)
))  # fmt: skip


def parse_sentence(text: str) -> Claim | None:
    """The claim that a sentence makes, or None if it is not one sentence of the stories' grammar.

    The grammar: "there is NOUN." or "there are NOUN, NOUN and NOUN.", where a NOUN is an article, perhaps a size, a
    colour and a shape; before the full stop any number of ", THE is RELATION THE", where a THE is "the", a colour if
    needed, and a shape. Each THE must name exactly one of the NOUNs.

    >>> parse_sentence("there are a red heart and a small blue square, the square is left of the heart.").relations
    ((1, 'left of', 0),)
    >>> parse_sentence("there is a red heart and a blue square.") is None
    True
    """
    match = _SENTENCE.fullmatch(re.sub(r" (?=[.,])", "", " ".join(text.lower().split())))
    nouns = re.findall(_NOUN, match[1]) if match else []
    if match is None or len(nouns) > MAX_OBJECTS:
        return None
    looks = tuple(
        Look(SHAPES.index(shape), COLORS.index(color), SIZES.index(size) if size else None)
        for size, color, shape in nouns
    )
    found: list[tuple[int, Relation, int]] = []
    for color_a, shape_a, words, color_b, shape_b in re.findall(_CLAUSE, match[2]):
        a, b = _only(looks, color_a, shape_a), _only(looks, color_b, shape_b)
        if a is None or b is None or a == b:
            return None
        found += [(a, relation, b) for relation in RELATIONS if relation == words]
    return Claim(looks, tuple(found))


def _only(objects: Sequence[Look | SceneObject], color: str, shape: str) -> int | None:
    """Index of the only object of that shape, and of that colour unless it is empty; None if there is not just one."""
    fits = [i for i, t in enumerate(objects) if SHAPES[t.shape] == shape and (not color or color == _color_word(t))]
    return fits[0] if len(fits) == 1 else None


def _color_word(obj: Look | SceneObject) -> str:
    return COLORS[obj.color] if obj.color >= 0 else ""


def agrees(claim: Claim, objects: Sequence[SceneObject]) -> bool:
    """True if these objects are exactly the claimed ones and stand as claimed.

    objects: all objects of a scene, or all that were found in an image; a colour of -1 matches no word.

    >>> star, ring = (SceneObject(shape=s, color=0, size=1, x=x, y=32, angle=0) for s, x in ((3, 16), (5, 48)))
    >>> claim = parse_sentence("there are a red star and a red ring, the star is left of the ring.")
    >>> agrees(claim, [star, ring]), agrees(claim, [star])
    (True, False)
    """
    if len(objects) != len(claim.objects):
        return False
    return any(
        all(look.fits(obj) for look, obj in zip(claim.objects, order, strict=True))
        and all(relation in relations(order[a], order[b]) for a, relation, b in claim.relations)
        for order in itertools.permutations(objects)
    )


_IS_THERE: Final = re.compile("is there an? (?:({c}) )?({s})\\?".format(**_ANY))
_WHAT: Final = re.compile(f"what (color|size) is {_THE}\\?")
_IS_IT: Final = re.compile(f"is {_THE} ({'|'.join((*SIDES, *RELATIONS))}) {_THE}\\?")


def answer_question(question: str, objects: Sequence[SceneObject]) -> str | None:
    """The one-word answer that these objects give to a story's question; None if they do not settle it.

    objects: as in `agrees`. Without a star, or with two, the colour of the star is not settled, for example. Raises
    ConfigError for any other question.

    >>> answer_question("how many objects are left?", [])
    'zero'
    >>> answer_question("what color is the star?", []) is None
    True
    """
    if question in HOW_MANY:
        return NUMBERS[len(objects)] if len(objects) < len(NUMBERS) else None
    if match := _IS_THERE.fullmatch(question):
        color, shape = match.groups()
        return yes_or_no(any(SHAPES[t.shape] == shape and color in (None, _color_word(t)) for t in objects))
    if match := _WHAT.fullmatch(question):
        place = _only(objects, match[2] or "", match[3])
        if place is None:
            return None
        return SIZES[objects[place].size] if match[1] == "size" else _color_word(objects[place]) or None
    if match := _IS_IT.fullmatch(question):
        a, b = _only(objects, match[1] or "", match[2]), _only(objects, match[4] or "", match[5])
        return None if a is None or b is None or a == b else _stands(match[3], objects[a], objects[b])
    raise ConfigError(f"question={question!r}: expected a question in the form in which stories ask it")


def _stands(words: str, a: SceneObject, b: SceneObject) -> str | None:
    """The answer to "is a WORDS b?", where WORDS are a relation or a choice of two."""
    found = relations(a, b)
    if words not in SIDES:
        return yes_or_no(words in found)
    matching = [side.removesuffix(" of") for side in SIDES[words] if side in found]
    return matching[0] if matching else None


# -------------------------------------------------------------------------------------- vocabulary


@functools.cache
def story_words() -> frozenset[str]:
    """Every word, in lower case, that any request, sentence, question or answer of a story can contain.

    >>> {"start", "away", "left", "hearts", "elephant"} - story_words()
    {'elephant'}
    """
    forms = [form for w in STORY_WORDINGS.values() for form in (*w.train, *w.dev, *w.test)]
    sides = [words for table in (_BESIDE, _BESIDE_IT) for row in table.values() for words in row]
    grammar = "there is are a an and the what color size yes no left right above below"
    forms += [form for requests in (*_REQUESTS.values(), _OPEN_ADD) for form in requests.forms]
    sides += [words for row in SIDE_WORDS.values() for words in row]
    tables = (forms, sides, HOW_MANY, tuple(SIDES), SHAPES, COLORS, SIZES, RELATIONS, NUMBERS, (grammar,))
    return words_in(itertools.chain.from_iterable(tables)) | request_words()
