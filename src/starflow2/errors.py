"""Every exception that users of this package can meet.

    Exception
    └── StarFlowError            catch this one to catch them all
        ├── ShapeError           (ValueError)   a tensor of another shape than the function takes
        ├── ConfigError          (ValueError)   a config key or argument value that cannot be used
        ├── UsageError           (ValueError)   a command line that cannot be understood or followed
        ├── StateError           (RuntimeError) an object that is not in a state for the call
        ├── PromptError          (ValueError)   a prompt or question the model cannot take
        ├── CheckpointError                     weights missing, truncated, foreign or in another format
        ├── DeviceError                         the device asked for is not there
        ├── OutputError          (OSError)      a file could not be written; what was there before is untouched
        ├── DataError                           training or evaluation data that cannot be read or does not fit
        └── TrainingError                       a run that cannot start, go on or resume

A message names the argument, its value, what was expected and, where one is known, the remedy, on one line.
The second bases let callers keep the `except ValueError`, `RuntimeError` and `OSError` that they already have.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "OutputError",
    "PromptError",
    "ShapeError",
    "StarFlowError",
    "StateError",
    "TrainingError",
    "UsageError",
    "nearest",
    "printable_line",
]


class StarFlowError(Exception):
    """The root of the tree: everything this package raises for its users. Its message is one printable line."""

    def __str__(self) -> str:
        return printable_line(super().__str__())


class ShapeError(StarFlowError, ValueError):
    """A tensor of another shape than the function takes."""


class ConfigError(StarFlowError, ValueError):
    """A config key or an argument value that cannot be used."""


class UsageError(StarFlowError, ValueError):
    """A command line that cannot be understood or followed: unknown, missing, repeated or contradictory options."""


class StateError(StarFlowError, RuntimeError):
    """An object that is not in a state for the call: a busy session, a mark of another one, a missing stage."""


class PromptError(StarFlowError, ValueError):
    """A prompt or question that the model cannot take: empty, too long, unknown words."""


class CheckpointError(StarFlowError):
    """Weights that are missing, truncated, foreign, or in a format that this version cannot read."""


class DeviceError(StarFlowError):
    """The device asked for is not there."""


class OutputError(StarFlowError, OSError):
    """A file could not be written. What was there before is untouched."""


class DataError(StarFlowError):
    """Training or evaluation data that cannot be read or does not fit the model."""


class TrainingError(StarFlowError):
    """A training run that cannot start, go on or resume."""


def printable_line(text: str) -> str:
    """Text on one line, in which signs that do not print are escaped: names and values come from anywhere.

    >>> printable_line("a\\x1b[2J.png\\nb")
    'a\\\\x1b[2J.png b'
    """
    line = re.sub(r"\s*[\n\r]\s*", " ", text)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint to append to a message: ' Did you mean "lr"?', or '' where nothing is near.

    cutoff: how much alike the two must be at least, 0 to 1.

    >>> nearest("widht", ["width", "depth"])
    ' Did you mean "width"?'
    >>> nearest("zebra", ["width", "depth"])
    ''
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f' Did you mean "{found[0]}"?' if found else ""
