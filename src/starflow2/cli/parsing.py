"""Arguments into dataclasses of options: what tyro does, with errors of our own on one line."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff

from starflow2.errors import ConfigError

__all__ = [
    "parse",
    "refuse_repeated",
]


def refuse_repeated(arguments: Sequence[str], program: str) -> None:
    """Raise ConfigError for an option given twice: only the last one would count, in silence."""
    flags = [a.split("=")[0] for a in arguments if a.startswith("--") and len(a) > 2]
    for flag in flags:
        if flags.count(flag) > 1:
            raise ConfigError(f"{flag} is given {flags.count(flag)} times; give it once, several values behind it.")


def parse(kind: type[Any], default: Any, arguments: Sequence[str], program: str) -> tuple[Any, list[str]]:
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
