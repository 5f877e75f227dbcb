"""GenEval's rules, and W-GenEval: how well prompts about the drawn world are followed.

The rules are GenEval's own, as pure functions over named detections, so one scorer serves real detector files and the
world's judge. The runner is handed a `generate` function and knows nothing of models. Every score comes with its
caption-blind floor; the ceiling is the codec's round trip, measured by `codec_ceiling`.

Shape letters: G groups (distinct prompts) of one category.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import hypot
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from starflow2.errors import ConfigError
from starflow2.evals.statistics import (
    QUICK_SHARE,
    Grades,
    Report,
    bootstrap,
    check_lock,
    checked_images,
    chunks,
    digest,
    interval,
    quick_share,
)
from starflow2.evals.statistics import lock_text as _lock_text
from starflow2.world.captions import FAMILIES, CaptionedScene, paraphrase_drawings, suite_drawings
from starflow2.world.detector import Scan, detect
from starflow2.world.scene import COLORS, SHAPES, Split, render
from starflow2.world.splits import scene_key

__all__ = [
    "SAMPLES",
    "Found",
    "Part",
    "Progress",
    "Verdict",
    "codec_ceiling",
    "draw_scans",
    "evaluate_geneval",
    "grade",
    "lock_spec",
    "name_scan",
    "relations",
    "verify_lock",
]

Part = Literal["id", "cg", "paraphrase"]
PARTS: tuple[Part, ...] = get_args(Part)
RULES = ("lenient", "strict")  # order of the columns of Grades
PER_CATEGORY = 64  # prompts
SAMPLES = 4  # pictures of each prompt, GenEval's number
SEED_BASE = 1_000_000  # picture j of prompt i starts from seed SEED_BASE + 4 i + j
FLOOR_SHIFTS = 32  # mismatched pictures graded per prompt
DRAW_CHUNK = 64  # pictures asked of `generate` at a time

Images = NDArray[np.uint8]
Generate = Callable[[list[str], list[int]], Images]  # prompts, seeds -> (n, 64, 64, 3)
Progress = Callable[[int, int], None]  # pictures done, pictures in all
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
    """`correct` by GenEval's rules; `strict_correct` if there is nothing else in the picture either."""

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
    """Whether a picture with these detections shows what the prompt asks for.

    metadata: a GenEval JSONL row; `include` rows must all hold, `exclude` rows must not. Of each class only the `count`
    best scored detections are looked at for colour and position.

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
    """Why an include row fails, or ''."""
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
    """The judge's detections under the names of the world; unrecognised blobs come without a name."""
    named = [
        Found(SHAPES[d.shape], d.box, d.score, None if d.color is None else COLORS[d.color]) for d in scan.detections
    ]
    return named + [Found(None, (0.0, 0.0, 0.0, 0.0), score) for score in scan.unknown_scores]


# ------------------------------------------------------------------------------------------------------------ W-GenEval


@dataclass(frozen=True, slots=True)
class _Item:
    index: int  # in the full suite, so that a quick run draws the same pictures
    drawing: CaptionedScene


def evaluate_geneval(
    generate: Generate,
    split: Split,
    *,
    quick: bool = False,
    samples: int = SAMPLES,
    parts: Sequence[Part] = ("id", "cg"),
    progress: Progress | None = None,
) -> Report:
    """Draws and grades the suite; scores are shares of correct pictures in [0, 1], overall is the mean of categories.

    split: "dev" (for every choice) or "test". parts: among "id", "cg" and "paraphrase". quick: one prompt in eight.
    Returns a JSON-able report; `report["parts"][part]` holds `overall`, `by_category`, `floor`, counts and judge means.
    Raises ConfigError for an unknown part or samples outside 1-4, DataError if `generate` returns another shape.
    """
    if not 1 <= samples <= SAMPLES:
        raise ConfigError(f"samples: expected 1 to {SAMPLES} pictures per prompt, got {samples}")
    sets = {part: _items(split, part, quick) for part in parts}
    total = samples * sum(map(len, sets.values()))
    report: Report = {"suite": "geneval", "split": split, "quick": quick, "samples": samples, "n": total}
    report |= {"seed_base": SEED_BASE, "parts": {}, "ceiling": {}}
    rng, resampled, done = np.random.default_rng(0), dict[str, _Resamples](), 0
    for part, items in sets.items():
        scans: list[Scan] = []
        for some in draw_scans(generate, _jobs(items, samples)):
            scans += some
            done += len(some)
            if progress:
                progress(done, total)
        report["parts"][part], resampled[part] = _summary(items, scans, rng)
        report["parts"][part]["floor"] = _floor(items)
    if "id" in sets and "cg" in sets:
        report["gap"] = _gap(report["parts"], resampled)
    return report


