"""Stories of the drawn world: four requests in turn, each answered by a sentence and a picture, then a question.

The first request starts with one object; each later one adds an object, takes one away or changes a colour, and
all else keeps its place, size, angle and colour. Everything is a pure function of seed and index, or of split, part
and item. Sentences have one grammar, which `parse_sentence` reads back and `agrees` holds against a picture; questions
are answered by `answer_question`. Neither knows which story the words are from. Text and scenes only, no pixels. One
file in spite of its length: drafting, wording and reading back share the grammar.
What training may show and say is the split's (`world.is_trainable`); our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal, get_args

import numpy as np

from starflow2.data.dialogue import Dialogue, Turn
from starflow2.errors import ConfigError
from starflow2.world.scene import (
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
    Split,
    pick,
    relations,
    sample_scene,
    shuffled,
    stream,
)
from starflow2.world.splits import HELD_OUT, RECOLOR_HELD_OUT, bucket, held_out, is_trainable
from starflow2.world.words import NUMBERS, Wording

__all__ = [
    "CG_ROWS",
    "KINDS",
    "STEPS",
    "STORY_WORDINGS",
    "TOLD_KINDS",
    "Change",
    "Claim",
    "Look",
    "Op",
    "Part",
    "Step",
    "Story",
    "agrees",
    "answer_question",
    "parse_sentence",
    "story_beginning",
    "story_dialogue",
    "story_task",
    "story_words",
    "suite_stories",
]

Op = Literal["start", "add", "remove", "recolor"]
Part = Literal["id", "cg", "paraphrase"]

STEPS: Final = 4
KINDS: Final[Mapping[str, float]] = MappingProxyType(  # kinds of question and their shares
    {
        "count": 0.12,
        "exists": 0.12,
        "color": 0.12,
        "position": 0.24,
        "left_right": 0.12,
        "above_below": 0.12,
        "size": 0.16,
    }
)
TOLD_KINDS: Final = frozenset({"count", "exists", "color"})  # the requests alone settle the answer; else the picture
_RELATED: Final = frozenset({"position", "left_right", "above_below"})  # about two whose relation no request told
CG_ROWS: Final = ("pair", "fact", "shapes", "count", "edit")  # what "cg" items show of the held-out, in turn

_STORY: Final = 40  # a number of its own in every stream
_BEGINNING: Final = 41
_TWO: Final = 0.6  # share of beginnings that stop at the second picture
_SUITE_SEED: Final = 2026  # frozen: changing it, or the order of draws below, makes another benchmark
_REPEATS: Final = 0.3  # share of stories in which two objects have the same shape
_CASTS: Final = 12  # places tried for a training story's cast, for one that stands near the middle
_MIDDLE: Final = IMAGE_SIZE / 2 + 1  # pixels, x and y; guidance draws what is near it a pixel or two above and left
_SCRIPTS: Final = 16  # tries at a script for one cast: placing a cast costs more than what is done with it


# ------------------------------------------------------------------------------------------- stories


@dataclass(frozen=True, slots=True)
class Look:
    """An object as words tell it: indices into SHAPES, COLORS and SIZES; size None if nothing is said of it."""

    shape: int
    color: int
    size: int | None = None

    def fits(self, obj: SceneObject) -> bool:
        """Whether the object is one of which these words are true."""
        return (obj.shape, obj.color) == (self.shape, self.color) and self.size in (None, obj.size)

    def __str__(self) -> str:
        return " ".join([*([] if self.size is None else [SIZES[self.size]]), COLORS[self.color], SHAPES[self.shape]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a request asks for. before: the object that goes or is recoloured; after: that which comes or results."""

    op: Op
    before: Look | None = None
    after: Look | None = None
    relation: Relation | None = None  # what `after` is to be with respect to `reference`, if added
    reference: Look | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One request, the sentence and the picture that answer it, and what it changes."""

    instruction: str
    sentence: str
    scene: Scene  # objects in the order in which they came
    change: Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Four steps and a question about the last picture, with its one-word answer and one of KINDS."""

    steps: tuple[Step, ...]
    question: str
    answer: str
    kind: str


