"""The command line: a table of verbs, each a dataclass of options whose `run` calls the library.

Importing a verb's file imports neither torch nor transformers; a command imports what it needs when it runs, so that
`starflow2 --help` is fast. Exit status: 0 done, 1 a check failed, 2 bad input or an error of ours, 130 Ctrl-C, 141 if
whoever read the output has left.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import starflow2
from starflow2.cli.options import PROGRAM, Command, check_text
from starflow2.cli.parsing import docstring_of, help_text, parse, refuse_repeated
from starflow2.cli.train import Train
from starflow2.errors import StarFlowError, UsageError, nearest, printable_line

__all__ = ["COMMANDS", "command", "main"]

COMMANDS = {
    "generate": "starflow2.cli.generate:Generate",
    "ask": "starflow2.cli.ask:Ask",
    "edit": "starflow2.cli.edit:Edit",
    "chat": "starflow2.cli.chat:Chat",
    "score": "starflow2.cli.score:Score",
    "invert": "starflow2.cli.invert:Invert",
    "words": "starflow2.cli.words:Words",
    "serve": "starflow2.cli.serve:Serve",
    "demo": "starflow2.cli.demo:Demo",
    "prepare": "starflow2.cli.prepare:Prepare",
    "train": "starflow2.cli.train:Train",
    "finetune": "starflow2.cli.finetune:Finetune",
    "eval": "starflow2.cli.evaluate:Eval",
    "analyze": "starflow2.cli.analyze:Analyze",
    "data": "starflow2.cli.data:Data",
    "info": "starflow2.cli.info:Info",
    "check": "starflow2.cli.check:Check",
    "bench": "starflow2.cli.bench:Bench",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status. argv: without the program, by default that of this process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of another encoding costs no traceback
    try:
        check_text(*arguments)
        status = _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # here a full disk is met, or a reader that has left
        return status
    except StarFlowError as error:
        return _ended(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _ended("interrupted", 130)
    except BrokenPipeError:
        _discard_output()
        return 141  # as a program that the signal SIGPIPE ends
    except OSError as error:
        _discard_output()
        return _ended(f"error: cannot use {error.filename or 'standard output'}: {error.strerror or error}.", 2)
    except MemoryError:
        return _ended("error: there is not enough memory for this; use a smaller --batch, -n or model.", 2)


def _ended(message: str, status: int) -> int:
    """Write one printable line to standard error and return the exit status."""
    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: {printable_line(message)}", file=sys.stderr, flush=True)
    return status


def _discard_output() -> None:
    """Let what is left in the buffer of standard output go nowhere, so that Python does not stumble over it at exit."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def command(verb: str) -> type[Command]:
    """The dataclass of a verb. Raises UsageError with the nearest verb."""
    if verb not in COMMANDS:
        raise UsageError(
            f"there is no command {verb!r}; expected one of {', '.join(COMMANDS)}.{nearest(verb, COMMANDS)}"
        )
    module, _, name = COMMANDS[verb].partition(":")
    found: type[Command] = getattr(import_module(module), name)
    return found


def _dispatch(arguments: list[str]) -> int:
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help"):
        print(_overview())
        return 0
    if verb == "--version":
        print(f"{PROGRAM} {starflow2.__version__}")
        return 0
    return _run(command(verb), rest)


def _run(kind: type[Command], arguments: list[str]) -> int:
    program = f"{PROGRAM} {kind.verb}"
    if {"-h", "--help"} & set(arguments):
        print(help_text(kind, program), end="")
        others = [argument for argument in arguments if argument not in ("-h", "--help")]
        if kind is Train and others:
            print(parse(Train, others, program)[0].stage_help())
        return 0
    refuse_repeated(arguments, program)
    parsed, unknown = parse(kind, arguments, program)
    return parsed.run(unknown)


def _overview() -> str:
    """The help page of the program: every verb with the first line of its docstring."""
    width = max(map(len, COMMANDS))
    firsts = {verb: docstring_of(command(verb)).partition("\n")[0] for verb in COMMANDS}
    lines = [f"  {verb:<{width}}  {first}".rstrip() for verb, first in firsts.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} [-h] [--version] COMMAND ...",
            "",
            "Text and images as one causal sequence; the images are drawn by a normalizing flow.",
            "",
            "commands:",
            *lines,
            "",
            f"`{PROGRAM} COMMAND --help` lists the options of a command.",
            f'To begin: {PROGRAM} generate "two pink hearts" -n 4',
        ]
    )