def codec_ceiling(
    roundtrip: Callable[[Images], Images], split: Split, *, quick: bool = False, part: Part = "id"
) -> Report:
    """The score of ground-truth pictures after a codec's round trip: what no model that draws through it can pass.

    roundtrip: (n, 64, 64, 3) uint8 -> the same; add the sampling noise to the latents inside it for the second ceiling.
    """
    items = _items(split, part, quick)
    scans: list[Scan] = []
    for chunk in chunks(items, DRAW_CHUNK):
        truth = np.stack([render(item.drawing.scene) for item in chunk])
        scans += detect(checked_images(roundtrip(truth), len(chunk)))
    return _summary(items, scans, np.random.default_rng(0))[0]


def _items(split: Split, part: Part, quick: bool) -> list[_Item]:
    """The suite in its fixed order, or a quick run's share of each category (seed 0)."""
    items = [_Item(i, drawing) for i, drawing in enumerate(_suite(split, part))]
    if not quick:
        return items
    rng = np.random.default_rng(0)
    chosen: list[_Item] = []
    for category in _categories(items):
        rows = [item for item in items if _category(item) == category]
        chosen += quick_share(rows, rng)
    return chosen


@cache
def _suite(split: Split, part: Part) -> tuple[CaptionedScene, ...]:
    for name, value, known in (("split", split, get_args(Split)), ("part", part, PARTS)):
        if value not in known:
            raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    if part == "paraphrase":
        return tuple(paraphrase_drawings(split, PER_CATEGORY))
    return tuple(suite_drawings("geneval", split, part, per_category=PER_CATEGORY))


def _category(item: _Item) -> str:
    return item.drawing.family


def _categories(items: list[_Item]) -> list[str]:
    present = {_category(item) for item in items}
    return [category for category in FAMILIES if category in present]


def _jobs(items: list[_Item], samples: int) -> list[tuple[str, int]]:
    """Prompts and seeds, a prompt's samples together."""
    return [(item.drawing.prompt, SEED_BASE + SAMPLES * item.index + j) for item in items for j in range(samples)]


def draw_scans(generate: Generate, jobs: Sequence[tuple[str, int]]) -> Iterator[list[Scan]]:
    """One scan per (prompt, seed), a chunk at a time."""
    for chunk in chunks(jobs, DRAW_CHUNK):
        images = generate([prompt for prompt, _ in chunk], [seed for _, seed in chunk])
        yield detect(checked_images(images, len(chunk)))


# -------------------------------------------------------------------------------------------- scores, intervals, floors

_Resamples = dict[str, Grades]  # by category, (RESAMPLES, 2); the columns are RULES


def _grade_all(pairs: Iterable[tuple[_Item, list[Found]]]) -> Grades:
    verdicts = [grade(item.drawing.metadata, found) for item, found in pairs]
    return np.array([(v.correct, v.strict_correct) for v in verdicts], np.float64)


