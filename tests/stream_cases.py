"""Streams that record or bend what passes through them, for tests: wrappers, so that nothing is patched."""

from __future__ import annotations

from typing import Any

from starflow2.models.joint_stream import PretzelCache, Slots, States


class _Wrapped:
    """A `JointStream` that hands everything on to another one."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Recording(_Wrapped):
    """Records every call of `read`: its slots, its cache and the states it gave."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.calls: list[tuple[Slots, PretzelCache | None, States]] = []

    def read(self, slots: Slots, cache: PretzelCache | None = None) -> States:
        self.calls.append((slots, cache, self.stream.read(slots, cache)))
        return self.calls[-1][2]

    def states(self, cache: PretzelCache | None) -> list[States]:
        """States of all calls with this cache, in order."""
        return [states for _, used, states in self.calls if used is cache]


class Failing(_Wrapped):
    """Raises an error at the given call of `read`, counted from one."""

    def __init__(self, stream: Any, call: int, error: BaseException) -> None:
        super().__init__(stream)
        self.left, self.error = call, error

    def read(self, slots: Slots, cache: PretzelCache | None = None) -> States:
        self.left -= 1
        if not self.left:
            raise self.error
        return self.stream.read(slots, cache)
