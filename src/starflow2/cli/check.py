"""`starflow2 check` and `starflow2 demo`: is a model exact on this machine, and what does it make?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from starflow2.cli.options import (
    Device,
    JsonFile,
    Model,
    check_json,
    console,
    progress,
    refuse,
    write_json,
)

__all__ = [
    "Check",
    "Demo",
]


@dataclass(frozen=True, kw_only=True)
class Check:
    """Test on this machine that a model is exact: inverse, log-determinant, cache, batches.

    Exit status 1 if anything fails.
    """

    verb: ClassVar[str] = "check"

    model: Model = "nano"
    device: Device = "auto"
    json: JsonFile = None

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        from starflow2.pipeline import StarFlow2
        from starflow2.selfcheck import check_model, report, table

        with console(stderr=True).status("loading") as status:
            model = StarFlow2.from_pretrained(self.model, device=self.device)
            checks = check_model(model, status.update)
        console().print(table(checks))
        found = report(checks, model)
        write_json(found, self.json)
        return 0 if found["ok"] else 1


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Draw and score pictures of the test suite, and make a page of them."""

    verb: ClassVar[str] = "demo"

    output: Annotated[Path, arg(aliases=("-o",), metavar="FOLDER", help="where the page goes")] = Path("out") / "demo"
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        with progress("drawing", "pictures") as step:
            from starflow2.cli.demo import make_demo

            made = make_demo(self.model, self.output, device=self.device, progress=step)
        from starflow2.evals.report import table

        console().print(table(made.scores))
        right = sum(shown.verdict.correct for shown in made.shown)
        pace = made.report["seconds_per_image"]
        print(f"{right} of {len(made.shown)} pictures show what was asked, {pace:.2f} s each. The page: {made.page}")
        write_json(made.report, self.json)
        return 0
