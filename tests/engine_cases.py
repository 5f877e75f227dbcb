"""Rows of an engine that are asked different things, and crowds of them that join and leave in any order."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow2.inference.config import DrawConfig, Precision, ReplyLimits
from starflow2.inference.engine import Engine
from starflow2.inference.events import Completed, Ended, RowEvent, Stepped, Token
from starflow2.inference.sampler import Sampler

KINDS = 8  # of what is asked


def steered(sampler: Sampler) -> Sampler:
    """A sampler with which some rows draw and some write."""
    begin, twin = sampler.layout.begin, copy.copy(sampler)

    def change(logits: Tensor) -> Tensor:
        logits[:, begin] += torch.where(logits[:, 40] > logits[:, 41], 50.0, -50.0)
        return logits

    twin.adjust_logits = change
    return twin


def fed(engine: Engine, ids: Sequence[int]) -> int:
    row = engine.open()
    engine.feed(row, ids)
    return row


@dataclass(frozen=True)
class Asked:
    """A request to a row: tokens to read, and limits of the reply."""

    ids: tuple[int, ...]
    seed: int
    limits: ReplyLimits
    config: DrawConfig


def asked(number: int, precision: Precision = "float64") -> Asked:
    """One of `KINDS` requests: to write, to draw, or both, by settings of its own."""
    number %= KINDS
    ids = (1, *range(30, 31 + number % 5), 2)
    limits = ReplyLimits(tokens=2 + number % 3, pictures=number % 3, temperature=0.7 * (number % 2))
    guidance, rule = (1.0, 0.0, 2.0, 0.5)[number % 4], ("starflow", "tarflow")[number // 2 % 2]
    config = DrawConfig(guidance=guidance, rule=rule, prior_scale=0.5 + 0.1 * (number % 3), precision=precision)  # type: ignore[arg-type]
    return Asked(ids, number, limits, config)


def begun(engine: Engine, ask: Asked) -> int:
    row = fed(engine, ask.ids)
    engine.begin(row, ask.limits, ask.seed, ask.config)
    return row


def told(events: Sequence[RowEvent], row: int) -> list[object]:
    """Events of one row in a form that can be compared."""
    found: list[object] = []
    for event in events:
        if event.row == row and isinstance(event, Token):
            found.append(event.id)
        elif event.row == row and isinstance(event, Completed):
            found.append(event.picture)
        elif event.row == row and not isinstance(event, Stepped):
            found.append(type(event))
    return found


class Crowd:
    """Rows that join and leave an engine in an order that somebody else draws; at most `MOST` at a time."""

    MOST = 16

    def __init__(self, sampler: Sampler) -> None:
        self.engine, self.precision = Engine(steered(sampler)), sampler.config.precision
        self.live: dict[int, int] = {}  # by row, the number of what it was asked
        self.finished: list[tuple[int, int]] = []
        self.events: list[RowEvent] = []

    def join(self, number: int) -> None:
        if len(self.live) < self.MOST:
            self.live[begun(self.engine, asked(number, self.precision))] = number % KINDS

    def step(self, _: int = 0) -> None:
        new = self.engine.step()
        self.events += new
        for event in new:
            if isinstance(event, Ended):
                self.finished.append((event.row, self.live.pop(event.row)))

    def cancel(self, number: int) -> None:
        """Take a reply back and let it begin again, as if nothing had been."""
        row = self._some(number)
        if row is not None:
            again = asked(self.live[row], self.precision)
            self.engine.cancel(row)
            self.events = [event for event in self.events if event.row != row]
            self.engine.begin(row, again.limits, again.seed, again.config)

    def release(self, number: int) -> None:
        row = self._some(number)
        if row is not None:
            self.engine.release(row)
            del self.live[row]

    def copy(self, number: int) -> None:
        """Put a row that is over into another engine row, which then stays idle."""
        if self.finished:
            self.engine.load(self.engine.save(self.finished[number % len(self.finished)][0]))

    def take(self, actions: Sequence[tuple[str, int]]) -> None:
        """Take actions by name, each about a row that a number chooses, and then step until nobody replies."""
        for action, number in actions:
            getattr(self, action)(number)
        while self.live:
            self.step()

    def _some(self, number: int) -> int | None:
        return sorted(self.live)[number % len(self.live)] if self.live else None
