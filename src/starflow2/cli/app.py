"""The command line: every command is a dataclass of its options and a call into the library.

Importing this file imports neither torch nor transformers: what a command needs, it imports when it runs, so that
`starflow2 --help` is quick. Exit status: 0 done, 1 a check failed, 2 bad input or an error of ours, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro
from tyro.conf import Fixed, FlagCreatePairsOff, Positional, Suppress, arg

import starflow2
from starflow2.cli.conversation import Ask, Chat, Edit, Invert, Score, conversing
from starflow2.cli.evaluate import Analyze, Data, Eval
from starflow2.cli.options import (
    PROGRAM,
    Command,
    Device,
    Guidance,
    JsonFile,
    Model,
    PriorScale,
    check_json,
    check_seed,
    check_text,
    console,
    flags,
    own,
    png_text,
    printable,
    progress,
    refuse,
    write_json,
)
from starflow2.core.files import check_writable
from starflow2.errors import ConfigError, DataError, OutputError, PromptError, StarFlowError, nearest

if TYPE_CHECKING:
    from starflow2.core.images import Picture as Image
    from starflow2.inference.session import Session
    from starflow2.inference.text_to_image import DrawConfig
    from starflow2.pipeline import Picture, StarFlow2
    from starflow2.training.loop import StepReport
    from starflow2.training.tasks import RunConfig, StageConfig

__all__ = ["main"]

REPLY_TOKENS, REPLY_PICTURES = 256, 4  # what one interleaved reply may hold


# -- generate ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Draw pictures from words.

    One picture is written to --output. Several become a contact sheet there; where --output is a folder, one file each
    beside the sheet. Every PNG carries prompt, seed and settings. With --mode interleaved the model replies to the
    prompt as it sees fit, in words and pictures: out-1.png, out-2.png, ...
    """

    verb: ClassVar[str] = "generate"

    prompt: Positional[Annotated[tuple[str, ...], arg(metavar="PROMPT", help="what to draw, in quotes")]] = ()
    mode: Annotated[Literal["image", "interleaved"], arg(help="a picture, or whatever the model replies")] = "image"
    n: Annotated[int, arg(aliases=("-n",), help="pictures of each prompt, seeds counting on")] = 1
    keep: Annotated[Literal["all", "best"], arg(help="best: of each prompt the one that it explains best")] = "all"
    seed: Annotated[int, arg(help="seed of the first picture of each prompt")] = 0
    guidance: Guidance = None
    prior_scale: PriorScale = None
    cleanup: Annotated[Literal["none", "tweedie"], arg(help="denoise the sampled latents")] = "none"
    batch: Annotated[int | None, own("INT", "pictures at once", "32")] = None
    prompts: Annotated[Path | None, own("FILE", "more prompts, one on each line", "")] = None
    output: Annotated[str, arg(aliases=("-o",), metavar="PATH", help="a .png file, or a folder")] = "out.png"
    json: Annotated[bool, arg(help="tell what was made as a JSON list on standard output")] = False
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        prompts = [*self.prompt, *_lines(self.prompts)]
        if not prompts:
            raise PromptError('there is nothing to draw: give a prompt, for instance "two red hearts".')
        if self.n < 1:
            raise ConfigError(f"-n is {self.n}; expected at least 1 picture per prompt.")
        if self.keep == "best" and self.n < 2:
            raise ConfigError(
                f"--keep best chooses among the pictures of a prompt; -n is {self.n}, expected 2 or more."
            )
        check_seed(self.seed, self.n)
        if self.mode == "interleaved":
            return self._converse(prompts)
        seeds = ["best"] if self.keep == "best" else range(self.seed, self.seed + self.n)
        files = _plan(self.output, prompts, seeds)
        pictures, seconds = self._draw(prompts)
        pace = seconds / len(pictures)
        if self.keep == "best":
            pictures = [_best(pictures[i : i + self.n]) for i in range(0, len(pictures), self.n)]
        written = _save(pictures, files)
        if self.json:
            _print_json([_row(picture, path, pace) for picture, path in zip(pictures, written, strict=True)])
        else:
            for path in dict.fromkeys([*written, *([files.sheet] if files.sheet else [])]):
                print(path)
        return 0

    def _config(self, model: StarFlow2) -> DrawConfig:
        from starflow2.inference.text_to_image import DrawConfig

        return DrawConfig.for_model(
            model.parts,
            guidance=self.guidance,
            prior_scale=self.prior_scale,
            cleanup=self.cleanup,
            batch=self.batch,
        )

    def _draw(self, prompts: list[str]) -> tuple[list[Picture], float]:
        from starflow2.pipeline import StarFlow2

        with progress("drawing", "latents") as step:
            model = StarFlow2.from_pretrained(self.model, device=self.device)
            config = self._config(model)
            if self.keep == "best" and not (model.is_joint and config.guidance):
                done = ", ".join(model.parts.stages)
                raise ConfigError(
                    "--keep best compares pictures by what the prompt adds to their likelihood, which takes guidance "
                    f"and a model with stage joint; --guidance is {config.guidance:g} and this model has {done}."
                )
            started = time.perf_counter()
            pictures = model.generate(prompts, n=self.n, seed=self.seed, config=config, progress=step)
            return pictures, time.perf_counter() - started

    def _converse(self, prompts: list[str]) -> int:
        """Let the model reply to one prompt; nothing is written before the reply is whole."""
        if len(prompts) > 1 or self.n > 1:
            raise ConfigError(
                f"--mode interleaved replies to one prompt once, not to {len(prompts)} with -n {self.n}; "
                f"{PROGRAM} chat takes turn after turn."
            )
        if self.batch is not None:
            raise ConfigError("--batch is of --mode image; --mode interleaved makes one reply, picture after picture.")
        (prompt,) = prompts
        paths = _numbered(self.output, prompt)
        model = conversing(self.model, self.device, "--mode interleaved")
        config = self._config(model)
        blocks = _replied(model.session(seed=self.seed, config=config).add(prompt))
        settings = config.told() | {"model": model.parts.cfg.name}
        rows = _save_blocks(blocks, paths, png_text(prompt, self.seed, settings))
        if self.json:
            _print_json(rows)
        else:
            for row in rows:
                print(row.get("text") or row["file"])
        return 0


