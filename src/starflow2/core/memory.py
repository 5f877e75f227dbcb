"""Bytes of memory that are free on this machine."""

from __future__ import annotations

import re
from pathlib import Path

import torch

__all__ = ["free_bytes"]

_MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a program could still take on a device; None where the system does not say.

    On Linux those of MemAvailable, which counts files that the system keeps in memory as free.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not _MEMINFO.is_file():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMINFO.read_text("utf-8"), re.MULTILINE)
    return None if found is None else 1024 * int(found[1])
