"""`starflow2 eval report`: results of any checkpoint beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from starflow2.cli.options import refuse, say
from starflow2.cli.parsing import Option, Positional
from starflow2.errors import UsageError

__all__ = ["EvalReport"]


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """Set results beside the paper's columns: report.md, report.json, and a sheet of images for each folder."""

    verb: ClassVar[str] = "eval report"

    results: Positional[Annotated[tuple[Path, ...], Option("files that eval --json has written", metavar="FILE")]] = ()
    images: Annotated[tuple[Path, ...], Option("folders of drawn images to show", metavar="FOLDER")] = ()
    out: Annotated[Path, Option("where the report goes", metavar="FOLDER")] = Path("report")

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        if not self.results:
            raise UsageError("eval report needs results: give one or more files that eval --json has written.")
        from starflow2.benchmarks.report import write_report

        say(*write_report(self.results, self.out, self.images))
        return 0
