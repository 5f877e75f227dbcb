"""W-GenEval: how well prompts about the drawn world are followed, graded by GenEval's rules.

The rules are GenEval's own, as pure functions over named detections, so one scorer serves real detector files and the
world's detector. Every score comes with its caption-blind floor; the ceiling is the codec's round trip of true images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, count
from math import hypot
from typing import Any, ClassVar, Final, Protocol, TypeVar, get_args

import numpy as np
from torch import Tensor

from starflow2.core.images import to_bytes, to_floats
from starflow2.errors import ConfigError
from starflow2.evals.statistics import QUICK_SHARE, Row, Scored, Scores, quick_share, score_rows
from starflow2.evals.suite import (
    IMAGES_AT_ONCE,
    Codec,
    Graded,
    Images,
    Job,
    Part,
    Progress,
    Report,
    Runs,
    Section,
    ceiling,
    check_choice,
    checked_images,
    digest,
    evaluate,
    graded,
    jobs,
    roundtrip_scenes,
)
from starflow2.evals.tries import Choice, evaluate_tries
from starflow2.evals.twins import twins_of_100
from starflow2.world.captions import (
    SCENE_FAMILIES,
    CaptionedScene,
    new_drawings,
    paraphrase_drawings,
    scene_drawings,
    suite_drawings,
)
from starflow2.world.content import shows
from starflow2.world.dense_prompts import DensePrompt
from starflow2.world.detector import Scan, detect
from starflow2.world.grammar import FAMILIES
from starflow2.world.scene import COLORS, SHAPES, Scene, Split, render
from starflow2.world.splits import scene_key

__all__ = [
    "PARTS",
    "RULES",
    "SAMPLES",
    "Drawer",
    "Found",
    "Generate",
    "GenevalSuite",
    "Verdict",
    "captioned_scenes",
    "draw_scans",
    "drawing_jobs",
    "grade",
    "name_scan",
    "one_per_prompt",
    "relations",
    "roundtrips",
    "score_geneval",
    "true_scans",
]

PARTS: Final[tuple[Part, ...]] = ("id", "cg", "paraphrase", "new", "scenes")
PER_CATEGORY: Final = 64  # prompts
SAMPLES: Final = 4  # images of each prompt, GenEval's number
SEED_BASE: Final = 1_000_000  # image j of prompt i starts from seed SEED_BASE + 4 i + j
FLOOR_SHIFTS: Final = 32  # mismatched images graded per prompt

Generate = Callable[[list[str], list[int]], Images]  # prompts, seeds -> (n, 64, 64, 3)
Box = tuple[float, float, float, float]


# ------------------------------------------------------------------------------------------------------ GenEval's rules


@dataclass(frozen=True, slots=True)
class Found:
    """A detection by name. `name` is None for something that is there but was not recognised."""

    name: str | None
    box: Box  # x0, y0, x1, y1
    score: float = 1.0
    color: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """`correct` by GenEval's rules; `strict_correct` if there is nothing else in the image either."""

    correct: bool
    strict_correct: bool
    reason: str  # what was missed, one clause per miss; empty if correct


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box a lies relative to box b; two relations may hold at once, or none.

    Per axis the distance of the centres is shrunk by a tenth of both boxes' extent; what is left must exceed half of
    the full distance (GenEval's `relative_position`).

    >>> relations((0, 0, 10, 10), (30, 0, 40, 10))
    {'left of'}
    """
    dx, dy = (((a[i] + a[i + 2]) - (b[i] + b[i + 2])) / 2 for i in (0, 1))
    slack_x, slack_y = (0.1 * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i])) for i in (0, 1))
    left, up = max(abs(dx) - slack_x, 0), max(abs(dy) - slack_y, 0)
    if left < 1e-3 and up < 1e-3:
        return set()
    holds = set()
    if left / hypot(dx, dy) > 0.5:
        holds.add("left of" if dx < 0 else "right of")
    if up / hypot(dx, dy) > 0.5:
        holds.add("above" if dy < 0 else "below")
    return holds


def grade(metadata: Mapping[str, Any], detections: Iterable[Found]) -> Verdict:
    """Grade an image with these detections against what its prompt asks for.

    metadata: a GenEval JSONL row; `include` rows must all hold, `exclude` rows must not. Of each class only the `count`
    best scored detections are examined for colour and position.

    >>> grade({"include": [{"class": "cow", "count": 2}]}, [Found("cow", (0, 0, 9, 9))]).reason
    'expected 2 cow, found 1'
    """
    by_name: dict[str | None, list[Found]] = defaultdict(list)
    for found in sorted(detections, key=lambda f: -f.score):
        by_name[found.name].append(found)
    misses: list[str] = []
    matched: list[list[Found]] = []  # per include row; empty where it failed
    for row in metadata.get("include", ()):
        examined = by_name[row["class"]][: row["count"]]
        miss = _miss(row, examined, matched)
        misses += [miss] if miss else []
        matched.append([] if miss else examined)
    for row in metadata.get("exclude", ()):
        if len(by_name[row["class"]]) >= row["count"]:
            misses.append(f"expected fewer than {row['count']} {row['class']}, found {len(by_name[row['class']])}")
    asked = sum(row["count"] for row in metadata.get("include", ()))
    has_extras = sum(map(len, by_name.values())) > asked
    return Verdict(not misses, not misses and not has_extras, "; ".join(misses))


def _miss(row: Mapping[str, Any], examined: list[Found], matched: list[list[Found]]) -> str:
    """The reason why an include row fails, or ''."""
    name, count = row["class"], row["count"]
    if len(examined) < count:
        return f"expected {count} {name}, found {len(examined)}"
    colors = [found.color for found in examined]
    if "color" in row and colors.count(row["color"]) < count:
        return f"expected {count} {row['color']} {name}, colours are {', '.join(map(str, colors))}"
    if "position" in row:
        relation, target = row["position"]
        if not matched[target]:
            return f"nothing for {name} to be {relation}"
        if any(relation not in relations(a.box, b.box) for a in examined for b in matched[target]):
            return f"{name} is not {relation} target"
    return ""


def name_scan(scan: Scan) -> list[Found]:
    """The detections of a scan under the names of the world; unrecognised blobs come without a name."""
    named = [
        Found(SHAPES[d.shape], d.box, d.score, None if d.color is None else COLORS[d.color]) for d in scan.detections
    ]
    return named + [Found(None, (0.0, 0.0, 0.0, 0.0), score) for score in scan.unknown_scores]


# ------------------------------------------------------------------------------------------- images drawn from prompts


_Task = TypeVar("_Task", CaptionedScene, DensePrompt)


def drawing_jobs(tasks: Iterable[_Task], samples: int, seed_base: int) -> list[Job[_Task]]:
    """Jobs for `samples` images of each prompt. Raises ConfigError unless they are 1 to 4."""
    if not 1 <= samples <= SAMPLES:
        raise ConfigError(f"samples: expected 1 to {SAMPLES} images per prompt, got {samples}")
    return jobs(tasks, seed_base, samples, stride=SAMPLES)


def one_per_prompt(items: Iterable[Job[_Task]]) -> list[Job[_Task]]:
    """The last job of each prompt."""
    return list({job.index: job for job in items}.values())


def draw_scans(generate: Generate, items: Sequence[Job[_Task]]) -> list[Scan]:
    """The detector's reading of one image per job. Raises DataError if `generate` returns another shape."""
    images = generate([job.task.prompt for job in items], [job.seed for job in items])
    return detect(checked_images(images, len(items)))


def true_scans(items: Sequence[Job[_Task]], codec: Codec | None) -> list[Scan]:
    """The detector's reading of the true image of each job, after the codec's round trip if there is a codec."""
    return detect(roundtrip_scenes(codec, [job.task.scene for job in items]))


class Drawer(Protocol):
    """A model that draws images from (prompt, seed) pairs, and its codec. `StarFlow2` is one. B: number of images."""

    @property
    def sampling_noise(self) -> float:
        """Noise level of sampled latents, where the second ceiling is measured."""
        ...

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1]."""
        ...

    def roundtrip(self, images: Tensor, noise_level: float = 0.0, seed: int = 0) -> Tensor:
        """(B, 3, 64, 64) through the codec and back, with noise on the latents."""
        ...


def roundtrips(model: Drawer, first_seed: int = 0) -> dict[str, Codec]:
    """The round trips of a model's codec: "clean", and "noise" at its sampling noise, drawn anew for every call."""
    seeds = count(first_seed)

    def clean(images: Images) -> Images:
        return to_bytes(model.roundtrip(to_floats(images)))

    def noise(images: Images) -> Images:
        return to_bytes(model.roundtrip(to_floats(images), model.sampling_noise, next(seeds)))

    return {"clean": clean, "noise": noise}


