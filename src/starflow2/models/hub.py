"""Where a model is found and where it runs: by name, folder or Hub id, on a device that this machine has."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from starflow2.errors import CheckpointError, ConfigError, DeviceError, nearest

__all__ = ["NANO", "find_model", "pick_device"]

NANO = Path(__file__).parent.parent / "assets" / "nano"


def pick_device(name: str = "auto") -> torch.device:
    """ "auto", "cpu", "cuda[:i]" or "mps" as a device. Raises DeviceError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.split(":")[0]
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if kind not in there:
        raise DeviceError(f"device is {name!r}; expected auto, cpu, cuda or mps.{nearest(kind, there)}")
    if not there[kind]:
        raise DeviceError(f"device is {name!r}, but this machine has none; use --device cpu.")
    try:
        return torch.empty(0, device=name).device
    except RuntimeError as error:
        raise DeviceError(f"device is {name!r}: {str(error).splitlines()[0]}") from error


def find_model(name: str | Path, **hub: Any) -> Path:
    """The folder of a model by name ("nano"), folder or Hub id; `hub` goes to huggingface_hub's download.

    Raises CheckpointError where there is none, ConfigError for an option that the download does not have.
    """
    known = ["device", *inspect.signature(snapshot_download).parameters]
    for option in hub:
        if option not in known:
            raise ConfigError(f"unknown option {option!r} of from_pretrained.{nearest(option, known)}")
    if str(name) == "nano":
        return NANO
    try:
        if Path(name).exists():
            return Path(name)
    except OSError as error:
        raise CheckpointError(f"there is no model {str(name)[:40]!r}...: {error.strerror}.") from error
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no model {str(name)!r}: no such folder, and no Hub id (owner/name)."
            f"{nearest(str(name), ['nano'])}"
        )
    try:
        return Path(snapshot_download(str(name), **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"cannot fetch {name} from the Hub: {reason}") from error
