"""Captions of the drawn world: briefs drawn by family, their wordings, GenEval metadata, and the frozen prompt suites.

A `Brief` is a scene plus what its caption says about it; what the caption leaves out is random, and every object of the
scene is mentioned. Training items are pure functions of seed and index, and combine nothing that `splits.WITHHELD`
reserves; nor do they use the sentence forms that `WORDINGS` reserves for dev and test.
The six families and the metadata format are GenEval's (Ghosh et al. 2023). Our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, NotRequired, TypedDict

import numpy as np

from starflow2.errors import ConfigError
from starflow2.world.sampling import sample_crowd
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
    sample_scene,
    stream,
)
from starflow2.world.splits import HELD_OUT, WITHHELD, bucket, colors_of, held_out, is_trainable
from starflow2.world.words import NUMBERS, PLURALS, Wording, article, place_of

__all__ = [
    "BACKGROUND_WORDS",
    "DENSE_BACKGROUND",
    "DENSE_COUNT",
    "DENSE_RELATION",
    "FAMILIES",
    "RELATION_WORDS",
    "T2I_MIX",
    "TOGETHER",
    "WORDINGS",
    "Brief",
    "CaptionedScene",
    "GenEvalMetadata",
    "GenEvalObject",
    "caption",
    "caption_task",
    "metadata",
    "noun",
    "paraphrase_drawings",
    "suite_drawings",
]

FAMILIES: Final = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
T2I_MIX: Final[Mapping[str, float]] = MappingProxyType(
    {
        "single_object": 0.06,
        "two_object": 0.28,
        "counting": 0.14,
        "colors": 0.10,  # short captions that say most about the image teach the words fastest
        "position": 0.18,  # which word belongs to what is learnt last
        "color_attr": 0.22,
        "dense": 0.02,
    }
)
_CAPTION: Final = 1  # third number of a stream, so that no other task repeats these draws for the same seed and index
_SUITE: Final = 3  # second number of a suite's stream
_SUITE_SEED: Final = 2026  # frozen: changing it, or the order of draws below, makes another benchmark

GenEvalObject = TypedDict(  # one row of "include" or "exclude"
    "GenEvalObject",
    {"class": str, "count": int, "color": NotRequired[str], "position": NotRequired[list[str | int]]},
)


class GenEvalMetadata(TypedDict):
    """A line of GenEval's metadata file; "exclude" only where objects are counted."""

    tag: str
    include: list[GenEvalObject]
    exclude: NotRequired[list[GenEvalObject]]
    prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Brief:
    """A scene and what its caption has to say; objects are mentioned in the order of `scene.objects`."""

    scene: Scene
    family: str
    mentions: frozenset[str]  # of "color", "size", "background"
    relation: Relation | None = None  # what the first object is with respect to the second


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedScene:
    """One text-to-image item: the prompt, a scene that satisfies it, and GenEval's metadata line."""

    prompt: str
    scene: Scene
    family: str
    metadata: GenEvalMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class _Menu:
    """Combinations that a brief may be drawn from: those of training, one row replaced for a held-out suite."""

    colors: tuple[tuple[int, ...], ...]  # by shape
    second_colors: tuple[tuple[int, ...], ...]  # likewise, for the second object
    shapes: tuple[tuple[int, int], ...]  # two different shapes that may meet
    relations: tuple[tuple[int, Relation, int], ...]  # (shape, relation, shape)
    counts: tuple[tuple[int, int], ...]  # (shape, how many)


