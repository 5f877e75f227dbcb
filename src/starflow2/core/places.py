"""Places that hold no data of a user: the whole disk, and what the system shows of itself under /proc, /sys and /dev.

A pattern over one of these would be listed for minutes before anything is read, and a file there may be endless or
wait for ever. Not here: how files are read and written (files), what a corpus looks like (data.shards).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from starflow2.errors import StarFlowError

__all__ = ["check_walk", "is_of_the_system"]

SYSTEM = ("/proc", "/sys", "/dev")
MEMORY = "/dev/shm"  # a disk in memory, where data may well be
MAGIC = re.compile(r"[*?[]")
LEVELS = 2  # of folders that a pattern without ** may list from the root of the disk on


def is_of_the_system(path: str | os.PathLike[str]) -> bool:
    """True for what lies below /proc, /sys or /dev, also by way of links.

    >>> is_of_the_system("/proc/self/status"), is_of_the_system("/dev/shm/run"), is_of_the_system("/tmp")
    (True, False, False)
    """
    try:
        real = os.path.realpath(path)
    except ValueError:  # a NUL, half a surrogate pair: no name of anything
        return False
    return any(_is_below(real, place) for place in SYSTEM) and not _is_below(real, MEMORY)


def check_walk(place: str | os.PathLike[str], name: str, error: type[StarFlowError]) -> None:
    """Raise `error` for a local folder, file or pattern that would list or read the system's own, or the whole disk.

    name: of the argument, for the message. Nothing is listed, whatever the pattern.
    """
    fixed, levels = _fixed(os.fsdecode(place))
    try:
        real = os.path.realpath(fixed)
    except ValueError:  # no name of anything: nothing is listed
        return
    is_deep = not levels or len(levels) > LEVELS or any("**" in level for level in levels)
    if is_of_the_system(real):
        what = "which the system shows of itself"
    elif is_deep and real == os.path.dirname(real):
        what = "which is the whole disk"
    else:
        return
    raise error(f"{name} is {os.fsdecode(place)!r:.200}, {what}; expected the folder or the files that hold your data.")


def _fixed(pattern: str) -> tuple[str, list[str]]:
    """The folder that a pattern begins with, and the levels of folders and files that its signs stand for."""
    parts = pattern.split("/")
    for i, part in enumerate(parts):
        if MAGIC.search(re.sub(r"\[[*?[]\]", "", part)):  # an escaped sign stands for itself
            return _literal("/".join(parts[:i])) or ("/" if i else "."), parts[i:]
    return _literal(pattern), []


def _literal(pattern: str) -> str:
    """A pattern without signs that are not escaped as the name that it means."""
    return re.sub(r"\[([*?[])\]", r"\1", pattern)


def _is_below(real: str, place: str) -> bool:
    return real == place or Path(place) in Path(real).parents
