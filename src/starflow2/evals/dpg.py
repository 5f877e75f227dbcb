"""W-DPG: how much of a long prompt about the drawn world its pictures fulfil, question by question.

The arithmetic is DPG-Bench's, as pure functions over answers: in a picture's score a question whose parent failed
counts as failed, category scores are taken before that and from the last picture of each prompt alone. Beside them
stand the categories over all pictures, and the geometric mean over a picture's questions (after Soft-TIFA), which one
miss in twenty lowers more. Answers are the judge's, after the best one-to-one matching of asked and detected objects.
All scores are in [0, 1]; DPG-Bench prints a hundred times as much. The runner is handed a `generate` function.

Letters: S pictures of a prompt, Q its questions, P prompts.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from starflow2.errors import ConfigError
from starflow2.evals.geneval import draw_scans, relations
from starflow2.evals.statistics import (
    Grades,
    Report,
    bootstrap,
    check_lock,
    checked_images,
    chunks,
    digest,
    interval,
    lock_text,
    quick_share,
)
from starflow2.world.dense_prompts import CATEGORIES, PROMPTS, DensePrompt, Node, suite_dense
from starflow2.world.detector import Detection, Scan, detect
from starflow2.world.scene import BACKGROUND_NAMES, BACKGROUNDS, COLORS, SHAPES, SIZES, SceneObject, Split, render
from starflow2.world.splits import scene_key
from starflow2.world.words import NUMBERS, place_of

__all__ = ["answers", "evaluate_dpg", "lock_spec", "picture_score", "roundtrip_ceiling", "soft_score", "verify_lock"]

PARTS = ("id", "cg")
SAMPLES = 4  # pictures of each prompt, DPG-Bench's number
SEED_BASE = 2_000_000  # picture j of prompt i starts from seed SEED_BASE + 4 i + j
SOFT_MISS = 0.01  # what a miss counts in the geometric mean
FLOOR_SHIFTS = 8  # mismatched pictures graded per prompt
CANDIDATES = 6  # best scored detections of its shape that may stand for an object; bounds the matching
DRAW_CHUNK = 64  # pictures asked of `generate` at a time
SCORES = ("overall", "soft")  # order of the columns of Grades

Images = NDArray[np.uint8]
Marks = NDArray[np.bool_]
Generate = Callable[[list[str], list[int]], Images]  # prompts, seeds -> (n, 64, 64, 3)
Progress = Callable[[int, int], None]  # pictures done, pictures in all


# ------------------------------------------------------------------------------------------------------- arithmetic


def picture_score(tree: Sequence[Node], marks: Sequence[bool]) -> float:
    """The share of yes among a picture's answers after every question with a failed parent has become no.

    tree: parents before their children. The no of a child fails its own children in turn.
    """
    held: dict[int, bool] = {}
    for node, mark in zip(tree, marks, strict=True):
        held[node.number] = bool(mark) and all(held[parent] for parent in node.parents)
    return sum(held.values()) / len(held)


def soft_score(marks: Sequence[bool]) -> float:
    """The geometric mean of a picture's answers, a no counting SOFT_MISS; parents play no part."""
    return float(SOFT_MISS ** (1 - np.mean(np.asarray(marks, np.float64))))


def _by_category(trees: Sequence[Sequence[Node]], marks: Sequence[Marks]) -> Report:
    """Per category the share of yes before parents are looked at: of each prompt's last picture, and of all.

    marks: per prompt (S, Q).
    """
    last: dict[str, list[float]] = defaultdict(list)
    every: dict[str, list[float]] = defaultdict(list)
    for tree, rows in zip(trees, marks, strict=True):
        for column, node in enumerate(tree):
            last[node.category].append(float(rows[-1, column]))
            every[node.category] += rows[:, column].astype(float).tolist()
    return {
        category: {"last_picture": float(np.mean(last[category])), "all_pictures": float(np.mean(every[category]))}
        for category in CATEGORIES
    }


# ---------------------------------------------------------------------------------------------------------- answers


