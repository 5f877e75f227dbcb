"""Losses by source of a mixture, summed between two lines of metrics: which corpus is learnt, and which goes wrong.

Not here: the losses themselves (`losses`), whose values a task hands over image by image and token by token.
Letters: S sources.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor

__all__ = ["SourceLosses", "source_names"]

Sums = dict[str, list[list[float]]]  # by term: sums and counts of values, each by source


class Gathers(Protocol):
    """The processes of a run, `parallel.Distributed`, as far as they are needed here."""

    def all_gather(self, value: object) -> list[object]: ...


def source_names(corpora: Sequence[str]) -> tuple[str, ...]:
    """A name for each source of a mixture: that of its corpus, numbered where several have the same.

    >>> source_names(["cc12m", "captions", "captions"])
    ('cc12m', 'captions-1', 'captions-2')
    """
    total, seen, names = Counter(corpora), Counter[str](), list[str]()
    for corpus in corpora:
        seen[corpus] += 1
        names.append(f"{corpus}-{seen[corpus]}" if total[corpus] > 1 else corpus)
    return tuple(names)


class SourceLosses:
    """Sums of every loss term by source, and how many values each had; nothing for data without sources."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums: dict[str, Tensor] = {}  # (2, S) by term, on the device of the loss
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is added: held-out data are not what a stage learns from."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @torch.no_grad()
    def add(self, term: str, sources: Tensor, values: Tensor, counts: Tensor | None = None) -> None:
        """Add values (n,) of a term, in nats, from sources of these numbers (n,). Does not wait for the device.

        counts: (n,) bool, which values count; all by default.
        """
        if self._is_paused or not self.names or not len(values):
            return
        values = values.detach().float()
        ones = torch.ones_like(values) if counts is None else counts.to(values)
        pairs = torch.stack([values * ones, ones])  # (2, n)
        total = self._sums.setdefault(term, values.new_zeros(2, len(self.names)))
        total.index_add_(1, sources.to(values.device), pairs)

    def take(self, group: Gathers) -> dict[str, float]:
        """TERM/NAME: means over all processes since the last call, of the sources that were read. All call it."""
        if not self.names:
            return {}
        own: Sums = {term: sums.tolist() for term, sums in self._sums.items()}
        self._sums = {}
        processes, found = cast(list[Sums], group.all_gather(own)), dict[str, float]()
        for term in sorted({term for sums in processes for term in sums}):
            total = torch.tensor([sums[term] for sums in processes if term in sums], dtype=torch.float64).sum(0)
            for name, value, count in zip(self.names, *total.tolist(), strict=True):
                if count:
                    found[f"{term}/{name}"] = value / count
        return found
