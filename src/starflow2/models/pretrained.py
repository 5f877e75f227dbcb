"""Weights of others that a model refers to and never copies: where they are, whether they are whole, which they are.

A folder holds safetensors as transformers writes them: one model.safetensors, or shards with an index. Nothing else is
opened, a pickle least of all. The fingerprint of a folder is the sha256 over its tensors sorted by name, of each its
name, number format, shape and the first and last 256 bytes of its values. It does not depend on how they are split into
files, tells two fine-tunings of one model apart, and takes a second for the largest one. It is no signature: who wants
to deceive can leave those bytes alone. Not here: what the weights mean (backbones).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from starflow2.errors import CheckpointError

__all__ = ["Entry", "Pretrained", "fingerprint", "inventory", "locate"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PROBE = 256  # bytes at either end of a tensor that enter the fingerprint
WANTED = ["*.safetensors", "*.json"]  # what is fetched from the Hub


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Where a frozen part comes from, and in which number format it is held."""

    source: str  # a folder, or an id on the Hub such as "Qwen/Qwen2.5-VL-7B-Instruct"
    revision: str = ""  # on the Hub: commit, tag or branch; "" = main
    sha256: str = ""  # the fingerprint that it must have; "" = that of the first time it is loaded
    precision: Literal["float32", "bfloat16"] = "bfloat16"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a folder: its file, number format, shape, and the bytes [first, last) of the file it takes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


def locate(ref: Pretrained) -> Path:
    """The folder of these weights: itself, or its copy in the Hub's cache, fetched if it is not there.

    Raises CheckpointError that names the source and what to do where it is neither.
    """
    folder = Path(ref.source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import constants, snapshot_download

    offline = constants.HF_HUB_OFFLINE  # not every version looks into its cache then without being told
    revision = ref.revision or None
    try:
        return Path(snapshot_download(ref.source, revision=revision, allow_patterns=WANTED, local_files_only=offline))
    except (OSError, ValueError) as error:  # the Hub's own errors are OSErrors, those of a malformed id ValueErrors
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"pretrained weights {ref.source!r} are no folder here and cannot be had from the Hub: {why} "
            "Download them where there is a network and give their folder as the source."
        ) from error


def inventory(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder by name, from the heads of its files: nothing is loaded.

    Raises CheckpointError for a folder without safetensors, a missing or truncated shard, and an index that names
    other tensors than the shards hold.
    """
    entries: dict[str, Entry] = {}
    for path in _files(folder):
        for name, entry in _entries(path):
            if name in entries:
                raise CheckpointError(f"{folder}: tensor {name} is in {entries[name].file.name} and in {path.name}.")
            entries[name] = entry
    if (folder / INDEX).is_file():
        _check_index(folder, entries)
    return entries


def fingerprint(folder: Path) -> str:
    """What tells these weights from all others, 64 hexadecimal digits; see the top of this file."""
    digest = hashlib.sha256()
    for name, entry in sorted(inventory(folder).items()):
        digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
        with open(entry.file, "rb") as file:
            for start in (entry.first, max(entry.first, entry.last - PROBE)):
                file.seek(start)
                digest.update(file.read(min(PROBE, entry.last - start)))
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    names = sorted(set(_weight_map(index).values())) if index.is_file() else [SINGLE]
    if names == [SINGLE] and not (folder / SINGLE).is_file():
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        remedy = (
            f" {pickles[0]} is a pickle, which is never opened: take a revision with safetensors, or convert it "
            "where you trust it, with transformers' from_pretrained(...).save_pretrained(...)."
            if pickles
            else " Give the folder that holds config.json and the weights as transformers writes them."
        )
        raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}.{remedy}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of its {len(names)} shards: {', '.join(missing[:3])}; download them again."
        )
    return [folder / name for name in names]


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        found: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors ({error}); download it again.") from error
    if not isinstance(found, dict) or not found or not all(_is_file_name(name) for name in found.values()):
        raise CheckpointError(f"{index} is no index of safetensors: weight_map is {str(found)[:60]!r}.")
    return found


def _is_file_name(name: object) -> bool:
    """A shard stands beside its index: no way leads out of the folder."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _entries(path: Path) -> Iterator[tuple[str, Entry]]:
    """Name and place of every tensor of one file, which safetensors itself has found to be whole."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({error}); download it again. Pickles are never read."
        ) from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head: dict[str, Any] = json.loads(file.read(length))
    head.pop("__metadata__", None)
    for name, told in head.items():
        first, last = (8 + length + offset for offset in told["data_offsets"])
        yield name, Entry(path, told["dtype"], tuple(told["shape"]), first, last)


def _check_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    told = _weight_map(folder / INDEX)
    for name, file in told.items():
        if name not in entries or entries[name].file.name != file:
            raise CheckpointError(f"{folder}: its index says that {name} is in {file}, which has no such tensor.")
    extra = sorted(set(entries) - set(told))
    if extra:
        raise CheckpointError(
            f"{folder}: {entries[extra[0]].file.name} holds {extra[0]}, which its index does not know; "
            f"{len(extra)} such tensors."
        )
