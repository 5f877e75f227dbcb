"""Pretzels that record or bend what passes through them, for tests: twins of another class, nothing is patched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from starflow2.models.joint_stream import PretzelCache, Slots, States
from starflow2.models.pretzel import Pretzel


@dataclass(frozen=True)
class Recording(Pretzel):
    """Records every call of `read`: its slots, its cache and the states it gave."""

    calls: list[tuple[Slots, PretzelCache | None, States]] = field(default_factory=list)

    def read(self, slots: Slots, cache: PretzelCache | None = None) -> States:
        states = super().read(slots, cache)
        self.calls.append((slots, cache, states))
        return states


@dataclass(frozen=True)
class Bent(Pretzel):
    """Hands logits on after a change."""

    change: Callable[[Tensor], Tensor] = lambda logits: logits

    def logits(self, h: Tensor, g: Tensor) -> Tensor:
        return self.change(super().logits(h, g))


def recording(stream: Any) -> Recording:
    return Recording(**_fields(stream))


def bent(stream: Any, change: Callable[[Tensor], Tensor]) -> Bent:
    return Bent(**_fields(stream), change=change)


def _fields(stream: Any) -> dict[str, Any]:
    return {f.name: getattr(stream, f.name) for f in fields(Pretzel)}
