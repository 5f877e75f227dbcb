"""W-Edit: how well a picture is changed as told, and how well all the rest of it is kept.

The exact target is known, so no model judges: the world's detector says what stands where, and pixels say what was
left alone. Those are compared with the codec's round trip of the source, or the decoder's own error would be charged
to the edit. The runners are handed an `edit` function or a `start` and know nothing of models. Every score comes with
its controls: who hands the source back, who draws the target afresh from its caption, and the true target.

Letters: M items, K columns of scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import hypot, sqrt
from types import MappingProxyType
from typing import Final, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as nnf

from starflow2.core.images import psnr
from starflow2.errors import ConfigError
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
from starflow2.world.captions import Brief, caption
from starflow2.world.detector import Detection, Scan, detect
from starflow2.world.edit_operations import OPERATIONS, Operation
from starflow2.world.edits import Edit, EditSession, Part, suite_edits, suite_sessions
from starflow2.world.scene import BACKGROUNDS, Scene, SceneObject, Split, coverage, render, stream
from starflow2.world.splits import scene_key

__all__ = [
    "EditGrade",
    "Session",
    "evaluate_edit",
    "evaluate_edit_sessions",
    "grade_edits",
    "lock_spec",
    "verify_lock",
]

PER_OPERATION: Final[Mapping[Part, int]] = MappingProxyType({"id": 48, "cg": 24, "paraphrase": 48})
SESSIONS: Final = 64
SEED_BASE: Final = 3_000_000  # item i of a part starts from seed SEED_BASE + i
EDIT_CHUNK: Final = 64  # pictures asked of `edit` at a time

PLACE: Final = 6.0  # pixels from where the changed object should stand
DRIFT: Final = 4.0  # pixels that anything else may move
TINT: Final = 0.04  # distance of the background's colour, on [0, 1]
FIDELITY: Final = 24.0  # dB, outside of what the edit touches
MOST_DB: Final = 100.0  # what equal pictures score
DILATION: Final = 2  # pixels around what the edit touches

Images = NDArray[np.uint8]
Bools = NDArray[np.bool_]
EditImages = Callable[[Images, list[str], list[int]], Images]  # (n, 64, 64, 3), instructions, seeds -> the same shape
Draw = Callable[[list[str], list[int]], Images]  # prompts, seeds -> (n, 64, 64, 3)
Codec = Callable[[Images], Images]  # round trip, (n, 64, 64, 3) -> the same
Progress = Callable[[int, int], None]  # pictures done, pictures in all


class Session(Protocol):
    """A conversation about one picture. All pictures are (64, 64, 3) uint8."""

    def edit(self, instruction: str) -> Images:
        """The present picture, changed as told."""
        ...

    def undo(self, turns: int) -> Images:
        """The picture as it was so many edits ago, which is the present one from now on."""
        ...


Start = Callable[[Images, int], Session]  # picture, seed


# -------------------------------------------------------------------------------------------------------------- grading

_ASKED: Final[Mapping[Operation, tuple[str, ...]]] = MappingProxyType(  # what the changed object must have
    {
        "recolor": ("color",),
        "reshape": ("shape",),
        "resize": ("size",),
        "move": ("shape", "color"),
        "add": ("shape", "color", "size"),
    }
)
_KEPT: Final[Mapping[Operation, tuple[str, ...]]] = MappingProxyType(  # what it must not lose
    {
        "recolor": ("shape", "size"),
        "reshape": ("color", "size"),
        "resize": ("shape", "color"),
        "move": ("shape", "color", "size"),
    }
)


@dataclass(frozen=True, slots=True)
class EditGrade:
    """One edited picture, graded.

    applied: what was asked for is there. share: of the objects and the background that were to stay, those that did,
    unasked blobs counting as losses. preserved: all of it did, and so did the pixels outside what the edit touches.
    """

    applied: bool
    share: float
    psnr: float  # dB, outside what the edit touches
    template_iou: float  # mean over all blobs
    l1: float  # mean absolute and squared difference from the true target, on [0, 1]
    l2: float

    @property
    def preserved(self) -> bool:
        """Nothing else changed."""
        return self.share == 1 and self.psnr >= FIDELITY

    @property
    def success(self) -> bool:
        """The headline: applied and preserved."""
        return self.applied and self.preserved

    @property
    def semantic(self) -> float:
        """S of GEdit's √(S·Q), 0 to 10."""
        return 10 * self.applied * self.share

    @property
    def quality(self) -> float:
        """Q, 0 to 10."""
        return 10 * self.template_iou


