"""The interface between a stage and the training loop: modules to train, batches, a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from starflow2.models.components import Components
from starflow2.models.sequence import Batch
from starflow2.training.config import StageConfig

__all__ = ["WHOLE_BATCH", "Dataset", "LossAndMetrics", "LossWeights", "Task"]

Dataset = Callable[[range], Any]  # the batch of some indices; picklable and without weights: workers may call it
LossAndMetrics = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Per-term weights of a microbatch.

    Multiplying each microbatch mean by its weight makes their average the mean over the whole batch.
    """

    factors: Mapping[str, float] = field(default_factory=dict)  # by term; a term that is not named counts once

    def apply(self, term: str, mean: Tensor) -> Tensor:
        return mean * self.factors[term] if term in self.factors else mean


WHOLE_BATCH = LossWeights()


class Task(ABC):
    """A stage's modules to train, its batches and its loss. The constructor stores; it changes no weight.

    dataset: makes the batch of some indices, by default the stage's own data from the drawn world. trained: the modules
    that train, by default the stage's own; their names are those of the weights in checkpoints.
    """

    def __init__(
        self,
        components: Components,
        stage: StageConfig,
        seed: int,
        *,
        dataset: Dataset | None = None,
        trained: nn.ModuleDict | None = None,
    ) -> None:
        self.components, self.stage, self.seed = components, stage, seed
        self.make_batch = self.default_dataset() if dataset is None else dataset
        self.trained = self.default_trained() if trained is None else trained

    @abstractmethod
    def default_dataset(self) -> Dataset:
        """The stage's own data from the drawn world."""

    @abstractmethod
    def default_trained(self) -> nn.ModuleDict:
        """The modules that this stage trains."""

    def initialise(self) -> None:  # noqa: B027  # most stages measure nothing
        """Set weights whose starting values are measured on data; nothing by default.

        `fit` calls it once, before the first step of a stage that this model has never finished.
        """

    @abstractmethod
    def counts(self, data: Any) -> dict[str, int]:
        """How many values each term of the loss is a mean of; terms left out are means over the documents."""

    @abstractmethod
    def from_documents(self, images: Tensor, batch: Batch) -> Any:
        """Convert a packed corpus batch with its images (P, 3, s, s) to the input format of `loss`."""

    @abstractmethod
    def loss(self, data: Any, generator: torch.Generator, weights: LossWeights = WHOLE_BATCH) -> LossAndMetrics:
        """The loss of a batch, and the metrics to be logged beside it; all noise comes from `generator`."""
