"""Pretrained weights that a model references and never copies: find them, check them, identify them.

A folder holds safetensors as transformers writes them: one model.safetensors, or shards with an index. Nothing else is
opened, in particular no pickle. The fingerprint of a folder is the sha256 over its tensors sorted by name: name, number
format, shape and the first and last 256 bytes of the values of each. It does not depend on how tensors are split into
files, distinguishes two fine-tunings of one model, and takes a second for the largest one. It is not a signature: an
attacker can leave those bytes unchanged. Not here: how the weights are used (`qwen`, `vision`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from starflow2.core.fields import Config
from starflow2.core.files import check_regular
from starflow2.core.json_reader import JsonObject, parse_record
from starflow2.core.serialize import read_json
from starflow2.core.text import shown
from starflow2.errors import CheckpointError, ConfigError

__all__ = ["SINGLE", "Entry", "Pretrained", "fingerprint", "inventory", "locate", "weight_files"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PROBE = 256  # bytes at each end of a tensor that enter the fingerprint
WANTED = ["*.safetensors", "*.json"]  # files to download from the Hub


@dataclass(frozen=True, kw_only=True)
class Pretrained(Config):
    """Source of a frozen backbone, and the number format of its weights in memory."""

    source: str  # a folder, or an id on the Hub such as "Qwen/Qwen2.5-VL-7B-Instruct"
    revision: str = ""  # on the Hub: commit, tag or branch; "" = main
    sha256: str = ""  # required fingerprint; "" = any, recorded when it is first loaded
    precision: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"([0-9a-f]{64})?", self.sha256):
            raise ConfigError(f"sha256 is {shown(self.sha256)}; expected 64 hexadecimal digits, or nothing.")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a folder: file, number format, shape, and its bytes [first, last) in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


def locate(ref: Pretrained, files: Sequence[str] = WANTED) -> Path:
    """Folder of these weights: the source itself, or its copy in the Hub's cache, downloaded if necessary.

    files: patterns of what is downloaded. Raises CheckpointError, naming source and remedy, if neither exists.
    """
    folder = Path(ref.source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import constants, snapshot_download

    offline = constants.HF_HUB_OFFLINE  # some versions ignore their cache then unless asked
    revision = ref.revision or None
    try:
        return Path(
            snapshot_download(ref.source, revision=revision, allow_patterns=list(files), local_files_only=offline)
        )
    except (OSError, ValueError) as error:  # the Hub's own errors are OSErrors, those of a malformed id ValueErrors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"source {ref.source!r} is not a folder here and cannot be downloaded from the Hub: {reason} "
            "Download it on a machine with a network and give its folder as the source."
        ) from error


def inventory(folder: Path) -> dict[str, Entry]:
    """Tensors of a folder by name, from the headers of its files; no weights are loaded.

    Raises CheckpointError for a folder without safetensors, a missing or truncated shard, and an index that does not
    name the tensors of its shards.
    """
    entries: dict[str, Entry] = {}
    for path in weight_files(folder):
        for name, entry in _entries(path):
            if name in entries:
                raise CheckpointError(f"{folder}: tensor {name} is in {entries[name].file.name} and in {path.name}.")
            entries[name] = entry
    if (folder / INDEX).is_file():
        _check_index(folder, entries)
    return entries


def fingerprint(folder: Path) -> str:
    """Fingerprint of the weights in a folder, 64 hexadecimal digits, as the top of this file defines it."""
    digest = hashlib.sha256()
    for name, entry in sorted(inventory(folder).items()):
        digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
        with open(entry.file, "rb") as file:
            for start in (entry.first, max(entry.first, entry.last - PROBE)):
                file.seek(start)
                digest.update(file.read(min(PROBE, entry.last - start)))
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder. Raises CheckpointError where there are none, or some of its index are missing."""
    index = folder / INDEX
    names = sorted(set(_weight_map(index).values())) if index.is_file() else [SINGLE]
    if names == [SINGLE] and not (folder / SINGLE).is_file():
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        remedy = (
            f" {pickles[0]} is a pickle, which is never opened: use a revision with safetensors, or, if you trust it, "
            "convert it with transformers' from_pretrained(...).save_pretrained(...)."
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
        found: Any = read_json(index)["weight_map"]
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors ({error}); download it again.") from error
    if not isinstance(found, dict) or not found or not all(_is_file_name(name) for name in found.values()):
        raise CheckpointError(
            f"{index} is not an index of safetensors: weight_map is {str(found)[:60]!r}; download it again."
        )
    return found


def _is_file_name(name: object) -> bool:
    """True for a plain name of a safetensors file: an index must not lead out of its folder."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _entries(path: Path) -> Iterator[tuple[str, Entry]]:
    """Name and position of every tensor of one file, after safetensors has checked that it is complete."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}); download it again. Pickles are never read."
        ) from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: JsonObject = parse_record(file.read(length))
    header.pop("__metadata__", None)
    for name, info in header.items():
        first, last = (8 + length + offset for offset in info["data_offsets"])
        yield name, Entry(path, info["dtype"], tuple(info["shape"]), first, last)


def _check_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    index = _weight_map(folder / INDEX)
    for name, file in index.items():
        if name not in entries or entries[name].file.name != file:
            raise CheckpointError(f"{folder}: its index says that {name} is in {file}, which has no such tensor.")
    extra = sorted(set(entries) - set(index))
    if extra:
        raise CheckpointError(
            f"{folder}: {entries[extra[0]].file.name} has {extra[0]}, which is not in its index; "
            f"{len(extra)} such tensors."
        )
