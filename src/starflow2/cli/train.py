"""`starflow2 train`: the stages of a recipe, with every setting of a stage as an option."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from starflow2.cli.options import PROGRAM, Device, find_recipe, refuse, say, training_bar
from starflow2.cli.parsing import Option, Positional, flags, help_text, parse
from starflow2.core.files import check_writable
from starflow2.core.imports import find_object, foreign_code
from starflow2.core.serialize import JsonObject
from starflow2.core.text import read_lines
from starflow2.errors import DataError, UsageError

if TYPE_CHECKING:
    from starflow2.models.components import Components
    from starflow2.training.config import RunConfig, StageConfig
    from starflow2.training.evaluation import Evaluate
    from starflow2.training.metrics import Log

__all__ = ["Train"]

LISTENER, MEASUREMENT = "a listener for metrics", "a function of (model, step)"  # of --log and of --evaluate
FIXED = ("name",)  # of a stage: --stage chooses it
DRAWS = ("t2i", "joint")  # stages whose models draw


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one stage of a recipe, or all of them in order that the model in the run's folder has not finished.

    With --stage, every setting of that stage is an option as well (--steps 100, --optim.lr 3e-4);
    `starflow2 train RECIPE --stage STAGE --help` lists them. Metrics go to metrics-STAGE.jsonl in the run's folder.
    """

    verb: ClassVar[str] = "train"

    recipe: Positional[Annotated[str, Option("nano, or your own module:function", metavar="RECIPE")]]
    stage: Annotated[str, Option("a stage of the recipe, or all", metavar="STAGE")] = "all"
    resume: Annotated[
        str,
        Option(
            "auto: from the last checkpoint, if any; STEP: from that one; weights or weights:STEP: with other settings "
            "and the data from their start; none: from the first step",
            metavar="{auto,STEP,weights,weights:STEP,none}",
        ),
    ] = "auto"
    device: Device = "auto"
    output: Annotated[Path | None, Option("the run's folder", metavar="FOLDER", short="-o", default="runs/RECIPE")] = (
        None
    )
    dry_run: Annotated[
        bool, Option("print settings and sizes as JSON; with --device, also run one training step on random data")
    ] = False
    mixtures: Annotated[
        Path | None,
        Option(
            "train every stage on STAGE.json of this folder, a mixture file", metavar="FOLDER", default="the recipe's"
        ),
    ] = None
    evaluate: Annotated[
        str | None,
        Option("at every evaluation, numbers by name from this function of (model, step)", metavar="MODULE:FUNCTION"),
    ] = None
    sample_prompts: Annotated[
        Path | None,
        Option("at every evaluation, draw the prompts of this file, one a line, into samples-STAGE", metavar="FILE"),
    ] = None
    log: Annotated[
        str | None,
        Option(
            "send metrics to what this function of (folder, stage settings) returns, a function of (step, metrics)",
            metavar="MODULE:FUNCTION",
        ),
    ] = None
    smoke: Annotated[bool, Option("run a few tiny steps on the same code path")] = False
    keep_size: Annotated[bool, Option("with --smoke: keep image size and latent grid, shrink widths only")] = False

    def run(self, unknown: Sequence[str]) -> int:
        from starflow2.training.start import unfinished_stages

        run, stages, folder = self._resolved(unknown)
        if self.dry_run:
            self._print_plan(run, stages, folder)
            return 0
        self._check_sources(run, stages)
        if self.sample_prompts is not None and not set(stages) & set(DRAWS):
            raise UsageError(f"--sample-prompts draws in stages {' and '.join(DRAWS)}; {self.stage} does not draw.")
        check_writable(folder / "config.json")
        for name in unfinished_stages(run, folder) if self.stage == "all" and self.resume == "auto" else stages:
            self._fit(run, name, folder)
        say(folder / "model")
        return 0

    def _check_sources(self, run: RunConfig, stages: Sequence[str]) -> None:
        """Raise ConfigError or DataError for a stage without its data, before the first of them trains for days."""
        from starflow2.training.datasets import check_source
        from starflow2.training.mixture_check import check_mixture

        for name in stages:
            check_source(run.model, run.stage(name))
        for name in stages:
            check_mixture(run.stage(name))

    def stage_help(self) -> str:
        """The help page of the options that --stage adds."""
        run = self._recipe()
        if self.stage == "all":
            names = ", ".join(stage.name for stage in run.stages)
            return f"\nWith --stage STAGE ({names}), the settings of that stage are options as well."
        stage = run.stage(self.stage)
        return "\n" + help_text(type(stage), self._program, stage, FIXED)

    @property
    def _program(self) -> str:
        """The command line whose --help lists the settings of the stage."""
        return f"{PROGRAM} train {self.recipe} --stage {self.stage}"

    def _recipe(self) -> RunConfig:
        from starflow2.training.recipes import smoke, smoke_at_size

        if self.keep_size and not self.smoke:
            raise UsageError("--keep-size says how --smoke shrinks a recipe; give it together with --smoke.")
        run = find_recipe(self.recipe)
        if self.smoke:
            run = smoke_at_size(run) if self.keep_size else smoke(run)
        return run if self.mixtures is None else self._on_mixtures(run, self.mixtures)

    def _on_mixtures(self, run: RunConfig, folder: Path) -> RunConfig:
        """The recipe over the mixture files of a folder."""
        files: dict[str, Path] = {stage.name: folder / f"{stage.name}.json" for stage in run.stages}
        wanted = files if self.stage == "all" else {self.stage: files[run.stage(self.stage).name]}
        if absent := [file.name for file in wanted.values() if not file.is_file()]:
            raise UsageError(f"--mixtures is {folder}, which lacks {', '.join(absent)}; expected one for every stage.")

        def over(stage: StageConfig) -> StageConfig:
            if stage.name not in wanted:
                return stage
            corpus = dataclasses.replace(stage.corpus, mixture=str(files[stage.name]))
            return dataclasses.replace(stage, corpus=corpus)

        return dataclasses.replace(run, stages=tuple(map(over, run.stages)))

    def _resolved(self, unknown: Sequence[str]) -> tuple[RunConfig, list[str], Path]:
        """The run with the given settings, the stages to train, and the run's folder."""
        run = self._recipe()
        folder = self.output or Path("runs") / (self.recipe.split(":")[-1] + "-smoke" * self.smoke)
        if self.stage == "all":
            refuse(unknown, type(self), "; settings of a stage need --stage to say which")
            return run, [stage.name for stage in run.stages], folder
        changed = self._overridden(run.stage(self.stage), unknown)
        stages = tuple(changed if stage.name == changed.name else stage for stage in run.stages)
        return dataclasses.replace(run, stages=stages), [self.stage], folder

    def _overridden(self, stage: StageConfig, arguments: Sequence[str]) -> StageConfig:
        """`stage` with the settings that `arguments` change."""
        changed, unknown = parse(type(stage), arguments, self._program, stage, FIXED)
        refuse(unknown, type(self), known=flags(type(stage), stage, FIXED))
        for name in ("steps", "batch", "save_every", "keep_last", "log_every", "accumulate", "max_skipped"):
            if getattr(changed, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(changed, name)}; expected at least 1.")
        return changed

    def _print_plan(self, run: RunConfig, stages: Sequence[str], folder: Path) -> None:
        """Print the plan of a dry run as JSON, once for all processes."""
        from starflow2.core.serialize import to_dict

        plan = {"recipe": self.recipe, "output": str(folder), "seed": run.seed, "precision": run.precision}
        sizes = {name: self._dry_run(run, name) for name in stages}
        plan |= {"stages": [to_dict(run.stage(name)) for name in stages], "sizes": sizes}
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(plan, indent=1))

    def _dry_run(self, run: RunConfig, stage: str) -> JsonObject:
        """Counts alone, unless --device names where to take a step."""
        from starflow2.models.hub import pick_device
        from starflow2.training.dry_run import dry_run

        return dry_run(run, stage, "meta" if self.device == "auto" else pick_device(self.device).type)

    def _fit(self, run: RunConfig, stage: str, folder: Path) -> Path:
        from starflow2.models.hub import pick_device
        from starflow2.training.loop import fit

        device, evaluate, log = pick_device(self.device).type, self._evaluate(stage, folder), None
        if self.log is not None and os.environ.get("RANK", "0") == "0":
            log = _own_listener(self.log, folder, run.stage(stage))
        with training_bar(run.stage(stage)) as report:
            return fit(run, stage, folder, resume=self.resume, device=device, report=report, evaluate=evaluate, log=log)

    def _evaluate(self, stage: str, folder: Path) -> Evaluate | None:
        """Settings of evaluations: measurements and drawings of a stage."""
        found: list[Evaluate] = []
        if self.evaluate is not None:
            found.append(_own_measurement(self.evaluate))
        if self.sample_prompts is not None and stage in DRAWS:
            found.append(partial(_draw_samples, _prompts(self.sample_prompts), folder / f"samples-{stage}"))
        if not found:
            return None
        return lambda model, step: {name: value for one in found for name, value in one(model, step).items()}


