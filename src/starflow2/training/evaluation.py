"""Measurements while a stage trains: the loss on held-out data, and whatever a caller wants to know.

Held-out data are drawn scenes of a seed that no stage uses, or the mixture `corpus.held_out`; a stage measures the same
few microbatches with the same noise before its first step and every time later, by its averaged weights, in all
processes.
Not here: scores by drawing (a callable is passed in; `training` never imports `inference`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

from starflow2.data.shards import WorkerShard
from starflow2.models.components import Components
from starflow2.training.datasets import corpus_batches
from starflow2.training.parallel import Distributed
from starflow2.training.task import Task
from starflow2.training.tasks import task_maker
from starflow2.training.trainer import Trainer

__all__ = ["Evaluate", "Evaluator"]

Evaluate = Callable[[Components, int], dict[str, float]]  # the model with averaged weights and the step, to metrics
UNUSED_SEED = 1_000_003  # added to the run's seed


class Evaluator:
    """Measures a model in training, every `evaluate_every` steps or at every checkpoint."""

    def __init__(self, trainer: Trainer, evaluate: Evaluate | None) -> None:
        self.trainer, self.evaluate = trainer, evaluate
        self._held_out: list[Any] | None = None

    def is_due(self, *, is_saved: bool) -> bool:
        """True after a step that ends with an evaluation. is_saved: the step ended with a checkpoint."""
        every = self.trainer.stage.evaluate_every
        return self.trainer.is_done or (self.trainer.state.step % every == 0 if every else is_saved)

    def __call__(self) -> dict[str, float]:
        """The metrics of the model as it is, those of `evaluate` in the first process alone. All processes call it."""
        trainer, metrics = self.trainer, self.held_out()
        if self.evaluate is not None:
            with trainer.state.averaged_weights():
                model = trainer.group.whole_model(trainer.task.components)
                metrics |= self.evaluate(model, trainer.state.step) if model is not None else {}
        trainer.group.barrier()
        return metrics

    def held_out(self) -> dict[str, float]:
        """The loss on held-out data and its terms; nothing where the stage measures none. All processes call it."""
        trainer = self.trainer
        if not trainer.stage.held_out_batches:
            return {}
        if self._held_out is None:
            self._held_out = held_out_batches(trainer.task, trainer.group)
        return trainer.held_out_metrics(self._held_out)


def held_out_batches(task: Task, group: Distributed) -> list[Any]:
    """This process's microbatches of held-out data, without dropped words."""
    stage = replace(task.stage, caption_drop=0.0, kl_to_t2i=0.0)
    if not stage.corpus.mixture:
        other = task_maker(stage)(task.components, stage, task.seed + UNUSED_SEED, trained=task.trained)
        size = stage.batch // (group.world * stage.accumulate)
        firsts = (size * (group.rank * stage.held_out_batches + i) for i in range(stage.held_out_batches))
        return [other.make_batch(range(first, first + size)) for first in firsts]
    stage = replace(stage, corpus=replace(stage.corpus, mixture=stage.corpus.held_out))
    shard = WorkerShard(rank=group.rank, world=group.world)
    batches = corpus_batches(task.components, stage, shard, lists_broken=False)
    return [task.from_documents(*data) for data in islice(batches, stage.held_out_batches)]
