"""The interface between a stage and the training loop: modules to train, batches, a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from starflow2.data.mixture import read_mixture
from starflow2.errors import DataError
from starflow2.models.components import Components
from starflow2.models.sequence import Batch
from starflow2.training.config import StageConfig
from starflow2.training.datasets import check_source, corpus_batches, not_by_index
from starflow2.training.source_losses import SourceLosses, source_names

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

    dataset: makes the batch of some indices, by default the stage's own data from the drawn world; a stage with a
    mixture has none, see `first_batches`. trained: the modules that train, by default the stage's own; their names are
    those of the weights in checkpoints. Raises ConfigError for a model whose images are not of the drawn world's size
    and that is given neither a dataset nor a mixture.
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
        self.make_batch = self._own_dataset() if dataset is None else dataset
        self.trained = self.default_trained() if trained is None else trained

    @cached_property
    def by_source(self) -> SourceLosses:
        """The terms of the loss by source of the stage's mixture, since they were last taken."""
        path = self.stage.corpus.mixture
        return SourceLosses(source_names([source.corpus for source in read_mixture(path)]) if path else ())

    def _own_dataset(self) -> Dataset:
        check_source(self.components.cfg, self.stage)
        return not_by_index if self.stage.corpus.mixture else self.default_dataset()

    def first_batches(self, size: int = 16) -> Iterator[Any]:
        """Endless batches from the start of the stage's own source, for what is measured before training.

        The same in every process of a run. size: documents of a batch of the drawn world.
        """
        if not self.stage.corpus.mixture:
            yield from (self.make_batch(range(start, start + size)) for start in count(0, size))
        for images, batch in corpus_batches(self.components, self.stage, lists_broken=False):
            yield self.from_documents(images, batch)

    def first_images(self, number: int, limit: int = 100) -> Tensor:
        """The first images of the stage's own source, (number, 3, s, s), for tasks whose batches begin with images.

        Raises DataError where the first `limit` batches hold fewer.
        """
        found = list[Tensor]()
        for data in islice(self.first_batches(), limit):
            found += data[0][: number - len(found)]
            if len(found) == number:
                return torch.stack(found)
        raise DataError(
            f"stage {self.stage.name} measures {number} images before it starts, but the first {limit} batches of its "
            f"data hold {len(found)}; give it sources with images."
        )

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
