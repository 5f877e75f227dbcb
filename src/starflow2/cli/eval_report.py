"""`starflow2 eval report`: results of any checkpoint beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from starflow2.cli.options import Device, console, refuse, say
from starflow2.cli.parsing import Option, Positional
from starflow2.errors import UsageError

__all__ = ["EvalReport"]


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """Set results beside the paper's columns: report.md, report.json, and sheets of images.

    Results are files that eval has written, of any checkpoints; with --measure also what can be measured of a model of
    the drawn world without a judge or a download.
    """

    verb: ClassVar[str] = "eval report"

    results: Positional[Annotated[tuple[Path, ...], Option("files that eval --json has written", metavar="FILE")]] = ()
    measure: Annotated[
        str | None,
        Option("a model to measure first: quick suites, codec, density, sheets", metavar="MODEL", default="none"),
    ] = None
    images: Annotated[tuple[Path, ...], Option("folders of drawn images to show", metavar="FOLDER")] = ()
    out: Annotated[Path, Option("where the report goes", metavar="FOLDER")] = Path("report")
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        if not self.results and self.measure is None:
            raise UsageError(
                "eval report needs results: give one or more files that eval --json has written, or --measure MODEL."
            )
        from starflow2.benchmarks.report import write_report

        files, sheets = list(self.results), list[Path]()
        if self.measure is not None:
            measured, sheets = self._measured(self.measure)
            files += measured
        say(*write_report(files, self.out, self.images, sheets))
        return 0

    def _measured(self, name: str) -> tuple[list[Path], list[Path]]:
        """Files of results of a model, and sheets of what it draws."""
        from starflow2.benchmarks.measuring import measure
        from starflow2.pipeline import StarFlow2
        from starflow2.research.figures import drawing_sheet, edit_sheet, story_sheet

        with console(stderr=True).status("loading") as status:
            model = StarFlow2.from_pretrained(name, device=self.device)
            found = measure(model, self.out, lambda what: status.update(f"measuring {what}"))
            status.update("drawing sheets")
            sheets = [self.out / "drawings.png"]
            drawing_sheet(model, sheets[0])
            if model.is_joint:
                sheets += [self.out / "edits.png", self.out / "stories.png"]
                edit_sheet(model, sheets[1])
                story_sheet(model, sheets[2])
        for what, why in found.left_out.items():
            console(stderr=True).print(f"{what} is left out: {why}", markup=False)
        return found.files, sheets
