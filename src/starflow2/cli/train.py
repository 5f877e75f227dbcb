"""`starflow2 train`, `finetune`, `prepare` and `info`: recipes trained, planned, counted and begun."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import Fixed, Positional, Suppress, arg

from starflow2.cli.options import (
    PROGRAM,
    Device,
    JsonFile,
    check_json,
    check_seed,
    console,
    flags,
    own,
    refuse,
    write_json,
)
from starflow2.cli.parsing import parse
from starflow2.core.files import check_writable
from starflow2.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from starflow2.training.config import RunConfig, StageConfig
    from starflow2.training.loop import StepReport

__all__ = [
    "Finetune",
    "Info",
    "Prepare",
    "Train",
]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a stage of a recipe, or all of them in order.

    With --stage, every setting of that stage is an option too (--steps 100, --optim.lr 3e-4):
    `starflow2 train RECIPE --stage STAGE --help` lists them. Metrics go to metrics-STAGE.jsonl in the output folder.
    """

    verb: ClassVar[str] = "train"

    recipe: Positional[Annotated[str, arg(metavar="RECIPE", help="nano, or module:function of your own")]]
    stage: Annotated[str, arg(metavar="STAGE", help="a stage of the recipe, or all")] = "all"
    resume: Annotated[Literal["auto", "none"], arg(help="auto goes on from the last checkpoint there is")] = "auto"
    device: Device = "auto"
    output: Annotated[
        Path | None,
        arg(aliases=("-o",), metavar="FOLDER", help="the run's folder", help_behavior_hint="(default: runs/RECIPE)"),
    ] = None
    dry_run: Annotated[bool, arg(help="print settings and sizes as JSON; with --device, take a made-up step")] = False
    smoke: Annotated[bool, arg(help="a few tiny steps on the same code path")] = False

    def run(self, unknown: Sequence[str]) -> int:
        run, stages, folder = self._resolved(unknown)
        if self.dry_run:
            from starflow2.core.serialize import to_dict

            config = {"recipe": self.recipe, "output": str(folder), "seed": run.seed, "precision": run.precision}
            sizes = {name: self._rehearsed(run, name) for name in stages}
            config |= {"stages": [to_dict(run.stage(name)) for name in stages], "sizes": sizes}
            if os.environ.get("RANK", "0") == "0":
                print(json.dumps(config, indent=1))
            return 0
        check_writable(folder / "config.json")
        for name in stages:
            model = self._fit(run, name, folder)
        print(model)
        return 0

    def _rehearsed(self, run: RunConfig, stage: str) -> dict[str, Any]:
        """Counts alone unless a device was named."""
        from starflow2.models.hub import pick_device
        from starflow2.training.dry_run import rehearse

        return rehearse(run, stage, "meta" if self.device == "auto" else pick_device(self.device).type)

    def stage_help(self) -> None:
        """Print the options that --stage adds."""
        run = self._recipe()
        if self.stage == "all":
            names = ", ".join(stage.name for stage in run.stages)
            print(f"\n--stage NAME ({names}) makes the settings of that stage options, too.")
            return
        with contextlib.suppress(SystemExit):
            parse(*_overrides(run.stage(self.stage)), ["--help"], f"{PROGRAM} train {self.recipe} --stage {self.stage}")

    def _recipe(self) -> RunConfig:
        from starflow2.training.recipes import find, smoke

        sys.path.insert(0, "")  # recipes of the user's own stand in the folder they are in
        run = find(self.recipe)
        return smoke(run) if self.smoke else run

    def _resolved(self, unknown: Sequence[str]) -> tuple[RunConfig, list[str], Path]:
        """The run with overrides in it, the stages to train, and the folder."""
        run = self._recipe()
        folder = self.output or Path("runs") / (self.recipe.split(":")[-1] + "-smoke" * self.smoke)
        if self.stage == "all":
            refuse(unknown, type(self), "; settings of a stage need --stage to say which")
            return run, [stage.name for stage in run.stages], folder
        changed = _overridden(run.stage(self.stage), unknown)
        stages = tuple(changed if stage.name == changed.name else stage for stage in run.stages)
        return dataclasses.replace(run, stages=stages), [self.stage], folder

    def _fit(self, run: RunConfig, stage: str, folder: Path) -> Path:
        from starflow2.models.hub import pick_device
        from starflow2.training.loop import fit

        latents = run.model.flow.deep.num_latents
        device = pick_device(self.device).type
        with _training_bar(run.stage(stage), latents) as report:
            return fit(run, stage, folder, resume=self.resume == "auto", device=device, report=report)


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Teach a model pictures of your own, and the words of their captions.

    FOLDER holds picture files, each with its caption in a .txt file of the same name. Small adapters on the flow learn
    them, while a share of every batch keeps up what the model could do. The output is a whole model, and in it the
    adapter alone, adapter.safetensors.
    """

    verb: ClassVar[str] = "finetune"

    folder: Positional[Annotated[Path, arg(metavar="FOLDER", help="picture files, a .txt caption beside each")]]
    output: Annotated[Path, arg(aliases=("-o",), metavar="FOLDER", help="where the new model goes")] = (
        Path("out") / "finetuned"
    )
    steps: Annotated[int, arg(help="optimiser steps")] = 1000
    batch: Annotated[int, arg(help="pictures per step")] = 32
    lr: Annotated[float, arg(help="learning rate")] = 1e-3
    replay: Annotated[float, arg(help="share of every batch that comes from the drawn world")] = 0.5
    rank: Annotated[int, arg(help="of the adapters: more learns more and forgets more")] = 16
    seed: Annotated[int, arg(help="of order and noise")] = 0
    model: Annotated[str, arg(metavar="NAME", help="nano, or a model folder")] = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_seed(self.seed)
        check_writable(self.output / "config.json")
        from starflow2.models.checkpoint import read_config
        from starflow2.models.hub import NANO, pick_device
        from starflow2.models.lora import LoraConfig
        from starflow2.training.finetune import FinetuneConfig, finetune, read_album

        config = FinetuneConfig(
            steps=self.steps,
            batch=self.batch,
            lr=self.lr,
            replay=self.replay,
            lora=LoraConfig(rank=self.rank),
            seed=self.seed,
        )
        size: dict[str, Any] = read_config(NANO if self.model == "nano" else Path(self.model))["model"]
        album = read_album(self.folder, size["fae"]["image_size"])
        device = pick_device(self.device).type
        rows, columns = size["flow"]["deep"]["grid"]
        with _training_bar(config.stage(), rows * columns) as report:
            print(finetune(album, self.model, self.output, config, device=device, report=report))
        return 0


def _overrides(stage: StageConfig) -> tuple[type[StageConfig], StageConfig]:
    """A config class whose stage name cannot be set, and `stage` as an instance of it, for tyro."""
    fixed = [("name", Annotated[str, Suppress, Fixed], dataclasses.field(default=stage.name))]
    settings = dataclasses.make_dataclass("Settings", fixed, bases=(type(stage),), frozen=True, kw_only=True)
    settings.__doc__ = f"Settings of stage {stage.name}."
    return settings, settings(**_fields(stage))


def _overridden(stage: StageConfig, arguments: Sequence[str]) -> StageConfig:
    """`stage` with the settings that `arguments` change."""
    settings, default = _overrides(stage)
    changed, unknown = parse(settings, default, arguments, f"{PROGRAM} train --stage {stage.name}")
    refuse(unknown, Train, known=flags(settings))
    for name in ("steps", "batch", "save_every", "log_every", "accumulate"):
        if getattr(changed, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(changed, name)}; expected at least 1.")
    return type(stage)(**_fields(changed))


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


@dataclass(frozen=True, kw_only=True)
class Info:
    """Count the parameters, bytes and cache of a recipe or a model folder; with --gpus, plan its training.

    The plan is arithmetic at a share of peak that is assumed, not measured: memory by component, FLOPs, days.
    """

    verb: ClassVar[str] = "info"

    name: Positional[Annotated[str, arg(metavar="RECIPE", help="name, module:function, or a model folder")]] = "nano"
    gpus: Annotated[int | None, own("INT", "plan the recipe's training on so many GPUs", "no plan")] = None
    gpu_memory: Annotated[float, arg(help="GiB of each GPU")] = 80.0
    gpu_tflops: Annotated[float, arg(help="its dense bfloat16 peak; 989 is an H100")] = 989.0
    json: JsonFile = None

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        sys.path.insert(0, "")
        from starflow2.models.summary import describe, table
        from starflow2.training.recipes import find_config

        facts, tables = describe(find_config(self.name)), []
        if self.gpus is not None:
            facts["plan"], shown = self._plan(self.gpus)
            tables.append(shown)
        console().print(table(facts), *tables)
        write_json(facts, self.json)
        return 0

    def _plan(self, gpus: int) -> tuple[dict[str, Any], Any]:
        """The plan as JSON and for the terminal."""
        from starflow2.training.planner import Hardware, plan, table
        from starflow2.training.recipes import find

        if Path(self.name).is_dir():
            raise ConfigError(f"--gpus plans the stages of a recipe, and {self.name} is a model folder.")
        hardware = Hardware(gpus=gpus, gpu_memory=self.gpu_memory, peak=1e12 * self.gpu_tflops)
        planned = plan(find(self.name), hardware)
        return planned, table(planned)


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make the folder that a recipe over pretrained parts starts from: they are loaded and checked, all else is fresh.

    It holds their fingerprints, not their weights. Then `starflow2 train RECIPE -o FOLDER` trains the first stage.
    """

    verb: ClassVar[str] = "prepare"

    recipe: Positional[Annotated[str, arg(metavar="RECIPE", help="paper, mini, or module:function of your own")]]
    flow: Annotated[
        Path | None, own("FILE", "safetensors of a released STARFlow that the deep block starts from", "none")
    ] = None
    output: Annotated[
        Path | None,
        arg(aliases=("-o",), metavar="FOLDER", help="the run's", help_behavior_hint="(default: runs/RECIPE)"),
    ] = None
    json: JsonFile = None

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        sys.path.insert(0, "")
        from starflow2.models.checkpoint import load_tensors, save_components, start_components
        from starflow2.models.convert import adopt, flow_state
        from starflow2.training.recipes import find

        folder = (self.output or Path("runs") / self.recipe.replace(":", "-")) / "model"
        if folder.exists():
            raise OutputError(f"{folder} is there already; give another --output.")
        check_writable(folder / "config.json")
        state = None if self.flow is None else flow_state(load_tensors(self.flow))
        run = find(self.recipe)
        with seeded(run.seed), console(stderr=True).status("loading"):
            components = start_components(run.model)
            copied, fresh = ([], []) if state is None else adopt(components.flow, state)
            save_components(components, folder)
        if state is not None:
            print(
                f"{len(copied)} tensors of the flow from {self.flow}, {len(fresh)} fresh: {', '.join(fresh[:4])}, ..."
            )
        print(folder)
        facts = {"folder": str(folder), "fingerprints": components.fingerprints, "copied": copied, "fresh": fresh}
        write_json(facts, self.json)
        return 0


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, fresh weights are those of this seed."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _training_bar(stage: StageConfig, latents: int) -> Iterator[Callable[[StepReport], None]]:
    """A bar for one stage; where standard error is no terminal, a line per report instead, for log files."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    screen = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task(stage.name, total=stage.steps, said="starting")

        def report(line: StepReport) -> None:
            said = _told(line, latents)
            bar.update(task, completed=line.step, said=said)
            if not screen.is_terminal:
                screen.print(f"{line.stage} {line.step}/{line.steps} {said}", soft_wrap=True, highlight=False)

        yield report


def _told(line: StepReport, latents: int) -> str:
    """loss 0.123 · 71 images/s · 4,569 latents/s · 12 min left"""
    minutes = line.eta_s / 60
    left = f"{minutes:.0f} min" if minutes >= 2 else f"{line.eta_s:.0f} s"
    rate = line.images_per_s
    return f"loss {line.metrics['loss']:.4f} · {rate:,.0f} images/s · {rate * latents:,.0f} latents/s · {left} left"
