"""Captions of the drawn world: training items, plain wordings, GenEval metadata, and the frozen prompt suites.

Training items are pure functions of seed and index, worded by `grammar`, and combine nothing that `splits` withholds;
nor do they use the sentence forms that `WORDINGS` reserves for dev and test, nor say what `prompt_part` reserves.
Suites are worded by the plain forms. Scenes and what is said of them come from `briefs`.
The six families and the metadata format are GenEval's (Ghosh et al. 2023). Our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal, NotRequired, TypedDict

import numpy as np

from starflow2.errors import ConfigError
from starflow2.world.briefs import BRIEFS, SCENES, Brief, content_of, menu_of, scene_content
from starflow2.world.content import Content, Group, prompt_part, scene_of
from starflow2.world.grammar import FAMILIES, WORDINGS, say
from starflow2.world.scene import (
    BACKGROUND_NAMES,
    COLORS,
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
    stream,
)
from starflow2.world.splits import bucket, held_out, is_trainable
from starflow2.world.words import NUMBERS, PLURALS, article, place_of

__all__ = [
    "BACKGROUND_WORDS",
    "DENSE_BACKGROUND",
    "DENSE_COUNT",
    "DENSE_RELATION",
    "RELATION_WORDS",
    "SCENE_FAMILIES",
    "T2I_MIX",
    "TOGETHER",
    "CaptionedScene",
    "GenEvalMetadata",
    "GenEvalObject",
    "caption",
    "caption_task",
    "metadata",
    "new_drawings",
    "noun",
    "paraphrase_drawings",
    "random_caption",
    "scene_drawings",
    "scene_metadata",
    "suite_drawings",
]

SCENE_FAMILIES: Final = tuple(SCENES)
T2I_MIX: Final[Mapping[str, float]] = MappingProxyType(
    {
        "single_object": 0.05,
        "two_object": 0.20,
        "counting": 0.12,
        "colors": 0.08,  # short captions that say most about the image teach the words fastest
        "position": 0.15,  # which word belongs to what is learnt last
        "color_attr": 0.17,
        "dense": 0.02,
        "mixed": 0.07,
        "many": 0.05,
        "placed": 0.06,
        "sized": 0.03,
    }
)
_BARE: Final = 0.1  # share of captions of several coloured groups that leave one colour unsaid
_CAPTION: Final = 1  # third number of a stream, so that no other task repeats these draws for the same seed and index
_SUITE, _SCENES = 3, 4  # second numbers of the streams of suites
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
class CaptionedScene:
    """One text-to-image item: the prompt, a scene that satisfies it, GenEval's metadata line, and what is said."""

    prompt: str
    scene: Scene
    family: str
    metadata: GenEvalMetadata
    content: Content


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

    >>> from starflow2.world.scene import sample_scene
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


def scene_metadata(content: Content, family: str, prompt: str) -> GenEvalMetadata:
    """Request of a caption of one of SCENE_FAMILIES in the format of GenEval, which has no sizes and places.

    As there, the reference object of a relation comes first.
    """
    rows = [_group_entry(group) for group in content.groups]
    if content.relation is not None:
        rows[0]["position"] = [content.relation, 0]
        rows[:2] = rows[1::-1]
    return {"tag": family, "include": rows, "prompt": prompt}


def _group_entry(group: Group) -> GenEvalObject:
    entry: GenEvalObject = {"class": SHAPES[group.shape], "count": group.count}
    if group.color is not None:
        entry["color"] = COLORS[group.color]
    return entry


def _drawing(brief: Brief, prompt: str) -> CaptionedScene:
    content = content_of(brief)
    row = metadata(brief, prompt)
    return CaptionedScene(prompt=prompt, scene=brief.scene, family=brief.family, metadata=row, content=content)