@functools.cache
def _menu(split: Split | None = None, row: str = "") -> _Menu:
    """The training menu, or that menu with one row ("pair", "pairs", "fact", "shapes", "count") held out by `split`."""
    k, guard = range(len(SHAPES)), WITHHELD["train"]
    meets = tuple(pair for pair in itertools.combinations(k, 2) if guard.allows_together(pair))
    stands = [(a, r, b) for a, b in itertools.permutations(k, 2) for r in RELATIONS if tuple(sorted((a, b))) in meets]
    stands = [(a, r, b) for a, r, b in stands if guard.allows_fact(a, r, b)]
    counts = [(s, n) for s in k for n in range(2, MAX_OBJECTS + 1) if guard.allows_count(s, n)]
    colors = second = tuple(colors_of(shape) for shape in k)
    if split is not None:
        table = HELD_OUT[split]
        if row in ("pair", "pairs"):
            colors = tuple(colors_of(shape, split) for shape in k)
            second = colors if row == "pairs" else second
        elif row == "fact":
            ways = sorted(table.facts) + sorted((b, OPPOSITES[r], a) for a, r, b in table.facts)
            stands = [(a, r, b) for a, r, b in ways]
        elif row == "shapes":
            first_two = sorted(tuple(sorted(pair)) for pair in table.shapes)
            meets = tuple((pair[0], pair[1]) for pair in first_two)
        elif row == "count":
            counts = sorted(table.counts)
    return _Menu(colors=colors, second_colors=second, shapes=meets, relations=tuple(stands), counts=tuple(counts))


def _pick_mentions(rng: np.random.Generator, **chances: float) -> frozenset[str]:
    return frozenset(name for name, probability in chances.items() if chance(rng, probability))


def _brief_one(rng: np.random.Generator, menu: _Menu, family: str) -> Brief:
    shape = int(rng.integers(len(SHAPES)))
    scene = sample_scene(rng, shapes=[shape], colors=[pick(rng, menu.colors[shape])])
    mentions = _pick_mentions(rng, color=float(family == "colors"), size=0.3, background=0.25)
    return Brief(scene=scene, family=family, mentions=mentions)


def _brief_two(rng: np.random.Generator, menu: _Menu, family: str) -> Brief:
    a, b = pick(rng, menu.shapes)
    if chance(rng, 0.5):
        a, b = b, a
    options = (menu.colors, menu.second_colors) if chance(rng, 0.5) else (menu.second_colors, menu.colors)
    colors = [pick(rng, options[0][a]), pick(rng, options[1][b])]
    while family == "color_attr" and colors[0] == colors[1]:
        colors = [pick(rng, options[0][a]), pick(rng, options[1][b])]
    scene = sample_scene(rng, shapes=[a, b], colors=colors)
    mentions = _pick_mentions(rng, color=float(family == "color_attr"), size=0.2, background=0.2)
    return Brief(scene=scene, family=family, mentions=mentions)


def _brief_counting(rng: np.random.Generator, menu: _Menu, family: str) -> Brief:
    shape, count = pick(rng, menu.counts)
    one_color, one_size = chance(rng, 0.5), chance(rng, 0.5)
    colors = [pick(rng, menu.colors[shape]) for _ in range(count)]
    sizes = rng.integers(len(SIZES), size=count).tolist()
    scene = sample_scene(
        rng,
        shapes=[shape] * count,
        colors=colors[:1] * count if one_color else colors,
        sizes=sizes[:1] * count if one_size else sizes,
    )
    mentions = _pick_mentions(rng, color=0.6 * one_color, size=0.5 * one_size, background=0.2)
    return Brief(scene=scene, family=family, mentions=mentions)


def _brief_position(rng: np.random.Generator, menu: _Menu, family: str) -> Brief:
    a, relation, b = pick(rng, menu.relations)
    colors = [pick(rng, menu.colors[a]), pick(rng, menu.colors[b])]
    scene = sample_scene(rng, shapes=[a, b], colors=colors, relation=relation)
    mentions = _pick_mentions(rng, color=0.35, size=0.15, background=0.15)
    return Brief(scene=scene, family=family, mentions=mentions, relation=relation)


def _brief_dense(rng: np.random.Generator, menu: _Menu, family: str) -> Brief:
    scene = sample_crowd(rng, int(rng.integers(3, 5)))
    return Brief(scene=scene, family=family, mentions=frozenset({"color", "size", "background"}))


