"""`starflow2 analyze`: measure a model from inside, check the paper's claims, train its comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from starflow2.cli.options import (
    Device,
    JsonFile,
    Model,
    check_json,
    load_joint,
    progress,
    refuse,
    say,
    write_json,
)
from starflow2.cli.parsing import Option, Positional
from starflow2.core.files import check_writable
from starflow2.core.serialize import JsonObject
from starflow2.errors import UsageError

if TYPE_CHECKING:
    from starflow2.pipeline import StarFlow2

__all__ = ["Analyze"]

MAX_BUDGET = 10**6  # of steps, seeds, documents or jobs


@dataclass(frozen=True, kw_only=True)
class Analyze:
    """Measure a model from inside, train the paper's comparisons, and check its claims.

    skips: what both skips carry, over 50 prompts. turns: the time of a turn in a session, and of reading everything
    again. sheets: images of edits and stories. understanding: whether it improves drawing, by the self-check and by the
    skips. compare: train the paper's variants on equal budgets, from a model that
    has finished stages 1 and 2 (hours on a CPU; the same command continues after a stop). codecs: likewise, an FAE that
    trains with the flow, and no FAE at all, beside the default. paper: write claims.md from the JSON files in the
    folder; skips and turns are measured first if they are missing.
    """

    verb: ClassVar[str] = "analyze"

    what: Positional[
        Annotated[
            Literal["skips", "turns", "sheets", "understanding", "compare", "paper", "codecs"],
            Option("see above", metavar="NAME"),
        ]
    ]
    output: Annotated[Path, Option("where files go", metavar="FOLDER", short="-o")] = Path("docs/results")
    steps: Annotated[int | None, Option("training steps of every run", default="300 for compare, 1000 for codecs")] = (
        None
    )
    batch: Annotated[int | None, Option("documents per training step", default="32 for compare, 64 for codecs")] = None
    seeds: Annotated[int | None, Option("number of seeds, from 0 on", default="3 for compare, 1 for codecs")] = None
    jobs: Annotated[int | None, Option("how many runs train at once, each in its own process", default="1")] = None
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        check_writable(self.output / "claims.md")
        if self._budget() and self.what not in ("compare", "codecs"):
            names = ", ".join(f"--{name}" for name in self._budget())
            raise UsageError(f"{names}: {self.what} trains nothing; these options belong to compare and codecs.")
        measures: dict[str, Callable[[], JsonObject]] = {
            "skips": self._skips,
            "turns": self._turns,
            "sheets": self._sheets,
            "understanding": self._understanding,
            "compare": self._compare,
            "paper": self._paper,
            "codecs": self._codecs,
        }
        write_json(measures[self.what](), self.json)
        return 0

    def _budget(self) -> dict[str, int]:
        """The options that bound a comparison, where given. Raises UsageError for less than one."""
        values = {name: getattr(self, name) for name in ("steps", "batch", "seeds", "jobs")}
        values = {name: value for name, value in values.items() if value is not None}
        for name, value in values.items():
            if not 1 <= value <= MAX_BUDGET:
                raise UsageError(f"--{name} is {value}; expected at least 1, and at most {MAX_BUDGET}.")
        return values

    def _settings(self) -> JsonObject:
        """The budget as fields of a comparison's config."""
        settings: JsonObject = {name: value for name, value in self._budget().items() if name != "jobs"}
        return settings | ({"seeds": tuple(range(settings["seeds"]))} if "seeds" in settings else {})

    def _joint(self) -> StarFlow2:
        return load_joint(self.model, self.device, f"analyze {self.what}")

    def _skips(self) -> JsonObject:
        from starflow2.research.analysis import plot_skips, skip_contributions

        report = skip_contributions(self._joint().sampler())
        facts: JsonObject = report.to_json()
        write_json(facts, self.output / "skips.json")
        plot_skips(report, self.output / "skips.png")
        for name in ("visual", "text"):
            row = facts[name]
            print(
                f"{name}: ratio {row['contribution_ratio']['mean']:.3f}, cosine {row['cosine']['mean']:+.3f}, "
                f"centred {row['centred_cosine']['mean']:+.3f}"
            )
        return facts

    def _turns(self) -> JsonObject:
        from starflow2.research.analysis import plot_turn_costs, turn_costs

        costs = turn_costs(self._joint().sampler())
        rows = [cost.to_json() for cost in costs]
        write_json({"turns": rows}, self.output / "turns.json")
        plot_turn_costs(costs, self.output / "turns.png")
        for row in rows:
            slot, factor = 1000 * row["per_slot"], row["slower_to_start"]
            print(f"turn {row['turn']}: {slot:.1f} ms per slot; {factor:.1f} times slower to start without the cache")
        return {"turns": rows}

    def _sheets(self) -> JsonObject:
        from starflow2.research.figures import edit_sheet, story_sheet

        model, files = self._joint(), [self.output / "edits.png", self.output / "stories.png"]
        edit_sheet(model, files[0])
        story_sheet(model, files[1])
        say(*files)
        return {"files": [str(file) for file in files]}

    def _understanding(self) -> JsonObject:
        from starflow2.research.understanding import understanding_and_drawing

        model = self._joint()
        with progress("drawing", "images") as step:
            found = understanding_and_drawing(model, progress=step)
        facts: JsonObject = {"model": model.components.cfg.name, "comparisons": [row.to_json() for row in found]}
        write_json(facts, self.output / "understanding.json")
        for row in found:
            pairs = ", ".join(f"{arm} {share:.3f}" for arm, share in zip(row.arms, row.shares, strict=True))
            print(f"{row.name}: {pairs}; p = {row.p:.3f}")
        return facts

    def _compare(self) -> JsonObject:
        from starflow2.models.hub import find_model, pick_device
        from starflow2.research.ablations import CompareConfig, compare_and_keep

        config = replace(CompareConfig(), **self._settings())
        device = str(pick_device(self.device))
        rows = compare_and_keep(find_model(self.model), config, self.output, device=device, jobs=self.jobs or 1)
        say(self.output / "compare.md")
        return {"rows": rows}

    def _codecs(self) -> JsonObject:
        from starflow2.models.hub import find_model, pick_device
        from starflow2.research.codec_ablations import CodecsConfig, compare_codecs, write

        config = replace(CodecsConfig(), **self._settings())
        device = str(pick_device(self.device))
        rows = compare_codecs(find_model(self.model), config, self.output, device=device, jobs=self.jobs or 1)
        say(write(rows, config, self.output))
        return {"rows": rows}

    def _paper(self) -> JsonObject:
        from starflow2.research.paper_claims import CLAIMS, write_claims

        for name, measure in (("skips", self._skips), ("turns", self._turns)):
            if not (self.output / f"{name}.json").is_file():
                measure()
        say(write_claims(self.output))
        return {"claims": [claim.text for claim in CLAIMS]}
