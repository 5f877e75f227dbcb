"""GenEval: its folders of images, and its score from a detector's file.

A detector hands back `detections.jsonl`: after a line that names the judge, one line an image, {"image":
"00000/samples/0000.png", "size": [256, 256], "detections": [{"class": "cow", "score": 0.97, "box": [x0, y0, x1, y1],
"color": "red"}]}, with all boxes above the lower threshold; thresholds, limits and verdicts are applied here by
GenEval's rules (`evals.geneval.grade`). "color" is needed for the classes that a prompt asks in a colour.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from starflow2.benchmarks.folders import DrawnFolder, FolderSettings, draw_prompts, read_folder
from starflow2.benchmarks.prompts import TAGS, PromptRow, read_geneval_prompts
from starflow2.benchmarks.records import JudgeFile, Placed, check_complete, read_judged
from starflow2.benchmarks.results import Result, record_facts
from starflow2.core.files import replacing
from starflow2.core.images import save_png
from starflow2.core.provenance import png_text
from starflow2.errors import ConfigError, DataError
from starflow2.evals.geneval import Found, grade
from starflow2.evals.statistics import Row, Score, Scored, score_rows
from starflow2.pipeline import Drawing, StarFlow2

__all__ = ["OFFICIAL_JUDGE", "DetectedImage", "GenevalLayout", "ImageDetection", "kept", "score_folder"]

THRESHOLD: Final = 0.3  # a detection counts above this score
COUNTING_THRESHOLD: Final = 0.9  # in prompts that ask for a number
MOST_BOXES: Final = 16  # of a class in one image
EDGE: Final = 1.0  # pixels by which a detector's box may leave the image
OFFICIAL_JUDGE: Final = "geneval"  # Mask2Former Swin-S of mmdet with CLIP ViT-L/14, as GenEval runs them


@dataclass(frozen=True, slots=True)
class GenevalLayout:
    """NNNNN/metadata.jsonl and NNNNN/samples/NNNN.png."""

    benchmark: str = "geneval"
    stage: str = "t2i"

    def draw(self, model: StarFlow2, rows: Sequence[PromptRow], settings: FolderSettings) -> list[list[Drawing]]:
        return draw_prompts(model, rows, settings)

    def files(self, row: PromptRow, samples: int) -> list[str]:
        return [f"{row.name}/metadata.jsonl", *self.images(row, samples)]

    def images(self, row: PromptRow, samples: int) -> list[str]:
        """Names of a prompt's images."""
        return [f"{row.name}/samples/{j:04d}.png" for j in range(samples)]

    def write(self, folder: Path, row: PromptRow, drawings: Sequence[Drawing]) -> None:
        for drawing, name in zip(drawings, self.images(row, len(drawings)), strict=True):
            save_png(drawing.image, folder / name, png_text(drawing.prompt, drawing.seed, drawing.settings))
        with replacing(folder / row.name / "metadata.jsonl") as temp:
            temp.write_text(json.dumps(row.row) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDetection:
    """A box (x0, y0, x1, y1) in pixels, what is in it, and how sure the detector is."""

    class_: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None

    def __post_init__(self) -> None:
        x0, y0, x1, y1 = self.box
        if not self.class_.strip():
            raise ConfigError("class is empty; expected the name of an object.")
        if not 0 <= self.score <= 1:
            raise ConfigError(f"score is {self.score}; expected 0 to 1.")
        if x0 > x1 or y0 > y1:
            raise ConfigError(f"box is {list(self.box)}; expected x0 <= x1 and y0 <= y1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectedImage:
    """All detections in one image. size: width and height in pixels."""

    image: str
    size: tuple[int, int]
    detections: tuple[ImageDetection, ...] = field(metadata={"of": ImageDetection})

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ConfigError(f"size is {list(self.size)}; expected width and height in pixels.")
        for found in self.detections:
            for low, high, side in zip(found.box[:2], found.box[2:], self.size, strict=True):
                if low < -EDGE or high > side + EDGE:
                    raise ConfigError(
                        f"box {list(found.box)} lies outside of the image of {self.size[0]}x{self.size[1]}."
                    )


def kept(found: DetectedImage, tag: str) -> list[Found]:
    """The detections that count for a prompt of this tag: above its threshold, the best 16 of each class."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    by_class: dict[str, list[ImageDetection]] = {}
    for one in sorted(found.detections, key=lambda d: -d.score):
        if one.score > threshold:
            by_class.setdefault(one.class_, []).append(one)
    best = [one for ones in by_class.values() for one in ones[:MOST_BOXES]]
    return [Found(one.class_, one.box, one.score, one.color) for one in best]


def score_folder(folder: str | Path, detections: str | Path, rows: Sequence[PromptRow] | None = None) -> Result:
    """GenEval's score of a folder: shares of correct images by tag, and the mean of the tags.

    rows: as in `read_folder`. Prompts that the model could not read are left out of the columns, as GenEval's own
    script would, and count as wrong in "overall, unread prompts wrong". Raises DataError with file and line.
    """
    drawn = read_folder(folder, GenevalLayout(), rows)
    _check_metadata(drawn)
    judged = read_judged(detections, DetectedImage)
    graded = _grade(drawn, judged, detections)
    if not graded:
        raise DataError(f"{folder} has no images; the model could read none of {len(drawn.unread)} prompts.")
    return _result(drawn, judged, graded)


def _check_metadata(drawn: DrawnFolder) -> None:
    """Raise DataError where a metadata.jsonl does not hold the line of its prompt."""
    for row in drawn.drawn:
        path = drawn.folder / row.name / "metadata.jsonl"
        found = read_geneval_prompts(path)
        if len(found) != 1 or found[0].row != row.row:
            raise DataError(f"{path}:1 is not prompt {row.name} of the prompt file; expected {row.prompt!r}.")


def _grade(drawn: DrawnFolder, judged: JudgeFile[DetectedImage], source: str | Path) -> list[Row]:
    """One mark an image."""
    layout = GenevalLayout()
    names = {name: row for row in drawn.drawn for name in layout.images(row, drawn.samples)}
    lines = check_complete(judged.records, lambda found: found.image, names, source)
    return [_mark(line, names[line.value.image]) for line in lines]


def _mark(line: Placed[DetectedImage], row: PromptRow) -> Row:
    found = kept(line.value, row.row["tag"])
    for asked in row.row["include"]:
        examined = [one for one in found if one.name == asked["class"]][: asked["count"]]
        if asked.get("color") and any(one.color is None for one in examined):
            raise DataError(
                f"{line.where}: {asked['class']} has no color, and its prompt asks for one: {row.prompt!r}."
            )
    return Row(row.row["tag"], row.name, (float(grade(row.row, found).correct),))


def _result(drawn: DrawnFolder, judged: JudgeFile[DetectedImage], rows: Sequence[Row]) -> Result:
    scored = _scored(rows)
    unread = _unread_rows(drawn)
    tags = scored.scores.by_kind
    columns = {tag: tags[tag]["correct"] if tag in tags else Score(None) for tag in TAGS}
    more = {"overall, unread prompts wrong": _scored([*rows, *unread]).scores["correct"]}
    more["correct images, all tags pooled"] = Score(float(np.mean([row.marks[0] for row in rows])))
    record = drawn.record
    return Result(
        benchmark="geneval",
        model="unknown" if record is None else record.model,
        judge=judged.judge,
        columns=columns | {"overall": scored.scores["correct"]},
        more=more,
        counts={"prompts": len(drawn.drawn), "unread prompts": len(drawn.unread), "images": len(rows)},
        made=record_facts(record),
        notes=tuple(_notes(drawn, judged, tags)),
    )


def _scored(rows: Sequence[Row]) -> Scored:
    return score_rows(rows, ("correct",), np.random.default_rng(0), "averaged")


def _unread_rows(drawn: DrawnFolder) -> list[Row]:
    """A wrong image for every one that was not drawn."""
    rows = {row.name: row for row in drawn.rows}
    return [Row(rows[u.name].row["tag"], u.name, (0.0,)) for u in drawn.unread for _ in range(drawn.samples)]


def _notes(drawn: DrawnFolder, judged: JudgeFile[DetectedImage], tags: Mapping[str, object]) -> list[str]:
    notes = ["Shares of correct images; overall is the mean of the tags. 95 % bootstrap over prompts."]
    if judged.judge != OFFICIAL_JUDGE:
        notes.append(f"Judged by {judged.judge}, not by GenEval's own detector: not to be compared with the paper.")
    if len(tags) < len(TAGS):
        notes.append(f"Overall is the mean of {len(tags)} of {len(TAGS)} tags: the others have no image.")
    if drawn.unread:
        notes.append(f"The model could not read {len(drawn.unread)} prompts; they are left out of the columns.")
    named = {found.class_ for line in judged.records for found in line.value.detections}
    asked = {asked["class"] for row in drawn.drawn for asked in row.row["include"]}
    if asked - named:
        notes.append(f"Asked for and never detected: {', '.join(sorted(asked - named))}.")
    return notes
