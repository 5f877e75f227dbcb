"""Reports of the suites about understanding, editing and telling, line by line: ID, CG, gap, floor, ceiling.

W-GenEval has a table of its own (report). Here every suite is a function from its report to the same six columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from starflow2.errors import ConfigError
from starflow2.evals.report import commit

__all__ = ["HEADINGS", "lines", "suite_record", "suite_table"]

HEADINGS = ("measure", "ID", "CG", "gap", "floor", "ceiling")
ABSENT = "–"
Report = Mapping[str, Any]
Line = tuple[str, str, str, str, str, str]


def lines(report: Report) -> list[Line]:
    """The table's rows, the headline first."""
    return list(_LINES[report["suite"]](report))


def suite_table(report: Report) -> Table:
    """For the terminal."""
    grid = Table(title=_title(report), caption=_NOTES[report["suite"]], caption_justify="left")
    for heading in HEADINGS:
        grid.add_column(heading, justify="left" if heading == "measure" else "right")
    for i, row in enumerate(lines(report)):
        grid.add_row(*row, style="bold" if i == 0 else None)
    return grid


def suite_record(report: Report) -> dict[str, Any]:
    """Date, commit and the table's cells of a full test run, for the ledger. Raises ConfigError for any other."""
    if report["quick"] or report["split"] != "test":
        raise ConfigError("report: only full test runs enter the ledger, this one is not.")
    told = {name: {"id": a, "cg": b, "floor": floor, "ceiling": best} for name, a, b, _, floor, best in lines(report)}
    made = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    return made | {"suite": report["suite"], "split": "test", "n": report["n"], "lines": told}


def _title(report: Report) -> str:
    kind = "quick " if report["quick"] else ""
    return f"W-{report['suite']}, {kind}{report['split']}, {report['n']} items"


def _score(row: Report | None, digits: int = 3) -> str:
    """A score with its interval, or only itself where it has none."""
    if not row or row.get("score") is None:
        return ABSENT
    if "low" not in row:
        return f"{row['score']:.{digits}f}"
    return f"{row['score']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def _gap(id_row: Report | None, cg_row: Report | None, digits: int = 3) -> str:
    if not id_row or not cg_row or id_row.get("score") is None or cg_row.get("score") is None:
        return ABSENT
    return f"{id_row['score'] - cg_row['score']:.{digits}f}"


def _row(name: str, pair: tuple[Report | None, Report | None], bounds: tuple[str, str], digits: int = 3) -> Line:
    floor, ceiling = bounds
    return name, _score(pair[0], digits), _score(pair[1], digits), _gap(*pair, digits), floor, ceiling


def _with_gap(line: Line, gap: Report | None) -> Line:
    """The same with the gap of the report, where that is more than a difference of two cells."""
    name, id_score, cg_score, _, *bounds = line
    return name, id_score, cg_score, _score(gap), *bounds  # type: ignore[return-value]


def _at(tree: Report | None, *path: str) -> Any:
    """What stands at a path of keys, None where it ends early."""
    for key in path:
        tree = None if tree is None else tree.get(key)
    return tree


def _pair(report: Report, *path: str) -> tuple[Any, Any]:
    """The same in both parts."""
    return _at(report["parts"], "id", *path), _at(report["parts"], "cg", *path)


def _both(values: tuple[Any, Any], digits: int = 3) -> str:
    """Two numbers, ID / CG."""
    return " / ".join(ABSENT if v is None else f"{v:.{digits}f}" for v in values)


def _mme(report: Report) -> Iterator[Line]:
    floor, vlm = report["parts"]["id"]["floor"], {"parts": report.get("vlm", {})}
    told = f"{floor['always_yes']:.0f} always yes, {floor['coin']:.0f} coin"
    yield _row("total of 1,200", _pair(report, "total"), (told, _both(_pair(vlm, "total", "score"), 0)), 0)
    for name in report["parts"]["id"]["by_subtask"]:
        seen = _both(_pair(vlm, "by_subtask", name, "score"), 0)
        yield _row(name, _pair(report, "by_subtask", name), ("50 / 75", seen), 0)


def _gqa(report: Report) -> Iterator[Line]:
    seen = _both(_pair({"parts": report.get("vlm", {})}, "accuracy", "score"))
    total = _row("accuracy", _pair(report, "accuracy"), (_both(_pair(report, "prior")), seen))
    yield _with_gap(total, _at(report.get("gap"), "overall"))
    for name in report["parts"]["id"]["by_kind"]:
        prior = _both(_pair(report, "by_kind", name, "prior"))
        yield _row(name, _pair(report, "by_kind", name, "accuracy"), (prior, ABSENT))


