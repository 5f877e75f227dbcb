"""`starflow2 demo`: the options of the demo page. demo_page measures the model and writes the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from starflow2.cli.options import Device, JsonFile, Model, check_json, console, progress, refuse, write_json
from starflow2.cli.parsing import Option

__all__ = ["Demo"]


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
            from starflow2.cli.demo_page import check_folder, make_demo
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
