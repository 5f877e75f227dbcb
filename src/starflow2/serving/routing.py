"""Which of several replicas a request goes to: the one that keeps its conversation, else the one with least to do.

An id of a kept response begins with the number of its replica. A conversation that is sent whole goes where its first
message leads, so that its past is found there. Not here: processes (`ray_app`); a plain load balancer can do the same
from the documentation.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from starflow2.core.json_reader import parse_json
from starflow2.errors import ConfigError

__all__ = ["Choice", "choose", "number_of"]

PREFIX = 4  # hexadecimal digits of an id that tell its replica
_ID = re.compile(rf"resp_([0-9a-f]{{{PREFIX}}})[0-9a-f]{{{32 - PREFIX}}}")
_CONVERSATION = re.compile(r"/v1/responses/(resp_[0-9a-f]{32})")


@dataclass(frozen=True, slots=True)
class Choice:
    """A replica for a request. is_pinned: no other one can answer it."""

    number: int
    is_pinned: bool = False


def choose(path: str, body: bytes, loads: Sequence[int]) -> Choice:
    """The replica for a request; loads: requests in progress at each.

    >>> choose("/v1/images/generations", b"{}", [3, 1])
    Choice(number=1, is_pinned=False)
    >>> choose("/v1/responses", b'{"previous_response_id": "resp_0000%s"}' % (28 * b"a"), [3, 1])
    Choice(number=0, is_pinned=True)
    """
    found = _CONVERSATION.fullmatch(path)
    name = found[1] if found else _named(path, body)
    number = None if name is None else number_of(name)
    if number is not None and number < len(loads):
        return Choice(number, is_pinned=True)
    if path == "/v1/chat/completions":
        start = _first_message(body)
        if start is not None:
            return Choice(zlib.crc32(start) % len(loads))
    least = [number for number, load in enumerate(loads) if load == min(loads)]
    return Choice(least[zlib.crc32(body) % len(least)])  # equal ones take turns, also for one client at a time


def number_of(name: str) -> int | None:
    """The number of the replica that made an id."""
    found = _ID.fullmatch(name)
    return None if found is None else int(found[1], 16)


def _named(path: str, body: bytes) -> str | None:
    """The response that a request continues."""
    if path != "/v1/responses":
        return None
    name = _field(body, "previous_response_id")
    return name if isinstance(name, str) else None


def _first_message(body: bytes) -> bytes | None:
    """The first message of a conversation that has more than one."""
    messages = _field(body, "messages")
    return repr(messages[0]).encode() if isinstance(messages, list) and len(messages) > 1 else None


def _field(body: bytes, name: str) -> object:
    try:
        fields = parse_json(body, "the body")
    except ConfigError:  # the replica says what is wrong with it
        return None
    return fields.get(name) if isinstance(fields, dict) else None