def _family(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    known = (*BRIEFS, *SCENES)
    unknown = sorted(set(weights) - set(known))
    if unknown or not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ConfigError(f"weights={dict(weights)}: expected non-negative shares of {', '.join(known)}")
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
    return random_caption(rng, _family(rng, weights))


def random_caption(rng: np.random.Generator, family: str) -> CaptionedScene:
    """A training item of a family."""
    while True:
        if family in SCENES:
            content, scene = scene_content(rng, family)
            if prompt_part(content) == "train":
                prompt = say(content, rng)
                row = scene_metadata(content, family, prompt)
                return CaptionedScene(prompt=prompt, scene=scene, family=family, metadata=row, content=content)
            continue
        brief = BRIEFS[family](rng, menu_of(), family)
        content = _loosened(content_of(brief), rng)
        if is_trainable(brief.scene) and prompt_part(content) == "train":
            is_plain = family == "dense" and chance(rng, 0.5)
            prompt = caption(brief, rng) if is_plain else say(content, rng)
            row = scene_metadata(content, family, prompt) if content != content_of(brief) else metadata(brief, prompt)
            return CaptionedScene(prompt=prompt, scene=brief.scene, family=family, metadata=row, content=content)


def _loosened(content: Content, rng: np.random.Generator) -> Content:
    """The content, or by chance without the colour of one of its groups."""
    if len(content.groups) < 2 or content.groups[0].color is None or not chance(rng, _BARE):
        return content
    groups = list(content.groups)
    index = int(rng.integers(len(groups)))
    groups[index] = replace(groups[index], color=None)
    return replace(content, groups=tuple(groups))


_ROWS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(  # held out per family; single_object combines nothing
    {
        "two_object": ("shapes",),
        "counting": ("count",),
        "colors": ("pair",),
        "position": ("fact",),
        "color_attr": ("pair", "pairs"),  # one of two, both
    }
)


def _suite_stream(split: Split, part: Literal["id", "cg", "paraphrase", "new"], family: str) -> tuple[int, ...]:
    """The first numbers of all streams of one part and family of a suite."""
    parts = ("id", "cg", "paraphrase", "new")
    return (_SUITE_SEED, _SUITE, ("dev", "test").index(split), parts.index(part), FAMILIES.index(family))


@functools.cache  # "paraphrase" words the briefs of "id" a second time
def _suite_briefs(split: Split, part: Literal["id", "cg"], family: str, count: int) -> tuple[Brief, ...]:
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
        menu = menu_of(split, row) if row else menu_of()
        tries = 0
        while True:
            brief = BRIEFS[family](rng, menu, family)
            if bucket(brief.scene) != split or held_out(brief.scene, split) != wanted or held_out(brief.scene, other):
                continue
            plain = caption(brief, stream(0))  # one form for all, so that only the content is compared
            tries += 1
            if plain not in captions or tries > 20:
                break
        captions.add(plain)
        briefs.append(brief)
    return tuple(briefs)


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


def new_drawings(split: Split, per_category: int = 64) -> list[CaptionedScene]:
    """Prompts of the six families whose content no training prompt has, though all that they combine was seen.

    Plain wording; `content.prompt_part` reserves the contents.
    """
    drawings = []
    for family in FAMILIES:
        for item in range(per_category):
            rng = stream(*_suite_stream(split, "new", family), item)
            drawings.append(_new_drawing(split, family, rng))
    return drawings


def _new_drawing(split: Split, family: str, rng: np.random.Generator) -> CaptionedScene:
    while True:
        brief = BRIEFS[family](rng, menu_of(), family)
        content = content_of(brief)
        scene = scene_of(content, rng, split) if prompt_part(content) == split else None
        if scene is not None:
            brief = replace(brief, scene=scene)
            return _drawing(brief, caption(brief, rng))


def scene_drawings(split: Split, per_category: int = 64) -> list[CaptionedScene]:
    """Prompts of SCENE_FAMILIES about unseen scenes with nothing held out, in the words of training's grammar."""
    drawings = []
    for index, family in enumerate(SCENE_FAMILIES):
        for item in range(per_category):
            rng = stream(_SUITE_SEED, _SCENES, ("dev", "test").index(split), index, item)
            content, scene = scene_content(rng, family, split)
            prompt = say(content, rng)
            row = scene_metadata(content, family, prompt)
            drawings.append(CaptionedScene(prompt=prompt, scene=scene, family=family, metadata=row, content=content))
    return drawings
