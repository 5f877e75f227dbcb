"""One page for a checkpoint: every result beside the paper's row, as Markdown, JSON, and a sheet of its images.

Results are the files that `eval ... --json` writes. Not here: any arithmetic, and the drawn world's suites, whose
scores do not compare with the paper's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from starflow2.benchmarks.paper import PAPER, PaperRow
from starflow2.benchmarks.results import Result, read_result
from starflow2.core.files import check_writable, replacing
from starflow2.core.images import contact_sheet, picture_files, read_picture, save_png, to_pil
from starflow2.errors import DataError
from starflow2.evals.statistics import Score

__all__ = ["markdown", "read_results", "write_report"]

TITLES: Final = {
    "geneval": "GenEval",
    "dpg": "DPG-Bench",
    "mme": "MME, perception and cognition",
    "gqa": "GQA",
    "seed": "SEED-Bench",
    "mmbench": "MMBench-en, dev",
    "mmmu": "MMMU, validation",
    "ai2d": "AI2D",
    "gedit": "GEdit-Bench",
    "imgedit": "ImgEdit-Bench",
    "magicbrush": "MagicBrush",
    "codec": "Codec",
    "likelihood": "Likelihood",
}
SHOWN: Final = 24  # images of a sheet
SIDE: Final = 256  # pixels, of a larger image on a sheet
ABSENT: Final = "–"


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Results of files, in the order of the paper's tables.

    Raises DataError for a file that is none, for two of one benchmark, row and judge, and for none at all.
    """
    results = [read_result(path) for path in paths]
    seen: dict[tuple[str, str, str], Path] = {}
    for path, result in zip(paths, results, strict=True):
        key = (result.benchmark, result.model, result.judge)
        if key in seen:
            raise DataError(f"{path} and {seen[key]} are both of {', '.join(key)}; give one of them.")
        seen[key] = path
    if not results:
        raise DataError("there is no result to report; give files that eval --json has written.")
    order = list(TITLES)
    return sorted(results, key=lambda r: order.index(r.benchmark) if r.benchmark in order else len(order))


def write_report(paths: Sequence[Path], folder: Path, images: Sequence[Path] = ()) -> list[Path]:
    """Write report.md, report.json and, of folders of drawn images, a contact sheet each; returns all files.

    Raises DataError for results or folders that cannot be read, OutputError.
    """
    for name in ("report.md", "report.json"):
        check_writable(folder / name)
    results = read_results(paths)
    sheets = [_write_sheet(source, folder) for source in images]
    with replacing(folder / "report.md") as temp:
        temp.write_text(markdown(results, [sheet.name for sheet in sheets]), encoding="utf-8")
    data = {"results": [result.to_json() | {"paper": _paper(result.benchmark)} for result in results]}
    with replacing(folder / "report.json") as temp:
        temp.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [folder / "report.md", folder / "report.json", *sheets]


def markdown(results: Sequence[Result], sheets: Sequence[str] = ()) -> str:
    """The page: a table for each benchmark, the paper's rows first, then notes and what ours depends on."""
    page = ["# Benchmarks beside the paper", ""]
    for benchmark in dict.fromkeys(result.benchmark for result in results):
        page += _section(benchmark, [result for result in results if result.benchmark == benchmark])
    for sheet in sheets:
        page += [f"![images]({sheet})", ""]
    return "\n".join(page)


def _section(benchmark: str, results: Sequence[Result]) -> list[str]:
    rows = PAPER.get(benchmark, ())
    names = list(dict.fromkeys([c for row in rows for c in row.columns] + [c for r in results for c in r.columns]))
    lines = [
        f"## {TITLES.get(benchmark, benchmark)}",
        "",
        _line(["row", "judge", *names]),
        _line(["---"] * (len(names) + 2)),
    ]
    lines += [_line([row.name, "", *(_paper_cell(row, name) for name in names)]) for row in rows]
    lines += [_line([r.model, r.judge, *(_cell(r.columns.get(name)) for name in names)]) for r in results]
    for result in results:
        lines += ["", f"{result.model}: {_facts(result)}", *result.notes]
        lines += [f"{name}: {_cell(score)}." for name, score in result.more.items()]
    return [*lines, ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _paper_cell(row: PaperRow, name: str) -> str:
    return f"{row.columns[name]:g}" if name in row.columns else ""


def _cell(score: Score | None) -> str:
    if score is None or score.score is None:
        return ABSENT
    digits = 3 if abs(score.score) <= 1 else 2
    text = f"{score.score:.{digits}f}"
    return (
        text if score.low is None or score.high is None else f"{text} ({score.low:.{digits}f}–{score.high:.{digits}f})"
    )


def _facts(result: Result) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in result.counts.items())
    return "; ".join(filter(None, [counts, ", ".join(f"{name} {value}" for name, value in result.made.items())])) + "."


def _paper(benchmark: str) -> list[dict[str, object]]:
    return [{"row": row.name, "columns": dict(row.columns)} for row in PAPER.get(benchmark, ())]


def _write_sheet(source: Path, folder: Path) -> Path:
    """A contact sheet of the first images below a folder. Raises DataError where there are none."""
    places = [source, *sorted(path for path in source.rglob("*") if path.is_dir())] if source.is_dir() else []
    files = [file for place in places for file in picture_files(place)][:SHOWN]
    if not files:
        raise DataError(f"{source} has no images; expected a folder that eval has drawn.")
    images = [to_pil(read_picture(file, SIDE)) for file in files]
    path = folder / f"{source.resolve().name}.png"
    save_png(contact_sheet(images, [str(file.relative_to(source)) for file in files], scale=1), path)
    return path
