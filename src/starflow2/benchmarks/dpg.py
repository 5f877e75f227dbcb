"""DPG-Bench: its 2x2 grids, and its score from the answers of a judge.

A judge reads the four cells of `<prompt id>.png`, in the order of reading, and hands back `answers.jsonl`: after a line
that names the judge, one line an answer, {"image": "coco0.png", "crop": 0, "question": 3, "answer": "yes"}. The
questions are DPG-Bench's own CSV, which its users bring.

The official arithmetic is kept with its quirks: (1) the CSV's first row is skipped, so that the first prompt loses its
first question, and is left out altogether if another question depends on it; (2) categories are taken before a failed
parent fails its children, and (3) from the last cell alone, so that they can all exceed the overall score. Corrected
columns stand beside them.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from starflow2.benchmarks.folders import DrawnFolder, FolderSettings, draw_prompts, read_folder
from starflow2.benchmarks.prompts import PromptRow
from starflow2.benchmarks.records import Placed, check_complete, read_judged
from starflow2.benchmarks.results import Result, record_facts
from starflow2.core.images import grid_of, save_png
from starflow2.core.provenance import png_text
from starflow2.core.text import read_text, shown
from starflow2.errors import DataError
from starflow2.evals.statistics import Row, Score, bootstrap, score_rows
from starflow2.pipeline import Drawing, StarFlow2

__all__ = [
    "CATEGORIES",
    "OFFICIAL_JUDGE",
    "DpgLayout",
    "Question",
    "VqaAnswer",
    "image_scores",
    "read_questions",
    "score_folder",
]

COLUMNS: Final = 2  # cells of a grid side by side
CATEGORIES: Final = ("global", "entity", "attribute", "relation", "other")  # in the paper's order
OFFICIAL_JUDGE: Final = "mplug"  # mPLUG-large, finetuned on VQA with COCO
FIELDS: Final = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")

_Answers = Mapping[int, Sequence[bool]]  # by question: is it yes, one cell each


@dataclass(frozen=True, slots=True)
class DpgLayout:
    """A grid of two by two samples for every prompt: <prompt id>.png."""

    benchmark: str = "dpg"
    stage: str = "t2i"

    def draw(self, model: StarFlow2, rows: Sequence[PromptRow], settings: FolderSettings) -> list[list[Drawing]]:
        return draw_prompts(model, rows, settings)

    def files(self, row: PromptRow, samples: int) -> list[str]:
        return [f"{row.name}.png"]

    def write(self, folder: Path, row: PromptRow, drawings: Sequence[Drawing]) -> None:
        first = drawings[0]
        grid = grid_of([drawing.image for drawing in drawings], COLUMNS)
        save_png(grid, folder / f"{row.name}.png", png_text(first.prompt, first.seed, first.settings))


@dataclass(frozen=True, slots=True)
class Question:
    """One question about an image. parents: numbers of the questions that have to be answered yes before it counts."""

    number: int
    parents: tuple[int, ...]
    category: str  # one of CATEGORIES, or what the CSV says instead
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VqaAnswer:
    """A judge's answer to a question about one cell of a grid; only exactly "yes" counts."""

    image: str
    crop: int
    question: int
    answer: str


