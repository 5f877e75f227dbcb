"""Replace the content of a folder so that a crash at any instruction leaves one whole content, the old or the new.

The new content is written into a folder of its own inside, flushed, and renamed to `WAITING`; from that instruction on
it is what `whole` gives to readers. Then each of its files takes its place under its own name, and `WAITING` goes. A
crash in between is made good by the next writer, who finishes the work before anything else. The folder itself is
never renamed: it may be a mount, somebody's current folder, or stand where we may not write.
Not here: single files (`files`), what a folder holds (`models.checkpoint`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from starflow2.core.files import TEMPORARY, flush_file, flush_folder, temporary_name
from starflow2.core.locks import LOCK, folder_lock
from starflow2.errors import StarFlowError

__all__ = ["WAITING", "is_ours", "replacing_content", "stamp", "whole"]

WAITING = f"{TEMPORARY}whole"  # a whole new content that is being put in place


def whole(folder: Path) -> Path:
    """Where to read the content of `folder`: there, or in a newer content that is still being put in place."""
    waiting = folder / WAITING
    return waiting if waiting.is_dir() else folder


def stamp(folder: Path) -> frozenset[tuple[str, int]]:
    """Names and numbers of what is in `folder`, other ones after any replacement; empty where nothing can be seen."""
    try:
        return frozenset((entry.name, entry.inode()) for entry in os.scandir(folder))
    except OSError:
        return frozenset()


def is_ours(name: str) -> bool:
    """True for names that this module and locks use inside a folder."""
    return name.startswith(TEMPORARY) or name == LOCK


@contextlib.contextmanager
def replacing_content(folder: Path, error: type[StarFlowError], doing: str) -> Iterator[Path]:
    """Context of an empty folder to write to; when the block ends, what is in it takes its place in `folder`.

    Files of other names in `folder` stay; a subfolder is replaced as a whole. A failure in the block leaves `folder`
    as it was. Raises `error`, naming the holder, while somebody else is writing there, and OSError.
    """
    is_new = not folder.exists()
    try:
        with folder_lock(folder, error, doing):
            _remove_unfinished(folder)
            _put_in_place(folder)
            temp = folder / temporary_name()
            temp.mkdir()
            try:
                yield temp
                _flush(temp)
                temp.rename(folder / WAITING)
            except BaseException:
                shutil.rmtree(temp, ignore_errors=True)
                raise
            flush_folder(folder)
            _put_in_place(folder)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    flush_folder(folder.parent)


def _remove_unfinished(folder: Path) -> None:
    """Remove what killed writers left half-written; the caller holds the lock, so none of them is alive."""
    for path in folder.glob(f"{TEMPORARY}*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _put_in_place(folder: Path) -> None:
    """Give every file of a waiting content its own name, then remove it; nothing to do if there is none."""
    waiting = folder / WAITING
    if not waiting.is_dir():
        return
    for source in sorted(waiting.iterdir()):
        _place(source, folder / source.name)
    flush_folder(folder)
    done = folder / temporary_name()
    waiting.rename(done)  # in one step: half of it would no longer be whole
    shutil.rmtree(done)
    flush_folder(folder)


def _place(source: Path, target: Path) -> None:
    """Let `target` hold what `source` does, which stays; a folder loses whatever `source` does not have."""
    if not source.is_dir():
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        _replace_file(source, target)
        return
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        target.unlink()
    target.mkdir(exist_ok=True)
    for inside in sorted(source.iterdir()):
        _place(inside, target / inside.name)
    for old in set(target.iterdir()) - {target / inside.name for inside in source.iterdir()}:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    flush_folder(target)


def _replace_file(source: Path, target: Path) -> None:
    """Let `target` be another name of `source`, or a copy of it where a file system has no second names."""
    temp = target.with_name(temporary_name())
    try:
        try:
            os.link(source, temp)
        except OSError:
            shutil.copy2(source, temp)
            flush_file(temp, source.stat().st_mode & 0o777)
        os.replace(temp, target)
    finally:
        temp.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Give every file in `folder` the permissions that the umask leaves, and force all of them to the disk."""
    mode = folder.stat().st_mode & 0o666
    for path, _, files in os.walk(folder):
        for name in files:
            flush_file(Path(path) / name, mode)
        flush_folder(Path(path))
