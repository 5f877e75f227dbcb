"""Stories of the drawn world: four requests in turn, each answered by a sentence and an image, then a question.

The first request starts with one object; each later one adds an object, removes one or changes a colour, and all else
keeps its place, size, angle and colour. Everything is a pure function of seed and index, or of split, part and item.
A story is drafted by object numbers first (who is added, removed or recoloured), then narrated as changes, then worded;
`story_text` has the wordings and reads them back. Text and scenes only, no pixels.
What training may show is decided by `splits`; our choice: docs/choices.md#world.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal, get_args

import numpy as np

from starflow2.core.dialogue import Dialogue, Turn
from starflow2.errors import ConfigError
from starflow2.world.scene import (
    IMAGE_SIZE,
    OPPOSITES,
    SHAPES,
    Bucket,
    Relation,
    Scene,
    SceneDialogue,
    SceneObject,
    Split,
    central_scene,
    pick,
    relations,
    sample_scene,
    shuffled,
    stream,
)
from starflow2.world.splits import (
    HELD_OUT,
    RECOLOR_HELD_OUT,
    bucket,
    colors_of,
    held_out,
    is_trainable,
    may_recolor,
    recolor_step,
    reserved,
    withheld,
)
from starflow2.world.story_text import (
    HOW_MANY,
    SIDES,
    Change,
    Look,
    Op,
    answer_question,
    definite,
    free_request,
    request,
    sentence,
)
from starflow2.world.words import article

__all__ = [
    "CG_ROWS",
    "KINDS",
    "PARTS",
    "REQUEST_KINDS",
    "STEPS",
    "Part",
    "Step",
    "Story",
    "random_story",
    "story_beginning",
    "story_dialogue",
    "story_task",
    "suite_stories",
]

Part = Literal["id", "cg", "paraphrase", "plain"]
PARTS: Final[tuple[Part, ...]] = get_args(Part)

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
REQUEST_KINDS: Final = frozenset({"count", "exists", "color"})  # requests settle the answer; else the image does
CG_ROWS: Final = ("pair", "fact", "shapes", "count", "edit")  # what "cg" items show of the held-out, in turn

_RELATED: Final = frozenset({"position", "left_right", "above_below"})  # about two objects that no request related
_STORY: Final = 40  # third number of a training stream, second of a suite's, so that no other task repeats its draws
_BEGINNING: Final = 41  # third number of a stream
_SEVERAL: Final = 0.3  # share of stories that are planned so that a request can be about several objects
_TOGETHER: Final = {"remove": 0.8, "recolor": 0.8}  # share of requests, where it can be, that are
_OPEN: Final = 0.25  # share of additions whose place no request names, in training
_TWO: Final = 0.6  # share of beginnings that stop at the second image
_SUITE_SEED: Final = 2026  # frozen: changing it, or the order of draws below, makes another benchmark
_REPEATS: Final = 0.3  # share of stories in which two objects have the same shape
_MIDDLE: Final = IMAGE_SIZE / 2 + 1  # pixels, x and y; guidance draws what is near it a pixel or two above and left
_SCRIPTS: Final = 16  # scripts tried for one cast: placing a cast costs more than all that follows


# ------------------------------------------------------------------------------------------- stories


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One request, the sentence and the image that answer it, and the change between this image and the last."""

    instruction: str
    sentence: str
    scene: Scene  # objects in the order in which they were added
    change: Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Four steps and a question about the last image, with its one-word answer and one of KINDS."""

    steps: tuple[Step, ...]
    question: str
    answer: str
    kind: str


def story_dialogue(story: Story) -> SceneDialogue:
    """The story as a conversation: a turn per step, and one for the question."""
    turns = [Turn(user=(step.instruction,), assistant=(step.sentence, step.scene)) for step in story.steps]
    return Dialogue(turns=(*turns, Turn(user=(story.question,), assistant=(story.answer,))), kind="story")


# ------------------------------------------------------------------------------------ planning a story


@dataclass(frozen=True, slots=True)
class _Rules:
    """The part of the world that a story is for, and which of CG_ROWS held out by that split it must show; or ""."""

    split: Bucket
    row: str = ""
    # of requests: plain forms; training's grammar, with open places; the same, also about several objects at once
    words: Literal["plain", "free", "several"] = "plain"

    def row_of(self, split: Split) -> str:
        """Row of `split`'s held-out combinations that the story must show; or ""."""
        return self.row if split == self.split else ""


