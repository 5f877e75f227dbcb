"""Batches of a run, made ahead of time: from the drawn world by index, or from a mixture of real corpora as a stream.

Both yield, for every step, the list of this process's microbatches. The drawn world needs no position: its items are
functions of their index. A stream's position is JSON, one for each process, and is stored in checkpoints.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from starflow2.core.json_reader import JsonObject, parse_json
from starflow2.data.mixture import loader
from starflow2.data.shards import WorkerShard
from starflow2.errors import ConfigError, TrainingError
from starflow2.training.config import StageConfig
from starflow2.training.datasets import corpus_batches
from starflow2.training.parallel import Distributed
from starflow2.training.task import Dataset, Task

__all__ = ["CorpusFeed", "Feed", "WorldFeed", "feed_for"]


class Feed(Protocol):
    """The microbatches of every step that is left; a context that is entered before the first step."""

    def __enter__(self) -> Iterator[list[Any]]: ...

    def __exit__(self, *_: object) -> None: ...

    def position(self) -> dict[str, str]:
        """Entries of a checkpoint from which the feed can continue. All processes call it."""


def feed_for(
    task: Task, stage: StageConfig, group: Distributed, *, step: int, saved: str = "", workers: int = 0
) -> Feed:
    """The feed of a stage from step `step` on.

    saved: the entry "feed" of the checkpoint, "" at the start. workers: processes that make batches of the drawn world;
    a mixture has its own setting.
    """
    if stage.corpus.mixture:
        return CorpusFeed(task, stage, group, step, saved)
    return WorldFeed(task.make_batch, stage, group, step, workers)


class WorldFeed:
    """Batches of the drawn world by index; a thread, or several processes, make them ahead of the training."""

    def __init__(self, make_batch: Dataset, stage: StageConfig, group: Distributed, step: int, workers: int) -> None:
        self.make_batch, self.stage, self.step, self.group = make_batch, stage, step, group
        self.ahead = 1 + 2 * workers
        self.pool: Executor = ThreadPoolExecutor(1)
        if workers:
            self.pool = ProcessPoolExecutor(workers, torch.multiprocessing.get_context("spawn"))

    def __enter__(self) -> Iterator[list[Any]]:
        return self._batches()

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def position(self) -> dict[str, str]:
        return {}

    def _prefetch(self, step: int) -> list[Future[Any]]:
        """Start to make this process's microbatches of a step."""
        number = self.stage.accumulate
        size = self.stage.batch // (self.group.world * number)
        first = step * self.stage.batch + self.group.rank * number * size
        firsts = range(first, first + number * size, size)
        return [self.pool.submit(self.make_batch, range(start, start + size)) for start in firsts]

    def _batches(self) -> Iterator[list[Any]]:
        pending: deque[list[Future[Any]]] = deque()
        next_step = self.step
        for _ in range(self.step, self.stage.steps):
            while len(pending) <= self.ahead and next_step < self.stage.steps:
                pending.append(self._prefetch(next_step))
                next_step += 1
            yield [microbatch.result() for microbatch in pending.popleft()]


def _positions(saved: str) -> list[JsonObject]:
    """The position of every process in a mixture. Raises TrainingError for a text that does not hold them."""
    try:
        positions = parse_json(saved, "feed")
    except ConfigError as error:
        raise TrainingError(f"{error} Start anew with --resume none.") from error
    if not isinstance(positions, list) or not all(isinstance(position, dict) for position in positions):
        raise TrainingError("feed does not hold the positions of a mixture; start anew with --resume none.")
    return positions


class CorpusFeed:
    """Packed documents of real corpora; every process reads its own part of each source."""

    def __init__(self, task: Task, stage: StageConfig, group: Distributed, step: int, saved: str) -> None:
        batches = corpus_batches(task.components, stage, WorkerShard(rank=group.rank, world=group.world))
        self.stage, self.group, self.step, self.task = stage, group, step, task
        self.loader = loader(batches, stage.corpus.workers)
        if saved:
            states = _positions(saved)
            if len(states) != group.world:
                raise TrainingError(
                    f"the mixture was read by {len(states)} processes, now there are {group.world}; use as many again."
                )
            self.loader.load_state_dict(states[group.rank])

    def __enter__(self) -> Iterator[list[Any]]:
        return self._batches()

    def __exit__(self, *_: object) -> None:
        pass

    def position(self) -> dict[str, str]:
        return {"feed": json.dumps(self.group.all_gather(self.loader.state_dict()))}

    def _batches(self) -> Iterator[list[Any]]:
        documents = iter(self.loader)
        for _ in range(self.step, self.stage.steps):
            yield [self.task.from_documents(*next(documents)) for _ in range(self.stage.accumulate)]
