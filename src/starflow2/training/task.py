"""What a stage of training must offer the loop: modules to train, batches to make, a loss to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from starflow2.models.components import Components
from starflow2.models.sequence import Batch

__all__ = [
    "LossWeights",
    "Task",
]


@dataclass(frozen=True, slots=True)
class LossWeights:
    """A part of a step's batch. `factors`: what to multiply its mean of a term with, so that shares average to all."""

    factors: Mapping[str, float] = field(default_factory=dict)

    def of(self, term: str, mean: Tensor) -> Tensor:
        return mean * self.factors[term] if term in self.factors else mean


WHOLE = LossWeights()
LossAndMetrics = tuple[Tensor, dict[str, Tensor]]


class Task(Protocol):
    """What a stage trains, what it draws and how it scores it.

    `make_batch` makes the items of some indices; it can be sent to another process, since it holds no weights. `counts`
    says what the terms of a loss are means of, by term; those left out are means over equally many documents.
    """

    components: Components
    trained: nn.ModuleDict
    make_batch: Callable[[range], Any]

    def initialise(self) -> None:
        """Measure on data what fresh weights start from; `fit` calls it once, before a stage's first step."""

    def counts(self, data: Any) -> dict[str, int]: ...

    def from_documents(self, images: Tensor, batch: Batch) -> Any:
        """Packed documents of real corpora with their pictures (P, 3, s, s), in the form of `make_batch`'s items."""

    def loss(self, data: Any, generator: torch.Generator, share: LossWeights = WHOLE) -> LossAndMetrics: ...
