"""Files that judges exchange with us: one JSON object a line, each refused by file and line if it is not as agreed.

The first line names the judge, so that a report can say whose eyes it rests on: {"judge": "geneval"}. All other lines
are records of one dataclass. Keys that Python reserves ("class") are fields with an underscore behind them (`class_`).
"""

from __future__ import annotations

import dataclasses
import keyword
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from starflow2.core.json_reader import JsonObject, parse_json
from starflow2.core.serialize import from_dict
from starflow2.core.text import read_text, shown
from starflow2.errors import ConfigError, DataError

__all__ = ["JudgeFile", "Placed", "check_complete", "read_judged", "read_lines", "read_objects"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Placed(Generic[T]):
    """A record and where it stands, as "file:line"."""

    where: str
    value: T


@dataclass(frozen=True, slots=True)
class JudgeFile(Generic[T]):
    """Records of a judge, and its name."""

    judge: str
    records: Sequence[Placed[T]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    judge: str


def read_objects(path: str | Path) -> list[Placed[JsonObject]]:
    """The JSON objects of a file, one a line. Raises DataError with file and line for anything else."""
    lines = read_text(path).split("\n")
    if lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"{path} is empty; expected one JSON object a line.")
    return [Placed(f"{path}:{i}", _object(line, f"{path}:{i}")) for i, line in enumerate(lines, 1)]


def _object(line: str, where: str) -> JsonObject:
    if not line.strip():
        raise DataError(f"{where} is empty; expected one JSON object a line.")
    try:
        found = parse_json(line, where)
    except ConfigError as error:
        raise DataError(str(error)) from error
    if not isinstance(found, dict):
        raise DataError(f"{where} holds {shown(found)}; expected a JSON object.")
    return found


def read_lines(path: str | Path, kind: type[T]) -> list[Placed[T]]:
    """The records of a file. Fields with a default may be left out. Raises DataError with file and line."""
    return [Placed(line.where, _record(kind, line)) for line in read_objects(path)]


def read_judged(path: str | Path, kind: type[T]) -> JudgeFile[T]:
    """The judge that the first line names, and the records behind it. Raises DataError with file and line."""
    first, *rest = read_objects(path)
    if set(first.value) != {"judge"}:
        raise DataError(
            f'{first.where} holds {shown(first.value)}; expected {{"judge": NAME}}, the name of who wrote this file.'
        )
    header = _record(_Header, first)
    if not header.judge.strip():
        raise DataError(f"{first.where}: judge is empty; expected the name of who wrote this file.")
    return JudgeFile(header.judge, [Placed(line.where, _record(kind, line)) for line in rest])


def _record(kind: type[T], line: Placed[JsonObject]) -> T:
    try:
        return from_dict(kind, _filled(kind, line.value))
    except ConfigError as error:
        fault = str(error).removeprefix(kind.__name__).lstrip(".: ")  # the reader of a file does not know our classes
        raise DataError(f"{line.where}: {fault}") from error


def _filled(kind: Any, value: Any) -> Any:
    """A JSON object with the defaults of a dataclass, and with names that Python can have."""
    if not isinstance(value, dict):
        return value
    named = {f"{key}_" if keyword.iskeyword(key) else key: inner for key, inner in value.items()}
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            named.setdefault(field.name, field.default)
        inner = field.metadata.get("of")
        if inner is not None and isinstance(named.get(field.name), list):
            named[field.name] = [_filled(inner, item) for item in named[field.name]]
    return named


def check_complete(
    records: Iterable[Placed[T]], key: Callable[[T], Hashable], expected: Iterable[Hashable], source: str | Path
) -> list[Placed[T]]:
    """The records, each key once and all that are expected among them.

    source: the file they are of. Raises DataError for a key twice, one that was not expected, and one that is missing.
    """
    wanted, seen, found = set(expected), dict[Hashable, str](), list(records)
    for record in found:
        name = key(record.value)
        if name in seen:
            raise DataError(f"{record.where} is about {_said(name)}, and so is {seen[name]}; expected it once.")
        if name not in wanted:
            raise DataError(f"{record.where} is about {_said(name)}, which was not asked for; expected another file.")
        seen[name] = record.where
    missing = sorted(map(_said, wanted - set(seen)))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{source} has nothing about {', '.join(missing[:3])}{more}; let the judge read all of it.")
    return found


def _said(name: Hashable) -> str:
    return ", ".join(map(str, name)) if isinstance(name, tuple) else str(name)
