"""`starflow2 check` and `starflow2 demo`: test that a model is exact on this machine, and show what it draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

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
from starflow2.cli.parsing import Option

__all__ = ["Check", "Demo"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """Test that a model is exact on this machine: inverse, log-determinant, cache, batches.

    The exit status is 1 if any check fails.
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
    """Draw and score images of the test suite, and make a page of them."""

    verb: ClassVar[str] = "demo"

    output: Annotated[Path, Option("where the page goes", metavar="FOLDER", short="-o")] = Path("out") / "demo"
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        with progress("drawing", "images") as step:
            from starflow2.cli.demo import check_folder, make_demo
            from starflow2.pipeline import StarFlow2

            check_folder(self.output)
            model = StarFlow2.from_pretrained(self.model, device=self.device)
            made = make_demo(model, self.model, self.output, progress=step)
        from starflow2.evals.tables import table

        console().print(table(made.scores))
        correct = sum(shown.verdict.correct for shown in made.shown)
        pace = made.seconds_per_image
        print(
            f"{correct} of {len(made.shown)} images show what was asked for, {pace:.2f} s each. The page: {made.page}"
        )
        write_json(made.summary(), self.json)
        return 0
