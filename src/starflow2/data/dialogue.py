"""A conversation about the drawn world: turns of words and scenes. No tensors, no token ids here.

The one type that every task yields; `sequence` knows how a model reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from starflow2.data.world import Scene

__all__ = ["Dialogue", "Part", "Turn", "pictures"]

Part = str | Scene
P = TypeVar("P")


def pictures(parts: Iterable[P]) -> tuple[P, ...]:
    """The parts of a turn that are no words, drawn scenes or photos."""
    return tuple(part for part in parts if not isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user says or shows, and what the model says or draws in reply, in order."""

    asked: tuple[Part, ...]
    told: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns in order. `kind` names the task they came from, for metrics only: no layout depends on it."""

    turns: tuple[Turn, ...]
    kind: str

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """Every scene in order of appearance."""
        return tuple(p for turn in self.turns for p in (*turn.asked, *turn.told) if isinstance(p, Scene))
