"""Raw samples of a real corpus as one stream: WebDataset tars, parquet, JSONL and plain folders, local or remote.

Hugging Face `datasets` finds and opens the files; nothing is decoded here, so that one damaged sample costs one sample.
`datasets`' own tar and JSON readers decode as they go and stop at the first bad line.
Not here: the fields of a corpus (corpora), mixtures (mixture), how other readers go on (progress).
"""

from __future__ import annotations

import errno
import glob
import gzip
import importlib
import math
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from starflow2.core.fields import Range, whole
from starflow2.core.files import check_regular
from starflow2.core.json_reader import JsonObject, parse_record
from starflow2.core.places import check_walk
from starflow2.data.progress import PassProgress, Place, Unit, pass_units
from starflow2.errors import ConfigError, DataError, StarFlowError

__all__ = ["PICTURES", "Format", "Sample", "Samples", "WorkerShard", "inside", "needs", "read_file"]

Format = Literal["auto", "tar", "parquet", "jsonl", "folder"]

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
SIDECARS = ("txt", "json")  # files that may belong to an image in a folder
ENDINGS: dict[Format, tuple[str, ...]] = {
    "tar": (".tar", ".tar.gz", ".tgz"),
    "parquet": (".parquet",),
    "jsonl": (".jsonl", ".jsonl.gz", ".ndjson"),
}
METADATA = "metadata.jsonl"  # of a folder of images: a line for each, its file under file_name
ROWS = 16  # parquet rows in memory at once; each may hold several images
MEMBER = 1 << 28  # bytes of one file, member of a tar or line; what is larger is one broken sample and never in memory
CHUNK = 1 << 20  # bytes of lines that are read at once
HEADER = 1 << 20  # bytes of a long name or of other headers of a member of a tar, which tarfile reads into memory
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
BRACES = r"\{(\d{1,18})\.\.(\d{1,18})\}"  # a range of numbers, as WebDataset writes it
MAX_FILES = 1_000_000  # that such ranges may name
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how files of gzip, bzip2, xz and zstd begin


@dataclass(frozen=True, slots=True)
class Sample:
    """One raw sample. `damage` says why it, or its file beyond this point, cannot be read; "" if it can."""

    source: str  # its file
    key: str  # its place in the file: a name, a line, a row
    fields: Mapping[str, Any]  # bytes of a member by extension, a JSON line as "json", or the values of a row
    damage: str = ""


@dataclass(frozen=True, kw_only=True)
class WorkerShard:
    """The part of a corpus that a process reads: every sample belongs to exactly one rank."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not whole(self.rank, "rank", Range(least=0)) < whole(self.world, "world"):
            raise ConfigError(f"rank is {self.rank}; expected 0 to {self.world - 1} in a world of {self.world}.")


def needs(module: str) -> Any:
    """A module of the extra `train`. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"real corpora need the package {module.partition('.')[0]}, which is not installed; "
            "pip install 'starflow2[train]'."
        ) from error


