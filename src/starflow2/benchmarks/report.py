"""One page for checkpoints: every result beside the paper's row, as Markdown, JSON, and sheets of images.

Results are the files that `eval ... --json` writes. Those of the drawn world stand in sections of their own: its suites
follow the rules of published benchmarks, and their scores do not compare with the paper's. Not here: any arithmetic,
and measuring (`measuring`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from starflow2.benchmarks.paper import FROZEN, OURS, PAPER, PaperRow
from starflow2.benchmarks.results import Result, number_form, read_result
from starflow2.core.files import check_writable, replacing
from starflow2.core.images import contact_sheet, picture_files, read_metadata, read_picture, save_png, to_pil
from starflow2.core.places import check_walk
from starflow2.core.serialize import read_json
from starflow2.errors import ConfigError, DataError
from starflow2.evals.statistics import Score
from starflow2.evals.suite import Report
from starflow2.evals.tables import NAMES, headings, lines, notes, title

__all__ = ["Found", "markdown", "read_results", "write_report"]

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
    "isg": "ISG-Bench",
    "codec": "Codec",
    "likelihood": "Likelihood",
}
# the column that stands for a benchmark of the paper, and the suite of the drawn world that follows its rules, with
# the line of its table
HEADLINES: Final = MappingProxyType(
    {
        "geneval": ("overall", "geneval", "overall"),
        "dpg": ("overall", "dpg", "overall"),
        "mme": ("perception", "mme", "total of 1,200"),
        "gqa": ("accuracy", "gqa", "accuracy"),
        "seed": ("accuracy", "mcq", "seed accuracy"),
        "mmbench": ("accuracy", "mcq", "mmb circular"),
        "mmmu": ("accuracy", "mcq", "mmmu accuracy"),
        "ai2d": ("accuracy", "", ""),
    }
)
SHOWN: Final = 24  # images of a sheet
SIDE: Final = 256  # pixels, of a larger image on a sheet
SMALL: Final = 100  # pixels; images below are shown at twice their size
WIDE: Final = 7  # columns of a table; a wider one is turned
ABSENT: Final = "–"


@dataclass(frozen=True, slots=True)
class Found:
    """Results of published benchmarks in the order of the paper's tables, and reports of the drawn world's suites."""

    results: Sequence[Result]
    world: Sequence[Report] = ()


def read_results(paths: Sequence[Path]) -> Found:
    """Results and reports of files.

    Raises DataError for a file that is none, for two of one benchmark, row and judge, and for none at all.
    """
    found = [_read(path) for path in paths]
    seen: dict[tuple[str, str, str], Path] = {}
    for path, result in zip(paths, found, strict=True):
        key = _key(result)
        if key in seen:
            raise DataError(f"{path} and {seen[key]} are both of {', '.join(key)}; give one of them.")
        seen[key] = path
    if not found:
        raise DataError("there is no result to report; give files that eval --json has written.")
    order = list(TITLES)
    results = [result for result in found if isinstance(result, Result)]
    results.sort(key=lambda r: order.index(r.benchmark) if r.benchmark in order else len(order))
    return Found(results, [report for report in found if isinstance(report, Report)])


def _read(path: Path) -> Result | Report:
    """The result of a file, or the report of a suite of the drawn world. Raises DataError for anything else."""
    try:
        data = read_json(path)
    except ConfigError as error:
        raise DataError(str(error)) from error
    if not isinstance(data, dict) or "split" not in data:
        return read_result(path)
    try:
        report = Report.from_json(data)
        lines(report)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} is no whole report: {error!r}; expected one that eval world --json wrote.") from error
    return report


def _key(found: Result | Report) -> tuple[str, str, str]:
    if isinstance(found, Report):
        return NAMES[found.suite], found.model or "unknown", found.split
    return found.benchmark, found.model, found.judge


def write_report(
    paths: Sequence[Path], folder: Path, images: Sequence[Path] = (), sheets: Sequence[Path] = ()
) -> list[Path]:
    """Write report.md, report.json and, of folders of drawn images, a contact sheet each; returns all files.

    sheets: further ones, which are in `folder` already. Raises DataError for results or folders that cannot be read,
    OutputError.
    """
    for name in ("report.md", "report.json"):
        check_writable(folder / name)
    found = read_results(paths)
    shown = [*sheets]
    for source in images:
        shown.append(_write_sheet(source, folder, {sheet.name for sheet in shown}))
    with replacing(folder / "report.md") as temp:
        temp.write_text(markdown(found, [sheet.name for sheet in shown]), encoding="utf-8")
    results = [result.to_json() | {"paper": _paper(result.benchmark)} for result in found.results]
    data = {"results": results, "drawn world": [report.to_json() for report in found.world]}
    with replacing(folder / "report.json") as temp:
        temp.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [folder / "report.md", folder / "report.json", *shown]


# ------------------------------------------------------------------------------------------------------------- the page


def markdown(found: Found, sheets: Sequence[str] = ()) -> str:
    """The page: all benchmarks of the paper at a glance, a table for each result, the drawn world, and the images."""
    page = ["# Benchmarks beside the paper", "", *_glance(found), ""]
    for benchmark in dict.fromkeys(result.benchmark for result in found.results):
        page += _section(benchmark, [result for result in found.results if result.benchmark == benchmark])
    if found.world:
        page += ["## The drawn world", "", *_WORLD, ""]
    for report in found.world:
        page += _world_section(report)
    if sheets:
        page += ["## Images", ""]
    for sheet in sheets:
        page += [f"![{Path(sheet).stem.replace('_', ' ')}]({sheet})", ""]
    return "\n".join(page).rstrip() + "\n"


_WORLD: Final = (
    "Suites of 64-pixel images, named after the benchmark whose rules they follow. ID: unseen scenes of combinations",
    "that training contained; CG: combinations held out of training. Nothing here compares with the paper's numbers.",
)


def _glance(found: Found) -> Iterator[str]:
    """The headline of every benchmark of the paper, whether it was measured or not."""
    heads = ["benchmark", "paper", "paper, frozen language model", "measured"]
    yield _line([*heads, *(["drawn world, ID and CG"] if found.world else [])])
    yield _line(["---"] * (len(heads) + bool(found.world)))
    for benchmark, (column, suite, line) in HEADLINES.items():
        printed = {row.name: f"{row.columns[column]:g}" for row in PAPER[benchmark] if column in row.columns}
        results = [result for result in found.results if result.benchmark == benchmark]
        own = [f"{r.model} {_cell(r.columns.get(column))}, {r.judge}, of {_basis(r)}" for r in results]
        cells = [f"{TITLES[benchmark].split(',')[0]}, {column}", printed.get(OURS, ""), printed.get(FROZEN, "")]
        cells += ["; ".join(own) or ABSENT]
        if found.world:
            cells += ["; ".join(_pairs(found.world, suite, line)) or ABSENT]
        yield _line(cells)


def _basis(result: Result) -> str:
    """The first count of a result: what its headline is a mean of."""
    return next((f"{n} {name.removesuffix('s') if n == 1 else name}" for name, n in result.counts.items()), "unknown")


def _pairs(world: Sequence[Report], suite: str, name: str) -> Iterator[str]:
    """A line of the table of each report on a suite: ID and CG, with the model where there are several."""
    models = {report.model for report in world}
    for report in world:
        cells = {row[0]: row for row in lines(report)} if report.suite == suite else {}
        if name in cells:
            pair = " / ".join(cell.partition(" ")[0] for cell in cells[name][1:3])
            pair += f" of {name.partition(' of ')[2]}" if " of " in name else ""
            yield f"{report.model} {pair}" if len(models) > 1 else pair


def _section(benchmark: str, results: Sequence[Result]) -> Iterator[str]:
    rows = PAPER.get(benchmark, ())
    names = list(dict.fromkeys([c for row in rows for c in row.columns] + [c for r in results for c in r.columns]))
    absent = [n for n in names if not any(n in row.columns for row in rows) and not _is_scored(n, results)]
    names = [name for name in names if name not in absent]
    table = [["row", "judge", *names]]
    table += [[row.name, "", *(_paper_cell(row, name) for name in names)] for row in rows]
    table += [[r.model, r.judge, *(_cell(r.columns.get(name)) for name in names)] for r in results]
    if len(names) > WIDE:  # a column for each model
        table = [list(row) for row in zip(*table, strict=True)]
    yield from (f"## {TITLES.get(benchmark, benchmark)}", "", _line(table[0]), _line(["---"] * len(table[0])))
    yield from map(_line, table[1:])
    yield ""
    for result in results:
        yield from _about(result)
    yield from [f"- not measured: {', '.join(absent)}"] if absent else []
    yield ""


def _is_scored(column: str, results: Sequence[Result]) -> bool:
    return any(result.columns.get(column, Score(None)).score is not None for result in results)


def _about(result: Result) -> Iterator[str]:
    """Items of a list: settings that a result depends on, how to read it, and its further columns."""
    yield f"- **{result.model}**, judged by {result.judge}: {_facts(result)}"
    yield from (f"  - {note}" for note in result.notes)
    yield from (f"  - {name}: {_cell(score)}" for name, score in result.more.items())


def _world_section(report: Report) -> Iterator[str]:
    yield from (f"### {title(report)}", "")
    yield _line(headings(report))
    yield _line(["---"] * len(headings(report)))
    yield from map(_line, lines(report))
    yield ""
    made = [f"**{report.model or 'unknown'}**", *([f"weights {report.weights}"] if report.weights else [])]
    yield f"- {', '.join(made)}"
    yield from (f"  - {note}" for note in notes(report))
    yield ""


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _paper_cell(row: PaperRow, name: str) -> str:
    return f"{row.columns[name]:g}" if name in row.columns else ""


def _cell(score: Score | None) -> str:
    if score is None or score.score is None:
        return ABSENT
    form = number_form(score.score)
    if score.low is None or score.high is None:
        return f"{score.score:{form}}"
    dash = "–" if score.low >= 0 else " to "
    return f"{score.score:{form}} ({score.low:{form}}{dash}{score.high:{form}})"


def _facts(result: Result) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in result.counts.items())
    return "; ".join(filter(None, [counts, ", ".join(f"{name} {value}" for name, value in result.made.items())])) + "."


def _paper(benchmark: str) -> list[dict[str, object]]:
    return [{"row": row.name, "columns": dict(row.columns)} for row in PAPER.get(benchmark, ())]


# --------------------------------------------------------------------------------------------------------------- images


def _write_sheet(source: Path, folder: Path, used: set[str]) -> Path:
    """A contact sheet of the first images below a folder, under a name that is not used.

    Raises DataError where there are none.
    """
    check_walk(source, "images", DataError)
    places = [source, *sorted(path for path in source.rglob("*") if path.is_dir())] if source.is_dir() else []
    files = [file for place in places for file in picture_files(place)][:SHOWN]
    if not files:
        raise DataError(f"{source} has no images; expected a folder that eval has drawn.")
    images = [to_pil(read_picture(file, SIDE)) for file in files]
    stem = source.resolve().name
    name = next(n for n in (f"{stem}{end}.png" for end in ("", *(f"-{i}" for i in range(2, 99)))) if n not in used)
    labels = [read_metadata(file).get("prompt") or str(file.relative_to(source)) for file in files]
    scale = 2 if max(image.width for image in images) < SMALL else 1
    save_png(contact_sheet(images, labels, columns=6, scale=scale), folder / name)
    return folder / name
