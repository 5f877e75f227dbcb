"""Reports of the drawing suite for people and files: a table for the terminal, Markdown, JSON, the ledger; kept rows.

A score means nothing without what chance and the codec allow, so every table has the floor and the ceiling beside it
and says so where one was not measured.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from starflow2.core.files import replacing
from starflow2.core.serialize import read_json
from starflow2.errors import ConfigError, OutputError

__all__ = ["KeptRows", "append_ledger", "commit", "ledger_record", "notes", "table", "write_json"]

Report = Mapping[str, Any]
ABSENT = "–"
COLUMNS = ("category", "ID", "CG", "gap", "floor", "ceiling", "ID strict", "CG strict")


def table(report: Report) -> Table:
    """The report as a table for the terminal, notes underneath."""
    grid = Table(title=_title(report), caption="\n".join(notes(report)), caption_justify="left")
    headings = _columns(report)
    for heading in headings:
        grid.add_column(heading, justify="left" if heading == "category" else "right")
    for row in _rows(report):
        grid.add_row(*row, style="bold" if row[0] == "overall" else None)
    return grid


def notes(report: Report) -> list[str]:
    """What one has to know to read the table, first of all which floor or ceiling is missing."""
    parts, ceiling = report["parts"], report["ceiling"]
    said = []
    for name, kind in (("clean", "codec ceiling"), ("noise", "codec ceiling at the sampling noise")):
        if name not in ceiling:
            said.append(f"No {kind} was measured: these scores cannot be read against what the codec allows.")
    said += [f"No floor was measured for {part}." for part, scores in parts.items() if "floor" not in scores]
    if report["quick"]:
        said.append("Quick run on one prompt in eight: noisy, not for comparing models.")
    for part, scores in parts.items():
        overall = scores["overall"]["lenient"]
        said.append(
            f"{part}: {overall['score']:.3f} [{overall['low']:.3f}, {overall['high']:.3f}], 95 % bootstrap over "
            f"{scores['prompts']} distinct prompts, {scores['n']} pictures; mean template IoU "
            f"{scores['template_iou']:.3f}, unrecognised blobs {scores['unknown_share']:.1%}, "
            f"empty pictures {scores['empty_share']:.1%}."
        )
    said.append(
        "Floor: true pictures of other prompts (ID / CG). Ceiling: true pictures of the ID prompts after the "
        "codec (clean / at the sampling noise). Gap: ID − CG over the categories that both have. "
        "Strict: nothing else in the picture."
    )
    return said


def write_json(report: Report, path: str | Path) -> None:
    """Writes the report; an earlier file survives a failure. Raises OutputError."""
    with replacing(path) as temp:
        temp.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Rows of a measurement that takes hours, in a JSON file as soon as they are there, so that a stopped one goes on.

    asked: what the rows depend on, as JSON can hold it; a file of anything else is never written over.
    """

    path: Path
    asked: Mapping[str, Any]

    def read(self) -> list[dict[str, Any]]:
        """What an earlier call left, [] if there is no file. Raises ConfigError for a file of something else."""
        if not self.path.is_file():
            return []
        kept = read_json(self.path)
        if not isinstance(kept, dict) or kept.get("config") != json.loads(json.dumps(self.asked)):
            raise ConfigError(
                f"{self.path} holds a comparison of another budget or model: give another --output, or move it away."
            )
        return list(kept["rows"])

    def write(self, rows: Iterable[Mapping[str, Any]], **more: Any) -> None:
        """All rows so far, and what is told about them. Raises OutputError."""
        write_json({"config": dict(self.asked), "rows": list(rows)} | more, self.path)


# ----------------------------------------------------------------------------------------------------------- the ledger


def ledger_record(report: Report) -> dict[str, Any]:
    """Date, commit and scores of a full test run, for the ledger. Raises ConfigError for a quick or dev report."""
    if report["quick"] or report["split"] != "test":
        kind = "quick" if report["quick"] else report["split"]
        raise ConfigError(f"report: only full test runs enter the ledger, this one is a {kind} run")
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    record |= {"suite": report["suite"], "split": report["split"], "n": report["n"], "samples": report["samples"]}
    scored = report["parts"] | {f"ceiling_{name}": scores for name, scores in report["ceiling"].items()}
    for name, scores in scored.items():
        record[name] = {
            "lenient": _round(scores["overall"]["lenient"]["score"]),
            "strict": _round(scores["overall"]["strict"]["score"]),
            "by_category": {c: _round(s["lenient"]["score"]) for c, s in scores["by_category"].items()},
        }
    return record


def append_ledger(path: str | Path, record: Mapping[str, Any]) -> None:
    """Adds one line of JSON to the ledger. Raises OutputError."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise OutputError(f"cannot append to {path}: {error.strerror or error}.") from error


def commit() -> str:
    """The commit that this package runs from, with "+" if files were changed; "unknown" outside a checkout."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():  # installed: a checkout further up is someone else's
        return "unknown"
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


# ---------------------------------------------------------------------------------------------------------------- cells


def _title(report: Report) -> str:
    kind = "quick " if report["quick"] else ""
    return f"W-GenEval, {kind}{report['split']}, {report['samples']} pictures per prompt"


def _columns(report: Report) -> list[str]:
    return [*COLUMNS, "paraphrase"] if "paraphrase" in report["parts"] else list(COLUMNS)


def _rows(report: Report) -> list[list[str]]:
    """One row per category, then overall."""
    parts, ceiling = report["parts"], report["ceiling"]
    categories = list(dict.fromkeys(c for scores in parts.values() for c in scores["by_category"]))
    rows = []
    for category in [*categories, "overall"]:
        row = [category.replace("_", " "), _cell(parts, "id", category), _cell(parts, "cg", category)]
        row.append(_cell({"gap": report.get("gap")}, "gap", category))
        row.append(f"{_floor(parts, 'id', category)} / {_floor(parts, 'cg', category)}")
        row.append(f"{_cell(ceiling, 'clean', category)} / {_cell(ceiling, 'noise', category)}")
        row += [_cell(parts, "id", category, "strict"), _cell(parts, "cg", category, "strict")]
        row += [_cell(parts, "paraphrase", category)] if "paraphrase" in parts else []
        rows.append(row)
    return rows


def _cell(scored: Report, key: str, category: str, rule: str = "lenient") -> str:
    scores = scored.get(key)
    if not scores:
        return ABSENT
    found = scores["overall"] if category == "overall" else scores["by_category"].get(category)
    return f"{found[rule]['score']:.3f}" if found else ABSENT


def _floor(parts: Report, part: str, category: str) -> str:
    floor = parts.get(part, {}).get("floor")
    if not floor:
        return ABSENT
    found = floor if category == "overall" else floor["by_category"].get(category)
    return f"{found['lenient']:.3f}" if found else ABSENT


def _round(score: float) -> float:
    return round(score, 4)