# ------------------------------------------------------------------------------------------------------------ W-GenEval


RULES: Final = ("lenient", "strict")  # GenEval's; with nothing else in the image
_Items = Sequence[Job[CaptionedScene]]
_Pairs = Sequence[tuple[Job[CaptionedScene], Scan]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenevalSuite:
    """Prompts of six families. Scores a `Generate`. samples: images of each prompt.

    Columns of a report are the shares of correct images by RULES, means over categories; of a part also template_iou,
    the mean over all blobs, unknown_share, of blobs without a name, empty_share, of images without a blob, and twins,
    of 100 images of prompts with several shapes those that repeat one asked shape where another is missing.
    Busy scenes ("scenes") are correct if a choice of their objects, strictly if all of them, show what is asked for.
    """

    samples: int = SAMPLES
    parts: tuple[Part, ...] = ("id", "cg")
    name: ClassVar[str] = "geneval"
    chunk: ClassVar[int] = IMAGES_AT_ONCE

    def items(self, split: Split) -> Mapping[str, _Items]:
        return {part: drawing_jobs(captioned_scenes(split, part), self.samples, SEED_BASE) for part in self.parts}

    def quick(self, items: _Items) -> _Items:
        return quick_share(items, stratum=lambda job: job.task.family, unit=lambda job: job.index)

    def run(self, generate: Generate, items: _Items) -> list[Scan]:
        return draw_scans(generate, items)

    def truth(self, items: _Items, codec: Codec | None) -> list[Scan]:
        return true_scans(items, codec)

    def grade(self, runs: Runs[Job[CaptionedScene], Scan]) -> Graded:
        """Scores by GenEval's rules. Floor: true images of other prompts."""
        rng = np.random.default_rng(0)
        scored = {part: _grade(pairs, rng) for part, pairs in runs.items()}
        prompts = {part: one_per_prompt(job for job, _ in pairs) for part, pairs in runs.items()}
        floor = {part: _floor(jobs) for part, jobs in prompts.items()}
        twins = {part: _second_shape_ignored(jobs) for part, jobs in prompts.items()}
        settings = {"samples": self.samples, "seed_base": SEED_BASE}
        return graded(scored, {"floor": floor, "second_shape_ignored": twins}, settings)

    def are_right(self, items: _Items, outputs: Sequence[Scan]) -> list[bool]:
        return [bool(_row(job, scan).marks[0]) for job, scan in zip(items, outputs, strict=True)]

    def unit(self, item: Job[CaptionedScene]) -> tuple[str, str]:
        return item.task.family, item.task.prompt

    def without_controls(self) -> GenevalSuite:
        return self

    def lock(self) -> Section:
        sets = {f"{split}/{part}": captioned_scenes(split, part) for split in get_args(Split) for part in PARTS}
        items = {
            name: digest((d.prompt, d.scene.background, *scene_key(d.scene)) for d in drawings)
            for name, drawings in sets.items()
        }
        settings = {"categories": list(FAMILIES), "per_category": PER_CATEGORY, "samples": SAMPLES}
        return {"geneval": {**settings, "seed_base": SEED_BASE, "quick_share": QUICK_SHARE, "items": items}}


def score_geneval(
    model: Drawer,
    split: Split,
    *,
    quick: bool = False,
    samples: int = SAMPLES,
    parts: Sequence[Part] = ("id", "cg"),
    progress: Progress | None = None,
    choice: Choice | None = None,
) -> Report:
    """The report on a model's images, with the ceilings of its codec, "clean" and at the sampling "noise".

    choice: how several tries are made of each image (`tries`). Other options and errors as in `evaluate` and
    `GenevalSuite`.
    """

    def generate(prompts: list[str], seeds: list[int]) -> Images:
        return to_bytes(model.draw(prompts, seeds))

    suite = GenevalSuite(samples=samples, parts=tuple(parts))
    if choice is None:
        report = evaluate(suite, generate, split, quick=quick, progress=progress)
    else:
        report = evaluate_tries(suite, choice, split, quick=quick, progress=progress)
    for name, codec in roundtrips(model, first_seed=1).items():
        report = report.with_bound(name, ceiling(GenevalSuite(samples=1, parts=("id",)), split, codec, quick=quick))
    return report


_OTHER_PARTS: Final[Mapping[Part, Callable[[Split, int], Sequence[CaptionedScene]]]] = {
    "paraphrase": paraphrase_drawings,
    "new": new_drawings,
    "scenes": scene_drawings,
}


@cache
def captioned_scenes(split: Split, part: Part) -> tuple[CaptionedScene, ...]:
    """The prompts of a part with their scenes, family by family. Raises ConfigError for an unknown part."""
    check_choice("part", part, PARTS)
    if part in _OTHER_PARTS:
        return tuple(_OTHER_PARTS[part](split, PER_CATEGORY))
    return tuple(suite_drawings("geneval", split, "cg" if part == "cg" else "id", per_category=PER_CATEGORY))


def _row(job: Job[CaptionedScene], scan: Scan) -> Row:
    task = job.task
    if task.family in SCENE_FAMILIES:
        return Row(task.family, task.prompt, _shows(task, scan))
    verdict = grade(task.metadata, name_scan(scan))
    return Row(task.family, task.prompt, (verdict.correct, verdict.strict_correct))


def _shows(task: CaptionedScene, scan: Scan) -> tuple[bool, bool]:
    """Two verdicts: some, and all, of the objects are exactly what the prompt names; backgrounds are free."""
    content = replace(task.content, background=None)
    found = [detection.as_object for detection in scan.detections]
    chosen = combinations(found, len(content.slots))
    is_there = any(shows(Scene(objects=objects, background=0), content) for objects in chosen)
    return is_there, is_there and len(found) == len(content.slots) and not scan.unknown


def _asked_shapes(task: CaptionedScene) -> list[int]:
    """The shape of every object that a prompt asks for."""
    return [group.shape for group in task.content.groups for _ in range(group.count)]


def _grade(pairs: _Pairs, rng: np.random.Generator) -> Scored:
    """Scores of a part."""
    scored = score_rows([_row(job, scan) for job, scan in pairs], RULES, rng, "averaged")
    scans = [scan for _, scan in pairs]
    twins = twins_of_100((_asked_shapes(job.task), scan) for job, scan in pairs)
    named = [d.score for scan in scans for d in scan.detections]
    unknown = [score for scan in scans for score in scan.unknown_scores]
    blobs = max(len(named) + len(unknown), 1)
    scores = scored.scores.with_columns(
        template_iou=sum(named + unknown) / blobs,
        unknown_share=len(unknown) / blobs,
        empty_share=sum(not scan.detections and not scan.unknown for scan in scans) / len(scans),
        twins=twins,
    )
    return replace(scored, scores=scores)


def _floor(items: _Items) -> Scores:
    """Score every prompt with true images of other prompts of the part; one job per prompt."""
    found = detect(np.stack([render(job.task.scene) for job in items]))
    total = len(items)
    shifts = np.unique(np.linspace(1, total - 1, FLOOR_SHIFTS).astype(int)) if total > 1 else np.array([0])
    rows = [_row(job, found[(i + s) % total]) for i, job in enumerate(items) for s in shifts]
    return score_rows(rows, RULES, np.random.default_rng(0), "averaged").scores


def _second_shape_ignored(items: _Items) -> Scores:
    """Score every prompt with its true image, but with every shape after the first one drawn like the first."""
    scans = detect(np.stack([render(_alike(job.task)) for job in items]))
    rows = [_row(job, scan) for job, scan in zip(items, scans, strict=True)]
    return score_rows(rows, RULES, np.random.default_rng(0), "averaged").scores


def _alike(task: CaptionedScene) -> Scene:
    """The scene with all objects in the shape that the prompt names first."""
    first = task.content.groups[0].shape
    return replace(task.scene, objects=tuple(replace(obj, shape=first) for obj in task.scene.objects))
