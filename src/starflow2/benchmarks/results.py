"""Result of one benchmark: its columns as they are published, more of ours beside them, and all they depend on.

Not here: the arithmetic of any benchmark, and the paper's numbers (`paper`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from starflow2.benchmarks.folders import FolderRecord
from starflow2.core.fields import conform
from starflow2.core.json_reader import JsonObject
from starflow2.core.serialize import from_dict, read_json, to_dict
from starflow2.core.text import shown
from starflow2.errors import ConfigError, DataError
from starflow2.evals.codec import CodecReport
from starflow2.evals.statistics import Score

__all__ = ["Result", "codec_result", "number_form", "read_result", "record_facts", "result_table"]

FORMAT = 1  # of result files
_PLAIN: Mapping[str, Any] = {
    **dict.fromkeys(("benchmark", "model", "judge"), str),
    "counts": dict[str, int],
    "made": dict[str, object],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Scores of a model on one benchmark.

    columns: those that papers print, in their order and unit. more: further ones of ours. judge: whose eyes the scores
    rest on. counts: of what. made: settings that the scores depend on. notes: how to read them, a sentence each.
    """

    benchmark: str
    model: str
    judge: str
    columns: dict[str, Score]
    more: dict[str, Score] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    made: dict[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> JsonObject:
        """The result as JSON can hold it."""
        tables = {name: {c: s.to_json() for c, s in getattr(self, name).items()} for name in ("columns", "more")}
        head = {"format": FORMAT, "benchmark": self.benchmark, "model": self.model, "judge": self.judge}
        return head | tables | {"counts": self.counts, "made": self.made, "notes": list(self.notes)}

    @classmethod
    def from_json(cls, data: JsonObject) -> Result:
        """Undo `to_json`. Raises ConfigError, KeyError, TypeError and AttributeError for anything else."""
        columns, more = ({c: Score.from_json(s) for c, s in data[n].items()} for n in ("columns", "more"))
        plain = {name: conform(kind, data[name], name) for name, kind in _PLAIN.items()}
        notes = conform(tuple[str, ...], tuple(data["notes"]), "notes")
        return cls(**plain, columns=columns, more=more, notes=notes)


def record_facts(record: FolderRecord | None) -> dict[str, object]:
    """All that the images of a folder depend on, for `Result.made`."""
    return {} if record is None else to_dict(record)


def codec_result(report: CodecReport) -> Result:
    """A codec's round trip as a result, so that it can stand in a report; rFID where its weights were installed."""
    columns = dict[str, Score]()
    for row in report.rows:
        values = {"PSNR": row.psnr, "SSIM": row.ssim, "feature FD": row.feature_fd, "rFID": row.rfid}
        columns |= {f"{name} at noise {row.noise_level:g}": Score(value) for name, value in values.items()}
    notes = "Feature FD is of the model's own extractor and compares with itself alone; PSNR is in dB."
    return Result(
        benchmark="codec",
        model=report.model,
        judge="pixels and features",
        columns=columns,
        counts={"images": report.pictures},
        notes=(notes,),
    )


def read_result(path: str | Path) -> Result:
    """A result file, or a codec's report of `eval fae`. Raises DataError for anything else."""
    try:
        data = read_json(path)
        if isinstance(data, dict) and data.get("suite") == "fae":
            return codec_result(from_dict(CodecReport, data))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ConfigError(f"{path} holds {shown(data)}; expected a result that eval wrote, of format {FORMAT}.")
        return Result.from_json(data)
    except ConfigError as error:
        raise DataError(str(error)) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no whole result: {error!r}; expected a file that eval --json wrote.") from error


def result_table(result: Result) -> Table:
    """The result for the terminal, with its notes beneath."""
    title = f"{result.benchmark}, {result.model}, judged by {result.judge}"
    grid = Table(title=title, caption="\n".join(result.notes), caption_justify="left")
    for heading in ("column", "score", "95 %"):
        grid.add_column(heading, justify="left" if heading == "column" else "right")
    for name, score in [*result.columns.items(), *result.more.items()]:
        grid.add_row(name, *_cells(score))
    return grid


def _cells(score: Score) -> tuple[str, str]:
    if score.score is None:
        return "–", ""
    form = number_form(score.score)
    bounds = "" if score.low is None or score.high is None else f"{score.low:{form}}–{score.high:{form}}"
    return f"{score.score:{form}}", bounds


def number_form(value: float) -> str:
    """How a score and its bounds are written: no score but 0 looks like 0.

    >>> [f"{value:{number_form(value)}}" for value in (1677.9, 0.82, 0.0, 3e-10)]
    ['1677.90', '0.820', '0.000', '3.0e-10']
    """
    return ".2f" if abs(value) > 1 else ".3f" if abs(value) >= 0.001 or not value else ".1e"
