"""Compiles the C++ of this folder on first use, and loads it.

The library goes into the user's cache folder under a name made of its source, the flags, the compiler and the
processor, so that nothing stale or foreign is ever loaded. It is written under another name and then renamed: processes
that start together each compile, and the last one wins.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from hashlib import blake2b
from pathlib import Path

__all__ = ["Unavailable", "built", "cache_folder", "found_compiler", "key", "library"]

FOLDER = Path(__file__).parent
SOURCES = ("streams.cpp", "pixels.h", "layers.h", "registers.h")
COMPILERS = ("c++", "g++", "clang++")
# no reordering and no contraction: sums are rounded as they are written, whatever is computed beside them
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
PATIENCE_S = 300


class Unavailable(Exception):
    """The compiled form cannot run here, or not for this model; the message says why."""


def library() -> ctypes.CDLL:
    """The compiled library, from the cache or made now. Raises Unavailable, the first time with a warning."""
    found = _tried()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


@cache
def _tried() -> ctypes.CDLL | str:
    """The library, or why there is none; tried once a process."""
    try:
        return built(cache_folder(), found_compiler())
    except Unavailable as error:
        warnings.warn(f"sampling runs without compiled code, several times slower: {error}", stacklevel=4)
        return str(error)


def cache_folder() -> Path:
    """Where compiled libraries are kept: `starflow2` in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "starflow2"


def found_compiler() -> str:
    """Path of a C++ compiler: that of the variable CXX, or one of the usual names. Raises Unavailable."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    found = next((path for path in map(shutil.which, names) if path is not None), None)
    if found is None:
        raise Unavailable(f"no C++ compiler was found: looked for {', '.join(names)} on PATH")
    return found


def built(folder: Path, compiler: str) -> ctypes.CDLL:
    """The library in `folder`, compiled now unless it is there. Raises Unavailable."""
    path = folder / f"streams-{key(compiler)}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_loadable(path):
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the compiled library {path} cannot be written or loaded ({error})") from error


def _is_loadable(path: Path) -> bool:
    """True if a library is there and whole; a disk that was full may have cut it."""
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True


def key(compiler: str, source: Path = FOLDER) -> str:
    """A name for what the compiler makes of the source on this processor."""
    found = blake2b(digest_size=12)
    for name in SOURCES:
        found.update((source / name).read_bytes())
    real = Path(compiler).resolve()
    stat = real.stat()
    for value in (*_flags(), str(real), str(stat.st_size), str(stat.st_mtime_ns), _processor()):
        found.update(value.encode())
    return found.hexdigest()


def _flags() -> tuple[str, ...]:
    is_arm = platform.machine().lower() in ("aarch64", "arm64")
    return (*FLAGS, "-mcpu=native" if is_arm else "-march=native")


def _processor() -> str:
    """Text that tells processors with other instructions apart: a folder of caches may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, path: Path) -> None:
    """Compile the source to `path`, in one step for everyone who looks. Raises Unavailable, OSError."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    command = [compiler, *_flags(), str(FOLDER / SOURCES[0]), "-o", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        if done.returncode:
            problem = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise Unavailable(f"{compiler} failed with exit status {done.returncode}: {problem}")
        os.replace(name, path)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{compiler} took more than {PATIENCE_S} s and was ended") from error
    finally:
        Path(name).unlink(missing_ok=True)