def _own_measurement(name: str) -> Evaluate:
    """A user's function of (model, step) that measures a model in training. Raises ConfigError, also when it fails."""
    measure = find_object(name, MEASUREMENT)

    def evaluate(model: Components, step: int) -> dict[str, float]:
        with foreign_code(name, MEASUREMENT):
            return dict(measure(model, step))

    return evaluate


def _own_listener(name: str, folder: Path, stage: StageConfig) -> Log:
    """The listener for metrics that a user's function of (folder, stage) gives. Raises ConfigError, also later."""
    begin = find_object(name, LISTENER)
    with foreign_code(name, LISTENER):
        log = begin(folder, stage)

    def send(step: int, metrics: dict[str, float]) -> None:
        with foreign_code(name, LISTENER):
            log(step, metrics)

    return send


def _prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises UsageError where there are none."""
    try:
        prompts = read_lines(path)
    except DataError as error:
        raise UsageError(f"--sample-prompts: {error}") from error
    if not prompts:
        raise UsageError(f"--sample-prompts is {path}, which has no line; expected a prompt on each.")
    return prompts


def _draw_samples(prompts: Sequence[str], folder: Path, model: Components, step: int) -> dict[str, float]:
    """Draw the prompts, always from the same seeds, and write them as one sheet, folder/STEP.png."""
    from starflow2.core.images import contact_sheet, save_png, to_pil
    from starflow2.pipeline import StarFlow2

    images = [to_pil(image) for image in StarFlow2(model).draw(prompts, range(len(prompts)))]
    save_png(contact_sheet(images, prompts, scale=1 if images[0].width >= 128 else 3), folder / f"{step}.png")
    return {}