def answers(prompt: DensePrompt, scan: Scan) -> list[bool]:
    """The judge's answers to a prompt's questions, in the tree's order, for one picture."""
    seen = _matched(prompt, scan)
    return [_answer(node, scan, seen) for node in prompt.tree]


def _matched(prompt: DensePrompt, scan: Scan) -> dict[int, Detection]:
    """Which detection stands for which object: one-to-one, the same shape, and the most yes that this can give."""
    asked = range(len(prompt.scene.objects))
    options: list[list[Detection | None]] = [
        [*[d for d in scan.detections if d.shape == prompt.scene.objects[index].shape][:CANDIDATES], None]
        for index in asked
    ]
    best: dict[int, Detection] = {}
    most = -1
    for chosen in itertools.product(*options):
        seen = {index: found for index, found in enumerate(chosen) if found is not None}
        if len({id(found) for found in seen.values()}) == len(seen):
            right = sum(_answer(node, scan, seen) for node in prompt.tree)
            if right > most:
                best, most = seen, right
    return best


def _answer(node: Node, scan: Scan, seen: Mapping[int, Detection]) -> bool:
    if node.topic == "background":
        gap = np.linalg.norm(BACKGROUNDS / 255 - np.array(scan.background), axis=1)  # (tints,)
        return BACKGROUND_NAMES[int(gap.argmin())] == node.value
    if node.topic == "count":
        count = len(scan.detections) + scan.unknown
        return count < len(NUMBERS) and NUMBERS[count] == node.value
    found = None if node.subject is None else seen.get(node.subject)
    if found is None:
        return False
    if node.topic == "relation":
        other = None if node.other is None else seen.get(node.other)
        return other is not None and node.value in relations(found.box, other.box)
    return node.value in _qualities(found)


def _qualities(found: Detection) -> set[str | None]:
    """Shape, colour, size and place of a detection in words."""
    (x, y), color = found.center, None if found.color is None else COLORS[found.color]
    thing = SceneObject(shape=found.shape, color=found.color or 0, size=found.size, x=x, y=y, angle=0.0)
    return {SHAPES[found.shape], color, SIZES[found.size], place_of(thing, edge=0.0)}


# ------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True, slots=True)
class _Item:
    index: int  # in the full suite, so that a quick run draws the same pictures
    prompt: DensePrompt


def evaluate_dpg(
    generate: Generate,
    split: Split,
    *,
    quick: bool = False,
    samples: int = SAMPLES,
    progress: Progress | None = None,
) -> Report:
    """Draws and grades the suite.

    split: "dev" (for every choice) or "test". quick: one prompt in eight. Returns a JSON-able report;
    `report["parts"]["id" | "cg" | "all"]` holds `overall` and `soft` with their intervals, `by_category` (DPG-Bench's
    `last_picture`, and `all_pictures`), and the `floor` of pictures drawn for other prompts; `gap` is "id" minus "cg".
    Raises ConfigError for an unknown split or samples outside 1-4, DataError if `generate` returns another shape.
    """
    if not 1 <= samples <= SAMPLES:
        raise ConfigError(f"samples: expected 1 to {SAMPLES} pictures per prompt, got {samples}")
    items = _items(split, quick)
    total, scans = samples * len(items), list[Scan]()
    jobs = [(item.prompt.prompt, SEED_BASE + SAMPLES * item.index + j) for item in items for j in range(samples)]
    for some in draw_scans(generate, jobs):
        scans += some
        if progress:
            progress(len(scans), total)
    report: Report = {"suite": "dpg", "split": split, "quick": quick, "samples": samples, "n": total}
    return report | {"seed_base": SEED_BASE, "ceiling": {}} | _summary(items, scans)


def roundtrip_ceiling(roundtrip: Callable[[Images], Images], split: Split, *, quick: bool = False) -> Report:
    """The scores of true pictures after a codec's round trip, (n, 64, 64, 3) uint8 -> the same: no model that draws
    through it can pass them."""
    items, scans = _items(split, quick), list[Scan]()
    for chunk in chunks(items, DRAW_CHUNK):
        truth = np.stack([render(item.prompt.scene) for item in chunk])
        scans += detect(checked_images(roundtrip(truth), len(chunk)))
    return _summary(items, scans)


