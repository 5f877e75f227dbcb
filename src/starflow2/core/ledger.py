"""Files that grow by one line of JSON at a time: ledgers of test runs, curves of training. No half lines.

Not here: what the lines say; files that are written whole (`files`).
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

from starflow2.core.files import regular_target, write_errors
from starflow2.core.json_reader import parse_record
from starflow2.core.locks import wait_for_lock

__all__ = ["append_line"]

TAIL = 1 << 20  # bytes at the end of a file in which its last line is looked for


def append_line(path: str | Path, record: Mapping[str, object]) -> None:
    """Add one line of JSON to a file, whole or not at all. Raises OutputError.

    Half a line that an earlier process left at the end is removed first. Several processes may append at once.
    """
    line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    with write_errors(path):
        target = regular_target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        try:
            wait_for_lock(descriptor)
            _append(descriptor, line)
        finally:
            os.close(descriptor)


def _append(descriptor: int, line: bytes) -> None:
    """Add a line to an open file that nobody else is writing to; after an error the file is as it was."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    os.lseek(descriptor, max(0, end - TAIL), os.SEEK_SET)
    last = os.read(descriptor, TAIL).rpartition(b"\n")[2]
    if last and _is_json(last):  # written by an editor that leaves out the last line break
        line = b"\n" + line
    elif last:
        end -= len(last)
        os.ftruncate(descriptor, end)
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(parse_record(line), dict)
    except ValueError:
        return False
