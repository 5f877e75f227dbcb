"""Find a model by name, folder or Hub id (`find_model`), and the device to run it on (`pick_device`)."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from starflow2.core.files import named_place
from starflow2.core.text import shown
from starflow2.errors import CheckpointError, ConfigError, DeviceError, nearest

__all__ = ["ASSETS", "NANO", "SHIPPED", "find_model", "pick_device", "shipped"]

ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = ("nano", "nano-heldout")  # the second is for measuring: nothing held out was trained on


def _nano() -> Path:
    """The folder of nano: in a checkout part of this package, otherwise the package starflow2-nano beside it."""
    here = ASSETS / "nano"
    found = None if here.is_dir() else importlib.util.find_spec("starflow2_nano")
    return here if found is None or found.origin is None else Path(found.origin).parent / "model"


NANO = _nano()


def pick_device(name: str | int | torch.device | None = "auto") -> torch.device:
    """The device of a name: auto, cpu, cuda[:i] or mps. Raises DeviceError if this machine does not have it.

    None is auto, a number that of a CUDA device; a torch.device is taken as itself.
    """
    if name is None or (isinstance(name, str) and name == "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(name, int) and not isinstance(name, bool):
        name = f"cuda:{name}"
    if not isinstance(name, str | torch.device):
        raise DeviceError(f"device is {shown(name)} ({type(name).__name__}); expected auto, cpu, cuda or mps.")
    kind, _, index = str(name).partition(":")
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if kind not in available:
        raise DeviceError(f"device is {shown(name)}; expected auto, cpu, cuda or mps.{nearest(kind[:60], available)}")
    if not available[kind]:
        raise DeviceError(f"device is {str(name)!r}, but this machine has none; use --device cpu.")
    if kind != "cuda" and index not in ("", "0"):
        raise DeviceError(f"device is {str(name)!r}; expected {kind}: this machine has only one.")
    try:
        return torch.empty(0, device=name if kind == "cuda" else kind).device
    except RuntimeError as error:
        raise DeviceError(f"device is {str(name)!r}: {str(error).splitlines()[0]}") from error


def shipped(name: str) -> Path | None:
    """The folder of a model that comes with the code, None for any other name.

    "nano/" means nano where there is no folder of that name. Raises CheckpointError where its weights are missing.

    >>> shipped("nano") == NANO, shipped("elsewhere/nano")
    (True, None)
    """
    plain = name.removesuffix("/")
    if plain not in SHIPPED or (plain != name and Path(name).exists()):
        return None
    folder = NANO if plain == "nano" else NANO.parent / plain
    if not folder.is_dir():
        raise CheckpointError(f"the weights of {plain} are a package of their own: pip install starflow2-nano.")
    return folder


def find_model(name: str | Path, **hub: Any) -> Path:
    """The folder of a model, given its name ("nano"), folder or Hub id.

    hub: options of huggingface_hub's snapshot_download. Raises CheckpointError if there is no such model, and
    ConfigError for an option that snapshot_download does not have.
    """
    if hub:
        _check_options(hub)
    named_place(name, "name", CheckpointError)
    if (own := shipped(str(name))) is not None:
        return own
    try:
        if Path(name).exists():
            return Path(name)
    except OSError as error:
        raise CheckpointError(f"there is no model {str(name)[:40]!r}...: {error.strerror}.") from error
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no model {str(name)!r}: no such folder, and no Hub id (owner/name).{nearest(str(name), SHIPPED)}"
        )
    owner = Path(name).parent
    if owner.is_dir():  # a mistyped path would fetch the weights of whoever has that name
        raise CheckpointError(
            f"there is no model {str(name)!r} in the folder {owner}; to fetch that id from the Hub, start in a folder "
            f"without {owner}."
        )
    from huggingface_hub import snapshot_download  # imported here: it takes longer than a model in a folder
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"cannot fetch {name} from the Hub: {reason}") from error


def _check_options(options: Collection[str]) -> None:
    """Raise ConfigError for an option that snapshot_download does not have."""
    from huggingface_hub import snapshot_download  # imported here, as above

    known = ["device", *inspect.signature(snapshot_download).parameters]
    for option in options:
        if option not in known:
            raise ConfigError(f"unknown option {option!r} of from_pretrained.{nearest(option, known)}")
