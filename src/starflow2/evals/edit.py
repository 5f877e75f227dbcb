"""W-Edit: how well an image is changed as instructed, and how well the rest of it is preserved.

The exact target is known, so no model judges: the world's detector says where each object is, and pixels say what was
left alone. Those are compared with the codec's round trip of the source, or the decoder's own error would be charged
to the edit. Every score comes with its controls: the source handed back, the target drawn afresh from its caption, and
the true target.

Letters: M items or pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import hypot, sqrt
from types import MappingProxyType
from typing import ClassVar, Final, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as nnf

from starflow2.core.images import psnr
from starflow2.evals.geneval import Generate
from starflow2.evals.statistics import Row, Scored, Scores, chunks, quick_share, score_rows
from starflow2.evals.suite import (
    IMAGES_AT_ONCE,
    Codec,
    Graded,
    Images,
    Job,
    Part,
    Runs,
    Section,
    check_choice,
    checked_images,
    digest,
    graded,
    jobs,
    roundtrip_scenes,
)
from starflow2.evals.twins import is_twin
from starflow2.world.briefs import Brief
from starflow2.world.captions import caption
from starflow2.world.detector import Detection, Scan, detect
from starflow2.world.edit_operations import OPERATIONS, Operation
from starflow2.world.edits import Edit, suite_edits, suite_plain_edits, suite_sessions
from starflow2.world.scene import BACKGROUNDS, Scene, SceneObject, Split, coverage, relations, render, stream
from starflow2.world.splits import scene_key

__all__ = [
    "COLUMNS",
    "SEED_BASE",
    "SESSIONS",
    "EditGrade",
    "EditImages",
    "EditSuite",
    "edit_marks",
    "edit_twins",
    "edits_of",
    "grade_edits",
    "is_same_image",
]

PER_OPERATION: Final[tuple[tuple[Part, int], ...]] = (("id", 48), ("cg", 24), ("paraphrase", 48), ("plain", 32))
SESSIONS: Final = 64  # of suite sessions, which shares this one's section of the lock
SEED_BASE: Final = 3_000_000  # item i of a part starts from seed SEED_BASE + i

PLACE: Final = 6.0  # pixels from where the changed object should stand
DRIFT: Final = 4.0  # pixels that anything else may move
TINT: Final = 0.04  # distance of the background's colour, on [0, 1]
FIDELITY: Final = 24.0  # dB, outside of what the edit touches
MOST_DB: Final = 100.0  # what equal images score
DILATION: Final = 2  # pixels around what the edit touches

Bools = NDArray[np.bool_]
EditImages = Callable[[Images, list[str], list[int]], Images]  # (n, 64, 64, 3), instructions, seeds -> the same shape


# -------------------------------------------------------------------------------------------------------------- grading

_REQUESTED: Final[Mapping[Operation, tuple[str, ...]]] = MappingProxyType(  # attributes the changed object must have
    {
        "recolor": ("color",),
        "reshape": ("shape",),
        "resize": ("size",),
        "move": ("shape", "color"),
        "add": ("shape", "color", "size"),
    }
)
_UNCHANGED: Final[Mapping[Operation, tuple[str, ...]]] = MappingProxyType(  # attributes it must not lose
    {
        "recolor": ("shape", "size"),
        "reshape": ("color", "size"),
        "resize": ("shape", "color"),
        "move": ("shape", "color", "size"),
    }
)


@dataclass(frozen=True, slots=True)
class EditGrade:
    """The grade of one edited image.

    applied: the requested change is there. share: share of objects that should have stayed, and of the background,
    which did; every additional blob counts as one more that did not. preserved: all of these stayed, and so did the
    pixels outside what the edit touches.
    """

    applied: bool
    share: float
    psnr: float  # dB, outside what the edit touches
    template_iou: float  # mean over all blobs
    l1: float  # mean absolute and squared difference from the true target, on [0, 1]
    l2: float
    is_twin: bool | None = None  # one shape is there too often while another is missing; None: there is only one

    @property
    def preserved(self) -> bool:
        """True if nothing else changed."""
        return self.share == 1 and self.psnr >= FIDELITY

    @property
    def success(self) -> bool:
        """True if applied and preserved: the headline."""
        return self.applied and self.preserved

    @property
    def semantic(self) -> float:
        """S of GEdit's √(S·Q), 0 to 10."""
        return 10 * self.applied * self.share

    @property
    def quality(self) -> float:
        """Q, 0 to 10."""
        return 10 * self.template_iou