class Samples:
    """The raw samples of a corpus; each iteration is one pass, in an order given by seed and epoch.

    url: a file, a folder, a pattern (shards-{0000..0127}.tar, *.parquet) or one of these on a remote file system that
    fsspec knows (https://, s3://, gs://, hf://datasets/...). Each pass reads the files in a new order and shuffles
    blocks of `block` samples (1: none), so the order is a function of the numbers in `state_dict` alone, and resuming
    reads at most a block and the file around it again (docs/choices.md#shuffling-in-blocks). Inside a torch worker it
    reads that worker's part. Raises DataError where nothing is found.
    """

    def __init__(
        self, url: str, format: Format = "auto", *, shard: WorkerShard | None = None, seed: int = 0, block: int = 1
    ) -> None:
        self.url, self.shard = url, shard or WorkerShard()
        self.seed, self.block = whole(seed, "seed", Range(least=0)), whole(block, "block", Range(least=1))
        self.format, self.files = _find(url, format)
        self.progress = PassProgress()  # what others had read of the pass in which this reader began
        self._epoch, self._done = 0, 0  # number of the pass, samples of the block that have been yielded
        self._start: Place = (0, 0)  # where the block starts

    def continue_after(self, progress: PassProgress) -> None:
        """Begin with what other readers have left of a pass."""
        self.progress, self._epoch, self._done, self._start = progress, progress.epoch, 0, (0, 0)

    @property
    def names(self) -> list[str]:
        """The files without the folder that they have in common."""
        folders = [file.split("/")[:-1] for file in self.files]
        common = 0
        while all(len(f) > common and f[common] == folders[0][common] for f in folders):
            common += 1
        return ["/".join(file.split("/")[common:]) for file in self.files]

    @property
    def fingerprint(self) -> int:
        """A number that changes with the names of the files, but not with their folder."""
        return zlib.crc32("\n".join(self.names).encode())

    @property
    def whole_passes(self) -> int:
        """Passes that have ended, without a first one of which others had read a part."""
        return self._epoch - self.progress.epoch - bool(self.progress.files)

    @property
    def epoch(self) -> int:
        """The number of whole passes so far."""
        return self._epoch

    def state_dict(self) -> JsonObject:
        """The position in the stream, in JSON."""
        return {"epoch": self._epoch, "at": self._done, "place": list(self._start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position; files, seed, block, shard and progress must be the same."""
        try:
            unit, sample = (whole(value, "place", Range(least=0)) for value in state["place"])
            epoch, done = (whole(state[name], name, Range(least=0)) for name in ("epoch", "at"))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"state is no position in {self.url}: {error!r}; begin anew.") from error
        self._epoch, self._done, self._start = epoch, done, (unit, sample)

    def __iter__(self) -> Iterator[Sample]:
        """The rest of this pass. Afterwards the object is at the start of the next one."""
        stream = _Stream(self, self._epoch, self._start)
        samples = iter(stream)
        while block := list(islice(samples, self.block)):
            after = stream.place
            for i in self._order(len(block))[self._done :]:
                self._done += 1
                yield block[i]
            self._done, self._start = 0, after
        self._epoch, self._done, self._start = self._epoch + 1, 0, (0, 0)

    def _order(self, count: int) -> list[int]:
        """The order of the samples in the block that starts here."""
        return np.random.default_rng([self.seed, self._epoch, *self._start]).permutation(count).tolist()

    def units(self, epoch: int) -> list[Unit]:
        """Units that this process, or this torch worker of it, reads in a pass, in order."""
        files = list(zip(self.files, self.names, strict=True))
        reader, seed = (self.shard.rank, self.shard.world, *_worker()), self.seed if self.block > 1 else None
        return pass_units(files, reader, epoch, seed, self.progress)


class _Stream:
    """The samples of a pass from a place on; `place` is that of the next sample."""

    def __init__(self, samples: Samples, epoch: int, place: Place) -> None:
        self.samples, self.units, self.place = samples, samples.units(epoch), place
        self.progress = samples.progress if epoch == samples.progress.epoch else PassProgress()

    def __iter__(self) -> Iterator[Sample]:
        first_unit, first = self.place
        for number, unit in enumerate(self.units[first_unit:], first_unit):
            for i, sample in enumerate(_read(self.samples.format, unit)):
                if (number, i) < (first_unit, first) or self.progress.has_read(unit.name, unit.part + i * unit.parts):
                    continue
                self.place = (number, i + 1)
                yield sample
            self.place = (number + 1, 0)


def _worker() -> tuple[int, int]:
    """Number of this torch worker, and how many there are."""
    from torch.utils.data import get_worker_info

    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _read(format: str, unit: Unit) -> Iterator[Sample]:
    """The samples of a unit; where reading fails, a last sample says why."""
    try:
        yield from islice(_READERS[format](unit.file), unit.part, None, unit.parts)
    except StarFlowError:
        raise
    except Exception as error:  # file systems and formats raise anything; it is counted where samples are used
        yield Sample(unit.file, "", {}, f"{type(error).__name__}: {error}")


# -- finding ----------------------------------------------------------------------------------------------------------


def _find(url: str, format: Format) -> tuple[str, list[str]]:
    """The format, and the files in a fixed order."""
    if format not in get_args(Format):
        raise ConfigError(f"format is {format!r}; expected one of {', '.join(get_args(Format))}.")
    if not isinstance(url, str):
        raise ConfigError(
            f"url is {url!r} ({type(url).__name__}); expected the name of a file or folder, or a pattern."
        )
    if not url.strip():
        raise DataError("url is empty; expected a file, a folder or a pattern such as 'data/*.tar'.")
    _check_place(url)
    kinds: list[Format] = (
        [format] if format in ENDINGS else [k for k in ENDINGS if url.endswith(ENDINGS[k])] or list(ENDINGS)
    )
    for kind in kinds if format != "folder" else ():
        found = [file for name in _expanded(url) for file in _resolved(name)]  # files, or a folder of them
        if not found or (format == "auto" and not url.endswith(ENDINGS[kind])):
            found = [file for end in ENDINGS[kind] for file in _resolved(_within(url, f"**/*{end}")) if _is_data(file)]
        if found:
            return kind, sorted(found)
    if format in ENDINGS or not _listed(url):
        wanted = "file to read" if format == "auto" else f"{format} file"
        known = ", ".join(end for ends in ENDINGS.values() for end in ends)
        raise DataError(
            f"there is no {wanted} at {url}; give a file, a folder or a pattern such as 'data/*.tar'. Files end in "
            f"{known}; a folder may hold images, too."
        )
    return "folder", [url]


def _check_place(pattern: str) -> None:
    """Raise DataError for a local pattern that lists the whole disk or what the system shows of itself."""
    scheme, colon, path = pattern.rpartition("://")
    if not colon or scheme.endswith(("file", "local")):
        check_walk(path, "url", DataError)


def _is_data(file: str) -> bool:
    return posixpath.basename(file) != METADATA


def _within(folder: str, name: str) -> str:
    """The pattern `name` in a folder; brackets in the name of a folder that is there are no pattern."""
    is_literal = "://" not in folder and Path(folder).is_dir()
    return f"{(glob.escape(folder) if is_literal else folder).rstrip('/')}/{name}"


def _resolved(pattern: str) -> list[str]:
    """The files that match a path, a URL or a pattern; maybe none."""
    data_files = needs("datasets.data_files")
    _check_place(pattern)
    if "://" not in pattern and Path(pattern).is_file():  # even if its name looks like a pattern
        return [pattern]
    if pattern.startswith("~") and not Path(pattern.split("/")[0]).exists():  # a shell expands it, or it was quoted
        return []
    try:
        found: list[str] = data_files.resolve_pattern(pattern, base_path="")
    except FileNotFoundError:
        return []
    except Exception as error:  # a file system without its package, no network, whatever its library raises
        raise DataError(f"cannot look at {pattern}: {error}") from error
    return found


def _expanded(url: str) -> list[str]:
    """The names in shards-{0000..0012}.tar, as WebDataset writes them; web servers cannot list files.

    >>> _expanded("a-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    ranges = [range(int(first), int(last) + 1) for first, last in re.findall(BRACES, url)]
    if ranges and not 0 < math.prod(map(len, ranges)) <= MAX_FILES:
        raise DataError(f"{url} names {math.prod(map(len, ranges))} files; expected 1 to {MAX_FILES}.")
    names = [url]
    for numbers in ranges:
        names = [_numbered(name, number) for name in names for number in numbers]
    return names


def _numbered(name: str, number: int) -> str:
    """The name with its first range in braces replaced by a number, as wide as the range begins."""
    return re.sub(BRACES, lambda found: f"{number:0{len(found[1])}}", name, count=1)


def _listed(folder: str) -> list[str]:
    return sorted(_resolved(_within(folder, "**")))


# -- reading ----------------------------------------------------------------------------------------------------------


def _open(file: str, **options: Any) -> Any:
    """Open a local or remote file for reading bytes; remote reads that fail are repeated. Raises OSError."""
    if "://" not in file:
        check_regular(file)  # a pipe would be waited for
    return needs("datasets.utils.file_utils").xopen(file, "rb", **options)


def read_file(file: str) -> bytes:
    """The bytes of a file, local or remote. Raises OSError, also for a file of more than `MEMBER` bytes."""
    with _open(file) as opened:
        data: bytes = opened.read(MEMBER + 1)
    if len(data) > MEMBER:
        raise OSError(errno.EFBIG, _too_large("it"))
    return data


def _too_large(what: str) -> str:
    return f"{what} has more than {MEMBER >> 20} MiB"


def inside(folder: str, name: str) -> str:
    """The path of file `name` in a folder, local or remote. Raises ValueError for a name outside the folder.

    >>> inside("data", "./000/a.jpg")
    'data/000/a.jpg'
    """
    root = posixpath.normpath(folder) if "://" not in folder else folder.rstrip("/")
    path = posixpath.normpath(name.removeprefix(root + "/"))
    if path.startswith(("../", "/")) or path in (".", "..") or "://" in name:
        raise ValueError(f"{name} is not a file below {folder}")
    return f"{root}/{path}"


class _Tail:
    """A file that remembers its last bytes: tarfile does not notice one that was cut off between two members."""

    def __init__(self, opened: Any) -> None:
        self.opened, self.first, self.last = opened, b"", b""

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.opened.read(size)
        self.first = self.first or data[:8]
        self.last = (self.last + data)[-tarfile.BLOCKSIZE :]
        return data


def _read_tar(file: str) -> Iterator[Sample]:
    """Consecutive members with the same name up to its first dot are one sample."""
    key, fields, damage = "", dict[str, bytes](), ""
    with _open(file, block_size=0) as opened:  # 0: one stream rather than many requests
        tail = _Tail(opened)
        for name, data in _members(tail):
            folder, base = posixpath.split(name)
            stem, _, extension = base.partition(".")
            own, field = posixpath.join(folder, stem), extension.lower()
            if fields and (own != key or field in fields):
                yield Sample(file, key, fields, damage)
                fields, damage = {}, ""
            key, fields[field] = own, data or b""
            damage = damage if data is not None else _too_large(base)
    if fields:
        yield Sample(file, key, fields, damage)
    if file.endswith(".tar") and not tail.first.startswith(COMPRESSED) and tail.last.strip(b"\0"):
        raise EOFError("the tar file has no end: it was cut off")


class _Info(tarfile.TarInfo):
    """The header of a member. Raises ReadError for further headers of a size that would fill the memory."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> _Info:
        info = super().frombuf(buf, encoding, errors)
        if info.type in HEADERS and info.size > HEADER:
            raise tarfile.ReadError(f"a header has {info.size} bytes; expected at most {HEADER}")
        return info


def _members(opened: Any) -> Iterator[tuple[str, bytes | None]]:
    """Names and contents of the files in a tar; None for one that is too large."""
    with tarfile.open(fileobj=opened, mode="r|*", tarinfo=_Info) as tar:
        for info in tar:
            tar.members = []  # type: ignore[attr-defined] # else it keeps every header
            if info.isreg() and not posixpath.basename(info.name).startswith((".", "__")):
                member = tar.extractfile(info)
                if member is not None:  # it is a regular file
                    yield info.name, member.read() if info.size <= MEMBER else None


def _read_jsonl(file: str) -> Iterator[Sample]:
    with _open(file) as opened:
        lines = gzip.GzipFile(fileobj=opened) if file.endswith(".gz") else opened
        for number, line in enumerate(_lines(lines), 1):
            if line is None:
                yield Sample(file, f"line {number}", {}, _too_large("it"))
            elif line.strip():
                yield Sample(file, f"line {number}", {"json": line})


def _lines(opened: Any) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too large."""
    parts, size = list[bytes](), 0
    while chunk := opened.read(CHUNK):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            size += len(end)
            yield b"".join([*parts, end]) if size <= MEMBER else None
            parts, size = [], 0
        size += len(rest)
        parts = [*parts, rest] if size <= MEMBER else []
    if size:
        yield b"".join(parts) if size <= MEMBER else None


def _read_parquet(file: str) -> Iterator[Sample]:
    parquet = needs("pyarrow.parquet")
    with _open(file) as opened:
        first = 0
        for batch in parquet.ParquetFile(opened).iter_batches(batch_size=ROWS):
            for i in range(batch.num_rows):
                yield _row(file, first + i, batch.slice(i, 1))
            first += batch.num_rows


def _row(file: str, number: int, row: Any) -> Sample:
    try:
        return Sample(file, f"row {number}", row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return Sample(file, f"row {number}", {}, f"UnicodeDecodeError: {error}")


def _read_folder(folder: str) -> Iterator[Sample]:
    """Images with .txt or .json files of the same name, or the images that metadata.jsonl lists."""
    names = _listed(folder)
    table = next((name for name in names if posixpath.basename(name) == METADATA), None)
    if table is not None:
        for sample in _read_jsonl(table):
            yield Sample(sample.source, sample.key, {**sample.fields, **_named_picture(folder, sample.fields["json"])})
        return
    by_stem: dict[str, dict[str, str]] = {}
    for name in names:
        stem, _, extension = name.rpartition(".")
        if extension.lower() in (*PICTURES, *SIDECARS):
            by_stem.setdefault(stem, {})[extension.lower()] = name
    for stem, files in by_stem.items():
        yield _files_of(folder, stem, files)


def _files_of(folder: str, stem: str, files: Mapping[str, str]) -> Sample:
    key = posixpath.basename(stem)
    try:
        return Sample(folder, key, {field: read_file(file) for field, file in files.items()})
    except OSError as error:
        return Sample(folder, key, {}, f"{type(error).__name__}: {error}")


def _named_picture(folder: str, line: bytes) -> dict[str, bytes]:
    """The image that a line of metadata.jsonl names; none where the line or the image is broken."""
    try:
        name = parse_record(line)["file_name"]
        return {posixpath.splitext(name)[1][1:].lower(): read_file(inside(folder, name))}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):  # `corpora.to_dialogue` reports it
        return {}


_READERS: dict[str, Any] = {
    "tar": _read_tar,
    "parquet": _read_parquet,
    "jsonl": _read_jsonl,
    "folder": _read_folder,
}