COLUMNS: Final = ("success", "applied", "preserved", "semantic", "quality", "overall", "l1", "l2", "psnr")


def grade_edits(edits: Sequence[Edit], images: Images, references: Images) -> list[EditGrade]:
    """Grades edited pictures against the exact truth.

    images, references: (M, 64, 64, 3) uint8; references are the sources as the codec gives them back.
    Raises DataError for other shapes.
    """
    images, references = checked_images(images, len(edits)), checked_images(references, len(edits))
    rows = zip(edits, detect(images), images, references, strict=True)
    return [_grade(edit, scan, image, reference) for edit, scan, image, reference in rows]


def _grade(edit: Edit, scan: Scan, image: Images, reference: Images) -> EditGrade:
    others = [thing for i, thing in enumerate(edit.source.objects) if i != edit.before]
    matched = [_standing(thing, scan.detections) for thing in others]
    taken = {id(found) for found in matched if found is not None}
    free = [found for found in scan.detections if id(found) not in taken]
    applied = _is_applied(edit, scan, free)
    kept = [found is not None for found in matched]
    if edit.operation in _KEPT:
        kept.append(_is_rest_kept(edit, free))
    if edit.operation != "background":
        kept.append(_has_background(scan, edit.target))
    extra = max(len(free) + scan.unknown - _allowed(edit, free), 0)
    scores = [found.score for found in scan.detections] + list(scan.unknown_scores)
    off = (image.astype(np.float64) - render(edit.target)) / 255
    return EditGrade(
        applied=applied,
        share=sum(kept) / (len(kept) + extra),
        psnr=_psnr(image, reference, ~_touched(edit)),
        template_iou=sum(scores) / max(len(scores), 1),
        l1=float(np.abs(off).mean()),
        l2=float(np.square(off).mean()),
    )


def _standing(thing: SceneObject, detections: Iterable[Detection]) -> Detection | None:
    """The detection that is this object, where it was; objects stand so far apart that no two claim the same one."""
    same = [d for d in detections if _same(d, thing, ("shape", "color", "size")) and _distance(d, thing) <= DRIFT]
    return min(same, key=lambda d: _distance(d, thing), default=None)


def _same(found: Detection, thing: SceneObject, attributes: Iterable[str]) -> bool:
    return all(getattr(found, name) == getattr(thing, name) for name in attributes)


def _distance(found: Detection, thing: SceneObject) -> float:
    return hypot(found.center[0] - thing.x, found.center[1] - thing.y)


def _allowed(edit: Edit, free: Sequence[Detection]) -> int:
    """How many blobs besides the others may be there: the changed object, right or wrong, but once."""
    if edit.operation == "remove":
        return int(_standing(_changed(edit)[0], free) is not None)
    return int(edit.operation != "background")


def _has_background(scan: Scan, scene: Scene) -> bool:
    tint = (int(value) / 255 for value in BACKGROUNDS[scene.background])
    return sqrt(sum((a - b) ** 2 for a, b in zip(scan.background, tint, strict=True))) < TINT


def _changed(edit: Edit) -> tuple[SceneObject, SceneObject]:
    """The changed object before and after; the same twice where it was not there before or is gone after."""
    found = [
        scene.objects[index]
        for scene, index in ((edit.source, edit.before), (edit.target, edit.after))
        if index is not None
    ]
    return found[0], found[-1]


def _is_applied(edit: Edit, scan: Scan, free: Sequence[Detection]) -> bool:
    """Whether the changed object, found by place or by the shape and colour that it should still have, is as asked.

    free: detections that are no other object of the source.
    """
    if edit.operation == "background":
        return _has_background(scan, edit.target)
    old, new = _changed(edit)
    if edit.operation == "remove":
        return not any(_distance(d, old) <= PLACE or _same(d, old, ("shape", "color")) for d in free)
    asked = _ASKED[edit.operation]
    fit = [d for d in free if _same(d, new, asked)]
    by_looks = [name for name in ("shape", "color") if name not in asked]
    return any(_distance(d, new) <= PLACE or (bool(by_looks) and _same(d, old, by_looks)) for d in fit)


def _is_rest_kept(edit: Edit, free: Sequence[Detection]) -> bool:
    """Whether the changed object still has what the edit does not change of it."""
    old, _ = _changed(edit)
    return any(
        _same(d, old, _KEPT[edit.operation]) and (edit.operation == "move" or _distance(d, old) <= DRIFT) for d in free
    )


