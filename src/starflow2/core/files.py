"""Write files so that a failure, a kill or a power cut leaves the earlier file as it was.

Not a file format: configs, images and checkpoints all write through `replacing`. Not here: whole folders (`folders`),
files that grow line by line (`ledger`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from starflow2.core.places import is_of_the_system
from starflow2.core.text import shown
from starflow2.errors import OutputError, StarFlowError

__all__ = [
    "TEMPORARY",
    "check_regular",
    "check_writable",
    "create_new",
    "file_digest",
    "flush_file",
    "flush_folder",
    "named_place",
    "read_regular",
    "regular_target",
    "replacing",
    "temporary_name",
    "write_errors",
]

TEMPORARY = ".starflow2-"  # how the name of everything begins that is not finished yet
DAY = 24 * 3600.0  # seconds after which a temporary file belongs to a process that was killed
NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # of file systems on which folders cannot be flushed


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Context of a temporary path beside `path` to write to; when the block ends it becomes `path` in one step.

    Missing folders are created. An error inside the block, or a full disk, leaves an earlier file as it was and no
    temporary file. An OSError becomes an OutputError that says which file and why. A link is followed; a device or a
    folder is refused rather than replaced. The file gets the permissions that the umask leaves, whoever writes it.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with replacing(target) as temp:
    ...     _ = temp.write_text("hello", encoding="utf-8")
    >>> target.read_text(encoding="utf-8")
    'hello'
    """
    with write_errors(path):
        target = regular_target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        temp = target.with_name(temporary_name())
        mode = create_new(temp)
        try:
            yield temp
            flush_file(temp, mode)
            os.replace(temp, target)
        finally:
            temp.unlink(missing_ok=True)
        flush_folder(target.parent)


def check_writable(path: str | Path) -> None:
    """Raise at once the OutputError that `replacing` would raise after minutes of work: folder read-only, name taken.

    Creates nothing: of folders that `replacing` would create, the nearest existing parent is checked.

    >>> check_writable(Path(tempfile.gettempdir()) / "new" / "note.txt")
    """
    with write_errors(path):
        target = regular_target(path)
        folder = next(parent for parent in target.parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass


def check_regular(path: str | Path) -> None:
    """Raise OSError for a file that is not there, and for what is none: a folder, a pipe that waits, a device, and what
    looks like a file below /proc, /sys or /dev."""
    if not isinstance(path, str | os.PathLike):  # a number would be that of an open file
        raise OSError(errno.EINVAL, f"{shown(path)} is not the name of a file")
    try:
        is_regular = stat.S_ISREG(os.stat(path).st_mode)
    except ValueError as error:  # a NUL or half a surrogate pair in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if not is_regular:
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if is_of_the_system(path):
        raise OSError(errno.EINVAL, "it is a file of the system and holds no data", str(path))


def read_regular(path: str | Path, most: int) -> bytes:
    """The first `most` + 1 bytes of a file, by which a longer one can be told. Raises OSError as `check_regular`."""
    check_regular(path)
    with open(path, "rb") as file:
        return file.read(most + 1)


def named_place(place: object, name: str, error: type[StarFlowError]) -> Path:
    """The path of a name from outside. Raises `error` for what is no name: nothing, blanks, another type, a NUL."""
    if not isinstance(place, str | os.PathLike) or not str(place).strip() or "\0" in str(place):
        raise error(f"{name} is {shown(place)}; expected the name of a file or folder.")
    return Path(place)


def file_digest(path: str | Path) -> str:
    """Digest of a file's bytes, in 32 hexadecimal digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


# -- what folders and ledgers are written with, too


@contextlib.contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Inside the block an OSError becomes an OutputError that says what could not be written and why."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error


def temporary_name() -> str:
    """A name for something unfinished that nobody can guess, and that `replacing` sweeps away after a day."""
    return f"{TEMPORARY}{secrets.token_hex(8)}.tmp"


def create_new(path: Path) -> int:
    """Create an empty file that nothing and no link was there for; returns the permissions that the umask leaves."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)


def flush_file(path: Path, mode: int) -> None:
    """Set permissions and force the bytes to the disk: a power cut may leave an empty file under the new name else."""
    os.chmod(path, mode)  # safetensors writes a file of its own that only its owner may read
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Force a folder's names to the disk, where the system can: without this a power cut may undo a renaming."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_FOR_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def regular_target(path: str | Path) -> Path:
    """Where links lead. Raises OutputError for a name that no file can have, and for what is no regular file."""
    name: object = path  # from outside: anything
    if not isinstance(name, str | os.PathLike) or not str(name).strip():
        raise OutputError(f"cannot write {shown(path)}: expected the name of a file.")
    try:
        target = Path(os.path.realpath(path))
        is_other = target.exists() and not target.is_file()
    except ValueError as error:  # a NUL, a lone surrogate
        raise OutputError(f"cannot write {str(path)!a}: {error}; give another name.") from error
    if is_other:
        raise OutputError(f"cannot write {path}: it exists and is not a regular file; give another name.")
    return target


@cache
def _sweep(folder: Path) -> None:
    """Remove, once per process, temporary files in `folder` that killed processes left more than a day ago."""
    for path in folder.glob(f"{TEMPORARY}*.tmp"):
        with contextlib.suppress(OSError):
            if path.is_file() and time.time() - path.stat().st_mtime > DAY:
                path.unlink()
