"""Keys of clients: where they come from, and whose a request is.

Keys are compared by their digests in constant time, all of them every time. An owner's name is a digest, too: no log,
file or metric holds a key. Without keys everybody is one owner, which only a loopback address allows.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

from starflow2.core.text import read_text
from starflow2.errors import ConfigError
from starflow2.serving.jobs import LOCAL

__all__ = ["ENVIRONMENT", "Keys", "is_loopback"]

ENVIRONMENT = "STARFLOW2_API_KEYS"  # keys, apart by commas or line breaks
SHORTEST = 16  # characters of a key


class Keys:
    """The keys that are let in; without any, everybody is.

    >>> keys = Keys(["a-key-of-24-characters-!"])
    >>> keys.owner_of({"authorization": "Bearer a-key-of-24-characters-!"}) is None
    False
    >>> keys.owner_of({"authorization": "Bearer another"}) is None
    True
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = {_digest(key): f"key-{_digest(_checked(key)).hex()[:16]}" for key in keys}

    @classmethod
    def load(cls, path: Path | None, environment: Mapping[str, str] = os.environ) -> Keys:
        """Keys of a file, one a line, and of the environment. Raises DataError, ConfigError for one that is too short.

        Empty lines and those that begin with # are no keys.
        """
        text = environment.get(ENVIRONMENT, "").replace(",", "\n") + "\n" + ("" if path is None else read_text(path))
        lines = [line.strip() for line in text.splitlines()]
        keys = cls(line for line in lines if line and not line.startswith("#"))
        if path is not None and not keys:
            raise ConfigError(f"{path} holds no key; expected one a line.")
        return keys

    def __len__(self) -> int:
        return len(self._digests)

    def owner_of(self, headers: Mapping[str, str]) -> str | None:
        """Whose a request is, by its headers (lower case); None if its key is none of ours.

        A key comes as `Authorization: Bearer KEY`, or as the password of Basic, which browsers ask for.
        """
        if not self._digests:
            return LOCAL
        given, owner = _digest(_given(headers.get("authorization", ""))), None
        for digest, name in self._digests.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(digest, given):
                owner = name
        return owner


def is_loopback(host: str) -> bool:
    """True for addresses and names that only this machine can reach."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _checked(key: str) -> str:
    if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"a key has {len(key)} characters; expected at least {SHORTEST}, of ASCII and without blanks."
        )
    return key


def _digest(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "replace"), digest_size=32, person=b"starflow2-key").digest()


def _given(header: str) -> str:
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""