def _touched(edit: Edit) -> Bools:
    """(64, 64): the changed object where it was and where it should be, and two pixels around; all but the objects for
    a background."""
    if edit.operation == "background":
        touched = np.max([coverage(thing) for thing in edit.source.objects], axis=0) < 255
    else:
        touched = np.max([coverage(thing) for thing in _changed(edit)], axis=0) > 0
    grown = nnf.max_pool2d(torch.from_numpy(touched)[None].float(), 2 * DILATION + 1, stride=1, padding=DILATION)
    return np.asarray(grown[0].numpy() > 0)


def _psnr(image: Images, reference: Images, where: Bools) -> float:
    """In dB over some of the pixels, at most MOST_DB; equal if there are none."""
    if not where.any():
        return MOST_DB
    found, wanted = (torch.from_numpy(x[where].astype(np.float64))[None] for x in (image, reference))  # 2 x (1, M, 3)
    return min(float(psnr(found, wanted, span=255)), MOST_DB)


def _table(grades: Iterable[EditGrade]) -> Grades:
    """(M, K), the columns are COLUMNS; overall is √(S·Q) of each picture, as in GEdit."""
    rows = [
        (g.success, g.applied, g.preserved, g.semantic, g.quality, sqrt(g.semantic * g.quality), g.l1, g.l2, g.psnr)
        for g in grades
    ]
    return np.array(rows, np.float64)


# --------------------------------------------------------------------------------------------------------- single edits


@dataclass(frozen=True, slots=True)
class _Item:
    index: int  # in the full suite, so that a quick run starts from the same seeds
    edit: Edit


def evaluate_edit(
    edit: EditImages,
    split: Split,
    *,
    quick: bool = False,
    parts: Sequence[Part] = ("id", "cg"),
    codec: Codec | None = None,
    draw: Draw | None = None,
    progress: Progress | None = None,
) -> Report:
    """Edits and grades the suite: seven operations, 48 pictures of each in "id" and 24 in "cg".

    split: "dev" (for every choice) or "test". quick: one item in eight. codec: what the codec makes of a picture;
    without one the source and the target themselves are the reference and the ceiling. draw: for the control that draws
    the target's caption afresh, left out without it.
    Returns a JSON-able report: `report["parts"][part]` holds `overall` (mean of operations) and `by_operation`, each
    with the COLUMNS and their intervals, and `controls`. success, applied and preserved are shares in [0, 1]; semantic,
    quality and overall are of 10; l1 and l2 are to the true target, psnr is in dB outside what the edit touches.
    Raises ConfigError for an unknown split or part, DataError if a callable returns another shape.
    """
    sets = {part: _items(split, part, quick) for part in parts}
    total = sum(map(len, sets.values()))
    report: Report = {"suite": "edit", "split": split, "quick": quick, "n": total, "seed_base": SEED_BASE}
    report |= {"has_codec": codec is not None, "parts": {}}
    resampled, done = dict[str, _Resamples](), 0
    for part, items in sets.items():
        images: list[Images] = []
        for chunk in chunks(items, EDIT_CHUNK):
            sources = np.stack([render(item.edit.source) for item in chunk])
            seeds = [SEED_BASE + item.index for item in chunk]
            made = edit(sources, [item.edit.instruction for item in chunk], seeds)
            images += list(checked_images(made, len(chunk)))
            done += len(chunk)
            if progress:
                progress(done, total)
        references = _through(codec, [item.edit.source for item in items])
        report["parts"][part], resampled[part] = _summary(items, np.stack(images), references)
        report["parts"][part]["controls"] = _controls(items, references, codec, draw)
    if "id" in sets and "cg" in sets:
        report["gap"] = _gap(report["parts"], resampled)
    return report


def _controls(items: Sequence[_Item], references: Images, codec: Codec | None, draw: Draw | None) -> Report:
    """What it scores to hand the source back, to draw the target from words alone, and to know the target."""
    images = {"copy": references, "ceiling": _through(codec, [item.edit.target for item in items])}
    if draw is not None:
        drawn: list[Images] = []
        for chunk in chunks(items, EDIT_CHUNK):
            prompts = [_caption(item.edit.target, item.index) for item in chunk]
            drawn += list(checked_images(draw(prompts, [SEED_BASE + item.index for item in chunk]), len(chunk)))
        images["regenerate"] = np.stack(drawn)
    return {name: _summary(items, found, references)[0] for name, found in images.items()}


def _caption(scene: Scene, index: int) -> str:
    """Everything about a scene in training's words."""
    brief = Brief(scene=scene, family="dense", mentions=frozenset({"color", "size", "background"}))
    return caption(brief, stream(SEED_BASE, index))


