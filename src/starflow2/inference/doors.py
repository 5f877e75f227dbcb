"""Decorators of a session's public methods: claim it for one thread, and set torch's own defaults."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from starflow2.core.torch_defaults import inference_defaults
from starflow2.errors import StateError

__all__ = ["InUse", "exclusive", "exclusive_events"]

P = ParamSpec("P")
R = TypeVar("R")


class InUse:
    """Tells whether a thread uses an object; copies and pickles of it get one of their own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[InUse], tuple[()]]:
        return InUse, ()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Context in which only this thread uses the object. Raises StateError while another one does."""
        if not self._lock.acquire(blocking=False):
            raise StateError("this session is in use by another thread; wait for it, or give each thread a fork().")
        try:
            with inference_defaults():
                yield
        finally:
            self._lock.release()


class Shared(Protocol):
    in_use: InUse


S = TypeVar("S", bound=Shared)


def exclusive(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Method that refuses to run while another thread uses the object."""

    @functools.wraps(method)
    def guarded(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.in_use.claimed():
            return method(self, *args, **kwargs)

    return guarded


def exclusive_events(method: Callable[Concatenate[S, P], Iterator[R]]) -> Callable[Concatenate[S, P], Generator[R]]:
    """Generator method each step of which is `exclusive`; between steps its consumer's settings hold."""

    @functools.wraps(method)
    def guarded(self: S, /, *args: P.args, **kwargs: P.kwargs) -> Generator[R]:
        events = method(self, *args, **kwargs)
        try:
            while True:
                with self.in_use.claimed():
                    try:
                        event = next(events)
                    except StopIteration:
                        return
                yield event
        finally:
            with self.in_use.claimed():
                getattr(events, "close", lambda: None)()

    return guarded
