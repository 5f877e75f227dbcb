"""Locks between processes: one writer per folder, and a second one is told who the first is.

The lock is the system's own on an open file, so that it ends with its process, however that ends; the file only says
who holds it. Not here: what a folder holds (`folders`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from starflow2.core.files import write_errors
from starflow2.core.json_reader import parse_record
from starflow2.errors import StarFlowError

__all__ = ["LOCK", "folder_lock", "wait_for_lock"]

LOCK = ".starflow2.lock"  # in the folder that is locked, while it is

if sys.platform == "win32":
    import msvcrt

    FAR = 1 << 30  # a byte far behind what a file says of its holder: a locked one cannot be read on Windows

    def _lock(descriptor: int, *, waits: bool) -> None:
        os.lseek(descriptor, FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_LOCK if waits else msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int, *, waits: bool) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))


@contextlib.contextmanager
def folder_lock(folder: Path, error: type[StarFlowError], doing: str) -> Iterator[None]:
    """Inside the block nobody else holds the lock of `folder`, which is created if it is missing.

    doing: what the holder does, in words for whoever comes second. Raises `error`, naming the holder, if another
    process, or another thread of this one, holds it; OutputError where no lock can be written.
    """
    path, missing = folder / LOCK, [place for place in (folder, *folder.parents) if not place.exists()]
    with write_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _hold(path)
        if descriptor is None:
            raise error(f"{folder} is in use: {_holder(path)}. Wait until it has ended, or give another folder.")
        _describe(descriptor, doing)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove a file that is open
            path.unlink()
        os.close(descriptor)
        with contextlib.suppress(OSError):  # a run that is refused leaves no empty folder
            for place in missing:
                place.rmdir()


def wait_for_lock(descriptor: int) -> None:
    """Wait until nobody else holds the lock of an open file; closing the file gives it back."""
    with contextlib.suppress(OSError):  # a file system without locks
        _lock(descriptor, waits=True)


def _hold(path: Path) -> int | None:
    """Open and lock `path`; None if someone else holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(descriptor, waits=False)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return None
        except OSError as error:
            warnings.warn(f"{path.parent} cannot be locked ({error.strerror}): use it from one process.", stacklevel=4)
            return descriptor
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its holder removed it between our two steps


def _describe(descriptor: int, doing: str) -> None:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "doing": doing}
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(about).encode())


def _holder(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        about = parse_record(path.read_bytes()[:4096])
        return f"process {about['pid']:d} on {about['host']!a} has been {about['doing']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process is working in it"
