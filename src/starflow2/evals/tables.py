"""Reports as tables for the terminal, and as records for the ledger: ID, CG, gap, floor and ceiling, line by line.

A score means nothing without what chance and the codec allow, so every line has its floor and ceiling beside it, and
W-GenEval, which has a table of its own, says where one was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime

from rich.table import Table

from starflow2.errors import ConfigError
from starflow2.evals.report import commit
from starflow2.evals.statistics import Score, Scores
from starflow2.evals.story import RUNGS
from starflow2.evals.suite import Report

__all__ = ["ledger_record", "lines", "notes", "table"]

HEADINGS = ("measure", "ID", "CG", "gap", "floor", "ceiling")
GENEVAL_HEADINGS = ("category", "ID", "CG", "gap", "floor", "ceiling", "ID strict", "CG strict")
OTHER_PARTS = ("paraphrase", "new", "scenes", "plain")  # beside ID and CG, where they were run
ABSENT = "–"
Line = tuple[str, ...]
Record = dict[str, object]


def table(report: Report) -> Table:
    """The report for the terminal, the headline in bold and notes underneath."""
    is_geneval = report.suite == "geneval"
    grid = Table(title=_title(report), caption="\n".join(notes(report)), caption_justify="left")
    headings = GENEVAL_HEADINGS + _others(report) if is_geneval else HEADINGS
    for heading in headings:
        grid.add_column(heading, justify="left" if heading in ("measure", "category") else "right")
    for i, row in enumerate(lines(report)):
        grid.add_row(*row, style="bold" if row[0] == "overall" or (i == 0 and not is_geneval) else None)
    return grid


def lines(report: Report) -> list[Line]:
    """The rows of the table; the first is the headline, of W-GenEval the last."""
    return list(_LINES[report.suite](report))


def notes(report: Report) -> list[str]:
    """Notes on how to read the table."""
    return list(_geneval_notes(report)) if report.suite == "geneval" else [_NOTES[report.suite]]


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
    return {"samples": report.settings["samples"]} | {
        name: {rule: round(scores.value(rule), 4) for rule in ("lenient", "strict")}
        | {"by_category": {kind: round(row.value("lenient"), 4) for kind, row in scores.by_kind.items()}}
        | ({"twins_per_100": round(scores.value("twins"), 1)} if "twins" in scores.columns else {})
        for name, scores in (report.parts | ceilings).items()
    }


def _others(report: Report) -> tuple[str, ...]:
    """The parts of a report beside ID and CG."""
    return tuple(part for part in OTHER_PARTS if part in report.parts)


def _title(report: Report) -> str:
    kind = "quick " if report.quick else ""
    if report.suite == "geneval":
        return f"W-GenEval, {kind}{report.split}, {report.settings['samples']} images per prompt"
    return f"W-{report.suite}, {kind}{report.split}, {report.n} items"


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
        yield (*row, *(_number(_pick(parts[part], "lenient", kind)) for part in _others(report)))


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


def _edit(report: Report) -> Iterator[Line]:
    parts, copy, ceiling = report.parts, report.bounds["copy"], report.bounds["ceiling"]
    for name in ("success", "applied", "preserved", "overall"):
        yield _line(name, _pair(parts, name), _both(_pair(copy, name)), _both(_pair(ceiling, name)))
    for kind in parts["id"].by_kind:
        yield _line(f"{kind}: success", _pair(parts, "success", kind))
    for part in _others(report):
        for name in ("success", "applied", "preserved"):
            yield _line(f"{part}: {name}", (_pick(parts[part], name), None))


def _sessions(report: Report) -> Iterator[Line]:
    parts, copy, ceiling = report.parts, report.bounds["copy"]["id"], report.bounds["ceiling"]["id"]
    floor, top = (_number(scores["all_turns"]) for scores in (copy, ceiling))
    yield _line("all three edits", _pair(parts, "all_turns"), floor, top)
    for kind in parts["id"].by_kind:
        for name in ("success", "preserved"):
            yield _line(f"{kind}: {name}", _pair(parts, name, kind))
    for name in ("same", "exact"):
        yield _line(f"undo: {name}", _pair(parts, f"undo_{name}"))


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


def _geneval_notes(report: Report) -> Iterator[str]:
    for name, kind in (("clean", "codec ceiling"), ("noise", "codec ceiling at the sampling noise")):
        if name not in report.bounds:
            yield f"No {kind} was measured: these scores cannot be read against what the codec allows."
    if report.quick:
        yield "Quick run on one prompt in eight: noisy, not for comparing models."
    for part, scores in report.parts.items():
        yield (
            f"{part}: {_cell(scores['lenient'])}, 95 % bootstrap over {scores.units} distinct prompts, {scores.n} "
            f"images; mean template IoU {scores.value('template_iou'):.3f}, unrecognised blobs "
            f"{scores.value('unknown_share'):.1%}, empty images {scores.value('empty_share'):.1%}."
        )
        if "twins" in scores.columns:
            yield f"{part}: twins in {scores.value('twins'):.1f} of 100 images of several shapes."
    ignored = report.bounds.get("second_shape_ignored", {})
    if ignored:
        yield f"Who draws every shape like the first one scores {_both(_pair(ignored, 'lenient'))} (ID / CG)."
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
}
_NOTES: Mapping[str, str] = {
    "mme": "Ceiling: the frozen language model through its own vision tower.",
    "gqa": "Gap: the mean over kinds of both. Floor: the question-only prior. Ceiling: the language model alone, "
    "through its own vision tower.",
    "mcq": "Floor: chance, and a reader of the question alone. Circular: right in every rotation of the options.",
    "dpg": "Floor: images of other prompts. Ceiling: true images after the codec, clean / at the sampling noise.",
    "edit": "Floor: the source handed back unchanged. Ceiling: the true result after the codec. Overall is of 10.",
    "edit_sessions": "Three edits of one image, an undo before the third. Floor: the source handed back. Undo: the "
    "image is again what it was, and to the byte.",
    "story": "Prefix: steps without any fault, of 4. Floor: other stories' images; of answers, guessing by the kind "
    "of question, and by the words of the requests where they settle it.",
}
