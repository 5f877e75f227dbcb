"""Numbers from outside: types that carry their range, and the base of configs, which checks every field.

`steps: Count` says what the field holds and refuses everything else when the config is made, wherever it comes from:
Python, a command line, a JSON file. Numbers of numpy become Python's. Not here: how configs are read (serialize).
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from starflow2.core.text import shown
from starflow2.errors import ConfigError, nearest

__all__ = [
    "SEEDS",
    "Config",
    "Count",
    "Depth",
    "Extent",
    "Natural",
    "Positive",
    "Range",
    "Seed",
    "Share",
    "Size",
    "Weight",
    "conform",
    "described",
    "number",
    "of_kind",
    "whole",
]


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Bounds of a number: at least and at most, or strictly above and below."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:  # what no counter and no tensor holds
            return False
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "below": self.below, "at most": self.most}
        return " and ".join(f"{words} {_figure(bound)}" for words, bound in bounds.items() if math.isfinite(bound))


Natural = Annotated[int, Range(least=0)]
Count = Annotated[int, Range(least=1)]
Size = Annotated[int, Range(least=1, most=2**20)]  # of an axis: width, vocabulary, pixels, positions
Extent = Annotated[int, Range(least=0, most=2**20)]  # a size that may be left out
Depth = Annotated[int, Range(least=0, most=4096)]  # layers; bounded, because lists of this length are built
Share = Annotated[float, Range(least=0, most=1)]
Weight = Annotated[float, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
SEEDS = Range(least=-(2**63), most=2**63 - 1)
Seed = Annotated[int, SEEDS]


def _figure(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


class Config:
    """Base of config dataclasses: every field is checked against its annotation, and numbers become Python's own.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Sheet(Config):
    ...     columns: Count = 8
    >>> Sheet(columns=0)
    Traceback (most recent call last):
        ...
    starflow2.errors.ConfigError: columns is 0; expected at least 1.
    """

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, kind in _hints(cls).items():
            object.__setattr__(self, name, conform(kind, getattr(self, name), name))


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def whole(value: object, name: str, allowed: Range | None = None) -> int:
    """An integer as Python's own, also one of numpy's. Raises ConfigError for any other value, bool included.

    >>> whole(3, "n", Range(least=1))
    3
    """
    try:
        if not _is_single(value):
            raise TypeError
        found = operator.index(value)  # type: ignore[arg-type]
    except Exception as error:  # of the conversion of any object
        raise ConfigError(f"{name} is {described(value)}; expected a whole number{_of(allowed)}.") from error
    return _within(found, name, allowed or SEEDS)


def number(value: object, name: str, allowed: Range | None = None) -> float:
    """A finite number as Python's float, also one of numpy's. Raises ConfigError for any other value, bool included."""
    try:
        if not _is_single(value) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
            raise TypeError
        found = float(value)  # type: ignore[arg-type]
    except Exception as error:  # of the conversion of any object
        raise ConfigError(f"{name} is {described(value)}; expected a number{_of(allowed)}.") from error
    if not math.isfinite(found):
        raise ConfigError(f"{name} is {found}; expected a finite number{_of(allowed)}.")
    return _within(found, name, allowed)


def of_kind(value: object, kind: type[T], name: str, remedy: str = "") -> T:
    """`value` itself, which is an instance of `kind`. Raises ConfigError, with the remedy, for anything else.

    >>> of_kind("nano", dict, "settings", "dict(name='nano')")
    Traceback (most recent call last):
        ...
    starflow2.errors.ConfigError: settings is 'nano' (str); expected dict: dict(name='nano').
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{name} is {described(value)}; expected {kind.__name__}{f': {remedy}' if remedy else ''}.")
    return value


def conform(kind: Any, value: object, name: str) -> Any:
    """`value` as the annotation `kind` describes it. Raises ConfigError, naming the field and what was expected.

    Checks numbers, text, Literals, tuples, dictionaries, dataclasses and unions of these; other kinds pass unseen.
    """
    allowed = None
    if get_origin(kind) is Annotated:
        kind, *marks = get_args(kind)
        allowed = next((mark for mark in marks if isinstance(mark, Range)), None)
    if kind is int:
        return whole(value, name, allowed)
    if kind is float:
        return number(value, name, allowed)
    if kind in (bool, str):
        return _plain(kind, value, name)
    declared: Any = kind
    if dataclasses.is_dataclass(kind):
        return of_kind(value, declared, name)
    check = _CHECKS.get(get_origin(kind))
    return value if check is None else check(get_args(kind), value, name)


def _plain(kind: Any, value: object, name: str) -> Any:
    if kind is bool and _is_bool(value):
        return bool(value)
    return of_kind(value, kind, name)


def _literal(options: tuple[Any, ...], value: object, name: str) -> Any:
    if any(type(value) is type(option) and value == option for option in options):
        return value
    known = [str(option) for option in options]
    raise ConfigError(f"{name} is {shown(value)}; expected one of {', '.join(known)}.{nearest(str(value)[:60], known)}")


def _union(options: tuple[Any, ...], value: object, name: str) -> Any:
    if value is None and NoneType in options:
        return None
    members = [option for option in options if option is not NoneType]
    for option in members[:-1]:
        try:
            return conform(option, value, name)
        except ConfigError:
            continue
    return conform(members[-1], value, name)  # the one member beside None gives the better message


def _tuple(items: tuple[Any, ...], value: object, name: str) -> Any:
    if not isinstance(value, tuple):
        raise ConfigError(f"{name} is {described(value)}; expected a tuple.")
    if len(items) == 2 and items[1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise ConfigError(f"{name} is {shown(value)}; expected {len(items)} values, not {len(value)}.")
    return tuple(conform(kind, item, f"{name}[{i}]") for i, (kind, item) in enumerate(zip(items, value, strict=True)))


def _dict(items: tuple[Any, ...], value: object, name: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {described(value)}; expected a dictionary.")
    return {conform(items[0], key, name): conform(items[1], item, f"{name}[{key!r}]") for key, item in value.items()}


_CHECKS: dict[Any, Callable[[tuple[Any, ...], object, str], Any]] = {
    Literal: _literal,
    Union: _union,
    UnionType: _union,
    tuple: _tuple,
    dict: _dict,
}


def _within(value: Any, name: str, allowed: Range | None) -> Any:
    if allowed is not None and value not in allowed:
        raise ConfigError(f"{name} is {shown(value)}; expected {allowed}.")
    return value


def _of(allowed: Range | None) -> str:
    return "" if allowed is None else f" {allowed}"


def described(value: object) -> str:
    """A value and its type, for messages."""
    return f"{shown(value)} ({type(value).__name__})"


def _is_bool(value: object) -> bool:
    """True for Python's and numpy's truth values, which are numbers by inheritance or conversion only."""
    return isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"))


def _is_single(value: object) -> bool:
    """False for truth values, for arrays and tensors of any but no axes, and for what is a date or a span of time."""
    kind = str(getattr(value, "dtype", ""))
    has_axes = getattr(value, "ndim", 0) != 0
    return not (_is_bool(value) or has_axes or "bool" in kind or "time" in kind)
