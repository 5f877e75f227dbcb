"""The command line: every command is a dataclass of its options and a call into the library.

Importing this file imports neither torch nor transformers: what a command needs, it imports when it runs, so that
`starflow2 --help` is quick. Exit status: 0 done, 1 a check failed, 2 bad input or an error of ours, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

import starflow2
from starflow2.cli.analyze import Analyze
from starflow2.cli.check import Check, Demo
from starflow2.cli.conversation import Ask, Chat, Edit
from starflow2.cli.data import Data
from starflow2.cli.evaluate import Eval
from starflow2.cli.generate import Generate
from starflow2.cli.options import (
    PROGRAM,
    Command,
    check_text,
)
from starflow2.cli.parsing import parse, refuse_repeated
from starflow2.cli.score import Invert, Score
from starflow2.cli.train import Finetune, Info, Prepare, Train
from starflow2.errors import ConfigError, StarFlowError, nearest

__all__ = [
    "main",
]


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
            parse(command, None, ["--help"], program)
        rest = [a for a in arguments if a not in ("-h", "--help")]
        if command is Train and rest:
            parsed, _ = parse(Train, None, rest, program)
            parsed.stage_help()
        return 0
    refuse_repeated(arguments, program)
    parsed, unknown = parse(command, None, arguments, program)
    return parsed.run(unknown)


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
