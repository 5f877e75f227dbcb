"""W-DPG: how much of a long prompt about the drawn world its images fulfil, question by question.

The arithmetic is DPG-Bench's, as pure functions over answers: in an image's score a question whose parent failed
counts as failed, category scores are taken before that and from the last image of each prompt alone. Beside them
stand the categories over all images, and the geometric mean over an image's questions (after Soft-TIFA), which one
miss in twenty lowers more. Answers are the detector's, after the best one-to-one matching of described and detected
objects. All scores are in [0, 1]; DPG-Bench prints a hundred times as much.

Letters: S images of a prompt, Q its questions, P prompts.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final, get_args

import numpy as np
from numpy.typing import NDArray

from starflow2.evals.geneval import SAMPLES, Generate, draw_scans, drawing_jobs, one_per_prompt, relations, true_scans
from starflow2.evals.statistics import Row, Scored, Scores, by_part, quick_share, score_rows
from starflow2.evals.suite import IMAGES_AT_ONCE, Codec, Graded, Job, Runs, Section, digest, graded
from starflow2.evals.twins import twins_of_100
from starflow2.world.dense_prompts import CATEGORIES, PROMPTS, DensePrompt, Node, suite_dense
from starflow2.world.detector import Detection, Scan, detect
from starflow2.world.scene import BACKGROUND_NAMES, BACKGROUNDS, COLORS, SHAPES, SIZES, SceneObject, Split, render
from starflow2.world.splits import scene_key
from starflow2.world.words import NUMBERS, place_of

__all__ = ["DpgSuite", "answers", "image_score", "soft_score"]

SEED_BASE: Final = 2_000_000  # image j of prompt i starts from seed SEED_BASE + 4 i + j
SOFT_MISS: Final = 0.01  # what a miss counts in the geometric mean
FLOOR_SHIFTS: Final = 8  # mismatched images graded per prompt
CANDIDATES: Final = 6  # best scored detections of its shape that may stand for an object; bounds the matching

Marks = NDArray[np.bool_]


# ------------------------------------------------------------------------------------------------------- arithmetic


def image_score(tree: Sequence[Node], marks: Sequence[bool]) -> float:
    """The share of yes among an image's answers after every question with a failed parent has become no.

    tree: parents before their children. The no of a child fails its own children in turn.
    """
    passed: dict[int, bool] = {}
    for node, mark in zip(tree, marks, strict=True):
        passed[node.number] = bool(mark) and all(passed[parent] for parent in node.parents)
    return sum(passed.values()) / len(passed)


def soft_score(marks: Sequence[bool]) -> float:
    """The geometric mean of an image's answers, where a no counts SOFT_MISS; parents play no part."""
    return float(SOFT_MISS ** (1 - np.mean(np.asarray(marks, np.float64))))


# ---------------------------------------------------------------------------------------------------------- answers


def answers(prompt: DensePrompt, scan: Scan) -> list[bool]:
    """The detector's answers to a prompt's questions about one image, in the tree's order."""
    matches = _match(prompt, scan)
    return [_answer(node, scan, matches) for node in prompt.tree]


def _match(prompt: DensePrompt, scan: Scan) -> dict[int, Detection]:
    """The detection that stands for each object: one-to-one, of its shape, so that most answers are yes."""
    options: list[list[Detection | None]] = [
        [*[d for d in scan.detections if d.shape == obj.shape][:CANDIDATES], None] for obj in prompt.scene.objects
    ]
    best: dict[int, Detection] = {}
    most = -1
    for chosen in itertools.product(*options):
        matches = {index: found for index, found in enumerate(chosen) if found is not None}
        if len({id(found) for found in matches.values()}) == len(matches):
            right = sum(_answer(node, scan, matches) for node in prompt.tree)
            if right > most:
                best, most = matches, right
    return best


def _answer(node: Node, scan: Scan, matches: Mapping[int, Detection]) -> bool:
    if node.topic == "background":
        gap = np.linalg.norm(BACKGROUNDS / 255 - np.array(scan.background), axis=1)  # (tints,)
        return BACKGROUND_NAMES[int(gap.argmin())] == node.value
    if node.topic == "count":
        count = len(scan.detections) + scan.unknown
        return count < len(NUMBERS) and NUMBERS[count] == node.value
    found = None if node.subject is None else matches.get(node.subject)
    if found is None:
        return False
    if node.topic == "relation":
        other = None if node.other is None else matches.get(node.other)
        return other is not None and node.value in relations(found.box, other.box)
    return node.value in _qualities(found)


def _qualities(found: Detection) -> set[str | None]:
    """Shape, colour, size and place of a detection in words."""
    (x, y), color = found.center, None if found.color is None else COLORS[found.color]
    obj = SceneObject(shape=found.shape, color=found.color or 0, size=found.size, x=x, y=y, angle=0.0)
    return {SHAPES[found.shape], color, SIZES[found.size], place_of(obj, edge=0.0)}