def _best(pictures: Sequence[Picture]) -> Picture:
    """The one to whose likelihood the prompt adds most."""
    return max(pictures, key=lambda picture: -math.inf if picture.gain is None else picture.gain)


def _replied(session: Session) -> list[str | Image]:
    """What the model replies: words and pictures in order."""
    from starflow2.inference.session import Drew, Made, Wrote

    blocks: list[str | Image] = []
    with progress("drawing", "latents") as step:
        for event in session.run(tokens=REPLY_TOKENS, pictures=REPLY_PICTURES):
            match event:
                case Drew():
                    step(event.done, event.total)
                case Made():
                    blocks.append(event.image)
                case Wrote() if blocks and isinstance(blocks[-1], str):
                    blocks[-1] += event.text
                case Wrote():
                    blocks.append(event.text)
    return blocks


def _numbered(output: str, prompt: str) -> list[Path]:
    """Names of the pictures of a reply, as many as there can be: out-1.png, ... or folder/two-red-hearts-1.png, ..."""
    one = _plan(output, [prompt], [""]).each
    assert one is not None
    paths = [one[0].with_name(f"{one[0].stem}-{i}.png") for i in range(1, REPLY_PICTURES + 1)]
    for path in paths:
        check_writable(path)
    return paths


def _save_blocks(blocks: Sequence[str | Image], paths: Sequence[Path], about: dict[str, str]) -> list[dict[str, Any]]:
    """Write the pictures among the blocks and list all of them in order, by text or file."""
    from starflow2.core.images import save_png

    rows: list[dict[str, Any]] = []
    left = iter(paths)
    for block in blocks:
        if isinstance(block, str):
            rows.append({"text": printable(block).strip()})
        else:
            path = next(left)
            save_png(block, path, about)
            rows.append({"file": str(path)})
    return [row for row in rows if row != {"text": ""}]


def _print_json(rows: Sequence[dict[str, Any]]) -> None:
    print(json.dumps(rows, indent=1, ensure_ascii=False))