def _mcq(report: Report) -> Iterator[Line]:
    for suite, scores in report["suites"].items():
        for measure, chance in (("accuracy", "chance"), ("circular", "circular_chance")):
            if measure in scores["parts"]["id"]:
                guess, prior = (_both(_pair(scores, "floor", key)) for key in (chance, "prior"))
                yield _row(f"{suite} {measure}", _pair(scores, measure), (f"chance {guess}; prior {prior}", ABSENT))


def _dpg(report: Report) -> Iterator[Line]:
    for name in ("overall", "soft"):
        best = [_at(c, "parts", "id", name, "score") for c in report["ceiling"].values()]
        told = " / ".join(f"{b:.3f}" for b in best) or ABSENT
        yield _row(name, _pair(report, name), (_both(_pair(report, "floor", name)), told))
    for name in report["parts"]["id"]["by_category"]:
        id_score, cg_score = _pair(report, "by_category", name, "last_picture")
        yield _row(name, ({"score": id_score}, {"score": cg_score}), (ABSENT, ABSENT))


def _edit(report: Report) -> Iterator[Line]:
    for name in ("success", "applied", "preserved", "overall"):
        bounds = [_both(_pair(report, "controls", kind, "overall", name, "score")) for kind in ("copy", "ceiling")]
        yield _row(name, _pair(report, "overall", name), (bounds[0], bounds[1]))
    for name in report["parts"]["id"]["by_operation"]:
        yield _row(f"{name}: success", _pair(report, "by_operation", name, "success"), (ABSENT, ABSENT))


def _sessions(report: Report) -> Iterator[Line]:
    """Sessions have one part, ID."""
    bounds = [_at(report["controls"], kind, "all_turns", "score") for kind in ("copy", "ceiling")]
    yield _row("all three edits", (report["all_turns"], None), (f"{bounds[0]:.3f}", f"{bounds[1]:.3f}"))
    for turn, scores in enumerate(report["turns"], 1):
        for name in ("success", "preserved"):
            yield _row(f"edit {turn}: {name}", (scores[name], None), (ABSENT, ABSENT))
    for name in ("same", "exact"):
        yield _row(f"undo: {name}", (report["undo"][name], None), (ABSENT, ABSENT))


def _story(report: Report) -> Iterator[Line]:
    for name in ("prefix", "structure", "block", "image", "consistency"):
        best = _at(report, "ceiling", name, "score")
        ceiling = ABSENT if best is None else f"{best:.3f}"
        yield _row(name, _pair(report, name), (_both(_pair(report, "floor", name)), ceiling))
    guess, words = (_both(_pair(report, "floor", name)) for name in ("guess", "words"))
    yield _row("answer by the true story", _pair(report, "answer", "true"), (f"guess {guess}; words {words}", ABSENT))
    own = _both(_pair(report, "answer", "drawn", "guess"))
    yield _row("answer by its own picture", _pair(report, "answer", "drawn"), (f"guess {own}", ABSENT))
    for name in ("true_pictures", "no_pictures"):
        told = f"the same, after the story with {name.replace('_', ' ')}"
        yield _row(told, _pair(report, "asked", name), (ABSENT, ABSENT))


_LINES: Mapping[str, Callable[[Report], Iterator[Line]]] = {
    "mme": _mme,
    "gqa": _gqa,
    "mcq": _mcq,
    "dpg": _dpg,
    "edit": _edit,
    "edit_sessions": _sessions,
    "story": _story,
}
_NOTES: Mapping[str, str] = {
    "mme": "Ceiling: the frozen language model through its own vision tower.",
    "gqa": "Gap: the mean over kinds of both. Floor: the question-only prior. Ceiling: the language model alone, "
    "through its own vision tower.",
    "mcq": "Floor: chance, and a reader of the question alone. Circular: right in every rotation of the options.",
    "dpg": "Floor: pictures of other prompts. Ceiling: true pictures after the codec, clean / at the sampling noise.",
    "edit": "Floor: the picture handed back unchanged. Ceiling: the true result after the codec. Overall is of 10.",
    "edit_sessions": "Three edits of one picture, an undo before the third. Floor: the source handed back. Undo: the "
    "picture is again what it was, and to the byte.",
    "story": "Prefix: steps without any fault, of 4. Floor: other stories' pictures; of answers, guessing by the kind "
    "of question, and by the words of the requests where they settle it.",
}
