"""Common ground of the verbs: options, checks of arguments, loading a model, progress bars, JSON files.

Imports neither torch nor rich before they are used, so that `starflow2 --help` stays quick. Not here: any verb.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Protocol

from starflow2.cli.parsing import Option, flags
from starflow2.core.files import check_writable, replacing
from starflow2.core.provenance import png_text
from starflow2.core.serialize import JsonObject
from starflow2.errors import OutputError, PromptError, StateError, UsageError, nearest, printable_line

if TYPE_CHECKING:
    from rich.console import Console

    from starflow2.pipeline import Drawing, StarFlow2
    from starflow2.training.config import RunConfig, StageConfig
    from starflow2.training.metrics import StepReport

__all__ = [
    "PROGRAM",
    "Command",
    "Device",
    "Guidance",
    "ImageFile",
    "JsonFile",
    "Model",
    "PngFile",
    "PriorScale",
    "Seed",
    "Tries",
    "check_json",
    "check_png",
    "check_seed",
    "check_text",
    "check_tries",
    "console",
    "find_recipe",
    "load_joint",
    "note_confidence",
    "png_text",
    "printable",
    "progress",
    "refuse",
    "say",
    "training_bar",
    "write_json",
]

PROGRAM = "starflow2"
MAX_SEED = 2**63 - 1
OWN = "the model's own"

Model = Annotated[str, Option("nano, a model folder, or a Hub id (owner/name)", metavar="NAME")]
Device = Annotated[str, Option("where to compute", metavar="{auto,cpu,cuda,mps}")]
JsonFile = Annotated[Path | None, Option("also write the outcome to this file as JSON", metavar="FILE")]
Guidance = Annotated[float | None, Option("how closely to follow the words, in edits too; 0 = off", default=OWN)]
PriorScale = Annotated[float | None, Option("spread of the prior; 1 = exact sampling", default=OWN)]
Tries = Annotated[int | None, Option("images drawn to keep the one that the model confirms", default=OWN)]
Seed = Annotated[int, Option("the same seed draws the same image")]
ImageFile = Annotated[Path, Option("an image file; its middle square is read", metavar="IMAGE")]
PngFile = Annotated[Path, Option("a .png file", metavar="FILE", short="-o")]


class Command(Protocol):
    """A dataclass of options that can be run; its docstring is the help page of its verb."""

    verb: ClassVar[str]

    def run(self, unknown: Sequence[str]) -> int:
        """Run the command and return the exit status. `unknown`: arguments that are no options of the command."""
        ...


# -- checks of arguments ----------------------------------------------------------------------------------------------


def refuse(unknown: Sequence[str], command: type[Command], hint: str = "", known: Sequence[str] = ()) -> None:
    """Raise UsageError for the first argument that the command does not have, with the nearest option.

    known: options beside those of the command.
    """
    if not unknown:
        return
    name = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
    kind = "option" if name.startswith("-") else "argument"
    raise UsageError(
        f"{command.verb} has no {kind} {name}{hint}.{nearest(name, [*flags(command), *known])} "
        f"See {PROGRAM} {command.verb} --help."
    )


def check_text(*texts: str) -> None:
    """Raise for bytes that Python passes on as lone surrogates: PromptError if they are not UTF-8, else UsageError."""
    for text in texts:
        if text.encode("utf-8", "ignore").decode() == text:
            continue
        try:
            os.fsencode(text).decode("utf-8")
        except UnicodeError as error:
            raise PromptError(f"{ascii(text)[:60]} is not UTF-8 text.") from error
        raise UsageError(
            f"{ascii(text)[:60]} cannot be read in this locale's encoding, {sys.getfilesystemencoding()}; "
            "set PYTHONUTF8=1 or a UTF-8 locale."
        )


def check_seed(seed: int, count: int = 1) -> None:
    """Raise UsageError unless all of the seeds [seed, seed + count) are 0 to 2^63 - 1."""
    if not 0 <= seed <= MAX_SEED - count:
        raise UsageError(f"--seed is {seed}; expected 0 to 2^63 - 1.")


def check_tries(tries: int | None) -> None:
    """Raise UsageError for a number of tries below 1."""
    if tries is not None and tries < 1:
        raise UsageError(f"--tries is {tries}; expected at least 1.")


def check_png(path: Path, option: str = "--output") -> None:
    """Raise OutputError if no PNG file can be written to `path`."""
    if path.suffix.lower() != ".png":
        raise OutputError(f"{option} is {path}; expected a name that ends in .png.")
    check_writable(path)


def check_json(path: Path | None) -> None:
    """Raise OutputError if no file can be written to the path that --json gives."""
    if path is not None:
        check_writable(path)


# -- models and recipes -----------------------------------------------------------------------------------------------


def load_joint(name: str, device: str, verb: str) -> StarFlow2:
    """Load the model of that name. Raises StateError if its streams were not trained together, CheckpointError."""
    from starflow2.pipeline import StarFlow2

    with console(stderr=True).status("loading"):
        model = StarFlow2.from_pretrained(name, device=device)
    if not model.is_joint:
        done = ", ".join(model.components.finished_stages) or "none"
        raise StateError(
            f"{verb} needs a model that has finished stage joint; {name} has finished {done}. "
            "Train it further, or choose another --model."
        )
    return model


def find_recipe(name: str) -> RunConfig:
    """The run of a recipe's name, or of module:function, also from the current folder. Raises ConfigError."""
    from starflow2.training.recipes import find

    return find(name)


