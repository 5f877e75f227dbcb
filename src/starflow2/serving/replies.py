"""Replies: the events of one request, as they come, for a thread or an event loop that waits for them.

Written by the service's threads, read by any number of readers, each from the start. A reply is small (a bounded number
of events), so a reader that is slow holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Self

from starflow2.serving.jobs import Done, Event, Failed, Scored
from starflow2.serving.refusals import refusal_of

__all__ = ["Reply"]


class Reply:
    """Events of one request; iterating waits for them, ends after `Done` or `Scored`, and raises `Refusal`.

    >>> for event in service.submit(Ask(parts=["two pink hearts"])): print(event)  # doctest: +SKIP
    """

    def __init__(self, cancel: Callable[[Reply], None]) -> None:
        self._cancel = cancel
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._listeners: set[Callable[[], None]] = set()
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """True once the last event has come."""
        return self._is_over

    def put(self, event: Event) -> None:
        """Add an event; after the last one nothing is added. For the service only."""
        with self._changed:
            if self._is_over:
                return
            self._events.append(event)
            self._is_over = isinstance(event, Done | Scored | Failed)
            self._changed.notify_all()
            listeners = tuple(self._listeners)
        for wake in listeners:
            wake()

    def cancel(self) -> None:
        """Stop making this reply, at the latest one step from now; nothing of it is kept. Harmless when it is over."""
        if not self._is_over:
            self._cancel(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Event]:
        for i in itertools.count():
            with self._changed:
                self._changed.wait_for(lambda i=i: len(self._events) > i)  # type: ignore[misc]
            yield self._event(i)
            if self._ends(i):
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._listeners.add(wake)
        try:
            for i in itertools.count():
                while len(self._events) <= i:
                    changed.clear()
                    if len(self._events) <= i:
                        await changed.wait()
                yield self._event(i)
                if self._ends(i):
                    return
        finally:
            with self._changed:
                self._listeners.discard(wake)

    def _event(self, i: int) -> Event:
        event = self._events[i]
        if isinstance(event, Failed):
            raise refusal_of(event.error, of_request=False)
        return event

    def _ends(self, i: int) -> bool:
        return isinstance(self._events[i], Done | Scored)
