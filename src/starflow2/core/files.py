"""Write files so that a failure leaves the earlier file as it was.

Not a file format: configs, images and checkpoints all write through `replacing`.
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
    """Context of a temporary path beside `path` to write to; when the block ends it becomes `path` in one step.

    Missing folders are created. An error inside the block, or a full disk, leaves an earlier file as it was and no
    temporary file. An OSError becomes an OutputError that says which file and why. A link is followed; a device or a
    folder is refused rather than replaced.

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
            raise OutputError(f"cannot write {path}: it exists and is not a regular file; give another name.")
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
    """Raise at once the OutputError that `replacing` would raise after minutes of work: folder read-only, name taken.

    Creates nothing: of folders that `replacing` would create, the nearest existing parent is checked.

    >>> check_writable(Path(tempfile.gettempdir()) / "new" / "note.txt")
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            raise OutputError(f"cannot write {path}: it exists and is not a regular file; give another name.")
        folder = next(parent for parent in target.parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error


def _flush(path: Path) -> None:
    """Force the bytes to the disk: without this a power cut may leave an empty file under the new name."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
