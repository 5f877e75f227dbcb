"""Long prompts about the drawn world, each with a tree of questions that a right picture answers with yes.

The prompts of W-DPG: three or four objects, how many there are and on what background, a sentence for each object, and
two relations. A question hangs on others: the colour of a star is only asked for if there is a star. Test prompts
only; `tasks` draws the dense captions of training. All text is lower case, and numbers are words.
Categories and dependencies after DPG-Bench (Hu et al. 2024). Our choice: docs/choices.md#world.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np

from starflow2.errors import ConfigError
from starflow2.world.captions import NUMBERS
from starflow2.world.multiple_choice import draw_scene, place_of
from starflow2.world.scene import (
    BACKGROUND_NAMES,
    COLORS,
    SHAPES,
    SIZES,
    Relation,
    Scene,
    SceneObject,
    Split,
    pick,
    relations,
    stream,
)
from starflow2.world.splits import scene_key

__all__ = ["CATEGORIES", "PROMPTS", "DensePrompt", "Node", "suite_dense"]

Category = Literal["global", "entity", "attribute", "relation", "other"]
Topic = Literal["background", "shape", "color", "size", "place", "relation", "count"]
Part = Literal["id", "cg"]

CATEGORIES: Final[tuple[Category, ...]] = get_args(Category)
_Told = tuple[int, Relation, int]  # which object stands how to which
PROMPTS: Final = 128  # half of them "id", half "cg"

_SUITE_SEED: Final = 2026  # frozen: changing it, or the order of draws below, makes another benchmark
_DPG: Final = 23  # second number of a stream
_OPENINGS: Final = (
    "there are {n} objects on a {tint} background.",
    "a picture with {n} objects on a {tint} background.",
    "please make a picture with a {tint} background and {n} objects.",
)
_SENTENCES: Final = (  # {a} with article; some with words that ask for nothing
    "there is {a} {place}.",
    "{a} is {place}.",
    "{place} there is {a}.",
    "in the picture {place} is {a}.",
    "please show {a} {place}.",
)
_UNPLACED: Final = ("there is {a}.", "in the picture there is {a}.", "please show {a}.")
_RELATION: Final = "the {a} is {rel} the {b}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A question that the right picture answers with yes. `subject` and `other` index the scene's objects."""

    number: int
    category: Category
    topic: Topic
    question: str
    value: str  # what is asked for: a tint, shape, colour, size, place, relation or number
    subject: int | None = None
    other: int | None = None  # what the subject stands in relation to
    parents: tuple[int, ...] = ()  # numbers of questions that must be answered yes before this one counts


@dataclass(frozen=True, slots=True, kw_only=True)
class DensePrompt:
    """A prompt, a scene that fulfils it, and its questions in the order of their numbers, parents first."""

    prompt: str
    scene: Scene
    tree: tuple[Node, ...]
    part: Part


def _kind(obj: SceneObject) -> str:
    return f"{COLORS[obj.color]} {SHAPES[obj.shape]}"


def _told_relations(scene: Scene, rng: np.random.Generator) -> list[_Told]:
    """Two relations between different pairs of objects, or fewer if the scene has fewer; of any two boxes at most one
    relation holds, so that neither wording is wrong."""
    pairs = list(itertools.combinations(range(len(scene.objects)), 2))
    told: list[_Told] = []
    for index in rng.permutation(len(pairs)).tolist():
        a, b = pairs[index] if rng.random() < 0.5 else pairs[index][::-1]
        found = sorted(relations(scene.objects[a], scene.objects[b]))
        if len(found) == 1 and len(told) < 2:
            told.append((a, found[0], b))
    return told


class _Tree:
    """Grows a prompt's questions, numbered from 1."""

    def __init__(self, scene: Scene) -> None:
        self.nodes: list[Node] = []
        tint = BACKGROUND_NAMES[scene.background]
        self._add("global", "background", f"is the background {tint}?", tint)
        self.entities = [self._object(index, obj) for index, obj in enumerate(scene.objects)]
        count = NUMBERS[len(scene.objects)]
        self._add("other", "count", f"are there exactly {count} objects?", count, parents=(self.entities[0],))

    def _add(self, category: Category, topic: Topic, question: str, value: str, **rest: Any) -> int:
        """Appends a question and returns its number. rest: the optional fields of Node."""
        number = len(self.nodes) + 1
        node = Node(number=number, category=category, topic=topic, question=question, value=value, **rest)
        self.nodes.append(node)
        return number

    def _object(self, index: int, obj: SceneObject) -> int:
        """The questions about one object; returns the number of the one whether it is there at all."""
        shape, color, size, place = SHAPES[obj.shape], COLORS[obj.color], SIZES[obj.size], place_of(obj)
        entity = self._add("entity", "shape", f"is there a {shape}?", shape, subject=index)
        self._add("attribute", "color", f"is the {shape} {color}?", color, subject=index, parents=(entity,))
        self._add("attribute", "size", f"is the {shape} {size}?", size, subject=index, parents=(entity,))
        if place is not None:
            self._add("relation", "place", f"is the {shape} {place}?", place, subject=index, parents=(entity,))
        return entity

    def relate(self, a: int, relation: Relation, b: int, question: str) -> None:
        """A question about two objects, which hangs on both."""
        parents = (self.entities[a], self.entities[b])
        self._add("relation", "relation", question, relation, subject=a, other=b, parents=parents)


def _worded(scene: Scene, told: Sequence[_Told], part: Part, rng: np.random.Generator) -> DensePrompt:
    tree = _Tree(scene)
    tint, count = BACKGROUND_NAMES[scene.background], NUMBERS[len(scene.objects)]
    sentences = [pick(rng, _OPENINGS).format(n=count, tint=tint)]
    for obj in scene.objects:
        noun, place = f"a {obj}", place_of(obj)
        form = pick(rng, _UNPLACED if place is None else _SENTENCES)
        sentences.append(form.format(a=noun, place=place))
    clauses = []
    for a, relation, b in told:
        names = {"a": _kind(scene.objects[a]), "b": _kind(scene.objects[b]), "rel": relation}
        clauses.append(_RELATION.format(**names))
        tree.relate(a, relation, b, f"is the {names['a']} {relation} the {names['b']}?")
    sentences.append(" and ".join(clauses) + ".")
    return DensePrompt(prompt=" ".join(sentences), scene=scene, tree=tuple(tree.nodes), part=part)


@functools.cache
def suite_dense(split: Split) -> tuple[DensePrompt, ...]:
    """The frozen prompts of a split, "id" first (unseen scenes, nothing held out), then "cg" (held-out colour-shape
    pairs in the picture, nothing else held out). Raises ConfigError for an unknown split.

    >>> suite_dense("dev")[0].tree[0].category
    'global'
    """
    if split not in get_args(Split):
        raise ConfigError(f"split: expected one of {', '.join(get_args(Split))}, got {split!r}")
    made: list[DensePrompt] = []
    shown: set[tuple[int, ...]] = set()
    for index in range(PROMPTS):
        rng = stream(_SUITE_SEED, _DPG, get_args(Split).index(split), index)
        part: Part = "id" if index < PROMPTS // 2 else "cg"
        while True:
            scene = draw_scene(rng, split, novel=part == "cg", num_objects=3 + index % 2)
            told = _told_relations(scene, rng)
            are_clear = len({_kind(t) for t in scene.objects}) == len(scene.objects)
            if are_clear and len(told) == 2 and scene_key(scene) not in shown:
                break
        shown.add(scene_key(scene))
        made.append(_worded(scene, told, part, rng))
    return tuple(made)
