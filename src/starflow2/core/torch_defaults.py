"""Computation that does not depend on what the caller has set in torch: autocast, default type, default device, modes.

`inference_defaults` is the context and decorator of every public call that computes; `torch_defaults` leaves gradients
alone, for loading and training. Both are entered again at every step of a generator, since a `with` around a `yield`
would reach its consumer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

__all__ = ["inference_defaults", "torch_defaults"]

DEVICES = ("cpu", "cuda", "mps")  # whose autocast is switched off
DTYPE = torch.float32
FULL, LOW = "ieee", ("tf32", "bf16")  # precisions of float32 products


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Context in which torch's settings are those of a fresh process; the caller's come back behind it.

    The default dtype and the precision of float32 products belong to the whole process: while a call of ours runs,
    other threads see torch's own, too.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_PROCESS)
        yield


@contextmanager
def inference_defaults() -> Iterator[None]:
    """`torch_defaults` without gradients.

    >>> with torch.autocast("cpu"), inference_defaults():
    ...     torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
    (False, False)
    """
    with torch_defaults(), torch.no_grad():
        yield


class _ProcessSettings:
    """Settings that torch keeps once per process: torch's own from the first call that runs to the end of the last."""

    def __init__(self) -> None:
        self._lock, self._running = threading.Lock(), 0
        self._dtype: torch.dtype | None = None  # the caller's, None if it is torch's own
        self._precisions: list[tuple[Any, str]] = []  # the caller's, of backends where they are lower than torch's own

    def __enter__(self) -> None:
        with self._lock:
            self._running += 1
            if torch.get_default_dtype() != DTYPE:
                self._dtype = torch.get_default_dtype()
                torch.set_default_dtype(DTYPE)
            for backend in _products():
                if backend.fp32_precision in LOW:
                    self._precisions.append((backend, backend.fp32_precision))
                    backend.fp32_precision = FULL

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            if self._running:
                return
            # what the caller has set meanwhile stays
            if self._dtype is not None and torch.get_default_dtype() == DTYPE:
                torch.set_default_dtype(self._dtype)
            for backend, precision in reversed(self._precisions):
                if backend.fp32_precision == FULL:
                    backend.fp32_precision = precision
            self._dtype, self._precisions = None, []


def _products() -> tuple[Any, ...]:
    """Where torch keeps the precision of float32 products."""
    on_cpu: Any = torch.backends.mkldnn  # torch's own annotations do not know its parts
    return on_cpu.matmul, on_cpu.conv, torch.backends.cuda.matmul


_PROCESS = _ProcessSettings()
