"""Small folders in the layouts of published benchmarks, drawn by the tiny model, and files of judges about them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model_cases import STAGES, tiny_components
from starflow2.benchmarks.folders import DrawnFolder, FolderSettings, draw_folder
from starflow2.benchmarks.geneval import GenevalLayout
from starflow2.benchmarks.prompts import read_geneval_prompts
from starflow2.pipeline import StarFlow2

# Two prompts that the tiny model reads, one that it does not.
GENEVAL_ROWS = (
    {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a photo of a star"},
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "heart", "count": 2}],
        "exclude": [{"class": "heart", "count": 3}],
        "prompt": "a photo of two hearts",
    },
    {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "red"}], "prompt": "a photo of a red star"},
)
DPG_ROWS = ({"id": "one", "prompt": "a red star."}, {"id": "two", "prompt": "a zebra."})
SETTINGS = FolderSettings(samples=2, at_once=4)


def write_lines(path: Path, rows: Iterable[object]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def tiny_model(stages: tuple[str, ...] = STAGES) -> StarFlow2:
    return StarFlow2(tiny_components(stages))


def geneval_folder(folder: Path, model: StarFlow2, settings: FolderSettings = SETTINGS) -> DrawnFolder:
    """The rows above, drawn into `folder`/images from `folder`/prompts.jsonl."""
    prompts = write_lines(folder / "prompts.jsonl", GENEVAL_ROWS)
    return draw_folder(model, GenevalLayout(), read_geneval_prompts(prompts), folder / "images", settings)


def detection(name: str, box: tuple[float, ...] = (4, 4, 20, 20), score: float = 0.95, **more: Any) -> dict[str, Any]:
    return {"class": name, "score": score, "box": list(box)} | more


def detections_of(drawn: DrawnFolder) -> list[dict[str, Any]]:
    """Lines of a judge that sees a red star in every image and two hearts where they are asked for."""
    lines: list[dict[str, Any]] = [{"judge": "geneval"}]
    for row in drawn.drawn:
        for name in GenevalLayout().images(row, drawn.samples):
            found = [detection("star", color="red")]
            if row.row["tag"] == "counting":
                found = [detection("heart"), detection("heart", (30, 30, 50, 50))]
            lines.append({"image": name, "size": [64, 64], "detections": found})
    return lines