def grade_edits(edits: Sequence[Edit], images: Images, references: Images) -> list[EditGrade]:
    """Grade edited images against the exact truth.

    images, references: (M, 64, 64, 3) uint8; references are the sources as the codec gives them back.
    Raises DataError for other shapes.
    """
    images, references = checked_images(images, len(edits)), checked_images(references, len(edits))
    rows = zip(edits, detect(images), images, references, strict=True)
    return [_grade(edit, scan, image, reference) for edit, scan, image, reference in rows]


def _grade(edit: Edit, scan: Scan, image: Images, reference: Images) -> EditGrade:
    others = [obj for i, obj in enumerate(edit.source.objects) if i not in edit.step.changed]
    matches = [_match(obj, scan.detections) for obj in others]
    matched = {id(detection) for detection in matches if detection is not None}
    free = [detection for detection in scan.detections if id(detection) not in matched]
    stayed = [detection is not None for detection in matches]
    if edit.operation in _UNCHANGED:
        stayed += [_is_rest_unchanged(edit, old, free) for old, _ in _changed(edit)]
    if edit.operation != "background":
        stayed.append(_has_background(scan, edit.target))
    extra = max(len(free) + scan.unknown - _allowed(edit, free), 0)
    scores = [detection.score for detection in scan.detections] + list(scan.unknown_scores)
    difference = (image.astype(np.float64) - render(edit.target)) / 255
    return EditGrade(
        applied=_is_applied(edit, scan, free),
        share=sum(stayed) / (len(stayed) + extra),
        psnr=_psnr(image, reference, ~_touched(edit, free)),
        template_iou=sum(scores) / max(len(scores), 1),
        l1=float(np.abs(difference).mean()),
        l2=float(np.square(difference).mean()),
        is_twin=_is_twin(edit.target, scan),
    )


def _is_twin(target: Scene, scan: Scan) -> bool | None:
    """True if an image repeats one shape of the target where another is missing; None for targets of one shape."""
    asked = [obj.shape for obj in target.objects]
    return is_twin(asked, (d.shape for d in scan.detections)) if len(set(asked)) > 1 else None


def _match(obj: SceneObject, detections: Iterable[Detection]) -> Detection | None:
    """The detection of an object where it was. Objects are so far apart that no two match the same one."""
    near = [d for d in detections if _same(d, obj, ("shape", "color", "size")) and _distance(d, obj) <= DRIFT]
    return min(near, key=lambda d: _distance(d, obj), default=None)


def _same(detection: Detection, obj: SceneObject, attributes: Iterable[str]) -> bool:
    return all(getattr(detection, name) == getattr(obj, name) for name in attributes)


def _distance(detection: Detection, obj: SceneObject) -> float:
    return hypot(detection.center[0] - obj.x, detection.center[1] - obj.y)


def _allowed(edit: Edit, free: Sequence[Detection]) -> int:
    """How many blobs there may be besides the other objects: the changed objects, right or wrong, but once."""
    if edit.operation == "remove":
        return sum(_match(old, free) is not None for old, _ in _changed(edit))
    return len(_changed(edit))


def _has_background(scan: Scan, scene: Scene) -> bool:
    tint = (int(value) / 255 for value in BACKGROUNDS[scene.background])
    return sqrt(sum((a - b) ** 2 for a, b in zip(scan.background, tint, strict=True))) < TINT


def _changed(edit: Edit) -> list[tuple[SceneObject, SceneObject]]:
    """The changed objects before and after; an object that is added or removed twice."""
    source, target = edit.source.objects, edit.target.objects
    if edit.operation == "add":
        return [(target[-1], target[-1])]
    if edit.operation == "remove":
        return [(source[i], source[i]) for i in edit.step.changed]
    return [(source[i], target[i]) for i in edit.step.changed]


def _is_applied(edit: Edit, scan: Scan, free: Sequence[Detection]) -> bool:
    """True if every changed object is as requested; it is found by its place, or by the shape and colour it keeps.

    free: detections that are no other object of the source.
    """
    if edit.operation == "background":
        return _has_background(scan, edit.target)
    if edit.step.is_free:
        return bool(_added(edit, free))
    pairs = _changed(edit)
    return all(_is_done(edit.operation, old, new, free, is_one=len(pairs) == 1) for old, new in pairs)