_BRIEFS: Final[Mapping[str, Callable[[np.random.Generator, _Menu, str], Brief]]] = MappingProxyType(
    {
        "single_object": _brief_one,
        "two_object": _brief_two,
        "counting": _brief_counting,
        "colors": _brief_one,
        "position": _brief_position,
        "color_attr": _brief_two,
        "dense": _brief_dense,
    }
)


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
    dev=("please make a drawing of {c}", "the image shows {c}"),
    test=("please paint an image that shows {c}", "show a drawing with {c} in it", "in the photo there {is} {c}"),
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
    dev=("show {a} that is {rel} {b}", "in the image {a} is {rel} {b}"),
    test=(
        "please paint {a} that is {rel} {b}",
        "there is {b} and {rel} it is {a}",
        "a drawing that shows {b}, and {a} is {rel} it",
    ),
)
_DENSE: Final = Wording(  # one sentence per object
    train=(
        "there is {a} {place}.",
        "{a} is {place}.",
        "{place} there is {a}.",
        "{place} is {a}.",
    ),
    dev=("draw {a} {place}.", "{place} show {a}."),
    test=("the picture shows {a} {place}.", "paint {a} {place}.", "please draw {a} {place}."),
)
WORDINGS: Final[Mapping[str, Wording]] = MappingProxyType(
    {family: _PHRASE for family in FAMILIES} | {"position": _POSITION, "dense": _DENSE}
)
TOGETHER: Final = ("{a} and {b}", "{a} and {b}", "{a} with {b}", "both {a} and {b}")
BACKGROUND_WORDS: Final = ("{c} on a {tint} background", "{c} with a {tint} background", "{c}, {tint} background")
RELATION_WORDS: Final[Mapping[Relation, tuple[str, ...]]] = MappingProxyType(
    {
        "left of": ("left of", "to the left of", "on the left side of"),
        "right of": ("right of", "to the right of", "on the right side of"),
        "above": ("above", "on top of", "over"),
        "below": ("below", "under", "beneath"),
    }
)
DENSE_BACKGROUND: Final = (
    "the background is {tint}.",
    "the picture has a {tint} background.",
    "a picture with a {tint} background.",
)
DENSE_RELATION: Final = ("the {kind_a} is {rel} the {kind_b}.",)
DENSE_COUNT: Final = (
    "there are {n} objects.",
    "the picture shows {n} objects.",
    "there are {n} objects in the picture.",
)


def _kind(obj: SceneObject, mentions: frozenset[str]) -> str:
    """An object in words, such as "small red circle", with only what is mentioned."""
    words = [SIZES[obj.size]] * ("size" in mentions) + [COLORS[obj.color]] * ("color" in mentions)
    return " ".join([*words, SHAPES[obj.shape]])


def noun(obj: SceneObject, mentions: frozenset[str]) -> str:
    """An object in words with its article, such as "a small red circle", with only what is mentioned."""
    return article(_kind(obj, mentions))


def _counted(objects: Sequence[SceneObject], mentions: frozenset[str]) -> str:
    """Objects of one shape in words, such as "two small red hearts"."""
    *words, _ = _kind(objects[0], mentions).split()
    return " ".join([NUMBERS[len(objects)], *words, PLURALS[objects[0].shape]])


def _caption_dense(scene: Scene, rng: np.random.Generator, wording: Bucket) -> str:
    full = frozenset({"color", "size"})
    opening = [pick(rng, DENSE_BACKGROUND)] if chance(rng, 0.75) else []
    sentences = [s.format(tint=BACKGROUND_NAMES[scene.background]) for s in opening]
    forms = WORDINGS["dense"].forms(wording)
    sentences += [pick(rng, forms).format(a=noun(t, full), place=place_of(t)) for t in scene.objects]
    room = 6 - len(sentences)
    closing = []
    if chance(rng, 0.6):
        closing.append(pick(rng, DENSE_COUNT).format(n=NUMBERS[len(scene.objects)]))
    rows = _relation_phrases(scene)
    for index in rng.permutation(len(rows))[: room - len(closing)].tolist():
        a, relation, b = rows[index]
        fields = {"kind_a": a, "kind_b": b, "rel": pick(rng, RELATION_WORDS[relation])}
        sentences.append(pick(rng, DENSE_RELATION).format(**fields))
        if chance(rng, 0.5):
            break
    return " ".join(sentences + closing[:room])