# -------------------------------------------------------------------------------------------------------- the suite


SCORES: Final = ("overall", "soft")  # DPG-Bench's, and the geometric mean
_Items = Sequence[Job[DensePrompt]]
_Pairs = Sequence[tuple[Job[DensePrompt], Scan]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DpgSuite:
    """Prompts of three and four objects. Scores a `Generate`. samples: images of each prompt.

    Kinds of a report are DPG-Bench's categories of questions, with shares of yes before parents are considered:
    last_picture, DPG-Bench's, of each prompt's last image, and all_pictures.
    """

    samples: int = SAMPLES
    name: ClassVar[str] = "dpg"
    chunk: ClassVar[int] = IMAGES_AT_ONCE

    def items(self, split: Split) -> Mapping[str, _Items]:
        return {"all": drawing_jobs(suite_dense(split), self.samples, SEED_BASE)}

    def quick(self, items: _Items) -> _Items:
        return quick_share(items, stratum=lambda job: job.task.part, unit=lambda job: job.index)

    def run(self, generate: Generate, items: _Items) -> list[Scan]:
        return draw_scans(generate, items)

    def truth(self, items: _Items, codec: Codec | None) -> list[Scan]:
        return true_scans(items, codec)

    def grade(self, runs: Runs[Job[DensePrompt], Scan]) -> Graded:
        """Scores by DPG-Bench's arithmetic. Floor: true images of other prompts."""
        rng = np.random.default_rng(0)
        parts = by_part(runs["all"], lambda pair: pair[0].task.part)
        scored = {part: _grade(pairs, rng) for part, pairs in parts.items()}
        floor = {part: _floor(one_per_prompt(job for job, _ in pairs)) for part, pairs in parts.items()}
        return graded(scored, {"floor": floor}, {"samples": self.samples, "seed_base": SEED_BASE})

    def lock(self) -> Section:
        items = {split: digest(map(_locked, suite_dense(split))) for split in get_args(Split)}
        return {"dpg": {"prompts": PROMPTS, "samples": SAMPLES, "seed_base": SEED_BASE, "items": items}}


def _locked(prompt: DensePrompt) -> tuple[object, ...]:
    tree = [(n.number, n.category, n.topic, n.value, n.subject, n.other, *n.parents) for n in prompt.tree]
    return (prompt.part, prompt.prompt, prompt.scene.background, *scene_key(prompt.scene), *tree)


def _grade(pairs: _Pairs, rng: np.random.Generator) -> Scored:
    """Scores of a part, resampled over prompts."""
    marks: dict[int, list[list[bool]]] = defaultdict(list)  # by prompt, (S, Q) each
    for job, scan in pairs:
        marks[job.index].append(answers(job.task, scan))
    items = one_per_prompt(job for job, _ in pairs)
    rows = [Row("", job.index, _prompt_grades(job.task.tree, marks[job.index])) for job in items]
    scored = score_rows(rows, SCORES, rng, "plain")
    by_category = _by_category([(job.task.tree, np.array(marks[job.index])) for job in items])
    twins = twins_of_100(([obj.shape for obj in job.task.scene.objects], scan) for job, scan in pairs)
    return replace(scored, scores=replace(scored.scores.with_columns(twins=twins), by_kind=by_category))


def _prompt_grades(tree: Sequence[Node], rows: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Both scores of a prompt, means over its images. rows: (S, Q)."""
    return (float(np.mean([image_score(tree, row) for row in rows])), float(np.mean([soft_score(row) for row in rows])))


def _by_category(prompts: Sequence[tuple[Sequence[Node], Marks]]) -> dict[str, Scores]:
    """Shares of yes by category. Of each prompt: its tree and marks (S, Q)."""
    last: dict[str, list[float]] = defaultdict(list)
    every: dict[str, list[float]] = defaultdict(list)
    for tree, rows in prompts:
        for column, node in enumerate(tree):
            last[node.category].append(float(rows[-1, column]))
            every[node.category] += rows[:, column].astype(float).tolist()
    return {
        name: Scores(len(every[name]), len(prompts), {}).with_columns(
            last_picture=float(np.mean(last[name])), all_pictures=float(np.mean(every[name]))
        )
        for name in CATEGORIES
    }


def _floor(items: _Items) -> Scores:
    """Score every prompt with true images of other prompts of the part; one job per prompt."""
    scans = detect(np.stack([render(job.task.scene) for job in items]))
    count = len(items)
    shifts = np.unique(np.linspace(1, count - 1, min(FLOOR_SHIFTS, count - 1)).astype(int))
    grades = [
        _prompt_grades(job.task.tree, [answers(job.task, scans[(i + s) % count]) for s in shifts])
        for i, job in enumerate(items)
    ]
    overall, soft = np.mean(grades, axis=0).tolist()
    return Scores(count, count, {}).with_columns(overall=overall, soft=soft)
