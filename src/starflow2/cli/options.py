"""What the commands share: options that mean the same everywhere, refusals on one line, bars, JSON files.

Imports neither torch nor rich before they are used, so that `starflow2 --help` stays quick. Not here: any command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from tyro.conf import arg

import starflow2
from starflow2.core.files import check_writable, replacing
from starflow2.errors import ConfigError, OutputError, PromptError, nearest

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "PROGRAM",
    "Command",
    "Device",
    "Guidance",
    "JsonFile",
    "Model",
    "PriorScale",
    "check_json",
    "check_png",
    "check_seed",
    "check_text",
    "console",
    "flags",
    "own",
    "png_text",
    "printable",
    "progress",
    "refuse",
    "write_json",
]

PROGRAM = "starflow2"
MAX_SEED = 2**63 - 1


def own(metavar: str, text: str, default: str = "the model's own") -> Any:
    """An option that is None by default, with what that means in its help."""
    return arg(metavar=metavar, help=text, help_behavior_hint=f"(default: {default})" if default else "")


Model = Annotated[str, arg(metavar="NAME", help="nano, a model folder, or a Hub id (owner/name)")]
Device = Annotated[str, arg(metavar="{auto,cpu,cuda,mps}", help="where to compute")]
JsonFile = Annotated[Path | None, own("FILE", "also write the outcome to this file as JSON", "")]
Guidance = Annotated[float | None, own("FLOAT", "how hard to follow the words, in edits too; 0 = off")]
PriorScale = Annotated[float | None, own("FLOAT", "spread of the prior, 1 = exact sampling")]


class Command(Protocol):
    """What every command offers; its class docstring is its help."""

    verb: ClassVar[str]

    def run(self, unknown: Sequence[str]) -> int:
        """Do it and return the exit status. `unknown`: arguments that are no options of the command itself."""
        ...


# -- refusals ---------------------------------------------------------------------------------------------------------


def refuse(unknown: Sequence[str], command: type[Command], hint: str = "", known: Sequence[str] = ()) -> None:
    """Raise ConfigError for the first argument that nothing takes, with the nearest option there is."""
    if not unknown:
        return
    name = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
    kind = "option" if name.startswith("-") else "argument"
    raise ConfigError(
        f"{command.verb} has no {kind} {name}{hint}.{nearest(name, [*flags(command), *known])} "
        f"See {PROGRAM} {command.verb} --help."
    )


def flags(kind: type[Any], prefix: str = "") -> list[str]:
    """Long options of a dataclass: --steps, --optim.lr, --shard.no-reshards for what is on by default."""
    found = []
    for field in dataclasses.fields(kind):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            found += flags(type(default), f"{prefix}{field.name}.")
        else:
            found.append(f"--{prefix}{'no-' if default is True else ''}{field.name}".replace("_", "-"))
    return found


def check_text(*texts: str) -> None:
    """Raise PromptError for bytes that were no UTF-8; Python hands them on as lone surrogates, which nothing takes."""
    for text in texts:
        if text.encode("utf-8", "ignore").decode() != text:
            raise PromptError(f"{ascii(text)[:60]} is not UTF-8 text.")


def check_seed(seed: int, count: int = 1) -> None:
    """Raise ConfigError where one of the seeds [seed, seed + count) is none."""
    if not 0 <= seed <= MAX_SEED - count:
        raise ConfigError(f"--seed is {seed}; expected 0 to 2^63 - 1.")


def check_png(path: Path, option: str = "--output") -> None:
    """Raise OutputError for a picture that could not be written there, before there is one."""
    if path.suffix.lower() != ".png":
        raise OutputError(f"{option} is {path}; expected a name that ends in .png.")
    check_writable(path)


def png_text(prompt: str, seed: int, settings: Mapping[str, Any]) -> dict[str, str]:
    """What every PNG that we write says about itself; `settings` names the model."""
    about = {"settings": json.dumps(settings), "model": str(settings["model"]), "version": starflow2.__version__}
    return {"prompt": prompt, "seed": str(seed), **about}


# -- what is seen -----------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """`text` without what could steer a terminal: no model and no file gets to write escape codes.

    >>> printable("two \\x1b[31mred hearts")
    'two [31mred hearts'
    """
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def console(*, stderr: bool = False) -> Console:
    """Where tables (standard output) and bars (standard error) go."""
    from rich.console import Console

    return Console(stderr=stderr)


@contextlib.contextmanager
def progress(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error and the function (done, in all) that moves it."""
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


# -- JSON files -------------------------------------------------------------------------------------------------------


def check_json(path: Path | None) -> None:
    """Raise OutputError now for a --json file that could not be written in the end."""
    if path is not None:
        check_writable(path)


def write_json(data: dict[str, Any], path: Path | None) -> None:
    """Write `data` where --json asks for it."""
    if path is not None:
        with replacing(path) as temp:
            temp.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