def story_dialogue(story: Story) -> SceneDialogue:
    """The story as a conversation: a turn per step, and one for the question."""
    turns = [Turn(user=(step.instruction,), assistant=(step.sentence, step.scene)) for step in story.steps]
    return Dialogue(turns=(*turns, Turn(user=(story.question,), assistant=(story.answer,))), kind="story")


# --------------------------------------------------------------------------------------------- words

STORY_WORDINGS: Final[Mapping[Op, Wording]] = MappingProxyType(  # {a} what comes; {b} what is there, or "it"
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
_HOW_MANY: Final = ("how many objects are left?", "how many objects are there now?")
_SIDES: Final[Mapping[str, tuple[Relation, Relation]]] = MappingProxyType(
    {"left or right of": ("left of", "right of"), "above or below": ("above", "below")}
)


def _noun(look: Look) -> str:
    return f"an {look}" if str(look)[0] in "aeiou" else f"a {look}"


def _the(look: Look | SceneObject, others: Iterable[Look | SceneObject]) -> str:
    """Words for one of the objects: its shape, and its colour if another has that shape too."""
    is_alone = sum(other.shape == look.shape for other in others) == 1
    return f"the {SHAPES[look.shape]}" if is_alone else f"the {COLORS[look.color]} {SHAPES[look.shape]}"


def _sentence(looks: Sequence[Look], change: Change) -> str:
    """What is to be seen, and where the object that has just come stands."""
    nouns = [_noun(look) for look in looks]
    if len(nouns) == 1:
        return f"there is {nouns[0]}."
    text = f"there are {', '.join(nouns[:-1])} and {nouns[-1]}"
    if change.after is not None and change.reference is not None:
        text += f", {_the(change.after, looks)} is {change.relation} {_the(change.reference, looks)}"
    return text + "."


def _instruction(move: _Move, looks: Sequence[Look], wording: Bucket, rng: np.random.Generator) -> str:
    """The request in words. looks: what was to be seen before it."""
    change, fields = move.change, dict[str, str]()
    if change.relation is not None and change.reference is not None:
        sides = (_BESIDE_IT if move.says_it else _BESIDE)[change.relation]
        fields["rel"] = pick(rng, sides).format(b=_the(change.reference, looks))
    if change.before is not None:
        fields["b"] = "it" if move.says_it else _the(change.before, looks)
    if change.after is not None:
        fields |= {"a": _noun(change.after), "color": COLORS[change.after.color]}
    return pick(rng, STORY_WORDINGS[change.op].forms(wording)).format(**fields)


# ---------------------------------------------------------------------------- reading words back


@dataclass(frozen=True, slots=True)
class Claim:
    """What a sentence states: every object that is to be seen, and (number, relation, number) between them."""

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
    """What a sentence states, or None if it is not one sentence of the stories' grammar.

    The grammar: "there is NOUN." or "there are NOUN, NOUN and NOUN.", where a NOUN is an article, perhaps a size, a
    colour and a shape; before the full stop any number of ", THE is RELATION THE", where a THE is "the", a colour if it
    is needed, and a shape. Each THE must name one of the NOUNs and no other.

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
    """The number of the one object of that shape, and of that colour unless it is empty."""
    fits = [i for i, t in enumerate(objects) if SHAPES[t.shape] == shape and (not color or color == _color_word(t))]
    return fits[0] if len(fits) == 1 else None


def _color_word(obj: Look | SceneObject) -> str:
    return COLORS[obj.color] if obj.color >= 0 else ""


def agrees(claim: Claim, objects: Sequence[SceneObject]) -> bool:
    """Whether these objects, all that are there, are exactly the claimed ones and stand as claimed.

    objects: of a scene or found in a picture; a colour of -1 fits no word.

    >>> story = story_task(0, 0)
    >>> all(agrees(parse_sentence(step.sentence), step.scene.objects) for step in story.steps)
    True
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
_IS_IT: Final = re.compile(f"is {_THE} ({'|'.join((*_SIDES, *RELATIONS))}) {_THE}\\?")


def answer_question(question: str, objects: Sequence[SceneObject]) -> str | None:
    """The one-word answer that these objects give to a story's question; None if they do not settle it.

    objects: as in `agrees`. None, for instance, for the colour of a star where there is no star, or two.

    >>> answer_question("how many objects are left?", [])
    'zero'
    >>> answer_question("what color is the star?", []) is None
    True
    """
    if question in _HOW_MANY:
        return NUMBERS[len(objects)] if len(objects) < len(NUMBERS) else None
    if match := _IS_THERE.fullmatch(question):
        color, shape = match.groups()
        return _yes(any(SHAPES[t.shape] == shape and color in (None, _color_word(t)) for t in objects))
    if match := _WHAT.fullmatch(question):
        place = _only(objects, match[2] or "", match[3])
        if place is None:
            return None
        return SIZES[objects[place].size] if match[1] == "size" else _color_word(objects[place]) or None
    if match := _IS_IT.fullmatch(question):
        a, b = _only(objects, match[1] or "", match[2]), _only(objects, match[4] or "", match[5])
        return None if a is None or b is None or a == b else _stands(match[3], objects[a], objects[b])
    raise ConfigError(f"question={question!r}: not a question that a story asks")


def _stands(words: str, a: SceneObject, b: SceneObject) -> str | None:
    """The answer to "is a WORDS b?", WORDS being a relation or a choice of two."""
    found = relations(a, b)
    if words not in _SIDES:
        return _yes(words in found)
    true = [side.removesuffix(" of") for side in _SIDES[words] if side in found]
    return true[0] if true else None


def _yes(is_yes: bool) -> str:
    return "yes" if is_yes else "no"


# ------------------------------------------------------------------------------------ drafting stories


@dataclass(frozen=True, slots=True)
class _Rules:
    """For which part of the world a story is, and which of CG_ROWS, held out by that split, it must show; or ""."""

    split: Bucket
    row: str = ""

    def row_of(self, split: Split) -> str:
        """What the story must show of that which `split` holds out; or ""."""
        return self.row if split == self.split else ""


@dataclass(frozen=True, slots=True)
class _Act:
    """One request by number: which of the cast comes, goes or is recoloured, and its colour from then on."""

    op: Op
    number: int
    color: int


@dataclass(frozen=True, slots=True)
class _Move:
    """A change, whether its words say "it" for the object they refer to, and what is then to be seen."""

    change: Change
    says_it: bool
    looks: tuple[Look, ...]
    scene: Scene


@dataclass(frozen=True, slots=True)
class _Draft:
    """A story before its requests are put into words."""

    moves: tuple[_Move, ...]
    question: str
    answer: str
    kind: str


_Here = Mapping[int, SceneObject]  # what is to be seen, by number in the cast, in the order in which it came


@dataclass(frozen=True, slots=True)
class _Sizes:
    """How often the objects of a story are large, and how often words tell the size of small and of large ones."""

    large: float
    told: tuple[float, float]


_ALIKE: Final = _Sizes(0.5, (0.5, 0.5))
_ROOMY: Final = _Sizes(0.3, (0.4, 0.9))  # small where words leave it open


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is drawn once for a story, so that nothing suffers for being hard to place or to ask."""

    kind: str
    ops: tuple[Op, ...]
    required: tuple[int, ...]  # shapes that must be in the cast

    @property
    def num_cast(self) -> int:
        """How many objects there ever are."""
        return 1 + self.ops.count("add")

    def sizes(self, rules: _Rules) -> _Sizes:
        """Both alike in suites, and where training asks for a size that nothing has told."""
        return _ALIKE if rules.split != "train" or self.kind == "size" else _ROOMY

    def is_sound(self, rules: _Rules) -> bool:
        """Whether such a story can be told and asked about; a plan that cannot would be tried for ever."""
        heads = [self.ops[: end + 1] for end in range(STEPS)]
        counts = [1 + ops.count("add") - ops.count("remove") for ops in heads]  # objects after each step
        can_ask = {kind: counts[-1] > 2 for kind in _RELATED} | {"color": self.num_cast > len(self.required)}
        can_show = rules.row != "edit" or self.ops.count("recolor") == 1  # three on end lead to a held-out pair
        return max(counts) >= len(self.required) and can_ask.get(self.kind, True) and can_show


def _plan(rng: np.random.Generator, rules: _Rules) -> _Plan:
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    while True:
        plan = _Plan(kind, _ops(rng), tuple(_required_shapes(rng, rules)))
        if plan.is_sound(rules):
            return plan


def _ops(rng: np.random.Generator) -> tuple[Op, ...]:
    """What the four requests ask for: a start, then mostly additions; never an empty picture."""
    ops: list[Op] = ["start"]
    while len(ops) < STEPS:
        num_objects = 1 + ops.count("add") - ops.count("remove")
        removal = 0.3 if num_objects > 1 else 0.0
        ops.append("remove" if rng.random() < removal else "recolor" if rng.random() < 0.25 else "add")
    return tuple(ops)


def _required_shapes(rng: np.random.Generator, rules: _Rules) -> list[int]:
    """Shapes without which a story cannot show what it must; for the others sometimes two of a kind."""
    if rules.split != "train" and rules.row in ("shapes", "fact", "count"):
        table = HELD_OUT[rules.split]
        if rules.row == "shapes":
            return sorted(pick(rng, sorted(map(sorted, table.shapes))))
        if rules.row == "fact":
            a, _, b = pick(rng, sorted(table.facts))
            return [a, b]
        shape, count = pick(rng, sorted(table.counts))
        return [shape] * count
    twice = [s for s in range(len(SHAPES)) if not any((s, 2) in table.counts for table in HELD_OUT.values())]
    return [pick(rng, twice)] * 2 if rng.random() < _REPEATS else []


def _cast(rng: np.random.Generator, plan: _Plan, rules: _Rules) -> Scene | None:
    """Every object that a story will ever show, placed together so that none can overlap; colours mean nothing yet."""
    others = [int(shape) for shape in rng.permutation(len(SHAPES)) if shape not in plan.required]
    shapes = shuffled(rng, [*plan.required, *others[: plan.num_cast - len(plan.required)]])
    if not all(_may_meet(shapes, s, rules.row_of(s)) for s in get_args(Split)):
        return None
    is_training, large = rules.split == "train", plan.sizes(rules).large
    cast = _roomy_cast(rng, shapes, large) if is_training else sample_scene(rng, shapes=shapes)
    return cast if all(held_out(cast, s) <= {"pair", rules.row_of(s)} for s in get_args(Split)) else None


def _roomy_cast(rng: np.random.Generator, shapes: Sequence[int], large: float) -> Scene:
    """A cast whose first object is as near to the middle as any of a few allows: whoever draws it alone cannot know on
    which side of it the next will be asked for, and must leave room on all (docs/choices.md#room-in-a-story).
    """
    sizes = (rng.random(len(shapes)) < large).astype(int).tolist()
    casts = [sample_scene(rng, shapes=shapes, sizes=sizes) for _ in range(_CASTS)]
    cast, middle = min(((cast, i) for cast in casts for i in range(len(shapes))), key=lambda c: _off_centre(*c))
    objects = list(cast.objects)
    return replace(cast, objects=(objects.pop(middle), *objects))


def _off_centre(scene: Scene, number: int) -> float:
    obj = scene.objects[number]
    return max(abs(obj.x - _MIDDLE), abs(obj.y - _MIDDLE))


def _may_meet(shapes: Sequence[int], split: Split, row: str) -> bool:
    """Whether no two shapes, and no number of one, are held out by `split`, but for `row`. Needs no places."""
    table = HELD_OUT[split]
    has_shapes = any(pair.issubset(shapes) for pair in table.shapes)
    has_count = any((shape, shapes.count(shape)) in table.counts for shape in shapes)
    return (row == "shapes" or not has_shapes) and (row == "count" or not has_count)


@functools.cache
def _colors_of(shape: int, split: Split | None = None) -> tuple[int, ...]:
    """The colours in which training may show a shape, or those that `split` holds out."""
    tables = HELD_OUT.values() if split is None else (HELD_OUT[split],)
    is_held_out = [any((shape, color) in table.pairs for table in tables) for color in range(len(COLORS))]
    return tuple(color for color, held in enumerate(is_held_out) if held == (split is not None))


def _color(rng: np.random.Generator, shape: int, old: int | None, rules: _Rules) -> int | None:
    """A colour for an object that comes, or that has the colour `old`; None if there is none to turn to."""
    pool = _colors_of(shape)
    if rules.split != "train" and rules.row == "pair" and rng.random() < 0.5:
        pool = _colors_of(shape, rules.split)
    if old is not None:
        steps = set(range(1, len(COLORS))) - set(RECOLOR_HELD_OUT.values())
        if rules.split != "train" and rules.row == "edit":
            steps = {RECOLOR_HELD_OUT[rules.split]}
        pool = tuple(color for color in pool if (color - old) % len(COLORS) in steps)
    return pick(rng, pool) if pool else None


def _script(rng: np.random.Generator, ops: Sequence[Op], cast: Scene, rules: _Rules) -> tuple[_Act, ...] | None:
    """Who comes, goes and turns which colour; None if words could not tell two objects apart, or at a dead end."""
    acts: list[_Act] = []
    here: dict[int, int] = {}  # colour by number
    entered = 0
    for op in ops:
        is_new = op in ("start", "add")
        number = entered if is_new else pick(rng, list(here))
        shape, old = cast.objects[number].shape, here.get(number)
        color = old if op == "remove" else _color(rng, shape, old, rules)
        if color is None:
            return None
        acts.append(_Act(op, number, color))
        here, entered = _acted(here, acts[-1]), entered + is_new
        if len({(cast.objects[i].shape, c) for i, c in here.items()}) < len(here):
            return None
    return tuple(acts)


def _acted(here: Mapping[int, int], act: _Act) -> dict[int, int]:
    rest = {number: color for number, color in here.items() if act.op != "remove" or number != act.number}
    return rest if act.op == "remove" else rest | {act.number: act.color}


def _played(acts: Sequence[_Act], cast: Scene) -> list[_Here]:
    """What is to be seen after each act."""
    found: list[_Here] = []
    colors: dict[int, int] = {}
    for act in acts:
        colors = _acted(colors, act)
        found.append({number: replace(cast.objects[number], color=color) for number, color in colors.items()})
    return found


def _is_allowed(scenes: Sequence[Scene], rules: _Rules) -> bool:
    """Whether the split lets such a story show these pictures: all that it must, and nothing else that is held out."""
    if rules.split == "train":
        return all(is_trainable(scene) for scene in scenes)
    other: Split = "dev" if rules.split == "test" else "test"
    if bucket(scenes[-1]) != rules.split or any(held_out(scene, other) for scene in scenes):
        return False
    shown = frozenset[str]().union(*(held_out(scene, rules.split) for scene in scenes))
    return shown == {rules.row} - {"", "edit"}


class _Teller:
    """Tells played acts: what words say of each object, and what they leave to the picture."""

    def __init__(self, rng: np.random.Generator, tells_size: Sequence[bool]) -> None:
        self.rng, self.tells_size = rng, tells_size  # by number in the cast
        self.related: set[frozenset[int]] = set()  # two whose relation was told
        self.only_named = -1  # the one object that the last request named; "it" may mean no other

    def look(self, number: int, here: _Here) -> Look:
        """The object as words tell it."""
        obj = here[number]
        return Look(obj.shape, obj.color, obj.size if self.tells_size[number] else None)

    def move(self, act: _Act, before: _Here, scene: Scene, after: _Here) -> _Move | None:
        """An act told, or None if what is added stands in no clear relation to anything."""
        meant, antecedent = act.number, self.only_named
        self.only_named = act.number if act.op in ("start", "recolor") else -1
        change = Change(
            op=act.op,
            before=self.look(act.number, before) if act.number in before else None,
            after=self.look(act.number, after) if act.number in after else None,
        )
        if act.op == "add":
            found = self._side(act.number, after)
            if found is None:
                return None
            meant, relation = found
            change = replace(change, relation=relation, reference=self.look(meant, after))
        says_it = meant == antecedent and self.rng.random() < 0.7
        return _Move(change, says_it, tuple(self.look(number, after) for number in after), scene)

    def _side(self, new: int, here: _Here) -> tuple[int, Relation] | None:
        """Another object, and what the new one is with respect to it."""
        for number in shuffled(self.rng, [other for other in here if other != new]):
            sides = sorted(relations(here[new], here[number]))
            if sides:
                self.related.add(frozenset((new, number)))
                return number, pick(self.rng, sides)
        return None


class _Asker:
    """Asks about what is there in the end: words, or None where a story allows no question of that kind."""

    def __init__(self, rng: np.random.Generator, played: Sequence[_Here], acts: Sequence[_Act], teller: _Teller):
        self.rng, self.teller, self.here = rng, teller, played[-1]
        self.shown = {(t.shape, t.color) for here in played for t in here.values()}  # at any time
        self.recolored = {act.number for act in acts if act.op == "recolor"}

    def ask(self, kind: str) -> str | None:
        """A question of one of KINDS."""
        asks: Mapping[str, Callable[[], str | None]] = {
            "count": lambda: pick(self.rng, _HOW_MANY),
            "exists": self._exists,
            "color": self._color,
            "position": self._position,
            "left_right": lambda: self._side("left or right of"),
            "above_below": lambda: self._side("above or below"),
            "size": self._size,
        }
        return asks[kind]()

    def _named(self, number: int) -> str:
        return _the(self.here[number], self.here.values())

    def _exists(self) -> str:
        """Half of the answers are "no", if it can be for what was there once."""
        now = {(t.shape, t.color) for t in self.here.values()}
        shapes = {shape for shape, _ in now}
        names_color, pairs = self.rng.random() < 0.5, sorted(now)
        if self.rng.random() < 0.5:
            gone = self.shown - now if names_color else {pair for pair in self.shown if pair[0] not in shapes}
            never = {(s, c) for s in range(len(SHAPES)) if s not in shapes for c in _colors_of(s)}
            pairs = sorted(gone or never)
        shape, color = pick(self.rng, pairs)
        return f"is there {_noun(Look(shape, color)) if names_color else f'a {SHAPES[shape]}'}?"

    def _color(self) -> str | None:
        shapes = [t.shape for t in self.here.values()]
        clear = [number for number, obj in self.here.items() if shapes.count(obj.shape) == 1]
        clear = [number for number in clear if number in self.recolored] or clear
        return f"what color is {self._named(pick(self.rng, clear))}?" if clear else None

    def _size(self) -> str | None:
        untold = [number for number in self.here if not self.teller.tells_size[number]]
        return f"what size is {self._named(pick(self.rng, untold))}?" if untold else None

    def _untold_pairs(self) -> list[tuple[int, int]]:
        pairs = itertools.permutations(self.here, 2)
        return shuffled(self.rng, [pair for pair in pairs if frozenset(pair) not in self.teller.related])

    def _may_say(self, a: int, sides: Iterable[Relation], b: int) -> bool:
        """Whether "a is SIDE b" names nothing held out for any of the sides, true or not; two of a shape never do."""
        first, second = self.here[a].shape, self.here[b].shape
        told = {fact for side in sides for fact in ((first, side, second), (second, OPPOSITES[side], first))}
        return first == second or not any(told & table.facts for table in HELD_OUT.values())

    def _position(self) -> str | None:
        is_yes = self.rng.random() < 0.5
        for a, b in self._untold_pairs():
            for side in shuffled(self.rng, sorted(relations(self.here[a], self.here[b]))):
                if self._may_say(a, (side, OPPOSITES[side]), b):  # both, or "yes" would be likelier
                    return f"is {self._named(a)} {side if is_yes else OPPOSITES[side]} {self._named(b)}?"
        return None

    def _side(self, words: str) -> str | None:
        for a, b in self._untold_pairs():
            is_clear = not relations(self.here[a], self.here[b]).isdisjoint(_SIDES[words])
            if is_clear and self._may_say(a, _SIDES[words], b):
                return f"is {self._named(a)} {words} {self._named(b)}?"
        return None


def _draft(rng: np.random.Generator, plan: _Plan, rules: _Rules) -> _Draft | None:
    """One try at such a story."""
    cast = _cast(rng, plan, rules)
    for _ in range(_SCRIPTS if cast else 0):
        assert cast is not None
        acts = _script(rng, plan.ops, cast, rules)
        played = _played(acts, cast) if acts else []
        scenes = [Scene(objects=tuple(here.values()), background=cast.background) for here in played]
        if acts and _is_allowed(scenes, rules):
            objects = cast.objects[: 1 + max(act.number for act in acts)]
            told = plan.sizes(rules).told
            teller = _Teller(rng, [bool(rng.random() < told[obj.size]) for obj in objects])
            return _told(teller, acts, played, scenes, plan.kind)
    return None


def _told(
    teller: _Teller, acts: Sequence[_Act], played: Sequence[_Here], scenes: Sequence[Scene], kind: str
) -> _Draft | None:
    """The acts in the order of their telling, and a question; None if words cannot do it."""
    moves, before = [], dict[int, SceneObject]()
    for act, scene, after in zip(acts, scenes, played, strict=True):
        move = teller.move(act, before, scene, after)
        if move is None:
            return None
        moves.append(move)
        before = dict(after)
    question = _Asker(teller.rng, played, acts, teller).ask(kind)
    answer = answer_question(question, scenes[-1].objects) if question else None
    return _Draft(tuple(moves), question, answer, kind) if question and answer else None


def _drafted(rng: np.random.Generator, rules: _Rules) -> _Draft:
    """A story by the rules."""
    plan = _plan(rng, rules)
    while True:
        draft = _draft(rng, plan, rules)
        if draft is not None:
            return draft


def _worded(draft: _Draft, wording: Bucket, rng: np.random.Generator) -> Story:
    steps: list[Step] = []
    looks: tuple[Look, ...] = ()
    for move in draft.moves:
        instruction = _instruction(move, looks, wording, rng)
        sentence = _sentence(move.looks, move.change)
        steps.append(Step(instruction=instruction, sentence=sentence, scene=move.scene, change=move.change))
        looks = move.looks
    return Story(steps=tuple(steps), question=draft.question, answer=draft.answer, kind=draft.kind)


def story_task(seed: int, index: int) -> Story:
    """Training story number `index`: a pure function of its arguments, free of anything held out.

    >>> len(story_task(0, 3).steps), story_task(0, 3) == story_task(0, 3)
    (4, True)
    """
    rng = stream(seed, index, _STORY)
    return _worded(_drafted(rng, _Rules("train")), "train", rng)


def suite_stories(split: Split, part: Part = "id", count: int = 64) -> list[Story]:
    """The frozen stories of a split, whose last pictures lie in its bucket; a greater `count` leaves the first as is.

    "id": seen combinations, training wording. "cg": each story shows, in one picture or more, one of CG_ROWS that
    `split` holds out and nothing else held out ("edit": it asks for a held-out change of colour). "paraphrase": the
    stories of "id", with requests worded as training never words them. Raises ConfigError for another split or part.
    """
    for name, value, known in (("split", split, get_args(Split)), ("part", part, get_args(Part))):
        if value not in known:
            raise ConfigError(f"{name}={value!r}: expected one of {', '.join(known)}")
    stories = []
    for item in range(count):
        rules = _Rules(split, CG_ROWS[item % len(CG_ROWS)] if part == "cg" else "")
        where = (_SUITE_SEED, _STORY, get_args(Split).index(split), int(part == "cg"), item + 1)
        draft = _drafted(stream(*where), rules)
        wording: Bucket = split if part == "paraphrase" else "train"
        stories.append(_worded(draft, wording, stream(*where, 1)))  # words do not share the stream of the scenes
    return stories


def story_beginning(seed: int, index: int) -> SceneDialogue:
    """Training dialogue number `index` of a story that stops at its second or third picture: no question follows.

    What a request changes is learnt most from a dialogue's last picture (docs/choices.md#beginnings).

    >>> len(story_beginning(0, 0).turns) in (2, 3)
    True
    """
    steps = 2 if stream(seed, index, _BEGINNING).random() < _TWO else 3
    dialogue = story_dialogue(story_task(seed, index))
    return Dialogue(dialogue.turns[:steps], "story beginning")


# ------------------------------------------------------------------------------------------- lexicon


@functools.cache
def story_words() -> frozenset[str]:
    """Every word, in lower case, that any request, sentence, question or answer of a story can contain.

    >>> {"start", "away", "left", "hearts"} - story_words()
    {'hearts'}
    """
    forms = [form for w in STORY_WORDINGS.values() for form in (*w.train, *w.dev, *w.test)]
    sides = [words for table in (_BESIDE, _BESIDE_IT) for row in table.values() for words in row]
    grammar = "there is are a an and the what color size yes no left right above below"
    tables = (forms, sides, _HOW_MANY, tuple(_SIDES), SHAPES, COLORS, SIZES, RELATIONS, NUMBERS, (grammar,))
    texts = (re.sub(r"\{\w+\}", " ", text) for table in tables for text in table)
    return frozenset(word for text in texts for word in re.findall(r"[a-z]+", text))
