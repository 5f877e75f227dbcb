"""Files of named tensors (safetensors): written whole with a digest, and believed only if they are what was written.

Training states, sessions and adapters are such files. `check_tensors` compares what was read with what it is going to
replace, by name, shape, number format and range, before any of it is used: a fused kernel reads past the end of a
tensor that is too short. Not here: model folders (`checkpoint`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from starflow2.core.files import check_regular, replacing
from starflow2.errors import CheckpointError, OutputError, StarFlowError, nearest
from starflow2.nn import raw_bytes

__all__ = ["Expected", "check_tensors", "load_signed", "load_tensors", "read_metadata", "save_tensors"]

DIGEST = "digest"  # key of the metadata that holds the digest of everything else


@dataclass(frozen=True, slots=True)
class Expected:
    """Requirements on a tensor of a file: its shape, number format, and bounds of its values, which are finite."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def like(cls, tensor: Tensor) -> Expected:
        return cls(tuple(tensor.shape), tensor.dtype)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises CheckpointError for any other, a truncated or pickled one."""
    try:
        check_regular(path)
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors. Raises as `load_tensors` does."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, OSError) and path.exists():
        return CheckpointError(f"cannot read {path}: {error.strerror or error}.")
    return CheckpointError(
        f"{path} is not a complete safetensors file ({error}); only safetensors are read, never pickle."
    )


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a digest, completely or not at all.

    Raises OutputError; an earlier file then stays as it was.
    """
    try:
        with replacing(path) as temp:
            save_file(dict(tensors), temp, metadata={**metadata, DIGEST: _digest(tensors, metadata)})
    except SafetensorError as error:
        raise OutputError(f"cannot write {path}: {error}.") from error


def load_signed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that `save_tensors` wrote.

    Raises CheckpointError for a file that is not whole, that was changed since, or that has no digest.
    """
    tensors, metadata = load_tensors(path), read_metadata(path)
    digest = metadata.pop(DIGEST, None)
    if digest is None:
        raise CheckpointError(f"{path} has no digest; expected a file that this version of starflow2 wrote.")
    if digest != _digest(tensors, metadata):
        raise CheckpointError(f"{path} is damaged: it does not hold what was written; use a copy, or do without it.")
    return tensors, metadata


def check_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Expected],
    error: type[StarFlowError] = CheckpointError,
) -> None:
    """Raise `error`, naming tensor and expectation, unless exactly the expected tensors are there.

    Values have to be finite, and within their bounds.
    """
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        hint = nearest(missing[0], extra) if missing else ""
        raise error(
            f"{path} does not fit: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} unknown {extra[:3]}.{hint}"
        )
    for name, wanted in expected.items():
        wrong = _difference(tensors[name], wanted)
        if wrong:
            raise error(f"{path}: {name} {wrong}.")


def _difference(value: Tensor, wanted: Expected) -> str:
    """How a tensor differs from what was expected, in words; "" if it does not."""
    if tuple(value.shape) != wanted.shape:
        return f"has shape {tuple(value.shape)}, expected {wanted.shape}"
    if value.dtype != wanted.dtype:
        return f"holds {value.dtype}, expected {wanted.dtype}"
    if value.dtype == torch.bool or not value.numel():
        return ""
    low, high = (float(x) for x in value.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        return "holds NaN or infinity, expected finite numbers"
    if low < wanted.low or high > wanted.high:
        return f"holds numbers from {low:g} to {high:g}, expected {wanted.low:g} to {wanted.high:g}"
    return ""


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Digest of all values, names, shapes and number formats, in 32 hexadecimal digits."""
    digest = hashlib.blake2b(json.dumps(sorted(metadata.items())).encode(), digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(raw_bytes(value))
    return digest.hexdigest()
