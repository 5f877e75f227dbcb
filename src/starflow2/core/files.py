"""Writing files so that a failure leaves what was there before.

Not a file format: configs, pictures and checkpoints all write through `replacing`, which is why it has a home of its
own below them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starflow2.errors import OutputError

__all__ = ["check_writable", "replacing"]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; when the block ends it becomes `path` in one step.

    Folders on the way are made. An error inside the block, or a full disk, leaves an earlier file as it was and no
    temporary one behind. Any OSError comes out as an OutputError that says which file and why. A link is followed;
    a device or a folder is refused rather than replaced.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with replacing(target) as temp:
    ...     _ = temp.write_text("hello")
    >>> target.read_text()
    'hello'
    """
    target = Path(os.path.realpath(path))
    temp = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists() and not target.is_file():
            raise OutputError(f"cannot write {path}: it is there already and is not a regular file.")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temp
            _flush(temp)
            os.replace(temp, target)
        finally:
            temp.unlink(missing_ok=True)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error


def check_writable(path: str | Path) -> None:
    """Raise now the OutputError that `replacing` would raise after minutes of work: folder read-only, name taken.

    Nothing is made: folders that `replacing` would make are looked for at their nearest existing parent.

    >>> check_writable(Path(tempfile.gettempdir()) / "new" / "note.txt")
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            raise OutputError(f"cannot write {path}: it is there already and is not a regular file.")
        folder = next(parent for parent in target.parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error


def _flush(path: Path) -> None:
    """Ask for the bytes to be on the disk: without this a power cut may leave the new name with an empty file."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
