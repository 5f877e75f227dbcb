"""Spoiled files of published benchmarks: prompts, edits, what judges say, results; and folders of drawn images."""

from __future__ import annotations

import copy
import importlib
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fuzz.cases import Bench, Case, anything
from fuzz.documents import PNG, spoil_tree, spoiled_json
from starflow2.benchmarks.choices import read_mmbench, score_mmbench
from starflow2.benchmarks.dpg import VqaAnswer, read_questions
from starflow2.benchmarks.editing import read_edits
from starflow2.benchmarks.folders import read_folder
from starflow2.benchmarks.geneval import DetectedImage, GenevalLayout, score_folder
from starflow2.benchmarks.lmms_run import read_results
from starflow2.benchmarks.prompts import read_dpg_prompts, read_geneval_prompts
from starflow2.benchmarks.records import read_judged
from starflow2.benchmarks.report import write_report
from starflow2.benchmarks.results import read_result

__all__ = ["benchmarks", "drawn_folders"]

BOX = {"class": "star", "score": 0.9, "box": [1, 1, 20, 20], "color": "red"}
ROWS: Mapping[str, tuple[Any, ...]] = {  # right lines of every kind of file, from their published forms
    "geneval": (
        {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a photo of a star"},
        {
            "tag": "counting",
            "include": [{"class": "heart", "count": 2}],
            "exclude": [{"class": "heart", "count": 3}],
            "prompt": "a photo of two hearts",
        },
    ),
    "dpg": ({"id": "one", "prompt": "a red star."}, {"id": "two", "prompt": "a zebra."}),
    "gedit": (
        {
            "key": "a",
            "task_type": "color",
            "instruction": "make it red",
            "instruction_language": "en",
            "image": "one.png",
        },
    ),
    "detections": ({"judge": "x"}, {"image": "00000/samples/0000.png", "size": [64, 64], "detections": [BOX]}),
    "answers": ({"judge": "x"}, {"image": "one.png", "crop": 0, "question": 1, "answer": "yes"}),
    "mmbench": (
        {"index": 0, "answer": "A", "prediction": "A. red", "A": "red", "B": "blue", "C": "nan"},
        {"index": 10**6, "answer": "B", "prediction": "red", "A": "blue", "B": "red"},
    ),
}
TREES: Mapping[str, Any] = {
    "imgedit": {"10": {"id": "one.png", "prompt": "make it red", "edit_type": "adjust"}},
    "magicbrush": {"7": [{"input": "one.png", "mask": "m.png", "output": "one.png", "instruction": "make it red"}]},
    "result": {
        "format": 1,
        "benchmark": "geneval",
        "model": "x",
        "judge": "y",
        "columns": {"overall": {"score": 0.5, "low": 0.4, "high": 0.6}},
        "more": {},
        "counts": {"images": 4},
        "made": {},
        "notes": ["a note"],
    },
    "harness": {"results": {"mme": {"mme_perception_score,none": 1234.5, "mme_cognition_score,none": []}}},
}
QUESTIONS = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
    "one,a red star,x,1,0,entity,whole,entity - whole (star),is there a star?\n"
    'one,a red star,x,2,1,attribute,color,"attribute - color (star, red)",is it red?\n'
)


def benchmarks(rng: random.Random, bench: Bench) -> Case:
    """One file of a benchmark with something wrong in it, read; some fields may be what they like."""
    readers: dict[str, Callable[[Path], object]] = {
        "geneval": read_geneval_prompts,
        "dpg": read_dpg_prompts,
        "gedit": lambda path: read_edits("gedit", path, path.parent),
        "imgedit": lambda path: read_edits("imgedit", path, path.parent),
        "magicbrush": lambda path: read_edits("magicbrush", path, path.parent),
        "detections": lambda path: read_judged(path, DetectedImage),
        "answers": lambda path: read_judged(path, VqaAnswer),
        "mmbench": lambda path: score_mmbench(read_mmbench(path)),
        "result": read_result,
        "report": lambda path: write_report([path], bench.home / "report"),
        "harness": lambda path: read_results("mme", path),
        "questions": read_questions,
    }
    kind = rng.choice(list(readers))
    (bench.file("one.png", PNG).parent / "7").mkdir(exist_ok=True)
    bench.file("7/one.png", PNG)
    text, is_wrong = _text(kind, rng)
    return Case(f"{kind} file", lambda: readers[kind](bench.file(f"{kind}.json", text)), None if is_wrong else anything)