def _is_done(
    operation: Operation, old: SceneObject, new: SceneObject, free: Sequence[Detection], *, is_one: bool
) -> bool:
    """True if one object changed as requested. is_one: no other does, so its looks tell it as well as its place."""
    if operation == "remove":
        return not any(_distance(d, old) <= PLACE or _same(d, old, ("shape", "color")) for d in free)
    requested = _REQUESTED[operation]
    fit = [d for d in free if _same(d, new, requested)]
    by_looks = [name for name in ("shape", "color") if name not in requested and is_one]
    return any(_distance(d, new) <= PLACE or (bool(by_looks) and _same(d, old, by_looks)) for d in fit)


def _added(edit: Edit, free: Sequence[Detection]) -> list[Detection]:
    """Detections that are the object which was to be added anywhere, or on a side of another one."""
    step, new = edit.step, edit.target.objects[-1]
    found = [d for d in free if _same(d, new, ("shape", "color", *["size"] * step.names_size))]
    if step.beside is None:
        return found
    side, index = step.beside
    return [d for d in found if side in relations(d.as_object, edit.source.objects[index])]


def _is_rest_unchanged(edit: Edit, old: SceneObject, free: Sequence[Detection]) -> bool:
    """True if a changed object still has the attributes that the edit does not change."""
    attributes = _UNCHANGED[edit.operation]
    return any(_same(d, old, attributes) and (edit.operation == "move" or _distance(d, old) <= DRIFT) for d in free)


def _touched(edit: Edit, free: Sequence[Detection]) -> Bools:
    """(64, 64): pixels that the edit may change.

    The changed objects where they were and where they should be, or stand where that is open, and two pixels around;
    for a background, everything but the objects.
    """
    if edit.operation == "background":
        touched = np.max([coverage(obj) for obj in edit.source.objects], axis=0) < 255
    else:
        objects = [version for pair in _changed(edit) for version in pair]
        if edit.step.is_free:
            objects = [found.as_object for found in _added(edit, free)] or objects
        touched = np.max([coverage(obj) for obj in objects], axis=0) > 0
    grown = nnf.max_pool2d(torch.from_numpy(touched)[None].float(), 2 * DILATION + 1, stride=1, padding=DILATION)
    return np.asarray(grown[0].numpy() > 0)


def _psnr(image: Images, reference: Images, where: Bools) -> float:
    """PSNR in dB over some of the pixels, at most MOST_DB; MOST_DB if there are none."""
    if not where.any():
        return MOST_DB
    pixels, references = (torch.from_numpy(x[where].astype(np.float64))[None] for x in (image, reference))  # (1, M, 3)
    return min(float(psnr(pixels, references, span=255)), MOST_DB)


def is_same_image(image: Images, other: Images) -> bool:
    """True if two images (64, 64, 3) differ by no more than a faithful edit may: PSNR of at least 24 dB."""
    return _psnr(image, other, np.ones(image.shape[:2], np.bool_)) >= FIDELITY


# ------------------------------------------------------------------------------------------------------------ the suite

COLUMNS: Final = ("success", "applied", "preserved", "semantic", "quality", "overall", "l1", "l2", "psnr")


def edit_marks(grade: EditGrade) -> tuple[float, ...]:
    """A grade as COLUMNS: shares, but for three columns of 10; overall is √(S·Q), as in GEdit."""
    g, overall = grade, sqrt(grade.semantic * grade.quality)
    return (g.success, g.applied, g.preserved, g.semantic, g.quality, overall, g.l1, g.l2, g.psnr)


def edit_twins(grades: Iterable[EditGrade]) -> float | None:
    """Twins per 100 edits whose target has several shapes; None where there is no such edit."""
    twins = [grade.is_twin for grade in grades if grade.is_twin is not None]
    return 100 * sum(twins) / len(twins) if twins else None


