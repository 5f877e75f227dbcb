"""The one reader of JSON: what it lets through has plain finite numbers and no key twice.

Python's own reader takes NaN and Infinity, keeps the last of two equal keys and ends in a RecursionError on deep
nesting. Not here: configs (`serialize`), files (`serialize.read_json`).
"""

from __future__ import annotations

import json
import math
from typing import Any

from starflow2.errors import ConfigError

__all__ = ["LARGEST", "JsonObject", "parse_json", "parse_record"]

JsonObject = dict[str, Any]  # an object as JSON holds it

LARGEST = 1 << 26  # bytes; the largest of our own files, a tokenizer of 150,000 tokens, has 7 million


def parse_json(text: str | bytes, where: object) -> Any:
    """Value of a JSON text, which bytes hold as UTF-8.

    Raises ConfigError, saying `where`, for what is no JSON, is larger than 64 MiB or nested too deeply, for a key that
    stands twice in an object and for NaN and infinity.

    >>> parse_json('{"lr": 1e-3}', "settings")
    {'lr': 0.001}
    """
    if len(text) > LARGEST:
        raise ConfigError(f"{where} has {len(text)} bytes of JSON; expected at most {LARGEST}.")
    try:
        text = text.decode() if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_refused, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ConfigError(f"{where} is not JSON: {error}.") from error


def parse_record(text: str | bytes) -> Any:
    """Value of a record in a corpus of others, where NaN stands for a missing number. Raises ValueError."""
    if len(text) > LARGEST:
        raise ValueError(f"{len(text)} bytes of JSON; expected at most {LARGEST}")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> JsonObject:
    """Dictionary of the pairs of a JSON object. Raises ValueError for a repeated key: JSON would ignore one."""
    data: JsonObject = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f'key "{key}" occurs twice')
        data[key] = value
    return data


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999
        raise ValueError(f"{text} is no finite number")
    return value
