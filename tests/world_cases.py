"""Held-out rules of the drawn world written down a second time, so that tests do not trust the package's own tables."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache

from numpy import uint8
from numpy.typing import NDArray

from starflow2.core.dialogue import Dialogue
from starflow2.world.scene import COLORS, SHAPES, Scene, SceneObject, render, sample_scene, stream

NUMBERS = ("zero", "one", "two", "three", "four")
PLURALS = ("circles", "squares", "triangles", "stars", "hearts", "rings", "crosses", "diamonds")
RADII = (8.0, 11.0)  # pixels, small and large
RULES = {  # of both splits together
    "pair": lambda shape, color: (color + 3 * shape) % 8 in (0, 4),
    "count": lambda shape, n: n >= 2 and (shape + 3 * n) % 8 in (0, 4),
    "shapes": lambda a, b: {a, b} in ({0, 4}, {1, 5}, {2, 6}, {3, 7}),
    "left of": lambda a, b: (a + 3 * b + 2) % 8 == 0,
    "above": lambda a, b: (a + 3 * b + 6) % 8 == 0,
}

_SINGULAR = dict(zip(PLURALS, SHAPES, strict=True))
_FACT = re.compile(rf"({'|'.join(SHAPES)}) (?:is )?(left of|above) (?:an?|the) ({'|'.join(SHAPES)})\b")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text)


def texts(dialogue: Dialogue) -> list[str]:
    """Everything that is written in a conversation, by either side."""
    return [part for turn in dialogue.turns for part in (*turn.user, *turn.assistant) if isinstance(part, str)]


def scene_object(shape: int = 0, x: float = 32.0, y: float = 32.0, size: int = 1, color: int = 0) -> SceneObject:
    return SceneObject(shape=shape, color=color, size=size, x=x, y=y, angle=0.0)


@cache
def picture(scene: Scene) -> NDArray[uint8]:
    """The image of a scene, drawn once for all tests that judge the suites; read-only."""
    image = render(scene)
    image.setflags(write=False)
    return image


def random_scenes(count: int, seed: int = 0) -> Iterator[Scene]:
    """Scenes of one to four objects of any shapes, with no regard to splits."""
    for index in range(count):
        rng = stream(seed, index)
        yield sample_scene(rng, shapes=rng.integers(len(SHAPES), size=1 + index % 4).tolist())


def _stands_before(a: SceneObject, b: SceneObject, axis: str) -> bool:
    """GenEval's rule along one axis, from boxes of centre +- radius: a is left of b along x, above b along y."""
    widths = 2 * RADII[a.size] + 2 * RADII[b.size]
    distance = ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5
    return getattr(b, axis) - getattr(a, axis) - 0.1 * widths > 0.5 * distance


def leaks(scene: Scene) -> set[str]:
    """Kinds of combination in a scene that no training image may show."""
    counts = Counter(obj.shape for obj in scene.objects)
    found = {"pair" for obj in scene.objects if RULES["pair"](obj.shape, obj.color)}
    found |= {"count" for shape, n in counts.items() if RULES["count"](shape, n)}
    found |= {"shapes" for a, b in itertools.combinations(counts, 2) if RULES["shapes"](a, b)}
    for a, b in itertools.permutations(scene.objects, 2):
        for relation, axis in (("left of", "x"), ("above", "y")):
            if a.shape != b.shape and RULES[relation](a.shape, b.shape) and _stands_before(a, b, axis):
                found.add("fact")
    return found


def text_leaks(text: str) -> list[str]:
    """Held-out combinations that a text names: "red circle", "two small triangles", "circle left of a triangle"."""
    found = []
    tokens = words(text)
    for place, token in enumerate(tokens):
        noun = _SINGULAR.get(token, token)
        if noun not in SHAPES:
            continue
        shape, before = SHAPES.index(noun), tokens[max(place - 3, 0) : place]
        if before and before[-1] in COLORS and RULES["pair"](shape, COLORS.index(before[-1])):
            found.append(f"{before[-1]} {token}")
        if token in _SINGULAR:
            numbers = [n for n in before if n in NUMBERS[2:]][-1:]
            found += [f"{n} {token}" for n in numbers if RULES["count"](shape, NUMBERS.index(n))]
    for a, relation, b in _FACT.findall(text):
        if RULES[relation](SHAPES.index(a), SHAPES.index(b)):
            found.append(f"{a} {relation} {b}")
    return found
