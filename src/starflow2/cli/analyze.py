"""`starflow2 analyze`: look inside a model, at the paper's claims, and train its comparisons."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, arg

from starflow2.cli.conversation import conversing
from starflow2.cli.options import (
    Device,
    JsonFile,
    Model,
    check_json,
    own,
    refuse,
)
from starflow2.core.files import check_writable, replacing
from starflow2.errors import ConfigError

if TYPE_CHECKING:
    from starflow2.pipeline import StarFlow2

__all__ = [
    "Analyze",
]


@dataclass(frozen=True, kw_only=True)
class Analyze:
    """Look inside a model of stage 3: skips, cost of turns, sheets, comparisons, and the paper's claims beside it.

    skips: what both skips carry, over 50 prompts. turns: a session against reading everything anew. sheets: edits and
    stories as pictures. compare: the paper's arms on equal budgets, trained here (hours on CPU; a stopped call
    goes on) from a model of stages 1 and 2. paper: claims.md from the JSON files in the folder, skips and turns
    measured first where they are missing. codecs: an FAE that trains with the flow, and no FAE at all,
    beside the default (likewise).
    """

    verb: ClassVar[str] = "analyze"

    what: Positional[
        Annotated[
            Literal["skips", "turns", "sheets", "compare", "paper", "codecs"], arg(metavar="NAME", help="see above")
        ]
    ]
    output: Annotated[Path, arg(aliases=("-o",), metavar="FOLDER", help="where files go")] = Path("docs/results")
    steps: Annotated[int | None, own("INT", "of compare and codecs: training steps of every arm", "300; 1000")] = None
    batch: Annotated[int | None, own("INT", "of both: documents per step", "32; 64")] = None
    seeds: Annotated[int | None, own("INT", "of both: how many seeds, 0 and up", "3; 1")] = None
    jobs: Annotated[int | None, own("INT", "of both: arms at a time, each in its own process", "1")] = None
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        check_writable(self.output / "claims.md")
        if self._given() and self.what not in ("compare", "codecs"):
            given = ", ".join(f"--{name}" for name in self._given())
            raise ConfigError(f"{given}: of compare and codecs; {self.what} trains nothing.")
        doing: dict[str, Callable[[], Any]] = {
            "skips": self._skips,
            "turns": self._turns,
            "sheets": self._sheets,
            "compare": self._compare,
            "paper": self._paper,
            "codecs": self._codecs,
        }
        told = doing[self.what]()
        if self.json is not None:
            _write(told, self.json)
        return 0

    def _given(self) -> dict[str, int]:
        """What was said of steps, batch, seeds and jobs. Raises ConfigError for less than one."""
        given = {name: getattr(self, name) for name in ("steps", "batch", "seeds", "jobs")}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if value < 1:
                raise ConfigError(f"--{name} is {value}; expected at least 1.")
        return given

    def _budget(self) -> dict[str, Any]:
        """The same as fields of a comparison's settings."""
        given: dict[str, Any] = {name: value for name, value in self._given().items() if name != "jobs"}
        return given | ({"seeds": tuple(range(given["seeds"]))} if "seeds" in given else {})

    def _joint(self) -> StarFlow2:
        return conversing(self.model, self.device, f"analyze {self.what}")

    def _skips(self) -> Any:
        from starflow2.research.analysis import plot_skips, skip_contributions

        report = skip_contributions(self._joint().sampler())
        told = report.to_json()
        _write(told, self.output / "skips.json")
        plot_skips(report, self.output / "skips.png")
        for name in ("visual", "text"):
            row = told[name]
            print(f"{name}: ratio {row['contribution_ratio']['mean']:.3f}, cosine {row['cosine']['mean']:+.3f}")
        return told

    def _turns(self) -> Any:
        from starflow2.research.analysis import plot_turn_costs, turn_costs

        costs = turn_costs(self._joint().sampler())
        told = {"turns": [cost.to_json() for cost in costs]}
        _write(told, self.output / "turns.json")
        plot_turn_costs(costs, self.output / "turns.png")
        for row in told["turns"]:
            slot, anew = 1000 * row["per_slot"], row["slower_to_start"]
            print(f"turn {row['turn']}: {slot:.1f} ms per slot, {anew:.1f} times slower to start anew")
        return told

    def _sheets(self) -> Any:
        from starflow2.research.figures import edit_sheet, story_sheet

        model, files = self._joint(), [self.output / "edits.png", self.output / "stories.png"]
        edit_sheet(model, files[0])
        story_sheet(model, files[1])
        print(*files, sep="\n")
        return {"files": [str(file) for file in files]}

    def _compare(self) -> Any:
        from starflow2.models.hub import NANO, pick_device
        from starflow2.research.ablations import CompareConfig, compare_and_keep

        config = replace(CompareConfig(), **self._budget())
        folder = NANO if self.model == "nano" else Path(self.model)
        device = str(pick_device(self.device))
        rows = compare_and_keep(folder, config, self.output, device=device, jobs=self.jobs or 1)
        print(self.output / "compare.md")
        return {"rows": rows}

    def _codecs(self) -> Any:
        from starflow2.models.hub import find_model, pick_device
        from starflow2.research.codec_ablations import CodecsConfig, compare_codecs, write

        config = replace(CodecsConfig(), **self._budget())
        device = str(pick_device(self.device))
        rows = compare_codecs(find_model(self.model), config, self.output, device=device, jobs=self.jobs or 1)
        print(write(rows, config, self.output))
        return {"rows": rows}

    def _paper(self) -> Any:
        from starflow2.research.paper_claims import CLAIMS, write_claims

        for name, measure in (("skips", self._skips), ("turns", self._turns)):
            if not (self.output / f"{name}.json").is_file():
                measure()
        print(write_claims(self.output))
        return {"claims": [claim.text for claim in CLAIMS]}


def _write(told: Any, path: Path) -> None:
    with replacing(path) as temp:
        temp.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
