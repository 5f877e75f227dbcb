"""A detector's file for GenEval, written by models of transformers: another judge than GenEval's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from starflow2.benchmarks.folders import read_folder
from starflow2.benchmarks.geneval import GenevalLayout
from starflow2.benchmarks.prompts import COLORS, PromptRow
from starflow2.core.files import replacing
from starflow2.core.images import read_pixels
from starflow2.core.json_reader import JsonObject
from starflow2.models.object_detector import ObjectDetector

__all__ = ["JUDGE", "detect_folder"]

JUDGE = "transformers Mask2Former and CLIP, not GenEval's own detector"


def detect_folder(
    folder: Path,
    target: Path,
    detector: ObjectDetector,
    rows: Sequence[PromptRow] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `detections.jsonl` of a folder of GenEval's images. rows: as in `read_folder`.

    Raises DataError for a folder that is not whole, OutputError.
    """
    drawn = read_folder(folder, GenevalLayout(), rows)
    names = [(name, row) for row in drawn.drawn for name in GenevalLayout().images(row, drawn.samples)]
    lines: list[JsonObject] = [{"judge": JUDGE}]
    for done, (name, row) in enumerate(names, 1):
        lines.append(_line(name, row, read_pixels(folder / name), detector))
        if progress is not None:
            progress(done, len(names))
    with replacing(target) as temp:
        temp.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _line(name: str, row: PromptRow, image: Tensor, detector: ObjectDetector) -> JsonObject:
    """The record of an image; colours of the classes that its prompt asks in one."""
    colored = {asked["class"] for asked in row.row["include"] if asked.get("color")}
    found = []
    for one in detector.detect(image):
        color = detector.color(image, one, COLORS) if one.name in colored else None
        found.append({"class": one.name, "score": round(one.score, 6), "box": list(one.box), "color": color})
    return {"image": name, "size": [image.shape[2], image.shape[1]], "detections": found}
