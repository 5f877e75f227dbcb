"""Reports as tables for the terminal, and as records for the ledger: ID, CG, gap, floor and ceiling, line by line.

A score means nothing without what chance and the codec allow, so every line has its floor and ceiling beside it, and
W-GenEval, which has a table of its own, says where one was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from types import MappingProxyType

from rich.table import Table

from starflow2.errors import ConfigError
from starflow2.evals.report import commit
from starflow2.evals.statistics import Score, Scores
from starflow2.evals.story import RUNGS
from starflow2.evals.suite import Report
from starflow2.evals.tries import CHECKED, PASSED, SELF_CHECK

__all__ = ["NAMES", "headings", "ledger_record", "lines", "notes", "table", "title"]

HEADINGS = ("measure", "ID", "CG", "gap", "floor", "ceiling")
GENEVAL_HEADINGS = ("category", "ID", "CG", "gap", "floor", "ceiling", "ID strict", "CG strict")
TRIED_HEADINGS = ("confirmed", "passed", "AUC")  # ID / CG each, where several tries were made
OTHER_PARTS = ("paraphrase", "new", "scenes", "plain")  # beside ID and CG, where they were run
ABSENT = "–"
TWINS = "twins of 100"
NAMES = MappingProxyType(
    {
        "geneval": "W-GenEval",
        "dpg": "W-DPG",
        "mme": "W-MME-p",
        "gqa": "W-GQA",
        "mcq": "W-MCQ",
        "edit": "W-Edit",
        "edit_sessions": "Edits in sessions",
        "story": "W-Story",
        "newcomers": "A newcomer's first prompts",
    }
)
Line = tuple[str, ...]
Record = dict[str, object]


def table(report: Report) -> Table:
    """The report for the terminal, the headline in bold and notes underneath."""
    is_geneval = report.suite == "geneval"
    grid = Table(title=title(report), caption="\n".join(notes(report)), caption_justify="left")
    for heading in headings(report):
        grid.add_column(heading, justify="left" if heading in ("measure", "category") else "right")
    for i, row in enumerate(lines(report)):
        grid.add_row(*row, style="bold" if row[0] == "overall" or (i == 0 and not is_geneval) else None)
    return grid


def headings(report: Report) -> tuple[str, ...]:
    """Headings of the columns that `lines` has."""
    tried = TRIED_HEADINGS if CHECKED in report.bounds else ()
    return GENEVAL_HEADINGS + tried + _others(report) if report.suite == "geneval" else HEADINGS


def lines(report: Report) -> list[Line]:
    """The rows of the table; the first is the headline, of W-GenEval the last."""
    return list(_LINES[report.suite](report))


def notes(report: Report) -> list[str]:
    """Notes on how to read the table."""
    if report.suite == "geneval":
        return list(_geneval_notes(report))
    tried = [_TRIED_NEWCOMERS] if report.suite == "newcomers" and CHECKED in report.bounds else []
    return [*([_QUICK] if report.quick else []), _NOTES[report.suite], *tried]


def ledger_record(report: Report) -> Record:
    """Date, commit, model and scores of a full test run. Raises ConfigError for any other."""
    if report.quick or report.split != "test":
        kind = "quick" if report.quick else report.split
        raise ConfigError(f"report: only full test runs enter the ledger, this one is a {kind} run.")
    record: Record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    record |= {"suite": report.suite, "split": report.split, "n": report.n}
    made_by = {"model": report.model, "weights": report.weights}
    scores = _geneval_scores(report) if report.suite == "geneval" else _line_scores(report)
    return record | scores | {name: value for name, value in made_by.items() if value is not None}


def _line_scores(report: Report) -> Record:
    cells = {name: {"id": a, "cg": b, "floor": low, "ceiling": high} for name, a, b, _, low, high in lines(report)}
    return {"lines": cells}


def _geneval_scores(report: Report) -> Record:
    ceilings = {f"ceiling_{name}": report.bounds[name]["id"] for name in ("clean", "noise") if name in report.bounds}
    chosen = {f"{name}_{part}": s for name in (CHECKED, PASSED) for part, s in report.bounds.get(name, {}).items()}
    areas = {part: _rounded(s.columns["auc"]) for part, s in report.bounds.get(SELF_CHECK, {}).items()}
    record: Record = {name: report.settings[name] for name in ("samples", "tries") if name in report.settings}
    record |= {"self_check_auc": areas} if areas else {}
    return record | {name: _geneval_part(scores) for name, scores in (report.parts | chosen | ceilings).items()}


def _geneval_part(scores: Scores) -> Record:
    record: Record = {rule: round(scores.value(rule), 4) for rule in ("lenient", "strict")}
    record["by_category"] = {kind: round(row.value("lenient"), 4) for kind, row in scores.by_kind.items()}
    return record | ({"twins_per_100": _rounded(scores.columns["twins"], 1)} if "twins" in scores.columns else {})


def _rounded(score: Score, digits: int = 4) -> float | None:
    return None if score.score is None else round(score.score, digits)


def _others(report: Report) -> tuple[str, ...]:
    """The parts of a report beside ID and CG."""
    return tuple(part for part in OTHER_PARTS if part in report.parts)


def title(report: Report) -> str:
    """The suite, its split, and how much of it was run."""
    kind = "quick " if report.quick else ""
    many = f"{report.settings['samples']} images per prompt" if report.suite == "geneval" else f"{report.n} items"
    return f"{NAMES[report.suite]}, {kind}{report.split}, {many}"


# ---------------------------------------------------------------------------------------------------------------- cells

ByPart = Mapping[str, Scores]
Pair = tuple[Score | None, Score | None]  # ID, CG


def _pick(scores: Scores | None, column: str, kind: str = "") -> Score | None:
    """A column of some scores, or of one kind of rows; None if it is not there or there was nothing to score."""
    rows = scores.by_kind.get(kind) if kind and scores else scores
    score = rows.columns.get(column) if rows else None
    return None if score is None or score.score is None else score


def _pair(parts: ByPart, column: str, kind: str = "") -> Pair:
    return _pick(parts.get("id"), column, kind), _pick(parts.get("cg"), column, kind)


def _number(score: Score | None, digits: int = 3) -> str:
    return ABSENT if score is None else f"{score.score:.{digits}f}"


def _both(pair: Pair, digits: int = 3) -> str:
    """Two numbers without intervals."""
    return " / ".join(_number(score, digits) for score in pair)


def _cell(score: Score | None, digits: int = 3) -> str:
    """A score with its interval."""
    if score is None or score.low is None:
        return _number(score, digits)
    return f"{score.score:.{digits}f} [{score.low:.{digits}f}, {score.high:.{digits}f}]"


def _line(title: str, pair: Pair, floor: str = ABSENT, ceiling: str = ABSENT, digits: int = 3) -> Line:
    """Scores of both parts, their difference, floor and ceiling."""
    scores = [score.score for score in pair if score is not None and score.score is not None]
    difference = f"{scores[0] - scores[1]:.{digits}f}" if len(scores) == 2 else ABSENT
    return title, _cell(pair[0], digits), _cell(pair[1], digits), difference, floor, ceiling


# ---------------------------------------------------------------------------------------------------------------- lines


def _geneval(report: Report) -> Iterator[Line]:
    """One row per category, then overall."""
    parts, floor = report.parts, report.bounds["floor"]
    kinds = dict.fromkeys(kind for scores in parts.values() for kind in scores.by_kind)
    for kind in (*kinds, ""):
        pair = _pair(parts, "lenient", kind)
        ceilings = (_pick(report.bounds.get(name, {}).get("id"), "lenient", kind) for name in ("clean", "noise"))
        gap = _pick(report.gap, "lenient", kind)
        row = [kind.replace("_", " ") or "overall", *map(_number, (*pair, gap))]
        row += [_both(_pair(floor, "lenient", kind)), " / ".join(map(_number, ceilings))]
        row += map(_number, _pair(parts, "strict", kind))
        if not kind:
            yield _geneval_twins(report)
        yield (*row, *_tried(report, kind), *(_number(_pick(parts[part], "lenient", kind)) for part in _others(report)))


def _tried(report: Report, kind: str) -> tuple[str, ...]:
    """Cells of TRIED_HEADINGS; none where one try was made."""
    if CHECKED not in report.bounds:
        return ()
    chosen = (_both(_pair(report.bounds[name], "lenient", kind)) for name in (CHECKED, PASSED))
    return (*chosen, _both(_pair(report.bounds[SELF_CHECK], "auc", kind)))


def _geneval_twins(report: Report) -> Line:
    """A row with twins of 100 images of several shapes."""
    cells = [_number(score, 1) for score in _pair(report.parts, "twins")]
    chosen = [_both(_pair(report.bounds.get(name, {}), "twins"), 1) for name in (CHECKED, PASSED)]
    tried = (*chosen, ABSENT) if CHECKED in report.bounds else ()
    others = (_number(_pick(report.parts[part], "twins"), 1) for part in _others(report))
    return (TWINS, *cells, *[ABSENT] * (len(GENEVAL_HEADINGS) - 3), *tried, *others)


def _choices(report: Report, *columns: str) -> Iterator[Line]:
    """Lines about the choice among tries, and twins."""
    yield _line(TWINS, _pair(report.parts, "twins"), digits=1)
    if CHECKED in report.bounds:
        checked, passed = report.bounds[CHECKED], report.bounds.get(PASSED, {})
        tries = report.settings.get("tries", 0)
        for name in columns:
            title = f"{name.replace('_', ' ')}, the confirmed one of {tries} tries"
            yield _line(title, _pair(checked, name), ABSENT, _both(_pair(passed, name)) if passed else ABSENT)
        for part in _others(report):
            top = _number(_pick(passed.get(part), columns[0]))
            yield _line(f"{part}: {columns[0]}, confirmed", (_pick(checked[part], columns[0]), None), ABSENT, top)
        yield _line(f"{TWINS}, confirmed", _pair(checked, "twins"), digits=1)
    if SELF_CHECK in report.bounds:
        yield _line("AUC of the self-check", _pair(report.bounds[SELF_CHECK], "auc"), "0.5", "1")


def _mme(report: Report) -> Iterator[Line]:
    parts, floor, vlm = report.parts, report.bounds["floor"]["id"], report.bounds.get("vlm", {})
    without_looking = f"{floor.value('always_yes'):.0f} always yes, {floor.value('coin'):.0f} coin"
    yield _line("total of 1,200", _pair(parts, "total"), without_looking, _both(_pair(vlm, "total"), 0), 0)
    for kind in parts["id"].by_kind:
        yield _line(kind, _pair(parts, "score", kind), "50 / 75", _both(_pair(vlm, "score", kind), 0), 0)


def _gqa(report: Report) -> Iterator[Line]:
    parts, vlm = report.parts, _both(_pair(report.bounds.get("vlm", {}), "accuracy"))
    title, *scores, _, floor, top = _line("accuracy", _pair(parts, "accuracy"), _both(_pair(parts, "prior")), vlm)
    yield title, *scores, _cell(_pick(report.gap, "accuracy")), floor, top
    for kind in parts["id"].by_kind:
        yield _line(kind, _pair(parts, "accuracy", kind), _both(_pair(parts, "prior", kind)))


def _mcq(report: Report) -> Iterator[Line]:
    floor = report.bounds["floor"]
    for kind, scores in report.parts["id"].by_kind.items():
        for column, chance in (("accuracy", "chance"), ("circular", "circular_chance")):
            if column in scores.columns:
                guess, prior = _both(_pair(floor, chance, kind)), _both(_pair(floor, "prior", kind))
                yield _line(f"{kind} {column}", _pair(report.parts, column, kind), f"chance {guess}; prior {prior}")


def _dpg(report: Report) -> Iterator[Line]:
    parts, ceilings = report.parts, [report.bounds[name]["id"] for name in ("clean", "noise") if name in report.bounds]
    for name in ("overall", "soft"):
        ceiling = " / ".join(_number(scores[name]) for scores in ceilings) or ABSENT
        yield _line(name, _pair(parts, name), _both(_pair(report.bounds["floor"], name)), ceiling)
    for kind in parts["id"].by_kind:
        yield _line(kind, _pair(parts, "last_picture", kind))
    yield from _choices(report)


def _edit(report: Report) -> Iterator[Line]:
    parts, copy, ceiling = report.parts, report.bounds["copy"], report.bounds["ceiling"]
    for name in ("success", "applied", "preserved", "overall"):
        yield _line(name, _pair(parts, name), _both(_pair(copy, name)), _both(_pair(ceiling, name)))
    for kind in parts["id"].by_kind:
        yield _line(f"{kind}: success", _pair(parts, "success", kind))
    for part in _others(report):
        for name in ("success", "applied", "preserved"):
            yield _line(f"{part}: {name}", (_pick(parts[part], name), None))
    yield from _choices(report, "success", "applied", "preserved")


def _sessions(report: Report) -> Iterator[Line]:
    parts, copy, ceiling = report.parts, report.bounds["copy"]["id"], report.bounds["ceiling"]["id"]
    floor, top = (_number(scores["all_turns"]) for scores in (copy, ceiling))
    yield _line("all three edits", _pair(parts, "all_turns"), floor, top)
    for kind in parts["id"].by_kind:
        for name in ("success", "preserved"):
            yield _line(f"{kind}: {name}", _pair(parts, name, kind))
    for name in ("same", "exact"):
        yield _line(f"undo: {name}", _pair(parts, f"undo_{name}"))
    yield from _choices(report, "all_turns")


def _newcomers(report: Report) -> Iterator[Line]:
    parts = report.parts
    yield _line("exactly as said", _pair(parts, "right"))
    yield from _choices(report, "right")
    checked, passed = (report.bounds.get(name, {}).get("id") for name in (CHECKED, PASSED))
    for kind in parts["id"].by_kind:
        chosen = _number(_pick(checked, "right", kind)), _number(_pick(passed, "right", kind))
        yield _line(kind, _pair(parts, "right", kind), *chosen)


def _story(report: Report) -> Iterator[Line]:
    parts, floor, ceiling = report.parts, report.bounds["floor"], report.bounds.get("ceiling", {}).get("id")
    for name in ("prefix", "structure", *RUNGS):
        yield _line(name, _pair(parts, name), _both(_pair(floor, name)), _number(_pick(ceiling, name)))
    guess, words = (_both(_pair(floor, name)) for name in ("guess", "words"))
    yield _line("answer by the true story", _pair(parts, "answer"), f"guess {guess}; words {words}")
    guess = _both(_pair(parts, "guess_drawn"))
    yield _line("answer by its own picture", _pair(parts, "answer_drawn"), f"guess {guess}")
    for name in ("true_pictures", "no_pictures"):
        title = f"the same, after the story with {name.replace('_', ' ')}"
        yield _line(title, _pair(report.bounds.get("asked", {}), name))
    for part in _others(report):
        yield _line(f"{part}: prefix", (_pick(parts[part], "prefix"), None))
        if "open addition" in parts[part].by_kind:
            yield _line(f"{part}: additions without a place", (_pick(parts[part], "image", "open addition"), None))
    yield from _choices(report, "prefix", *RUNGS)


def _geneval_notes(report: Report) -> Iterator[str]:
    for name, kind in (("clean", "codec ceiling"), ("noise", "codec ceiling at the sampling noise")):
        if name not in report.bounds:
            yield f"No {kind} was measured: these scores cannot be read against what the codec allows."
    if report.quick:
        yield _QUICK
    for part, scores in report.parts.items():
        yield (
            f"{part}: {_cell(scores['lenient'])}, 95 % bootstrap over {scores.units} distinct prompts, {scores.n} "
            f"images; mean template IoU {scores.value('template_iou'):.3f}, unrecognised blobs "
            f"{scores.value('unknown_share'):.1%}, empty images {scores.value('empty_share'):.1%}."
        )
        if CHECKED in report.bounds:
            checked, passed, check = (report.bounds[name][part] for name in (CHECKED, PASSED, SELF_CHECK))
            yield (
                f"{part}, confirmed: {_cell(checked['lenient'])}, passed {_number(passed['lenient'])}, AUC "
                f"{_cell(_pick(check, 'auc'))} over {check.units} prompts, {check.value('confirmed'):.1%} confirmed."
            )
    ignored = report.bounds.get("second_shape_ignored", {})
    if ignored:
        yield f"Who draws every shape like the first one scores {_both(_pair(ignored, 'lenient'))} (ID / CG)."
    if CHECKED in report.bounds:
        yield (
            f"Confirmed: of {report.settings['tries']} tries the one in which the model itself has most confidence; "
            "passed: the judge's choice, which no other can beat; AUC: of the model's confidence, within a prompt."
        )
    yield "Twins: images that show one asked shape too often and another not often enough, of those with several."
    yield (
        "Floor: true images of other prompts (ID / CG). Ceiling: true images of the ID prompts after the "
        "codec (clean / at the sampling noise). Gap: ID − CG over the categories that both have. "
        "Strict: nothing else in the image."
    )


_LINES: Mapping[str, Callable[[Report], Iterator[Line]]] = {
    "geneval": _geneval,
    "dpg": _dpg,
    "mme": _mme,
    "gqa": _gqa,
    "mcq": _mcq,
    "edit": _edit,
    "edit_sessions": _sessions,
    "story": _story,
    "newcomers": _newcomers,
}
_QUICK = "Quick run on a share of the items: noisy, not for comparing models."
_TRIED_NEWCOMERS = "Floor and ceiling of a prompt are its confirmed try and the judge's choice."
_NOTES: Mapping[str, str] = {
    "mme": "Ceiling: the frozen language model through its own vision tower.",
    "gqa": "Gap: the mean over kinds of both. Floor: the question-only prior. Ceiling: the language model alone, "
    "through its own vision tower.",
    "mcq": "Floor: chance, and a reader of the question alone. Circular: right in every rotation of the options.",
    "dpg": "Floor: images of other prompts. Ceiling: true images after the codec, clean / at the sampling noise.",
    "edit": "Floor: the source handed back unchanged. Ceiling: the true result after the codec. Overall is of 10.",
    "newcomers": "Strictly judged: the image is exactly what was said.",
    "edit_sessions": "Three edits of one image, an undo before the third. Floor: the source handed back. Undo: the "
    "image is again what it was, and to the byte.",
    "story": "Prefix: steps without any fault, of 4. Floor: other stories' images; of answers, guessing by the kind "
    "of question, and by the words of the requests where they settle it.",
}
