"""Yes-or-no and one-word questions about scenes of the drawn world: what W-MME-p and W-GQA share.

Both have "id" items (unseen scenes, seen combinations) and "cg" items, and score "all" of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

from starflow2.evals.suite import Images, Section, checked_texts, digest
from starflow2.world.questions import Question
from starflow2.world.sampling import sample_count, with_repeats
from starflow2.world.scene import SHAPES, Scene, Split, chance, pick, render, sample_scene
from starflow2.world.splits import HELD_OUT, WITHHELD, bucket, colors_of, held_out, scene_key

__all__ = [
    "ASK_CHUNK",
    "PARTS",
    "Answer",
    "AskedQuestion",
    "Part",
    "ask",
    "digests",
    "new_scene",
    "stream_of",
]

Part = Literal["id", "cg"]
PARTS: tuple[Part, ...] = get_args(Part)
ASK_CHUNK: Final = 128  # questions asked at a time
_SUITE_SEED: Final = 2026  # frozen: changing it, or the order of draws below, makes another benchmark
_NUMBERS: Final = {"mme": 4, "gqa": 5}  # second number of a suite's streams
Answer = Callable[[Images, list[str]], list[str]]  # (n, 64, 64, 3), n questions -> n answers


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedQuestion:
    """One item: a question about the image of a scene."""

    question: Question
    scene: Scene
    image: int  # number in its suite; questions about one image are resampled together
    part: Part
    kind: str  # the subtask of MME, the kind of GQA's question


def ask(answer: Answer, items: Sequence[AskedQuestion]) -> list[str]:
    """The answers to the items. Raises DataError if `answer` returns anything but one text per question."""
    images = np.stack([render(item.scene) for item in items])  # (n, 64, 64, 3)
    return checked_texts(answer(images, [item.question.text for item in items]), len(items))


def digests(items: Callable[[Split], Iterable[AskedQuestion]]) -> Section:
    """Count and hash of the words and scene keys of both splits."""
    return {
        split: digest(
            (item.part, item.question.text, item.question.answer, item.scene.background, *scene_key(item.scene))
            for item in items(split)
        )
        for split in get_args(Split)
    }


def stream_of(split: Split, suite: Literal["mme", "gqa"]) -> tuple[int, int, int]:
    """The numbers that the random streams of a suite begin with."""
    return (_SUITE_SEED, _NUMBERS[suite], get_args(Split).index(split))


def new_scene(
    rng: np.random.Generator, split: Split, shown: set[tuple[int, ...]], *, shows_pair: bool = False
) -> Scene:
    """A scene of the split that was not shown before, which this call notes.

    Nothing in it is held out, except a colour-shape pair where `shows_pair`.
    """
    expected = {"pair"} if shows_pair else set()
    others = [name for name in HELD_OUT if name != split]
    while True:
        shapes = _shapes(rng)
        scene = sample_scene(rng, shapes=shapes, colors=_colors(rng, shapes, split if shows_pair else None))
        if bucket(scene) != split or held_out(scene, split) != expected or scene_key(scene) in shown:
            continue
        if not any(held_out(scene, other) for other in others):
            shown.add(scene_key(scene))
            return scene


def _shapes(rng: np.random.Generator) -> list[int]:
    """Shapes of one to four objects that may meet in training."""
    while True:
        count = sample_count(rng)
        shapes = with_repeats(rng, rng.permutation(len(SHAPES))[:count].tolist())
        if not WITHHELD["train"].rows_of_shapes(shapes):
            return shapes


def _colors(rng: np.random.Generator, shapes: Sequence[int], novel: Split | None) -> list[int]:
    """A colour for each shape, one that training combines with it.

    With `novel`, the first shape and half of the others get a colour that this split holds out instead.
    """
    return [
        pick(rng, colors_of(shape, novel if novel is not None and (index == 0 or chance(rng, 0.5)) else None))
        for index, shape in enumerate(shapes)
    ]