def _summary(items: list[_Item], scans: list[Scan], rng: np.random.Generator) -> tuple[Report, _Resamples]:
    """Scores of a part, and their bootstrap resamples."""
    owners = [item for item in items for _ in range(len(scans) // len(items))]
    grades = _grade_all((item, name_scan(scan)) for item, scan in zip(owners, scans, strict=True))
    categories = _categories(items)
    scores: dict[str, Grades] = {}  # (2,) each
    resamples: _Resamples = {}
    report: Report = {"n": len(scans), "prompts": len({item.drawing.prompt for item in items}), "by_category": {}}
    for category in categories:
        rows = [i for i, item in enumerate(owners) if _category(item) == category]
        prompts = [owners[i].drawing.prompt for i in rows]
        scores[category] = grades[rows].mean(axis=0)
        resamples[category] = bootstrap(prompts, grades[rows], rng)
        report["by_category"][category] = _score(scores[category], resamples[category])
        report["by_category"][category] |= {"n": len(rows), "prompts": len(set(prompts))}
    report["overall"] = _score(_mean(scores), _mean(resamples))
    return report | _judge_means(scans), resamples


def _mean(by_category: Mapping[str, Grades]) -> Grades:
    return np.asarray(np.mean(list(by_category.values()), axis=0))


def _score(score: Grades, resamples: Grades) -> Report:
    return {name: interval(score[i], resamples[:, i]) for i, name in enumerate(RULES)}


def _judge_means(scans: list[Scan]) -> Report:
    """Mean template IoU over all blobs, share of blobs without a name, share of pictures without a blob."""
    named = [d.score for scan in scans for d in scan.detections]
    unknown = [score for scan in scans for score in scan.unknown_scores]
    blobs = max(len(named) + len(unknown), 1)
    return {
        "template_iou": sum(named + unknown) / blobs,
        "unknown_share": len(unknown) / blobs,
        "empty_share": sum(not scan.detections and not scan.unknown for scan in scans) / len(scans),
    }


def _floor(items: list[_Item]) -> Report:
    """The score of true pictures of *other* prompts of the part: what a drawer gets that never reads the caption."""
    found = [name_scan(scan) for scan in detect(np.stack([render(item.drawing.scene) for item in items]))]
    count = len(items)
    shifts = np.unique(np.linspace(1, count - 1, FLOOR_SHIFTS).astype(int)) if count > 1 else np.array([0])
    by_category: dict[str, Grades] = {}
    for category in _categories(items):
        own = [i for i in range(count) if _category(items[i]) == category]
        by_category[category] = _grade_all((items[i], found[(i + s) % count]) for i in own for s in shifts).mean(axis=0)
    rows = {category: dict(zip(RULES, score.tolist(), strict=True)) for category, score in by_category.items()}
    return {**dict(zip(RULES, _mean(by_category).tolist(), strict=True)), "by_category": rows}


def _gap(parts: Mapping[str, Report], resampled: Mapping[str, _Resamples]) -> Report:
    """ID minus CG, category by category; overall over the categories that both have, so like is set against like."""
    shared = [category for category in resampled["cg"] if category in resampled["id"]]
    have, want = (
        {c: np.array([scores[rule]["score"] for rule in RULES]) for c, scores in parts[part]["by_category"].items()}
        for part in ("cg", "id")
    )
    scores = {category: want[category] - have[category] for category in shared}
    resamples = {category: resampled["id"][category] - resampled["cg"][category] for category in shared}
    by_category = {category: _score(scores[category], resamples[category]) for category in shared}
    return {"overall": _score(_mean(scores), _mean(resamples)), "by_category": by_category}


# ------------------------------------------------------------------------------------------------------------- the lock


def lock_spec() -> Report:
    """The frozen suite, made afresh: its settings, and count and hash of each part's scene keys and prompts.

    Integer keys and not pixels are hashed: rendered bytes may differ between library versions.
    """
    items = {f"{split}/{part}": _digest(_suite(split, part)) for split in get_args(Split) for part in PARTS}
    return {
        "version": 1,
        "geneval": {
            "categories": list(FAMILIES),
            "per_category": PER_CATEGORY,
            "samples": SAMPLES,
            "seed_base": SEED_BASE,
            "quick_share": QUICK_SHARE,
            "items": items,
        },
    }


def _digest(drawings: Iterable[CaptionedScene]) -> Report:
    return digest((drawing.prompt, drawing.scene.background, *scene_key(drawing.scene)) for drawing in drawings)


def verify_lock() -> None:
    """Raises DataError if the suite made by this code is not the frozen one that scores are published for."""
    check_lock(json.loads(_lock_text()), lock_spec())
