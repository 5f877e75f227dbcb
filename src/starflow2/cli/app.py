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

__all__ = ["COMMANDS", "command", "main", "split_verb"]

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
    "eval geneval": "starflow2.cli.eval_drawing:DrawGeneval",
    "eval geneval score": "starflow2.cli.eval_drawing:ScoreGeneval",
    "eval geneval detect": "starflow2.cli.eval_drawing:DetectGeneval",
    "eval dpg": "starflow2.cli.eval_drawing:DrawDpg",
    "eval dpg score": "starflow2.cli.eval_drawing:ScoreDpg",
    "eval gedit": "starflow2.cli.eval_editing:DrawGedit",
    "eval gedit score": "starflow2.cli.eval_editing:ScoreGedit",
    "eval imgedit": "starflow2.cli.eval_editing:DrawImgedit",
    "eval imgedit score": "starflow2.cli.eval_editing:ScoreImgedit",
    "eval magicbrush": "starflow2.cli.eval_editing:DrawMagicbrush",
    "eval magicbrush score": "starflow2.cli.eval_editing:ScoreMagicbrush",
    "eval isg": "starflow2.cli.eval_interleaved:ReplyIsg",
    "eval isg score": "starflow2.cli.eval_interleaved:ScoreIsg",
    "eval mme": "starflow2.cli.eval_answering:AskMme",
    "eval gqa": "starflow2.cli.eval_answering:AskGqa",
    "eval seed": "starflow2.cli.eval_answering:AskSeed",
    "eval mmbench": "starflow2.cli.eval_answering:AskMmbench",
    "eval mmmu": "starflow2.cli.eval_answering:AskMmmu",
    "eval ai2d": "starflow2.cli.eval_answering:AskAi2d",
    "eval likelihood": "starflow2.cli.eval_density:EvalLikelihood",
    "eval report": "starflow2.cli.eval_report:EvalReport",
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


def split_verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The longest verb that a command line begins with, and what follows: "eval geneval score" is one of three words.

    A first word that is no verb is returned as it is.
    """
    for count in (3, 2):
        verb = " ".join(arguments[:count])
        if verb in COMMANDS:
            return verb, list(arguments[count:])
    return arguments[0], list(arguments[1:])


def command(verb: str) -> type[Command]:
    """The dataclass of a verb. Raises UsageError with the nearest verb."""
    if verb not in COMMANDS:
        known = _single_words()
        raise UsageError(f"there is no command {verb!r}; expected one of {', '.join(known)}.{nearest(verb, known)}")
    module, _, name = COMMANDS[verb].partition(":")
    found: type[Command] = getattr(import_module(module), name)
    return found


def _dispatch(arguments: list[str]) -> int:
    verb, rest = split_verb(arguments or ["--help"])
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
        print(help_text(kind, program), *_below(kind.verb), sep="", end="")
        others = [argument for argument in arguments if argument not in ("-h", "--help")]
        if kind is Train and others:
            print(parse(Train, others, program)[0].stage_help())
        return 0
    refuse_repeated(arguments, program, kind)
    parsed, unknown = parse(kind, arguments, program)
    return parsed.run(unknown)


def _single_words() -> list[str]:
    """Verbs that stand on the first help page; those of several words stand on the page of their first."""
    return [verb for verb in COMMANDS if " " not in verb]


def _first_lines(verbs: Sequence[str]) -> list[str]:
    """Verbs with the first line of their docstring."""
    width = max(map(len, verbs))
    firsts = {verb: docstring_of(command(verb)).partition("\n")[0] for verb in verbs}
    return [f"  {verb:<{width}}  {first}".rstrip() for verb, first in firsts.items()]


def _below(verb: str) -> list[str]:
    """Lines that the help page of a verb ends with: the longer verbs that begin with it."""
    longer = [other for other in COMMANDS if other.startswith(f"{verb} ")]
    return (
        ["\ncommands with options of their own:\n", *(f"{line}\n" for line in _first_lines(longer))] if longer else []
    )


def _overview() -> str:
    """The help page of the program: every verb with the first line of its docstring."""
    lines = _first_lines(_single_words())
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