def read_questions(path: str | Path) -> dict[str, list[Question]]:
    """The questions of every prompt by its id, in the CSV's order; none is skipped.

    Raises DataError with file and line for a missing column, a number that is none, or a question that stands twice.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    missing = [name for name in FIELDS if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path}:1 has no column {missing[0]}; expected DPG-Bench's questions: {', '.join(FIELDS)}.")
    found: dict[str, list[Question]] = defaultdict(list)
    for line in _lines_of(reader, path):
        where = f"{path}:{reader.line_num}"
        question = _question(line, where)
        if any(question.number == other.number for other in found[line["item_id"]]):
            raise DataError(f"{where}: question {question.number} of {line['item_id']} stands there already.")
        found[line["item_id"]].append(question)
    if not found:
        raise DataError(f"{path} has no questions behind its first line.")
    return dict(found)


def _lines_of(reader: csv.DictReader[str], path: str | Path) -> Iterator[Mapping[str, str]]:
    """Lines of a table. Raises DataError for what is none, such as a cell without an end."""
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num} is no line of a table: {error}.") from error


def _question(line: Mapping[str, str | None], where: str) -> Question:
    cells = {name: line[name] or "" for name in FIELDS}
    try:
        number = int(cells["proposition_id"])
        parents = tuple(int(part) for part in cells["dependency"].split(","))
    except ValueError as error:
        raise DataError(f"{where}: {error}; expected whole numbers as proposition_id and dependency.") from error
    category = cells["tuple"].split("(")[0].split("-")[0].strip()
    if not category or not cells["item_id"]:
        raise DataError(f"{where}: tuple is {shown(cells['tuple'])}; expected a category and an item_id.")
    return Question(number, tuple(p for p in parents if p), category, cells["question_natural_language"])


# ------------------------------------------------------------------------------------------------------- arithmetic


def image_scores(questions: Sequence[Question], answers: _Answers) -> list[float]:
    """Shares of yes, one a cell, after every question with a failed parent has failed, in the CSV's order.

    Raises KeyError for a parent that is not among the questions.
    """
    cells = len(next(iter(answers.values())))
    return [_cell_score(questions, {number: marks[cell] for number, marks in answers.items()}) for cell in range(cells)]


def _cell_score(questions: Sequence[Question], marks: dict[int, bool]) -> float:
    for question in questions:
        if not all(marks[parent] for parent in question.parents):
            marks[question.number] = False
    return sum(marks.values()) / len(marks)


def score_folder(
    folder: str | Path, answers: str | Path, questions: str | Path, rows: Sequence[PromptRow] | None = None
) -> Result:
    """DPG-Bench's score of a folder in percent, overall and by category, with corrected columns beside.

    questions: DPG-Bench's CSV. rows: as in `read_folder`. Raises DataError with file and line.
    """
    drawn = read_folder(folder, DpgLayout(), rows)
    asked = read_questions(questions)
    unasked = [row.name for row in drawn.rows if row.name not in asked]
    if unasked:
        raise DataError(f"{questions} has no question about {unasked[0]} and {len(unasked) - 1} more prompts.")
    if not drawn.drawn:
        raise DataError(f"{folder} has no images; the model could read none of {len(drawn.unread)} prompts.")
    judged = read_judged(answers, VqaAnswer)
    marks = _marks(drawn, asked, judged.records, answers)
    return _result(drawn, judged.judge, {row.name: asked[row.name] for row in drawn.drawn}, marks, next(iter(asked)))


def _marks(
    drawn: DrawnFolder,
    asked: Mapping[str, Sequence[Question]],
    records: Iterable[Placed[VqaAnswer]],
    source: str | Path,
) -> dict[str, _Answers]:
    """By prompt and question: is the answer yes, one cell each."""
    cells = range(drawn.samples)
    wanted = [(f"{row.name}.png", cell, q.number) for row in drawn.drawn for q in asked[row.name] for cell in cells]
    found = check_complete(records, lambda record: (record.image, record.crop, record.question), wanted, source)
    yes = {(r.value.image, r.value.crop, r.value.question): r.value.answer == "yes" for r in found}
    return {
        row.name: {q.number: [yes[f"{row.name}.png", cell, q.number] for cell in cells] for q in asked[row.name]}
        for row in drawn.drawn
    }


def _result(
    drawn: DrawnFolder,
    judge: str,
    asked: Mapping[str, Sequence[Question]],
    marks: Mapping[str, _Answers],
    first: str,
) -> Result:
    official = {name: questions[1:] if name == first else questions for name, questions in asked.items()}
    kept = {name: questions for name, questions in official.items() if questions and _is_closed(questions)}
    overall, last = _overall(kept, marks), _categories(kept, marks, [drawn.samples - 1])
    every = _categories(asked, marks, range(drawn.samples))
    record = drawn.record
    return Result(
        benchmark="dpg",
        model="unknown" if record is None else record.model,
        judge=judge,
        columns=last | {"overall": overall},
        more={"overall, all questions": _overall(asked, marks)}
        | {f"{name}, all cells": score for name, score in every.items()}
        | {"overall, unread prompts wrong": _overall(asked, marks, len(drawn.unread))},
        counts={"prompts": len(asked), "unread prompts": len(drawn.unread), "left out": len(asked) - len(kept)},
        made=record_facts(record),
        notes=tuple(_notes(drawn, judge, len(asked) - len(kept))),
    )


def _is_closed(questions: Sequence[Question]) -> bool:
    """True if all parents are among the questions: where one is not, the official script leaves the prompt out."""
    numbers = {question.number for question in questions}
    return all(set(question.parents) <= numbers for question in questions)


def _overall(asked: Mapping[str, Sequence[Question]], marks: Mapping[str, _Answers], wrong: int = 0) -> Score:
    """Mean over prompts in percent, with `wrong` further prompts that count 0."""
    if not asked:
        return Score(None)
    rows = []
    for name, questions in asked.items():
        own = {question.number: marks[name][question.number] for question in questions}
        rows.append(Row("", name, (100 * float(np.mean(image_scores(questions, own))),)))
    rows += [Row("", f"unread {i}", (0.0,)) for i in range(wrong)]
    return score_rows(rows, ("overall",), np.random.default_rng(0), "plain").scores["overall"]


def _categories(
    asked: Mapping[str, Sequence[Question]], marks: Mapping[str, _Answers], cells: Iterable[int]
) -> dict[str, Score]:
    """Shares of yes in percent by category, in these cells and before parents are considered."""
    cells = list(cells)
    found: dict[str, list[tuple[str, float]]] = {name: [] for name in CATEGORIES}
    for name, questions in asked.items():
        for question in questions:
            own = found.setdefault(question.category, [])
            own += [(name, 100 * float(marks[name][question.number][cell])) for cell in cells]
    return {category: _mean(pairs) for category, pairs in found.items()}


def _mean(pairs: Sequence[tuple[str, float]]) -> Score:
    if not pairs:
        return Score(None)
    names, values = [name for name, _ in pairs], np.array([[value] for _, value in pairs])
    return bootstrap(names, values, np.random.default_rng(0)).columns(["mean"])["mean"]


def _notes(drawn: DrawnFolder, judge: str, left_out: int) -> list[str]:
    notes = [
        "Official arithmetic: the CSV's first question is skipped; categories are of the last cell, before parents "
        "are considered. 'All questions' and 'all cells' are without these quirks. 95 % bootstrap over prompts."
    ]
    if judge != OFFICIAL_JUDGE:
        notes.append(f"Judged by {judge}, not by mPLUG: not to be compared with the paper.")
    if left_out:
        notes.append(f"{left_out} prompt depends on the skipped question and is left out, as the official script does.")
    if drawn.unread:
        notes.append(f"The model could not read {len(drawn.unread)} prompts; they are left out of the columns.")
    return notes
