"""The index of a sharded checkpoint, which torch.distributed.checkpoint (DCP) pickles, read without trusting it.

A pickle may name any function and have it called. This reader knows the few classes that an index is made of and
refuses every other name, so that a folder from elsewhere cannot run anything. The digest of the index stands in the
checkpoint's settings, so that one of another checkpoint is noticed. Not here: what the shards hold (`checkpoint`).
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from starflow2.errors import TrainingError

__all__ = ["IndexReader", "index_digest"]

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
        return hashlib.blake2b((folder / INDEX).read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise TrainingError(f"cannot read {folder / INDEX}: {error.strerror or error}.") from error


class IndexReader(FileSystemReader):
    """DCP's reader of a folder, with an index that is read by names alone and points to files of the folder only."""

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
