"""Long prompts about the drawn world, each with a tree of questions that a right image answers with yes.

The prompts of W-DPG: three or four objects, how many there are and on what background, a sentence for each object, and
two relations. A question depends on its parents: the colour of a star counts only if there is a star. Test prompts
only; the dense captions of training are made in `captions`.
Categories and dependencies after DPG-Bench (Hu et al. 2024). Our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

from starflow2.errors import ConfigError
from starflow2.world.sampling import sample_split_scene
from starflow2.world.scene import (
    BACKGROUND_NAMES,
    COLORS,
    EDGE,
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
from starflow2.world.words import NUMBERS, kind_of, place_of

__all__ = ["CATEGORIES", "PROMPTS", "DensePrompt", "Node", "suite_dense"]

Category = Literal["global", "entity", "attribute", "relation", "other"]
Topic = Literal["background", "shape", "color", "size", "place", "relation", "count"]
Part = Literal["id", "cg"]

CATEGORIES: Final[tuple[Category, ...]] = get_args(Category)
_Stands = tuple[int, Relation, int]  # (object, relation, object), by index in the scene
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


@dataclass(frozen=True, slots=True)
class Node:
    """A question that the right image answers with yes. `subject` and `other` index the scene's objects."""

    number: int
    category: Category
    topic: Topic
    question: str
    value: str  # the background, shape, colour, size, place, relation or number that the question names
    subject: int | None = None
    other: int | None = None  # second object of a relation
    parents: tuple[int, ...] = ()  # numbers of questions that must be answered yes before this one counts


@dataclass(frozen=True, slots=True, kw_only=True)
class DensePrompt:
    """A prompt, a scene that fulfils it, and its questions in the order of their numbers, parents first."""

    prompt: str
    scene: Scene
    tree: tuple[Node, ...]
    part: Part


def _sample_relations(scene: Scene, rng: np.random.Generator) -> list[_Stands]:
    """Two relations between different pairs of objects, or fewer if the scene has fewer.

    Only pairs between which exactly one relation holds are used, so that no other wording would be right.
    """
    pairs = list(itertools.combinations(range(len(scene.objects)), 2))
    rows: list[_Stands] = []
    for index in rng.permutation(len(pairs)).tolist():
        a, b = pairs[index] if rng.random() < 0.5 else pairs[index][::-1]
        found = sorted(relations(scene.objects[a], scene.objects[b]))
        if len(found) == 1 and len(rows) < 2:
            rows.append((a, found[0], b))
    return rows


class _Tree:
    """Grows a prompt's questions, numbered from 1."""

    def __init__(self, scene: Scene) -> None:
        self.nodes: list[Node] = []
        tint = BACKGROUND_NAMES[scene.background]
        self._add(Node(self._next, "global", "background", f"is the background {tint}?", tint))
        self.entities = [self._object(index, obj) for index, obj in enumerate(scene.objects)]
        count = NUMBERS[len(scene.objects)]
        parents = (self.entities[0],)
        self._add(Node(self._next, "other", "count", f"are there exactly {count} objects?", count, parents=parents))

    @property
    def _next(self) -> int:
        return len(self.nodes) + 1

    def _add(self, node: Node) -> int:
        self.nodes.append(node)
        return node.number

    def _object(self, index: int, obj: SceneObject) -> int:
        """Adds the questions about one object; returns the number of the one that asks whether it is there."""
        shape, color, size = SHAPES[obj.shape], COLORS[obj.color], SIZES[obj.size]
        entity = self._add(Node(self._next, "entity", "shape", f"is there a {shape}?", shape, subject=index))
        self._about(entity, index, "attribute", "color", shape, color)
        self._about(entity, index, "attribute", "size", shape, size)
        place = place_of(obj, edge=EDGE)
        if place is not None:
            self._about(entity, index, "relation", "place", shape, place)
        return entity

    def _about(self, entity: int, index: int, category: Category, topic: Topic, shape: str, value: str) -> None:
        question = f"is the {shape} {value}?"
        self._add(Node(self._next, category, topic, question, value, subject=index, parents=(entity,)))

    def relate(self, a: int, relation: Relation, b: int, question: str) -> None:
        """Adds a question about two objects, which depends on both."""
        parents = (self.entities[a], self.entities[b])
        self._add(Node(self._next, "relation", "relation", question, relation, subject=a, other=b, parents=parents))


def _worded(scene: Scene, rows: Sequence[_Stands], part: Part, rng: np.random.Generator) -> DensePrompt:
    tree = _Tree(scene)
    tint, count = BACKGROUND_NAMES[scene.background], NUMBERS[len(scene.objects)]
    sentences = [pick(rng, _OPENINGS).format(n=count, tint=tint)]
    for obj in scene.objects:
        noun, place = f"a {obj}", place_of(obj, edge=EDGE)
        form = pick(rng, _UNPLACED if place is None else _SENTENCES)
        sentences.append(form.format(a=noun, place=place))
    clauses = []
    for a, relation, b in rows:
        names = {"a": kind_of(scene.objects[a]), "b": kind_of(scene.objects[b]), "rel": relation}
        clauses.append(_RELATION.format(**names))
        tree.relate(a, relation, b, f"is the {names['a']} {relation} the {names['b']}?")
    sentences.append(" and ".join(clauses) + ".")
    return DensePrompt(prompt=" ".join(sentences), scene=scene, tree=tuple(tree.nodes), part=part)


@functools.cache
def suite_dense(split: Split) -> tuple[DensePrompt, ...]:
    """The frozen prompts of a split, "id" before "cg". Raises ConfigError for an unknown split.

    "id": unseen scenes with nothing held out. "cg": scenes with held-out colour-shape pairs and nothing else held out.

    >>> suite_dense("dev")[0].tree[0].category
    'global'
    """
    if split not in get_args(Split):
        raise ConfigError(f"split={split!r}: expected one of {', '.join(get_args(Split))}")
    made: list[DensePrompt] = []
    shown: set[tuple[int, ...]] = set()
    for index in range(PROMPTS):
        rng = stream(_SUITE_SEED, _DPG, get_args(Split).index(split), index)
        part: Part = "id" if index < PROMPTS // 2 else "cg"
        while True:
            scene = sample_split_scene(rng, split, novel=part == "cg", num_objects=3 + index % 2)
            rows = _sample_relations(scene, rng)
            are_clear = len({kind_of(t) for t in scene.objects}) == len(scene.objects)
            if are_clear and len(rows) == 2 and scene_key(scene) not in shown:
                break
        shown.add(scene_key(scene))
        made.append(_worded(scene, rows, part, rng))
    return tuple(made)