def _relation_phrases(scene: Scene) -> list[tuple[str, Relation, str]]:
    """Every true relation between objects that colour and shape tell apart, as (words, relation, words)."""
    kinds = [_kind(t, frozenset({"color"})) for t in scene.objects]
    clear = [(t, kind) for t, kind in zip(scene.objects, kinds, strict=True) if kinds.count(kind) == 1]
    return [
        (kind_a, relation, kind_b)
        for (a, kind_a), (b, kind_b) in itertools.permutations(clear, 2)
        if a.shape != b.shape
        for relation in sorted(relations(a, b))
    ]


def caption(brief: Brief, rng: np.random.Generator, wording: Bucket = "train") -> str:
    """The brief in words, by one of the family's sentence forms of that split.

    >>> scene = sample_scene(stream(0), shapes=[3], colors=[0])
    >>> "red star" in caption(Brief(scene=scene, family="colors", mentions=frozenset({"color"})), stream(1))
    True
    """
    objects, mentions = brief.scene.objects, brief.mentions
    if brief.family == "dense":
        return _caption_dense(brief.scene, rng, wording)
    form = pick(rng, WORDINGS[brief.family].forms(wording))
    if brief.relation is not None:
        a, b = objects
        fields = {"a": noun(a, mentions), "b": noun(b, mentions), "kind_a": SHAPES[a.shape], "kind_b": SHAPES[b.shape]}
        text = form.format(**fields, rel=pick(rng, RELATION_WORDS[brief.relation]))
    elif brief.family == "counting":
        text = form.format(**{"c": _counted(objects, mentions), "is": "are"})
    elif len(objects) == 2:
        both = pick(rng, TOGETHER).format(a=noun(objects[0], mentions), b=noun(objects[1], mentions))
        text = form.format(**{"c": both, "is": "is"})
    else:
        text = form.format(**{"c": noun(objects[0], mentions), "is": "is"})
    if "background" in mentions:
        text = pick(rng, BACKGROUND_WORDS).format(c=text, tint=BACKGROUND_NAMES[brief.scene.background])
    return text


def metadata(brief: Brief, prompt: str) -> GenEvalMetadata:
    """The brief as a line of GenEval's metadata.

    For "position" the reference object comes first and the subject second, as GenEval has it. "dense" is not a GenEval
    tag; its line lists the objects in the same format.
    """
    objects = brief.scene.objects
    if brief.family == "counting":
        include = [_entry(brief, objects[0], len(objects))]
        exclude: list[GenEvalObject] = [{"class": SHAPES[objects[0].shape], "count": len(objects) + 1}]
        return {"tag": brief.family, "include": include, "exclude": exclude, "prompt": prompt}
    if brief.relation is not None:
        subject = _entry(brief, objects[0])
        subject["position"] = [brief.relation, 0]
        include = [_entry(brief, objects[1]), subject]
    elif brief.family == "dense":
        kinds = [(obj.shape, obj.color) for obj in objects]
        first = {kind: obj for kind, obj in reversed(list(zip(kinds, objects, strict=True)))}
        include = [_entry(brief, obj, kinds.count(kind)) for kind, obj in first.items()]
    else:
        include = [_entry(brief, obj) for obj in objects]
    return {"tag": brief.family, "include": include, "prompt": prompt}


def _entry(brief: Brief, obj: SceneObject, count: int = 1) -> GenEvalObject:
    entry: GenEvalObject = {"class": SHAPES[obj.shape], "count": count}
    if "color" in brief.mentions:
        entry["color"] = COLORS[obj.color]
    return entry


def _drawing(brief: Brief, prompt: str) -> CaptionedScene:
    return CaptionedScene(prompt=prompt, scene=brief.scene, family=brief.family, metadata=metadata(brief, prompt))