_Items = Sequence[Job[Edit]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EditSuite:
    """Seven operations. Scores an `EditImages`. Columns are COLUMNS, means over operations, and `twins` (`twins`).

    In part "plain" requests are in the words of training's grammar: they change several objects at once, call a lone
    one "it", and add objects where any place is right, or any on one side of another object.

    per_operation: edits of each operation, by part. codec: without one, the source and the target themselves are the
    reference and the ceiling. draw: draws the control "regenerate", which is left out without it.
    """

    parts: tuple[Part, ...] = ("id", "cg")
    per_operation: tuple[tuple[Part, int], ...] = PER_OPERATION
    codec: Codec | None = None
    draw: Generate | None = None
    name: ClassVar[str] = "edit"
    chunk: ClassVar[int] = IMAGES_AT_ONCE

    def items(self, split: Split) -> Mapping[str, _Items]:
        counts = dict(self.per_operation)
        for part in self.parts:
            check_choice("part", part, counts)
        return {part: jobs(edits_of(split, part, counts[part]), SEED_BASE) for part in self.parts}

    def quick(self, items: _Items) -> _Items:
        return quick_share(items, stratum=lambda item: item.task.operation, unit=lambda item: item.index)

    def run(self, edit: EditImages, items: _Items) -> list[Images]:
        sources = np.stack([render(item.task.source) for item in items])
        made = edit(sources, [item.task.instruction for item in items], [item.seed for item in items])
        return list(checked_images(made, len(items)))

    def grade(self, runs: Runs[Job[Edit], Images]) -> Graded:
        """Scores against the exact targets.

        Controls are "copy", the source handed back, "ceiling", the true target, both after the codec, and "regenerate".
        """
        scored, bounds = dict[str, Scored](), defaultdict[str, dict[str, Scores]](dict)
        for part, pairs in runs.items():
            items = [item for item, _ in pairs]
            references = roundtrip_scenes(self.codec, [item.task.source for item in items])
            targets = roundtrip_scenes(self.codec, [item.task.target for item in items])
            controls = {"copy": references, "ceiling": targets}
            if self.draw is not None:
                controls["regenerate"] = _drawn(self.draw, items)
            scored[part] = _score(items, np.stack([image for _, image in pairs]), references)
            for name, images in controls.items():
                bounds[name][part] = _score(items, images, references).scores
        return graded(scored, dict(bounds), {"seed_base": SEED_BASE, "has_codec": self.codec is not None})

    def are_right(self, items: _Items, outputs: Sequence[Images]) -> list[bool]:
        references = roundtrip_scenes(self.codec, [item.task.source for item in items])
        grades = grade_edits([item.task for item in items], np.stack(list(outputs)), references)
        return [grade.success for grade in grades]

    def unit(self, item: Job[Edit]) -> tuple[str, int]:
        return item.task.operation, item.index

    def without_controls(self) -> EditSuite:
        return replace(self, draw=None)

    def lock(self) -> Section:
        items = {
            f"{split}/{part}": digest(map(_locked, edits_of(split, part, count)))
            for split in get_args(Split)
            for part, count in self.per_operation
        }
        for split in get_args(Split):
            turns = [(s.undo_to, edit) for s in suite_sessions(split, SESSIONS) for edit in s.edits]
            items[f"{split}/sessions"] = digest((undo_to, *_locked(edit)) for undo_to, edit in turns)
        settings = {"operations": list(OPERATIONS), "per_operation": dict(self.per_operation), "sessions": SESSIONS}
        return {"edit": {**settings, "seed_base": SEED_BASE, "items": items}}


@cache
def edits_of(split: Split, part: Part, per_operation: int) -> tuple[Edit, ...]:
    """The edits of a part, operation by operation. Raises ConfigError for one that edits do not have."""
    if part == "plain":
        return suite_plain_edits(split, per_operation)
    return tuple(suite_edits(split, part, per_operation))  # type: ignore[arg-type]  # refuses others itself


def _locked(edit: Edit) -> tuple[object, ...]:
    scenes = [(scene.background, *scene_key(scene)) for scene in (edit.source, edit.target)]
    return (edit.operation, edit.instruction, *scenes[0], *scenes[1])


def _drawn(draw: Generate, items: _Items) -> Images:
    """The targets, drawn from their captions."""
    images: list[Images] = []
    for chunk in chunks(items, IMAGES_AT_ONCE):
        prompts = [_caption(item.task.target, item.index) for item in chunk]
        images += list(checked_images(draw(prompts, [item.seed for item in chunk]), len(chunk)))
    return np.stack(images)


def _caption(scene: Scene, index: int) -> str:
    """A caption of everything in a scene, in training's words."""
    brief = Brief(scene=scene, family="dense", mentions=frozenset({"color", "size", "background"}))
    return caption(brief, stream(SEED_BASE, index))


def _score(items: _Items, images: Images, references: Images) -> Scored:
    """Scores of a part."""
    grades = grade_edits([item.task for item in items], images, references)
    graded_items = enumerate(zip(items, grades, strict=True))
    rows = [Row(item.task.operation, row, edit_marks(grade)) for row, (item, grade) in graded_items]
    scored = score_rows(rows, COLUMNS, np.random.default_rng(0), "averaged")
    return replace(scored, scores=scored.scores.with_columns(twins=edit_twins(grades)))