def _text(kind: str, rng: random.Random) -> tuple[bytes, bool]:
    """Bytes of a spoiled file, and True if nobody may take them."""
    if kind == "questions":
        return _spoiled_table(rng), False
    if kind in ROWS:
        rows = copy.deepcopy(list(ROWS[kind]))
        if rng.random() < 0.7:
            spoil_tree(rng.choice(rows), rng, drops=rng.random() < 0.3)
        lines = [json.dumps(row, default=str).encode() for row in rows]
        if rng.random() < 0.3:
            at = rng.randrange(len(lines))
            lines[at] = spoiled_json(lines[at], rng).replace(b"\n", b" ")
            return b"\n".join(lines), bool(lines[at].strip())  # an empty line is one question less
        return rng.choice([b"\n", b"\r\n", b"\n\n"]).join(lines), False
    tree = copy.deepcopy(TREES["result" if kind == "report" else kind])
    if rng.random() < 0.3:
        return spoiled_json(json.dumps(tree).encode(), rng), True
    spoil_tree(tree, rng, drops=rng.random() < 0.3)
    return json.dumps(tree, default=str).encode(), False


def _spoiled_table(rng: random.Random) -> bytes:
    """DPG-Bench's questions with a cell, a line or the encoding spoiled."""
    lines = QUESTIONS.splitlines()
    wrong: Sequence[str] = ["", "x", "-1", "1.5", "1,x", '"', "\x00", "\x1b[2J", "a" * 200_000, "9" * 5000, "\u202e"]
    at = rng.randrange(len(lines))
    cells = lines[at].split(",")
    cells[rng.randrange(len(cells))] = rng.choice(wrong)
    lines[at] = ",".join(cells)
    if rng.random() < 0.2:
        lines.pop(rng.randrange(len(lines)))
    text = "\n".join(lines).encode()
    return rng.choice([text, text, text, b"\xff\xfe" + text, text[: len(text) // 2], b"", b"\xef\xbb\xbf" + text])


# -- folders of drawn images --------------------------------------------------------------------------------------


@cache
def _drawn(bench: Bench) -> Path:
    """A whole folder in GenEval's layout and the detections of its images, drawn by the small model."""
    cases: Any = importlib.import_module("benchmark_cases")
    folder = bench.home / "geneval"
    folder.mkdir()
    drawn = cases.geneval_folder(folder, bench.model)
    cases.write_lines(folder / "detections.jsonl", cases.detections_of(drawn))
    return folder


def drawn_folders(rng: random.Random, bench: Bench) -> Case:
    """A folder of drawn images in which a file is gone, spoiled, or something else than a file, scored."""
    folder = bench.home / "spoiled drawings"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_drawn(bench), folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice([p for p in files if p.suffix != ".png"] if rng.random() < 0.7 else files)
    kind = rng.choice(["gone", "bytes", "value", "folder", "link"])
    is_wrong = path.suffix == ".jsonl" and kind in ("folder", "link")
    match kind:
        case "gone" | "folder" | "link":
            path.unlink()
            if kind == "folder":
                path.mkdir()
            elif kind == "link":
                path.symlink_to(rng.choice(["/proc/self/status", "/dev/zero", str(path), "/nowhere"]))
        case "bytes":
            path.write_bytes(spoiled_json(path.read_bytes(), rng))
        case "value" if path.suffix != ".png":
            _spoil_value(path, rng)
        case _:
            path.write_bytes(b"")
    readers: dict[str, Callable[[], object]] = {
        "score": lambda: score_folder(folder / "images", folder / "detections.jsonl"),
        "read": lambda: read_folder(folder / "images", GenevalLayout()),
    }
    name = rng.choice(list(readers))
    is_read = path.name == "prompts.jsonl" and path.parent == folder / "images"
    is_read = is_read or (name == "score" and path.parent != folder)
    what = f"{name} with {path.name if path.suffix != '.png' else 'image'} {kind}"
    return Case(what, readers[name], None if is_wrong and is_read else anything)


def _spoil_value(path: Path, rng: random.Random) -> None:
    """Change one value in a JSON file, or in the first line of one with many."""
    first, *rest = path.read_text("utf-8").split("\n") if path.suffix == ".jsonl" else [path.read_text("utf-8")]
    tree = json.loads(first)
    spoil_tree(tree, rng, drops=rng.random() < 0.3)
    path.write_text("\n".join([json.dumps(tree, default=str), *rest]), encoding="utf-8")