def _family(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    unknown = sorted(set(weights) - set(_BRIEFS))
    if unknown or not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ConfigError(f"weights={dict(weights)}: expected non-negative shares of {', '.join(_BRIEFS)}")
    place = rng.random() * sum(weights.values())
    for family, weight in weights.items():
        place -= weight
        if place < 0:
            return family
    return family


def caption_task(seed: int, index: int, *, weights: Mapping[str, float] = T2I_MIX) -> CaptionedScene:
    """Text-to-image training item number `index`: a pure function of its arguments, free of anything held out.

    >>> caption_task(0, 5) == caption_task(0, 5)
    True
    """
    rng = stream(seed, index, _CAPTION)
    family = _family(rng, weights)
    while True:
        brief = _BRIEFS[family](rng, _menu(), family)
        if is_trainable(brief.scene):
            return _drawing(brief, caption(brief, rng))


_ROWS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(  # held out per family; single_object combines nothing
    {
        "two_object": ("shapes",),
        "counting": ("count",),
        "colors": ("pair",),
        "position": ("fact",),
        "color_attr": ("pair", "pairs"),  # one of two, both
    }
)


def _suite_stream(split: Split, part: Literal["id", "cg", "paraphrase"], family: str) -> tuple[int, ...]:
    """The first numbers of all streams of one part and family of a suite."""
    parts = ("id", "cg", "paraphrase")
    return (_SUITE_SEED, _SUITE, ("dev", "test").index(split), parts.index(part), FAMILIES.index(family))


def _suite_briefs(split: Split, part: Literal["id", "cg"], family: str, count: int) -> list[Brief]:
    """`count` briefs of one family with scenes of the split's bucket, with different captions if there are enough.

    "id": nothing held out. "cg": the family's row is held out by the split and nothing else is held out.
    """
    other: Split = "dev" if split == "test" else "test"
    briefs: list[Brief] = []
    captions: set[str] = set()
    for item in range(count):
        rng = stream(*_suite_stream(split, part, family), item)
        row = _ROWS[family][item % len(_ROWS[family])] if part == "cg" else ""
        wanted = {row.rstrip("s") if family == "color_attr" else row} if row else set()
        menu = _menu(split, row) if row else _menu()
        tries = 0
        while True:
            brief = _BRIEFS[family](rng, menu, family)
            if bucket(brief.scene) != split or held_out(brief.scene, split) != wanted or held_out(brief.scene, other):
                continue
            plain = caption(brief, stream(0))  # one form for all, so that only the content is compared
            tries += 1
            if plain not in captions or tries > 20:
                break
        captions.add(plain)
        briefs.append(brief)
    return briefs


def _worded(briefs: Sequence[Brief], wording: Bucket, numbers: tuple[int, ...]) -> list[CaptionedScene]:
    """The briefs in words; a prompt differs from those before it unless 20 tries all repeat one."""
    drawings: list[CaptionedScene] = []
    prompts: set[str] = set()
    for item, brief in enumerate(briefs):
        rng = stream(*numbers, item, 1)  # a stream apart from that of the scene
        prompt = next((p for p in (caption(brief, rng, wording) for _ in range(20)) if p not in prompts), None)
        prompt = caption(brief, rng, wording) if prompt is None else prompt
        prompts.add(prompt)
        drawings.append(_drawing(brief, prompt))
    return drawings


def suite_drawings(
    suite: Literal["geneval"], split: Split, part: Literal["id", "cg"], per_category: int = 64
) -> list[CaptionedScene]:
    """The frozen prompts of a benchmark, category by category; a larger `per_category` only adds items.

    "id": six families, unseen scenes, seen combinations, training wording. "cg": five families (single_object has no
    combination), each item with the combination of its family that `split` holds out: colors a colour-shape pair,
    color_attr one or both pairs, position a fact, counting a count, two_object two shapes together.
    """
    if suite != "geneval":
        raise ConfigError(f"suite={suite!r}: expected 'geneval', the only suite of prompts made here")
    families = FAMILIES if part == "id" else tuple(f for f in FAMILIES if f in _ROWS)
    return [
        drawing
        for family in families
        for drawing in _worded(
            _suite_briefs(split, part, family, per_category), "train", _suite_stream(split, part, family)
        )
    ]


def paraphrase_drawings(split: Split, per_category: int = 64) -> list[CaptionedScene]:
    """The "id" items of `suite_drawings` in the same order and scenes, worded in the forms reserved for `split`."""
    return [
        drawing
        for family in FAMILIES
        for drawing in _worded(
            _suite_briefs(split, "id", family, per_category), split, _suite_stream(split, "paraphrase", family)
        )
    ]
