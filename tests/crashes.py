"""Kill a piece of work at each of its file operations in turn."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree"}


def crashes(work: Callable[[], object], operations: set[str] = OPERATIONS) -> Iterator[int]:
    """Yield after a process that did `work` was killed at its first file operation, its second, and so on to the last.

    Python announces each operation before it happens; os.replace is an os.rename, and unlink an os.remove.
    """
    number = 0
    while True:
        child = os.fork()
        if not child:
            _do_until(work, number, operations)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 9:
            return
        yield number
        number += 1


def _do_until(work: Callable[[], object], number: int, operations: set[str]) -> None:
    left = [number]

    def watch(event: str, _: object) -> None:
        if event in operations:
            if not left[0]:
                os._exit(9)
            left[0] -= 1

    try:
        sys.addaudithook(watch)
        work()
    finally:
        os._exit(0)
