"""Questions about drawn pictures asked of a model in chunks, shared by W-MME-p and W-GQA."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from starflow2.errors import ConfigError, DataError
from starflow2.evals.statistics import (
    chunks,
    quick_share,
)
from starflow2.world.questions import Question
from starflow2.world.scene import COLORS, SHAPES, Scene, Split, render, sample_scene
from starflow2.world.splits import HELD_OUT, bucket, held_out, scene_key

__all__ = [
    "PARTS",
    "Answer",
    "Part",
    "Progress",
]


Part = Literal["id", "cg"]
PARTS: tuple[Part, ...] = get_args(Part)
THINGS: Final = (0.15, 0.3, 0.3, 0.25)  # shares of scenes with one to four objects, as in training
REPEATS: Final = 0.35  # share of scenes of several objects in which some have the same shape, as in training
ASK_CHUNK: Final = 128  # questions asked of `answer` at a time
_SUITE_SEED: Final = 2026  # frozen: changing it, or the order of draws below, makes another benchmark
_MME, _GQA = 4, 5  # second number of a stream
Images = NDArray[np.uint8]
Answer = Callable[[Images, list[str]], list[str]]  # (n, 64, 64, 3), n questions -> n answers
Progress = Callable[[int, int], None]  # questions done, questions in all


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    question: Question
    scene: Scene
    image: int  # number in its suite; questions about one image are resampled together
    part: Part
    kind: str  # the subtask of MME, the kind of GQA's question


def _checked(split: Split) -> Split:
    if split not in get_args(Split):
        raise ConfigError(f"split: expected one of {', '.join(get_args(Split))}, got {split!r}")
    return split


def _where(split: Split, suite: int) -> tuple[int, int, int]:
    """The numbers that a suite's streams begin with."""
    return (_SUITE_SEED, suite, get_args(Split).index(split))


def _scene(rng: np.random.Generator, split: Split, shown: set[tuple[int, ...]], *, shows_pair: bool = False) -> Scene:
    """A scene of the split, not among those shown, with nothing held out in it but colour-shape pairs if asked."""
    wanted = {"pair"} if shows_pair else set()
    others = [name for name in HELD_OUT if name != split]
    while True:
        shapes = _shapes(rng)
        scene = sample_scene(rng, shapes=shapes, colors=_colors(rng, shapes, split if shows_pair else None))
        if bucket(scene) != split or held_out(scene, split) != wanted or scene_key(scene) in shown:
            continue
        if not any(held_out(scene, other) for other in others):
            shown.add(scene_key(scene))
            return scene


def _shapes(rng: np.random.Generator) -> list[int]:
    """Shapes of one to four objects that may meet in training."""
    while True:
        count = int(rng.choice(len(THINGS), p=THINGS)) + 1
        shapes: list[int] = rng.permutation(len(SHAPES))[:count].tolist()
        if count > 1 and rng.random() < REPEATS:
            same = int(rng.integers(2, count + 1))
            shapes = [shapes[0]] * same + shapes[same:]
        counts = {(shape, shapes.count(shape)) for shape in shapes}
        if not any(counts & t.counts or any(pair.issubset(shapes) for pair in t.shapes) for t in HELD_OUT.values()):
            return shapes


def _colors(rng: np.random.Generator, shapes: Sequence[int], novel: Split | None) -> list[int]:
    """A colour per shape: one seen with it in training, or for the first and half of the rest one that `novel` holds
    out."""
    colors = []
    for index, shape in enumerate(shapes):
        kept = {name: {color for s, color in table.pairs if s == shape} for name, table in HELD_OUT.items()}
        options = [color for color in range(len(COLORS)) if not any(color in held for held in kept.values())]
        if novel is not None and (index == 0 or rng.random() < 0.5):
            options = sorted(kept[novel])
        colors.append(options[int(rng.integers(len(options)))])
    return colors


def _quick(items: Sequence[_Item], stratum: Callable[[_Item], object]) -> list[_Item]:
    """All questions about one image in eight of each stratum."""
    strata: dict[object, dict[int, None]] = defaultdict(dict)
    for item in items:
        strata[stratum(item)][item.image] = None
    rng = np.random.default_rng(0)
    kept = {image for images in strata.values() for image in quick_share(list(images), rng)}
    return [item for item in items if item.image in kept]


def _picks(items: Sequence[_Item]) -> dict[str, list[int]]:
    """Indices of the items of each part, and of all."""
    parts: dict[str, list[int]] = {p: [i for i, item in enumerate(items) if item.part == p] for p in PARTS}
    return parts | {"all": list(range(len(items)))}


def _ask(answer: Answer, items: Sequence[_Item], progress: Progress | None) -> list[str]:
    said: list[str] = []
    for chunk in chunks(items, ASK_CHUNK):
        images = np.stack([render(item.scene) for item in chunk])  # (n, 64, 64, 3)
        found = list(answer(images, [item.question.text for item in chunk]))
        if len(found) != len(chunk) or not all(isinstance(text, str) for text in found):
            raise DataError(f"answers: expected {len(chunk)} texts, got {len(found)} of {set(map(type, found))}")
        said += found
        if progress:
            progress(len(said), len(items))
    return said
