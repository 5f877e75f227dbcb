"""Objects of other modules by name, `module:name`: recipes, schemas and components that users write themselves."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from starflow2.errors import ConfigError, StarFlowError

__all__ = ["find_object", "foreign_code", "importable_folder"]

PACKAGE = Path(__file__).parent.parent


@contextlib.contextmanager
def importable_folder() -> Iterator[None]:
    """Make modules in the current folder importable inside the block."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


@contextlib.contextmanager
def foreign_code(name: str, purpose: str) -> Iterator[None]:
    """Inside the block code of a user runs; what it raises becomes a ConfigError with its file and line.

    `sys.exit` counts as well: a command would end in silence, with a status of somebody else. Errors of ours pass.
    """
    try:
        yield
    except StarFlowError:
        raise
    except SystemExit as error:
        raise ConfigError(
            f"cannot use {name!r} as {purpose}: it calls sys.exit({error.code!r:.60}){_place(error)}; let it return "
            "or raise an error instead."
        ) from error
    except Exception as error:
        reason = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"cannot use {name!r} as {purpose}: {reason.rstrip('.')}{_place(error)}.") from error


def _place(error: BaseException) -> str:
    """File and line of the user's code that an error comes from; "" where none of it ran."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        is_other = "importlib" in frame.filename or Path(frame.filename).is_relative_to(PACKAGE)
        if not is_other:
            return f" at {frame.filename}:{frame.lineno}"
    return ""


def find_object(name: str, purpose: str) -> Any:
    """The object that `module:name` names; modules of the current folder are found, too.

    purpose: what it is to be, for the message: "a recipe". Raises ConfigError where it cannot be imported, or exits.

    >>> find_object("math:tau", "a number") > 6
    True
    """
    module, _, attribute = name.partition(":")
    with foreign_code(name, purpose), importable_folder():
        return getattr(import_module(module), attribute)
