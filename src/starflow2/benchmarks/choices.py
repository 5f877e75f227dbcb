"""Multiple choice as its benchmarks score it: MMBench's circular accuracy.

A question is asked once for every rotation of its options, under indices i, i + 10^6, i + 2 x 10^6, ...; all have to
be right. What no rule can read is wrong: the published harness asks a language model, or guesses.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from starflow2.benchmarks.records import Placed, read_objects
from starflow2.core.text import shown
from starflow2.errors import DataError

__all__ = ["LETTERS", "CircularScore", "chosen_letter", "read_mmbench", "score_mmbench"]

LETTERS: Final = "ABCD"
PASS: Final = 1_000_000  # what a rotation adds to the index of its question


def chosen_letter(answer: str, options: Mapping[str, str]) -> str:
    """The letter that an answer chooses: a letter that stands alone, or the one option whose text it holds; else "".

    >>> options = {"A": "green", "B": "purple"}
    >>> [chosen_letter(text, options) for text in ("(B)", "A. green", "it is purple", "green or purple", "A cat")]
    ['B', 'A', 'B', '', '']
    """
    text = answer.strip()
    start = re.match(r"\(?([A-D])(?:\)|\.|:|,|$)", text)
    if start and start[1] in options:
        return start[1]
    held = [
        letter for letter, option in options.items() if re.search(rf"\b{re.escape(option.lower())}\b", text.lower())
    ]
    return held[0] if len(held) == 1 else ""


@dataclass(frozen=True, slots=True)
class CircularScore:
    """Shares of questions: right in every rotation, right in the first, and answers that could be read."""

    circular: float
    first_pass: float
    parsed: float
    questions: int


def score_mmbench(rows: Sequence[Mapping[str, object]]) -> CircularScore:
    """Scores of answered rows of MMBench: index, answer, prediction, and options A to D.

    A question without its first rotation is counted as wrong there. Raises DataError for a row without an answer.
    """
    marks: dict[int, dict[int, bool]] = defaultdict(dict)
    parsed = 0
    for row in rows:
        index, letter = _index(row), chosen_letter(str(row.get("prediction", "")), _options(row))
        parsed += bool(letter)
        marks[index % PASS][index // PASS] = letter == row.get("answer")
    if not marks:
        raise DataError("there is no row of MMBench to score.")
    count = len(marks)
    first = sum(found.get(0, False) for found in marks.values())
    return CircularScore(sum(all(f.values()) for f in marks.values()) / count, first / count, parsed / len(rows), count)


def read_mmbench(path: str | Path) -> list[dict[str, object]]:
    """Answered rows of a JSONL file. Raises DataError with file and line, also for an index that stands twice."""
    seen: dict[int, str] = {}
    for line in read_objects(path):
        _check(line)
        index = _index(line.value)
        if index in seen:
            raise DataError(f"{line.where}: index {index} stands at {seen[index]} already.")
        seen[index] = line.where
    return [line.value for line in read_objects(path)]


def _check(line: Placed[dict[str, object]]) -> None:
    missing = [name for name in ("index", "answer", "prediction", "A", "B") if name not in line.value]
    if missing:
        raise DataError(f"{line.where} has no {missing[0]}; expected index, answer, prediction and options A to D.")
    for name in ("answer", "prediction"):
        if not isinstance(line.value[name], str):
            raise DataError(f"{line.where}: {name} is {shown(line.value[name])}; expected text.")
    if line.value["answer"] not in _options(line.value):
        raise DataError(f"{line.where}: answer is {line.value['answer']!r}; expected one of its options' letters.")
    if type(line.value["index"]) is not int or _index(line.value) < 0:
        raise DataError(f"{line.where}: index is {line.value['index']!r}; expected a whole number of at least 0.")


def _index(row: Mapping[str, object]) -> int:
    return int(str(row["index"]))


def _options(row: Mapping[str, object]) -> dict[str, str]:
    """Options that are there; in published files an absent one is the text "nan"."""
    return {letter: str(row[letter]) for letter in LETTERS if str(row.get(letter, "nan")) not in ("nan", "None", "")}
