"""Range checks of single values, for the `__post_init__` of configs and the first lines of public functions.

A number that is NaN passes every comparison that asks whether it is too small, so each check here says what a value
has to be, not what it must not be. Not here: shapes of tensors (`nn.check`) and types of whole configs (`serialize`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

from starflow2.errors import ConfigError, nearest

__all__ = ["check_choice", "check_flag", "check_real", "check_whole"]


def check_whole(low: int, high: int, **values: object) -> None:
    """Raise ConfigError unless every value is a whole number from `low` to `high`, both included; True is none.

    >>> check_whole(1, 8, depth=9)
    Traceback (most recent call last):
        ...
    starflow2.errors.ConfigError: depth is 9; expected a whole number from 1 to 8.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
            raise ConfigError(f"{name} is {_shown(value)}; expected a whole number from {low} to {high}.")


def check_real(low: float, high: float = math.inf, **values: object) -> None:
    """Raise ConfigError unless every value is a finite number from `low` to `high`, both included.

    >>> check_real(0, clip=float("nan"))
    Traceback (most recent call last):
        ...
    starflow2.errors.ConfigError: clip is nan; expected a finite number of at least 0.
    """
    for name, value in values.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not (math.isfinite(value) and low <= value <= high):  # type: ignore[arg-type,operator]
            bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ConfigError(f"{name} is {_shown(value)}; expected a finite number {bounds}.")


def check_flag(**values: object) -> None:
    """Raise ConfigError unless every value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {_shown(value)}; expected True or False.")


def check_choice(options: Sequence[str], **values: object) -> None:
    """Raise ConfigError unless every value is one of the options.

    >>> check_choice(("l2r", "r2l"), direction="rtl")
    Traceback (most recent call last):
        ...
    starflow2.errors.ConfigError: direction is 'rtl'; expected 'l2r' or 'r2l'. Did you mean "r2l"?
    """
    for name, value in values.items():
        if not isinstance(value, str) or value not in options:
            hint = nearest(value, options) if isinstance(value, str) else ""
            raise ConfigError(f"{name} is {_shown(value)}; expected {' or '.join(map(repr, options))}.{hint}")


def _shown(value: object) -> str:
    """The value on one line of bounded length."""
    text = " ".join((str if isinstance(value, Real) else repr)(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