def _through(codec: Codec | None, scenes: Sequence[Scene]) -> Images:
    """(n, 64, 64, 3): pictures of the scenes after the codec's round trip."""
    images: list[Images] = []
    for chunk in chunks(scenes, EDIT_CHUNK):
        truth = np.stack([render(scene) for scene in chunk])
        images += list(truth if codec is None else checked_images(codec(truth), len(chunk)))
    return np.stack(images)


def _items(split: Split, part: Part, quick: bool) -> list[_Item]:
    """The suite in its fixed order, or a quick run's share of each operation (seed 0)."""
    items = [_Item(i, edit) for i, edit in enumerate(_suite(split, part))]
    if not quick:
        return items
    rng = np.random.default_rng(0)
    rows = [[item for item in items if item.edit.operation == operation] for operation in OPERATIONS]
    return [item for some in rows for item in quick_share(some, rng)]


@cache
def _suite(split: Split, part: Part) -> tuple[Edit, ...]:
    for name, value, known in (("split", split, get_args(Split)), ("part", part, tuple(PER_OPERATION))):
        if value not in known:
            raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    return tuple(suite_edits(split, part, PER_OPERATION[part]))


# --------------------------------------------------------------------------------------------------- scores, intervals

_Resamples = dict[str, Grades]  # by operation, (RESAMPLES, K)


def _summary(items: Sequence[_Item], images: Images, references: Images) -> tuple[Report, _Resamples]:
    """Scores of a part, and their bootstrap resamples."""
    scores = _table(grade_edits([item.edit for item in items], images, references))  # (M, K)
    rng = np.random.default_rng(0)
    means: dict[str, Grades] = {}  # (K,) each
    resamples: _Resamples = {}
    report: Report = {"n": len(items), "by_operation": {}}
    for operation in OPERATIONS:
        rows = [i for i, item in enumerate(items) if item.edit.operation == operation]
        means[operation] = scores[rows].mean(axis=0)
        resamples[operation] = bootstrap(rows, scores[rows], rng)
        report["by_operation"][operation] = {"n": len(rows)} | _score(means[operation], resamples[operation])
    report["overall"] = _score(_mean(means), _mean(resamples))
    return report, resamples


def _mean(by_operation: Mapping[str, Grades]) -> Grades:
    return np.asarray(np.mean(list(by_operation.values()), axis=0))


def _score(score: Grades, resamples: Grades) -> Report:
    return {name: interval(score[i], resamples[:, i]) for i, name in enumerate(COLUMNS)}


def _gap(parts: Mapping[str, Report], resampled: Mapping[str, _Resamples]) -> Report:
    """ID minus CG, operation by operation, and their mean."""
    have, want = (
        {o: np.array([row[c]["score"] for c in COLUMNS]) for o, row in parts[part]["by_operation"].items()}
        for part in ("cg", "id")
    )
    scores: dict[str, Grades] = {o: want[o] - have[o] for o in OPERATIONS}
    resamples: _Resamples = {o: resampled["id"][o] - resampled["cg"][o] for o in OPERATIONS}
    by_operation = {operation: _score(scores[operation], resamples[operation]) for operation in OPERATIONS}
    return {"overall": _score(_mean(scores), _mean(resamples)), "by_operation": by_operation}


# ------------------------------------------------------------------------------------------------------------- sessions


def evaluate_edit_sessions(
    start: Start,
    split: Split,
    *,
    quick: bool = False,
    codec: Codec | None = None,
    progress: Progress | None = None,
) -> Report:
    """Runs and grades the sessions of three edits with an undo before the third.

    Every turn is graded as a single edit of the *true* picture before it, so that errors which an earlier turn left
    behind count again. `report["turns"]` has the COLUMNS of each turn, `overall` their means, `all_turns` the share of
    sessions in which all three succeed. `undo` is `same` where the picture is again what it was (PSNR of at least 24 dB
    to the earlier picture, or to the codec's round trip of the source) and `exact` where every byte is.
    Options and errors as in `evaluate_edit`.
    """
    numbers, sessions = _sessions(split, quick)
    images: list[Images] = []
    undone: list[tuple[bool, bool]] = []
    references = _through(codec, [edit.source for session in sessions for edit in session.edits])
    for row, (number, session) in enumerate(zip(numbers, sessions, strict=True)):
        made, again = _run(start, session, SEED_BASE + number)
        images += made
        versions = [made[0]] if session.undo_to else [render(session.source), references[3 * row]]
        undone.append(_undo_marks(again, versions))
        if progress:
            progress(len(images), 3 * len(sessions))
    edits = [edit for session in sessions for edit in session.edits]
    report: Report = {"suite": "edit_sessions", "split": split, "quick": quick, "n": len(sessions)}
    report |= {"seed_base": SEED_BASE, "has_codec": codec is not None}
    report |= _session_summary(grade_edits(edits, np.stack(images), references))
    marks = np.array(undone, np.float64)  # (M, 2)
    resamples = bootstrap(range(len(marks)), marks, np.random.default_rng(0))
    report["undo"] = {name: interval(marks[:, i].mean(), resamples[:, i]) for i, name in enumerate(("same", "exact"))}
    report["controls"] = {
        "copy": _session_summary(grade_edits(edits, np.repeat(references[::3], 3, axis=0), references)),
        "ceiling": _session_summary(grade_edits(edits, _through(codec, [edit.target for edit in edits]), references)),
    }
    return report


