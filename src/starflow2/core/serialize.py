"""Frozen dataclasses to and from plain dictionaries and JSON, strictly.

A config is a frozen keyword-only dataclass of bool, int, float, str, None, Literal, tuple, dict[str, X], unions of
those and further dataclasses. Reading one back checks every key: an unknown one, a missing one and a value of another
type each raise ConfigError with the path to it. Not here: command lines, and defaults from elsewhere: the dictionary
is the whole config.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from starflow2.core.files import read_regular, replacing
from starflow2.core.json_reader import LARGEST, JsonObject, parse_json
from starflow2.errors import ConfigError, nearest

__all__ = ["JsonObject", "flatten", "from_dict", "load_json", "read_json", "save_json", "to_dict"]

T = TypeVar("T")


def to_dict(cfg: object) -> JsonObject:
    """Convert a config to a dictionary that JSON can hold: dataclasses become dictionaries, tuples become lists.

    Raises ConfigError, naming the path, for a value that JSON would change.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Sheet:
    ...     columns: int = 8
    ...     size: tuple[int, int] = (64, 64)
    >>> to_dict(Sheet())
    {'columns': 8, 'size': [64, 64]}
    """
    if not dataclasses.is_dataclass(cfg) or isinstance(cfg, type):
        raise ConfigError(f"cfg is {_show(cfg)}; expected a dataclass instance.")
    return _plain(cfg, type(cfg).__name__)


def from_dict(cls: type[T], data: object) -> T:
    """Config of class `cls` from a dictionary as `to_dict` writes it.

    Every field must be there, defaults or not: a config is read back years later, when defaults may have changed.
    Raises ConfigError naming path, value, expectation and nearest name.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Sheet:
    ...     columns: int = 8
    >>> from_dict(Sheet, {"columns": 4})
    Sheet(columns=4)
    >>> from_dict(Sheet, {"colums": 4})
    Traceback (most recent call last):
        ...
    starflow2.errors.ConfigError: Sheet.colums: unknown key (value 4), expected columns. Did you mean "columns"?
    """
    return _read(cls, data, cls.__name__)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> JsonObject:
    """A nested dictionary as one level with dotted names.

    >>> flatten({"steps": 3, "optim": {"lr": 0.002}})
    {'steps': 3, 'optim.lr': 0.002}
    """
    flat: JsonObject = {}
    for name, value in tree.items():
        is_nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{name}.") if is_nested else {f"{prefix}{name}": value}
    return flat


def save_json(cfg: object, path: str | Path) -> None:
    """Write the config as JSON, completely or not at all.

    Raises ConfigError for a value JSON cannot hold and OutputError where the file cannot be written.
    """
    text = json.dumps(to_dict(cfg), indent=2, allow_nan=False) + "\n"
    with replacing(path) as temp:
        temp.write_text(text, encoding="utf-8")


def load_json(cls: type[T], path: str | Path) -> T:
    """Config of class `cls` from a JSON file. Raises ConfigError, as `from_dict` and `read_json` do."""
    return from_dict(cls, read_json(path))


def read_json(path: str | Path) -> Any:
    """Parse a JSON file. Raises ConfigError, as `parse_json` does, and where there is no file to read."""
    try:
        data = read_regular(path, LARGEST)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}.") from error
    return parse_json(data, path)


def _show(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _plain(value: object, path: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f'{path}["{key}"]') for key, item in value.items()}
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    raise ConfigError(
        f"{path}: {_show(value)} cannot be written to JSON; expected finite numbers, text, tuples, configs."
    )


def _read(kind: Any, value: object, path: str) -> Any:
    """Read `value` as an instance of the annotation `kind`. Raises ConfigError."""
    if dataclasses.is_dataclass(kind):
        return _read_config(kind, value, path)
    if kind in _SCALARS:
        return _read_scalar(kind, value, path)
    reader = _READERS.get(get_origin(kind))
    if reader is None:
        raise TypeError(f"{path}: from_dict cannot read the annotation {kind!r}.")
    return reader(get_args(kind), value, path)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _read_config(cls: Any, value: object, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: got {_show(value)}, expected a dictionary with the keys of {cls.__name__}.")
    names = [f.name for f in dataclasses.fields(cls)]
    for key in value:
        if key not in names:
            known = ", ".join(names) or "no keys"
            raise ConfigError(
                f"{path}.{key}: unknown key (value {value[key]!r}), expected {known}.{nearest(str(key), names)}"
            )
    for name in names:
        if name not in value:
            raise ConfigError(f"{path}.{name}: missing, expected {_name(_hints(cls)[name])}.")
    fields = {name: _read(_hints(cls)[name], value[name], f"{path}.{name}") for name in names}
    try:
        return cls(**fields)
    except ConfigError as error:  # from the class's own __post_init__, which does not know the path
        raise ConfigError(f"{path}: {error}") from error


def _read_scalar(kind: Any, value: object, path: str) -> Any:
    if kind is float and type(value) is int:  # JSON written by hand says 1 and means 1.0
        return _as_float(value, path)
    if type(value) is not _SCALARS[kind]:  # `is`, because True is an instance of int
        raise ConfigError(f"{path}: got {_show(value)}, expected {_name(kind)}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: got {value}, expected a finite float.")
    return value


def _as_float(value: int, path: str) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ConfigError(
            f"{path}: got a whole number of {value.bit_length()} bits, expected a finite float."
        ) from error


def _read_literal(options: tuple[Any, ...], value: object, path: str) -> Any:
    if any(type(value) is type(option) and value == option for option in options):
        return value
    hint = nearest(value, [o for o in options if isinstance(o, str)]) if isinstance(value, str) else ""
    raise ConfigError(f"{path}: got {_show(value)}, expected {_name(Literal[options])}.{hint}")


def _read_union(options: tuple[Any, ...], value: object, path: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    members = [option for option in options if option is not types.NoneType]
    if len(members) == 1:
        return _read(members[0], value, path)  # its own message is the better one
    for option in members:
        try:
            return _read(option, value, path)
        except ConfigError:
            continue
    meant = _meant(members, value)
    if meant is not None:
        return _read(meant, value, path)  # its message says which key is wrong
    raise ConfigError(f"{path}: got {_show(value)}, expected {' or '.join(map(_name, options))}.")


def _meant(members: list[Any], value: object) -> Any:
    """Config class that shares most keys with `value`; None if none shares any, or two share as many."""
    if not isinstance(value, Mapping):
        return None
    classes = [option for option in members if dataclasses.is_dataclass(option)]
    shared = {cls: len({f.name for f in dataclasses.fields(cls)} & set(value)) for cls in classes}
    best = max(shared.values(), default=0)
    most = [cls for cls, count in shared.items() if count == best]
    return most[0] if best and len(most) == 1 else None


def _read_tuple(items: tuple[Any, ...], value: object, path: str) -> Any:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigError(f"{path}: got {_show(value)}, expected a list.")
    if len(items) == 2 and items[1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise ConfigError(f"{path}: got {_show(value)}, expected a list of length {len(items)}, not {len(value)}.")
    return tuple(_read(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(items, value, strict=True)))


def _read_dict(items: tuple[Any, ...], value: object, path: str) -> Any:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{path}: got {_show(value)}, expected a dictionary with names as keys.")
    return {key: _read(items[1], item, f'{path}["{key}"]') for key, item in value.items()}


def _name(kind: Any) -> str:
    """Annotation in words, for messages."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if kind is types.NoneType:
        return "None"
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


_SCALARS: dict[Any, type] = {kind: kind for kind in (bool, int, float, str, types.NoneType)}
_READERS: dict[Any, Callable[[tuple[Any, ...], object, str], Any]] = {
    Literal: _read_literal,
    Union: _read_union,
    types.UnionType: _read_union,
    tuple: _read_tuple,
    dict: _read_dict,
}
