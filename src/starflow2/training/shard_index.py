"""Files of a sharded checkpoint as torch.distributed.checkpoint (DCP) writes them, read without trusting them.

DCP pickles its index, and a pickle may name any function and have it called. This reader knows the few classes that an
index is made of and refuses every other name, so that a folder from elsewhere cannot run anything. Digests of the index
and of every data file stand in the checkpoint's settings: each process digests what it writes and compares what it
reads, so that damage and files of another checkpoint are noticed. Not here: what the shards hold (`checkpoint`).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from starflow2.core.files import file_digest
from starflow2.errors import StarFlowError, TrainingError

__all__ = ["DigestWriter", "IndexReader", "first_failure", "index_digest", "read_errors"]

INDEX = ".metadata"  # DCP's own name for it
METADATA = "torch.distributed.checkpoint.metadata"
KNOWN = {
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata")),
    *((METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # a table of layouts by name
    *((module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
}


def index_digest(folder: Path) -> str:
    """Digest of the index of a checkpoint, in 32 hexadecimal digits. Raises TrainingError where there is none."""
    try:
        return file_digest(folder / INDEX)
    except OSError as error:
        raise TrainingError(f"cannot read {folder / INDEX}: {error.strerror or error}.") from error


class DigestWriter(FileSystemWriter):
    """DCP's writer of a folder; in the first process, `digests` are those of all data files once it has finished."""

    digests: Mapping[str, str]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the part of this process; each result goes to the first process with the digest of its file."""
        results = super().write_data(plan, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        digests = {name: file_digest(Path(self.path) / name) for name in names}
        signed: Future[list[WriteResult]] = Future()
        signed.set_result(
            [replace(r, storage_data=(r.storage_data, digests[r.storage_data.relative_path])) for r in results]
        )
        return signed

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, which has no room for digests; called in the first process."""
        self.digests = {r.storage_data[0].relative_path: r.storage_data[1] for part in results for r in part}
        super().finish(metadata, [[replace(r, storage_data=r.storage_data[0]) for r in part] for part in results])


@contextmanager
def read_errors(folder: Path) -> Iterator[None]:
    """Inside the block the error of any process becomes a TrainingError of all: DCP's own is no Exception."""
    try:
        yield
    except CheckpointException as error:
        first = first_failure(error)
        if isinstance(first, StarFlowError):
            raise first from error
        raise TrainingError(
            f"cannot read {folder}: {str(first) or type(first).__name__}; start anew with --resume none."
        ) from error


def first_failure(error: BaseException) -> BaseException:
    """The error of the first process that failed, where DCP has gathered those of all; any other error itself."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


class IndexReader(FileSystemReader):
    """DCP's reader of a folder, with an index that is read by names alone and points to files of the folder only."""

    def __init__(self, path: Path, digests: Mapping[str, str]) -> None:
        """digests: of the data files, by their names."""
        super().__init__(path)
        self.digests = digests

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the part of this process. Raises TrainingError for a data file that is not what was written."""
        names = {self.storage_data[item.storage_index].relative_path for item in plan.items}
        for name in sorted(names):
            path = Path(self.path) / name
            if self.digests.get(name) != file_digest(path):
                raise TrainingError(
                    f"{path} is damaged, or of another checkpoint: it does not hold what was written; go back to an "
                    "earlier one with --resume STEP, or start anew with --resume none."
                )
        return super().read_data(plan, planner)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index. Raises TrainingError for a pickle of anything else, and for an index of more than tensors."""
        path = Path(self.path) / INDEX
        try:
            with open(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except (pickle.UnpicklingError, OSError, EOFError, AttributeError, ImportError, TypeError, ValueError) as error:
            raise TrainingError(
                f"{path} is not the index of a checkpoint: {error}; remove its folder, or start anew with "
                "--resume none."
            ) from error
        _check(path, metadata)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Knows the classes of an index, and no other name."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index does")
        return super().find_class(module, name)


def _check(path: Path, metadata: Any) -> None:
    """Raise TrainingError unless an index holds tensors alone, in plain files beside it."""
    entries = getattr(metadata, "state_dict_metadata", None)
    places = getattr(metadata, "storage_data", None)
    if not isinstance(metadata, Metadata) or not isinstance(entries, dict) or not isinstance(places, dict):
        raise TrainingError(f"{path} is not the index of a checkpoint: it holds {type(metadata).__name__}.")
    others = [name for name, entry in entries.items() if not isinstance(entry, TensorStorageMetadata)]
    names = [str(getattr(place, "relative_path", "")) for place in places.values()]
    outside = [name for name in names if Path(name).name != name]
    if others or outside:
        raise TrainingError(
            f"{path} names {(others + outside)[0]!a}, which is no tensor in a file beside it; remove its folder, or "
            "start anew with --resume none."
        )
