"""Decorators of a session's public methods: claim it for one thread, and set torch's own defaults."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from starflow2.core.torch_defaults import inference_defaults
from starflow2.errors import StateError

__all__ = ["InUse", "exclusive", "exclusive_events"]

P = ParamSpec("P")
R = TypeVar("R")


class InUse:
    """Tells whether a thread uses an object; copies and pickles of it get one of their own."""

    def __init__(self) -> None:
        self._lock, self._depth = threading.RLock(), 0

    def __reduce__(self) -> tuple[type[InUse], tuple[()]]:
        return InUse, ()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Context in which only this thread uses the object, with torch's own settings.

        Inside another one it does nothing more, as those are in force. Raises StateError while another thread uses it.
        """
        if not self._lock.acquire(blocking=False):
            raise StateError("this session is in use by another thread; wait for it, or give each thread a fork().")
        self._depth += 1
        try:
            with inference_defaults() if self._depth == 1 else nullcontext():
                yield
        finally:
            self._depth -= 1
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


class _Events(Generator[R, None, None]):
    """Events of an object, each made while only one thread uses it; a refusal takes nothing from them."""

    def __init__(self, shared: Shared, events: Generator[R, None, None]) -> None:
        self._shared, self._events = shared, events

    def send(self, value: None) -> R:
        with self._shared.in_use.claimed():
            return self._events.send(value)

    def throw(self, *error: Any) -> R:
        with self._shared.in_use.claimed():
            return self._events.throw(*error)

    def close(self) -> None:
        with self._shared.in_use.claimed():
            self._events.close()

    def __del__(self) -> None:
        self.close()


def exclusive_events(method: Callable[Concatenate[S, P], Iterator[R]]) -> Callable[Concatenate[S, P], Generator[R]]:
    """Generator method each step of which is `exclusive`; between steps its consumer's settings hold."""

    @functools.wraps(method)
    def guarded(self: S, /, *args: P.args, **kwargs: P.kwargs) -> Generator[R]:
        return _Events(self, cast("Generator[R, None, None]", method(self, *args, **kwargs)))

    return guarded