@dataclass(frozen=True, slots=True)
class _Act:
    """One request by number: which object of the cast is added, removed or recoloured, and its colour from then on.

    also: further objects that the same request removes, or gives the same colour.
    """

    op: Op
    number: int
    color: int
    also: tuple[int, ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        return (self.number, *self.also)


@dataclass(frozen=True, slots=True)
class _Move:
    """A change, whether its words call the object they refer to "it", and the image after it."""

    change: Change
    uses_pronoun: bool
    looks: tuple[Look, ...]
    scene: Scene


@dataclass(frozen=True, slots=True)
class _Draft:
    """A story before its requests are put into words."""

    moves: tuple[_Move, ...]
    question: str
    answer: str
    kind: str


_Present = Mapping[int, SceneObject]  # objects in the image, by number in the cast, in the order of being added


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Shares of objects in a story that are large, and of small and large ones whose size words name."""

    large: float
    named: tuple[float, float]


_ALIKE: Final = _Sizes(0.5, (0.5, 0.5))
_ROOMY: Final = _Sizes(0.3, (0.4, 0.9))  # mostly small where words leave the size open


@dataclass(frozen=True, slots=True)
class _Plan:
    """Choices made once for a story, so that none becomes rare for being hard to place or to ask about."""

    kind: str
    ops: tuple[Op, ...]
    required: tuple[int, ...]  # shapes that must be in the cast

    @property
    def num_cast(self) -> int:
        """Number of objects that the story ever shows."""
        return 1 + self.ops.count("add")

    def sizes(self, rules: _Rules) -> _Sizes:
        """Shares of sizes: balanced in suites, and where training asks for a size that no request named."""
        return _ALIKE if rules.split != "train" or self.kind == "size" else _ROOMY

    def is_sound(self, rules: _Rules) -> bool:
        """True if such a story can be drafted and asked about; any other plan would be tried for ever."""
        heads = [self.ops[: end + 1] for end in range(STEPS)]
        counts = [1 + ops.count("add") - ops.count("remove") for ops in heads]  # objects after each step
        can_ask = {kind: counts[-1] > 2 for kind in _RELATED} | {"color": self.num_cast > len(self.required)}
        can_show = rules.row != "edit" or self.ops.count("recolor") == 1  # three in a row end at a held-out pair
        return max(counts) >= len(self.required) and can_ask.get(self.kind, True) and can_show


def _plan(rng: np.random.Generator, rules: _Rules) -> _Plan:
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    while True:
        if rules.words == "several" and rng.random() < _SEVERAL:
            plan = _Plan(kind, *_ops_on_several(rng))
        else:
            plan = _Plan(kind, _ops(rng), tuple(_required_shapes(rng, rules)))
        if plan.is_sound(rules):
            return plan


def _ops_on_several(rng: np.random.Generator) -> tuple[tuple[Op, ...], tuple[int, ...]]:
    """Operations and required shapes of a story that can remove two alike at once, or give everything one colour."""
    if rng.random() < 0.5:
        return ("start", "add", "add", "remove"), (_shape_twice(rng),) * 2
    return ("start", "add", "add", "recolor") if rng.random() < 0.5 else ("start", "add", "recolor", "add"), ()


def _shape_twice(rng: np.random.Generator) -> int:
    """A shape of which training may show two."""
    return pick(rng, [shape for shape in range(len(SHAPES)) if withheld().allows_count(shape, 2)])


def _ops(rng: np.random.Generator) -> tuple[Op, ...]:
    """The operations of the four requests: a start, then mostly additions; the image is never empty."""
    ops: list[Op] = ["start"]
    while len(ops) < STEPS:
        num_objects = 1 + ops.count("add") - ops.count("remove")
        removal = 0.3 if num_objects > 1 else 0.0
        ops.append("remove" if rng.random() < removal else "recolor" if rng.random() < 0.25 else "add")
    return tuple(ops)


def _required_shapes(rng: np.random.Generator, rules: _Rules) -> list[int]:
    """Shapes that a story needs to show its row; without a row, sometimes two of one shape."""
    if rules.split != "train" and rules.row in ("shapes", "fact", "count"):
        table = HELD_OUT[rules.split]
        if rules.row == "shapes":
            return sorted(pick(rng, sorted(map(sorted, table.shapes))))
        if rules.row == "fact":
            a, _, b = pick(rng, sorted(table.facts))
            return [a, b]
        shape, count = pick(rng, sorted(table.counts))
        return [shape] * count
    return [_shape_twice(rng)] * 2 if rng.random() < _REPEATS else []


def _cast(rng: np.random.Generator, plan: _Plan, rules: _Rules) -> Scene | None:
    """Every object that a story will ever show, placed together so that none overlap; their colours are not used."""
    others = [int(shape) for shape in rng.permutation(len(SHAPES)) if shape not in plan.required]
    shapes = shuffled(rng, [*plan.required, *others[: plan.num_cast - len(plan.required)]])
    if not all(table.rows_of_shapes(shapes) <= {rules.row_of(s)} for s, table in reserved().items()):
        return None
    is_training, large = rules.split == "train", plan.sizes(rules).large
    cast = _roomy_cast(rng, shapes, large) if is_training else sample_scene(rng, shapes=shapes)
    return cast if all(held_out(cast, s) <= {"pair", rules.row_of(s)} for s in reserved()) else None


def _roomy_cast(rng: np.random.Generator, shapes: Sequence[int], large: float) -> Scene:
    """A cast whose first object is near the middle.

    A model that draws the first object alone cannot know on which side of it the next one will be asked for, and must
    leave room on all sides (docs/choices.md#room-in-a-story).
    """
    sizes = (rng.random(len(shapes)) < large).astype(int).tolist()
    return central_scene(rng, shapes, sizes, _MIDDLE)


def _color(rng: np.random.Generator, shape: int, old: int | None, rules: _Rules) -> int | None:
    """A colour for a new object, or for one that has the colour `old`; None if no colour is allowed."""
    pool = colors_of(shape)
    if rules.split != "train" and rules.row == "pair" and rng.random() < 0.5:
        pool = colors_of(shape, rules.split)
    if old is not None:
        if rules.split != "train" and rules.row == "edit":
            pool = tuple(color for color in pool if recolor_step(old, color) == RECOLOR_HELD_OUT[rules.split])
        else:
            pool = tuple(color for color in pool if may_recolor(old, color))
    return pick(rng, pool) if pool else None


def _script(rng: np.random.Generator, ops: Sequence[Op], cast: Scene, rules: _Rules) -> tuple[_Act, ...] | None:
    """Acts for the operations; None at a dead end, or if colour and shape would not tell two objects apart."""
    acts: list[_Act] = []
    colors: dict[int, int] = {}  # of the present objects, by number
    entered = 0
    for op in ops:
        is_new = op in ("start", "add")
        act = _act_on_several(rng, op, colors, cast) if rules.words == "several" else None
        if act is None:
            number = entered if is_new else pick(rng, list(colors))
            shape, old = cast.objects[number].shape, colors.get(number)
            color = old if op == "remove" else _color(rng, shape, old, rules)
            if color is None:
                return None
            act = _Act(op, number, color)
        acts.append(act)
        colors, entered = _colors_after(colors, act), entered + is_new
        if len({(cast.objects[i].shape, c) for i, c in colors.items()}) < len(colors):
            return None
    return tuple(acts)


def _act_on_several(rng: np.random.Generator, op: Op, colors: Mapping[int, int], cast: Scene) -> _Act | None:
    """A request about several objects at once, sometimes: one removes all of a shape, one gives everything a colour.

    colors: of the present objects, by number. None where it cannot be, or is not to be.
    """
    shapes = {number: cast.objects[number].shape for number in colors}
    if op == "remove":
        alike = [[n for n in shapes if shapes[n] == shape] for shape in sorted(set(shapes.values()))]
        alike = [group for group in alike if 1 < len(group) < len(shapes)]
        if alike and rng.random() < _TOGETHER["remove"]:
            first, *others = pick(rng, alike)
            return _Act(op, first, colors[first], tuple(others))
    elif op == "recolor" and 1 < len(shapes) == len(set(shapes.values())) and rng.random() < _TOGETHER["recolor"]:
        pools = [{c for c in colors_of(shapes[n]) if c != old and may_recolor(old, c)} for n, old in colors.items()]
        if pool := sorted(set.intersection(*pools)):
            first, *others = colors
            return _Act(op, first, pick(rng, pool), tuple(others))
    return None


def _colors_after(colors: Mapping[int, int], act: _Act) -> dict[int, int]:
    """Colours of the present objects, by number, after an act."""
    if act.op == "remove":
        return {number: color for number, color in colors.items() if number not in act.numbers}
    return {**colors, **dict.fromkeys(act.numbers, act.color)}


def _play(acts: Sequence[_Act], cast: Scene) -> list[_Present]:
    """The objects in the image after each act."""
    found: list[_Present] = []
    colors: dict[int, int] = {}
    for act in acts:
        colors = _colors_after(colors, act)
        found.append({number: replace(cast.objects[number], color=color) for number, color in colors.items()})
    return found


def _is_allowed(scenes: Sequence[Scene], rules: _Rules) -> bool:
    """True if a story by these rules may show these scenes: they show its row and nothing else that is held out."""
    if rules.split == "train":
        return all(is_trainable(scene) for scene in scenes)
    other: Split = "dev" if rules.split == "test" else "test"
    if bucket(scenes[-1]) != rules.split or any(held_out(scene, other) for scene in scenes):
        return False
    shown = frozenset[str]().union(*(held_out(scene, rules.split) for scene in scenes))
    return shown == {rules.row} - {"", "edit"}


# ------------------------------------------------------------------------------------ narrating and asking


class _Narrator:
    """Turns acts into changes: which words describe each object, and what they leave to the image."""

    def __init__(self, rng: np.random.Generator, names_size: Sequence[bool], *, leaves_open: float = 0.0) -> None:
        """leaves_open: share of additions without a place."""
        self.rng, self.names_size, self.leaves_open = rng, names_size, leaves_open  # sizes by number in the cast
        self.related: set[frozenset[int]] = set()  # pairs of objects whose relation a request names
        self.only_named = -1  # the only object that the last request named, which "it" may mean; -1 if there is none

    def look(self, number: int, present: _Present) -> Look:
        """An object as all requests and sentences describe it."""
        obj = present[number]
        return Look(obj.shape, obj.color, obj.size if self.names_size[number] else None)

    def move(self, act: _Act, before: _Present, scene: Scene, after: _Present) -> _Move | None:
        """The act as a change, or None if an added object is in no clear relation to another."""
        referent, antecedent = act.number, self.only_named
        self.only_named = act.number if act.op in ("start", "recolor") and not act.also else -1
        change, *also = (
            Change(
                op=act.op,
                before=self.look(number, before) if number in before else None,
                after=self.look(number, after) if number in after else None,
            )
            for number in act.numbers
        )
        change = replace(change, also=tuple(also))
        is_open = act.op == "add" and self.leaves_open > 0 and bool(self.rng.random() < self.leaves_open)
        if act.op == "add" and not is_open:
            found = self._relate(act.number, after)
            if found is None:
                return None
            referent, relation = found
            change = replace(change, relation=relation, reference=self.look(referent, after))
        uses_pronoun = not is_open and not also and referent == antecedent and self.rng.random() < 0.7
        return _Move(change, uses_pronoun, tuple(self.look(number, after) for number in after), scene)

    def _relate(self, new: int, present: _Present) -> tuple[int, Relation] | None:
        """Another object, and the relation of the new one to it."""
        for number in shuffled(self.rng, [other for other in present if other != new]):
            sides = sorted(relations(present[new], present[number]))
            if sides:
                self.related.add(frozenset((new, number)))
                return number, pick(self.rng, sides)
        return None


class _EndQuestions:
    """Asks about the last image of a story: words, or None where the story allows no question of that kind."""

    def __init__(
        self, rng: np.random.Generator, images: Sequence[_Present], acts: Sequence[_Act], narrator: _Narrator
    ) -> None:
        self.rng, self.narrator, self.present = rng, narrator, images[-1]
        self.shown = {(obj.shape, obj.color) for present in images for obj in present.values()}  # in any image
        self.recolored = {number for act in acts if act.op == "recolor" for number in act.numbers}

    def ask(self, kind: str) -> str | None:
        """A question of one of KINDS."""
        asks: Mapping[str, Callable[[], str | None]] = {
            "count": lambda: pick(self.rng, HOW_MANY),
            "exists": self._exists,
            "color": self._color,
            "position": self._position,
            "left_right": lambda: self._side("left or right of"),
            "above_below": lambda: self._side("above or below"),
            "size": self._size,
        }
        return asks[kind]()

    def _name(self, number: int) -> str:
        return definite(self.present[number], self.present.values())

    def _exists(self) -> str:
        """Half of the answers are "no", about an object that was there in an earlier image if there is one."""
        now = {(obj.shape, obj.color) for obj in self.present.values()}
        shapes = {shape for shape, _ in now}
        names_color, pairs = self.rng.random() < 0.5, sorted(now)
        if self.rng.random() < 0.5:
            gone = self.shown - now if names_color else {pair for pair in self.shown if pair[0] not in shapes}
            never = {(s, c) for s in range(len(SHAPES)) if s not in shapes for c in colors_of(s)}
            pairs = sorted(gone or never)
        shape, color = pick(self.rng, pairs)
        return f"is there {article(str(Look(shape, color)) if names_color else SHAPES[shape])}?"

    def _color(self) -> str | None:
        shapes = [obj.shape for obj in self.present.values()]
        clear = [number for number, obj in self.present.items() if shapes.count(obj.shape) == 1]
        clear = [number for number in clear if number in self.recolored] or clear
        return f"what color is {self._name(pick(self.rng, clear))}?" if clear else None

    def _size(self) -> str | None:
        unnamed = [number for number in self.present if not self.narrator.names_size[number]]
        return f"what size is {self._name(pick(self.rng, unnamed))}?" if unnamed else None

    def _unrelated_pairs(self) -> list[tuple[int, int]]:
        """Pairs of objects whose relation no request named, in random order."""
        pairs = itertools.permutations(self.present, 2)
        return shuffled(self.rng, [pair for pair in pairs if frozenset(pair) not in self.narrator.related])

    def _may_say(self, a: int, sides: Iterable[Relation], b: int) -> bool:
        """True if "a is SIDE b" names nothing held out for any of the sides; two objects of one shape never do."""
        first, second = self.present[a].shape, self.present[b].shape
        return first == second or all(withheld().allows_fact(first, side, second) for side in sides)

    def _position(self) -> str | None:
        is_yes = self.rng.random() < 0.5
        for a, b in self._unrelated_pairs():
            for side in shuffled(self.rng, sorted(relations(self.present[a], self.present[b]))):
                if self._may_say(a, (side, OPPOSITES[side]), b):  # both, or "yes" would be likelier
                    return f"is {self._name(a)} {side if is_yes else OPPOSITES[side]} {self._name(b)}?"
        return None

    def _side(self, words: str) -> str | None:
        for a, b in self._unrelated_pairs():
            is_clear = not relations(self.present[a], self.present[b]).isdisjoint(SIDES[words])
            if is_clear and self._may_say(a, SIDES[words], b):
                return f"is {self._name(a)} {words} {self._name(b)}?"
        return None


# ------------------------------------------------------------------------------------------- drafting


def _draft(rng: np.random.Generator, plan: _Plan, rules: _Rules) -> _Draft | None:
    """One try at a story by the plan; None if it fails."""
    cast = _cast(rng, plan, rules)
    if cast is None:
        return None
    for _ in range(_SCRIPTS):
        acts = _script(rng, plan.ops, cast, rules)
        images = _play(acts, cast) if acts else []
        scenes = [Scene(objects=tuple(present.values()), background=cast.background) for present in images]
        if acts and _is_allowed(scenes, rules):
            objects = cast.objects[: 1 + max(act.number for act in acts)]
            named = plan.sizes(rules).named
            names_size = [bool(rng.random() < named[obj.size]) for obj in objects]
            narrator = _Narrator(rng, names_size, leaves_open=_OPEN if rules.words != "plain" else 0.0)
            return _narrated(narrator, acts, images, scenes, plan.kind)
    return None


def _narrated(
    narrator: _Narrator, acts: Sequence[_Act], images: Sequence[_Present], scenes: Sequence[Scene], kind: str
) -> _Draft | None:
    """The acts as changes in their order, and a question; None if words cannot do it."""
    moves, before = [], dict[int, SceneObject]()
    for act, scene, after in zip(acts, scenes, images, strict=True):
        move = narrator.move(act, before, scene, after)
        if move is None:
            return None
        moves.append(move)
        before = dict(after)
    question = _EndQuestions(narrator.rng, images, acts, narrator).ask(kind)
    answer = answer_question(question, scenes[-1].objects) if question else None
    return _Draft(tuple(moves), question, answer, kind) if question and answer else None


def _draft_until_done(rng: np.random.Generator, rules: _Rules) -> _Draft:
    """The first draft by one plan that succeeds."""
    plan = _plan(rng, rules)
    while True:
        draft = _draft(rng, plan, rules)
        if draft is not None:
            return draft


def _worded(draft: _Draft, wording: Bucket | None, rng: np.random.Generator) -> Story:
    """The draft in the plain forms of a split, or with None in the words of training's grammar."""
    steps: list[Step] = []
    looks: tuple[Look, ...] = ()
    for move in draft.moves:
        if wording is None:
            instruction = free_request(move.change, looks, rng, uses_pronoun=move.uses_pronoun)
        else:
            instruction = request(move.change, looks, wording, rng, uses_pronoun=move.uses_pronoun)
        text = sentence(move.looks, move.change)
        steps.append(Step(instruction=instruction, sentence=text, scene=move.scene, change=move.change))
        looks = move.looks
    return Story(steps=tuple(steps), question=draft.question, answer=draft.answer, kind=draft.kind)


def story_task(seed: int, index: int) -> Story:
    """Training story number `index`: a pure function of its arguments, free of anything held out.

    >>> len(story_task(0, 3).steps), story_task(0, 3) == story_task(0, 3)
    (4, True)
    """
    return random_story(stream(seed, index, _STORY), several=True)


def random_story(rng: np.random.Generator, *, several: bool = False) -> Story:
    """A story that training may tell, in the words of training's grammar; several: some requests are about many.

    Checks of images are about one object at a time, and so are the stories that they are made from.
    """
    rules = _Rules("train", words="several" if several else "free")
    return _worded(_draft_until_done(rng, rules), None, rng)


def suite_stories(split: Split, part: Part = "id", count: int = 64) -> list[Story]:
    """The frozen stories of a split, whose last scenes lie in its bucket; a larger `count` only adds stories.

    "id": seen combinations, training wording. "cg": each story shows, in one image or more, one of CG_ROWS that
    `split` holds out and nothing else held out ("edit": it asks for a held-out change of colour). "paraphrase": the
    stories of "id", with requests worded as training never words them. "plain": other stories like those of "id", in
    the words of training's grammar, some adding objects without a place or changing several at once. Raises
    ConfigError for another split or part.
    """
    for name, value, known in (("split", split, get_args(Split)), ("part", part, get_args(Part))):
        if value not in known:
            raise ConfigError(f"{name}={value!r}: expected one of {', '.join(known)}")
    stories = []
    for item in range(count):
        rules = _Rules(
            split, CG_ROWS[item % len(CG_ROWS)] if part == "cg" else "", "several" if part == "plain" else "plain"
        )
        kind = {"cg": 1, "plain": 2}.get(part, 0)
        numbers = (_SUITE_SEED, _STORY, get_args(Split).index(split), kind, item + 1)
        draft = _draft_until_done(stream(*numbers), rules)
        wording: Bucket | None = {"paraphrase": split, "plain": None}.get(part, "train")
        words_rng = stream(*numbers, 1)  # apart from that of the scenes, which wording must not change
        stories.append(_worded(draft, wording, words_rng))
    return stories


def story_beginning(seed: int, index: int) -> SceneDialogue:
    """Training dialogue number `index` of a story that stops at its second or third image, without a question.

    The last image of a dialogue teaches most about what a request changes (docs/choices.md#beginnings).

    >>> len(story_beginning(0, 0).turns) in (2, 3)
    True
    """
    steps = 2 if stream(seed, index, _BEGINNING).random() < _TWO else 3
    dialogue = story_dialogue(story_task(seed, index))
    return Dialogue(dialogue.turns[:steps], "story beginning")