def _sessions(split: Split, quick: bool) -> tuple[list[int], list[EditSession]]:
    """Sessions and their numbers in the full suite; a quick run takes one in eight of either kind of undo."""
    sessions = suite_sessions(split, SESSIONS)
    numbers = list(range(len(sessions)))
    if quick:
        rng = np.random.default_rng(0)
        numbers = [n for kind in (0, 1) for n in quick_share([n for n in numbers if sessions[n].undo_to == kind], rng)]
    return numbers, [sessions[number] for number in numbers]


def _run(start: Start, session: EditSession, seed: int) -> tuple[list[Images], Images]:
    """The pictures of the three turns, and that of the undo."""
    talk = start(render(session.source), seed)
    first, second, third = session.instructions
    made = [_one(talk.edit(first)), _one(talk.edit(second))]
    again = _one(talk.undo(2 - session.undo_to))
    return [*made, _one(talk.edit(third))], again


def _one(image: Images) -> Images:
    return checked_images(np.asarray(image)[None], 1)[0]


def _undo_marks(image: Images, versions: Sequence[Images]) -> tuple[bool, bool]:
    everywhere = np.ones(image.shape[:2], np.bool_)
    is_same = any(_psnr(image, version, everywhere) >= FIDELITY for version in versions)
    return is_same, any(np.array_equal(image, version) for version in versions)


def _session_summary(grades: Sequence[EditGrade]) -> Report:
    """Scores of the turns of all sessions, three grades each; sessions are resampled whole."""
    scores = _table(grades).reshape(-1, 3, len(COLUMNS))  # (M, 3, K)
    rows, rng = range(len(scores)), np.random.default_rng(0)
    means: Grades = np.asarray(scores.mean(axis=1))  # (M, K)
    all_turns: Grades = np.asarray(scores[:, :, :1].all(axis=1), np.float64)  # (M, 1)
    return {
        "turns": [_score(scores[:, t].mean(axis=0), bootstrap(rows, scores[:, t], rng)) for t in range(3)],
        "overall": _score(means.mean(axis=0), bootstrap(rows, means, rng)),
        "all_turns": interval(all_turns.mean(), bootstrap(rows, all_turns, rng)[:, 0]),
    }


# ------------------------------------------------------------------------------------------------------------- the lock


def lock_spec() -> Report:
    """The frozen suite, made afresh: its settings, and count and hash of each part's scene keys and instructions."""
    items = {f"{split}/{part}": _digest(_suite(split, part)) for split in get_args(Split) for part in PER_OPERATION}
    for split in get_args(Split):
        turns = [(s.undo_to, edit) for s in suite_sessions(split, SESSIONS) for edit in s.edits]
        items[f"{split}/sessions"] = digest((undo_to, *_told(edit)) for undo_to, edit in turns)
    return {
        "edit": {
            "operations": list(OPERATIONS),
            "per_operation": dict(PER_OPERATION),
            "sessions": SESSIONS,
            "seed_base": SEED_BASE,
            "items": items,
        }
    }


def _digest(edits: Iterable[Edit]) -> Report:
    return digest(_told(edit) for edit in edits)


def _told(edit: Edit) -> tuple[object, ...]:
    scenes = [(scene.background, *scene_key(scene)) for scene in (edit.source, edit.target)]
    return (edit.operation, edit.instruction, *scenes[0], *scenes[1])


def verify_lock() -> None:
    """Raises DataError if the suites made by this code are not the frozen ones that scores are published for."""
    check_lock(json.loads(lock_text()), lock_spec())