def _items(split: Split, quick: bool) -> list[_Item]:
    items = [_Item(index, prompt) for index, prompt in enumerate(suite_dense(split))]
    if not quick:
        return items
    rng = np.random.default_rng(0)
    return [item for part in PARTS for item in quick_share([i for i in items if i.prompt.part == part], rng)]


def _summary(items: Sequence[_Item], scans: Sequence[Scan]) -> Report:
    """Scores of both parts and of all. scans: the same number for each item, an item's together."""
    samples = len(scans) // len(items)
    marks = [
        np.array([answers(item.prompt, scan) for scan in scans[at * samples : (at + 1) * samples]])
        for at, item in enumerate(items)
    ]
    rng = np.random.default_rng(0)
    parts, resamples = {}, {}
    for name in (*PARTS, "all"):
        picks = [i for i, item in enumerate(items) if name in (item.prompt.part, "all")]
        parts[name], resamples[name] = _scored([items[i] for i in picks], [marks[i] for i in picks], rng)
        parts[name]["floor"] = _floor([items[i] for i in picks])
    gap = {
        score: interval(
            parts["id"][score]["score"] - parts["cg"][score]["score"], resamples["id"][:, i] - resamples["cg"][:, i]
        )
        for i, score in enumerate(SCORES)
    }
    return {"parts": parts, "gap": gap}


def _scored(items: Sequence[_Item], marks: Sequence[Marks], rng: np.random.Generator) -> tuple[Report, Grades]:
    """Scores of a part, and their resamples over prompts (RESAMPLES, 2)."""
    grades = np.array([_prompt_grades(item.prompt.tree, rows) for item, rows in zip(items, marks, strict=True)])
    resamples = bootstrap([item.index for item in items], grades, rng)
    report: Report = {"prompts": len(items), "n": sum(map(len, marks))}
    report |= {score: interval(grades[:, i].mean(), resamples[:, i]) for i, score in enumerate(SCORES)}
    return report | {"by_category": _by_category([item.prompt.tree for item in items], marks)}, resamples


def _prompt_grades(tree: Sequence[Node], rows: Marks) -> tuple[float, float]:
    """The means over a prompt's pictures, in the order of SCORES. rows: (S, Q)."""
    return (
        float(np.mean([picture_score(tree, row.tolist()) for row in rows])),
        float(np.mean([soft_score(row.tolist()) for row in rows])),
    )


def _floor(items: Sequence[_Item]) -> Report:
    """The scores of true pictures of *other* prompts of the part: what a drawer gets that never reads the prompt."""
    scans = detect(np.stack([render(item.prompt.scene) for item in items]))
    count = len(items)
    shifts = np.unique(np.linspace(1, count - 1, min(FLOOR_SHIFTS, count - 1)).astype(int))
    grades = [
        _prompt_grades(item.prompt.tree, np.array([answers(item.prompt, scans[(at + s) % count]) for s in shifts]))
        for at, item in enumerate(items)
    ]
    return dict(zip(SCORES, np.mean(grades, axis=0).tolist(), strict=True))


# --------------------------------------------------------------------------------------------------------- the lock


@cache
def lock_spec() -> Report:
    """The frozen suite, made afresh: its settings, and count and hash of each split's scene keys, words and trees."""
    items = {split: digest(_told(prompt) for prompt in suite_dense(split)) for split in get_args(Split)}
    return {"dpg": {"prompts": PROMPTS, "samples": SAMPLES, "seed_base": SEED_BASE, "items": items}}


def _told(prompt: DensePrompt) -> tuple[object, ...]:
    tree = [(n.number, n.category, n.topic, n.value, n.subject, n.other, *n.parents) for n in prompt.tree]
    return (prompt.part, prompt.prompt, prompt.scene.background, *scene_key(prompt.scene), *tree)


def verify_lock() -> None:
    """Raises DataError if the suite made by this code is not the frozen one that scores are published for."""
    check_lock(json.loads(lock_text()), lock_spec())