# -- output -----------------------------------------------------------------------------------------------------------


def write_json(data: JsonObject, path: Path | None) -> None:
    """Write `data` to the path that --json gives, if any."""
    if path is not None:
        with replacing(path) as temp:
            temp.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def say(*lines: object) -> None:
    """Write lines to standard output, without signs that a terminal would obey."""
    for line in lines:
        print(printable_line(str(line)))


def note_confidence(drawing: Drawing) -> None:
    """Say on standard error that the model itself confirms none of the images that it tried."""
    if not drawing.is_confirmed:
        print(
            f"{PROGRAM}: note: of the tries at {printable_line(drawing.prompt)!r} it confirms none; the likeliest "
            f"was kept ({drawing.confidence:.0%}). More --tries may help.",
            file=sys.stderr,
        )


def printable(text: str) -> str:
    """`text` without control characters, so that neither a model nor a file can write escape codes to a terminal.

    >>> printable("two \\x1b[31mred hearts")
    'two [31mred hearts'
    """
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def console(*, stderr: bool = False) -> Console:
    """A rich console for tables (standard output) or bars (standard error)."""
    from rich.console import Console

    class Piped(Console):
        """A console whose reader may leave: rich would exit with status 1."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Piped(stderr=stderr)


@contextlib.contextmanager
def progress(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error and the function (done, total) that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    screen = console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=screen, transient=True, disable=not screen.is_terminal
    ) as bar:
        task = bar.add_task("loading", total=None)

        def step(done: int, total: int) -> None:
            bar.update(task, description=title, completed=done, total=total)

        yield step


@contextlib.contextmanager
def training_bar(stage: StageConfig) -> Iterator[Callable[[StepReport], None]]:
    """A progress bar for one stage and the function that takes its reports.

    Where standard error is no terminal, every report becomes a line instead, for log files.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    screen = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task(stage.name, total=stage.steps, state="starting")

        def report(step: StepReport) -> None:
            state = _training_state(step)
            bar.update(task, completed=step.step, state=state)
            if not screen.is_terminal:
                screen.print(f"{step.stage} {step.step}/{step.steps} {state}", soft_wrap=True, highlight=False)

        yield report


def _training_state(step: StepReport) -> str:
    """For instance: loss 0.123 · 71 images/s · 4,569 latents/s · 12 min left"""
    minutes = step.eta_s / 60
    left = f"{minutes:.0f} min" if minutes >= 2 else f"{step.eta_s:.0f} s"
    rates = f"{step.images_per_s:,.0f} images/s · {step.latents_per_s:,.0f} latents/s"
    return f"loss {step.metrics['loss']:.4f} · {rates} · {left} left"
