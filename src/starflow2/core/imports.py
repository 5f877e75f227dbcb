"""Objects of other modules by name, `module:name`: recipes, schemas and components that users write themselves."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from starflow2.errors import ConfigError

__all__ = ["find_object", "importable_folder"]


@contextlib.contextmanager
def importable_folder() -> Iterator[None]:
    """Make modules in the current folder importable inside the block."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def find_object(name: str, purpose: str) -> Any:
    """The object that `module:name` names; modules of the current folder are found, too.

    purpose: what it is to be, for the message: "a recipe". Raises ConfigError where it cannot be imported.

    >>> find_object("math:tau", "a number") > 6
    True
    """
    module, _, attribute = name.partition(":")
    try:
        with importable_folder():
            return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot use {name!r} as {purpose}: {error}.") from error