@dataclass(frozen=True, slots=True)
class _Files:
    """Where pictures go: a file for each, or none, and a sheet of all, or none."""

    each: list[Path] | None
    sheet: Path | None


def _plan(output: str, prompts: Sequence[str], seeds: Sequence[object]) -> _Files:
    """Names of what will be written, all of it checked to be writable before anything is drawn.

    In a folder a name is that of the prompt, and which of `seeds` it is.
    """
    count, path = len(prompts) * len(seeds), Path(output)
    if output.endswith(("/", "\\")) or path.is_dir():
        names = ["-".join(filter(None, (_slug(prompt), str(seed)))) for prompt in prompts for seed in seeds]
        taken: dict[str, int] = {"sheet": 1}
        each = [path / f"{_unique(name, taken)}.png" for name in names]
        files = _Files(each, path / "sheet.png" if count > 1 else None)
    elif path.suffix.lower() != ".png":
        raise OutputError(f"--output is {output}; expected a name that ends in .png, or a folder with / at its end.")
    else:
        files = _Files([path], None) if count == 1 else _Files(None, path)
    for file in [*(files.each or []), *([files.sheet] if files.sheet else [])]:
        check_writable(file)
    return files


def _slug(prompt: str) -> str:
    """A prompt as a file name: "two red hearts" -> two-red-hearts."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "picture"


def _unique(name: str, taken: dict[str, int]) -> str:
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}-{taken[name]}"


def _save(pictures: Sequence[Picture], files: _Files) -> list[Path]:
    """Write them and say which file each picture is in."""
    from starflow2.core.images import contact_sheet, save_png

    if files.sheet is not None:
        labels = [picture.prompt for picture in pictures]
        columns = min(8, max(4, round(len(pictures) ** 0.5)))
        first = pictures[0]
        about = png_text("\n".join(dict.fromkeys(labels)), first.seed, first.settings)
        about["pictures"] = json.dumps([{"prompt": p.prompt, "seed": p.seed} for p in pictures], ensure_ascii=False)
        save_png(contact_sheet([p.image for p in pictures], labels, columns), files.sheet, about)
    if files.each is None:
        assert files.sheet is not None
        return [files.sheet] * len(pictures)
    for picture, path in zip(pictures, files.each, strict=True):
        save_png(picture.image, path, png_text(picture.prompt, picture.seed, picture.settings))
    return files.each


def _row(picture: Picture, path: Path, seconds: float) -> dict[str, Any]:
    made_of = {"prompt": picture.prompt, "seed": picture.seed, "settings": picture.settings}
    gain = {} if picture.gain is None else {"gain": picture.gain}
    return {"file": str(path), **made_of, **gain, "seconds": round(seconds, 4)}


def _lines(path: Path | None) -> list[str]:
    """Prompts of a file, one on each line; blank lines are skipped."""
    if path is None:
        return []
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"cannot read prompts from {path}: {reason}.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


# -- train ------------------------------------------------------------------------------------------------------------


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
            _tyro(*_overrides(run.stage(self.stage)), ["--help"], f"{PROGRAM} train {self.recipe} --stage {self.stage}")

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
    changed, unknown = _tyro(settings, default, arguments, f"{PROGRAM} train --stage {stage.name}")
    refuse(unknown, Train, known=flags(settings))
    for name in ("steps", "batch", "save_every", "log_every", "accumulate"):
        if getattr(changed, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(changed, name)}; expected at least 1.")
    return type(stage)(**_fields(changed))


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


# -- eval -------------------------------------------------------------------------------------------------------------


# -- info, check, demo ------------------------------------------------------------------------------------------------


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
        from starflow2.models.checkpoint import load_tensors, save_parts, start_parts
        from starflow2.models.convert import adopt, flow_state
        from starflow2.training.recipes import find

        folder = (self.output or Path("runs") / self.recipe.replace(":", "-")) / "model"
        if folder.exists():
            raise OutputError(f"{folder} is there already; give another --output.")
        check_writable(folder / "config.json")
        state = None if self.flow is None else flow_state(load_tensors(self.flow))
        run = find(self.recipe)
        with seeded(run.seed), console(stderr=True).status("loading"):
            parts = start_parts(run.model)
            copied, fresh = ([], []) if state is None else adopt(parts.flow, state)
            save_parts(parts, folder)
        if state is not None:
            print(
                f"{len(copied)} tensors of the flow from {self.flow}, {len(fresh)} fresh: {', '.join(fresh[:4])}, ..."
            )
        print(folder)
        facts = {"folder": str(folder), "fingerprints": parts.fingerprints, "copied": copied, "fresh": fresh}
        write_json(facts, self.json)
        return 0


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, fresh weights are those of this seed."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


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


# -- the program ------------------------------------------------------------------------------------------------------

COMMANDS: tuple[type[Command], ...] = (
    Generate,
    Ask,
    Edit,
    Chat,
    Score,
    Invert,
    Demo,
    Prepare,
    Train,
    Finetune,
    Eval,
    Analyze,
    Data,
    Info,
    Check,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status; `argv` is sys.argv without the program by default."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        check_text(*arguments)
        return _dispatch(arguments)
    except StarFlowError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(_overview())
        return 0
    if verb == "--version":
        print(f"{PROGRAM} {starflow2.__version__}")
        return 0
    for command in COMMANDS:
        if command.verb == verb:
            return _run(command, arguments[1:])
    verbs = [command.verb for command in COMMANDS]
    raise ConfigError(f"there is no command {verb!r}; expected one of {', '.join(verbs)}.{nearest(verb, verbs)}")


def _run(command: type[Command], arguments: list[str]) -> int:
    program = f"{PROGRAM} {command.verb}"
    if {"-h", "--help"} & set(arguments):
        with contextlib.suppress(SystemExit):
            _tyro(command, None, ["--help"], program)
        rest = [a for a in arguments if a not in ("-h", "--help")]
        if command is Train and rest:
            parsed, _ = _tyro(Train, None, rest, program)
            parsed.stage_help()
        return 0
    _refuse_repeated(arguments, program)
    parsed, unknown = _tyro(command, None, arguments, program)
    return parsed.run(unknown)


def _refuse_repeated(arguments: Sequence[str], program: str) -> None:
    """Raise ConfigError for an option given twice: only the last one would count, in silence."""
    flags = [a.split("=")[0] for a in arguments if a.startswith("--") and len(a) > 2]
    for flag in flags:
        if flags.count(flag) > 1:
            raise ConfigError(f"{flag} is given {flags.count(flag)} times; give it once, several values behind it.")


def _overview() -> str:
    width = max(len(command.verb) for command in COMMANDS)
    lines = [f"  {c.verb:<{width}}  {(c.__doc__ or '').splitlines()[0]}" for c in COMMANDS]
    return "\n".join(
        [
            f"usage: {PROGRAM} [-h] [--version] COMMAND ...",
            "",
            "Words and pictures as one causal sequence, drawn by a normalizing flow.",
            "",
            "commands:",
            *lines,
            "",
            f'`{PROGRAM} COMMAND --help` lists the options of one. To begin: {PROGRAM} generate "two red hearts" -n 4',
        ]
    )


def _tyro(kind: type[Any], default: Any, arguments: Sequence[str], program: str) -> tuple[Any, list[str]]:
    """An instance of the dataclass `kind` from arguments, and those that belong to no field.

    What tyro says about a bad value comes in a box of several lines; it is raised as ConfigError on one.
    """
    given = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                prog=program,
                args=list(arguments),
                return_unknown_args=True,
                config=(FlagCreatePairsOff,),
                **given,
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise ConfigError(f"{_unboxed(said.getvalue())} See {program} --help.") from None


def _unboxed(text: str) -> str:
    """The message inside tyro's box, on one line, without title and footer."""
    lines = [line.strip(" │|") for line in text.splitlines()]
    rules = [i for i, line in enumerate(lines) if (line and not line.strip("─-╭╮╰╯")) or line.startswith("╭")]
    if not rules:
        return " ".join(text.split())
    inside = lines[rules[0] + 1 : rules[1] if len(rules) > 1 else None]
    return " ".join(line for line in inside if line)


# -- the terminal -----------------------------------------------------------------------------------------------------


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
