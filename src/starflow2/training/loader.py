"""What a run trains on, drawn ahead of time: the world by index, or a mixture of real corpora as a stream.

Both hand every step as a list of this process's microbatches. The world needs no state: its items are functions of
their index. A stream's state is JSON, one for each process, and stands in the checkpoint.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from starflow2.data.mixture import BatchConfig, Batches, Spelling, loader, read_mixture
from starflow2.data.shards import WorkerShard
from starflow2.errors import TrainingError
from starflow2.training.config import StageConfig
from starflow2.training.parallel import Distributed
from starflow2.training.task import Task

__all__ = ["Feed", "feed_for"]


class Feed(Protocol):
    """Steps of data; entered before the first, left behind the last."""

    def __enter__(self) -> Iterator[list[Any]]: ...

    def __exit__(self, *_: object) -> None: ...

    def settings(self) -> dict[str, str]:
        """What a checkpoint has to hold of it. All processes call it."""


def feed_for(
    task: Task, stage: StageConfig, group: Distributed, *, step: int, saved: str = "", workers: int = 0
) -> Feed:
    """What `stage` asks for, from step `step` on. saved: "feed" among the checkpoint's settings, "" at the start.

    `workers` processes draw the world; a mixture has its own setting.
    """
    if stage.corpus.mixture:
        return _Stream(task, stage, group, step, saved)
    return _Drawn(task, stage, group, step, workers)


class _Drawn:
    """Items of the drawn world by index: one thread ahead of the training, or several processes."""

    def __init__(self, task: Task, stage: StageConfig, group: Distributed, step: int, workers: int) -> None:
        self.make_batch, self.stage, self.step, self.group = task.make_batch, stage, step, group
        self.ahead = 1 + 2 * workers
        self.pool: Executor = ThreadPoolExecutor(1)
        if workers:
            self.pool = ProcessPoolExecutor(workers, torch.multiprocessing.get_context("spawn"))

    def __enter__(self) -> Iterator[list[Any]]:
        return self._batches()

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def settings(self) -> dict[str, str]:
        return {}

    def _ask(self, step: int) -> list[Future[Any]]:
        """This process's shares of a step, one for each microbatch."""
        count = self.stage.accumulate
        share = self.stage.batch // (self.group.world * count)
        first = step * self.stage.batch + self.group.rank * count * share
        firsts = range(first, first + count * share, share)
        return [self.pool.submit(self.make_batch, range(at, at + share)) for at in firsts]

    def _batches(self) -> Iterator[list[Any]]:
        coming: deque[list[Future[Any]]] = deque()
        asked = self.step
        for _ in range(self.step, self.stage.steps):
            while len(coming) <= self.ahead and asked < self.stage.steps:
                coming.append(self._ask(asked))
                asked += 1
            yield [share.result() for share in coming.popleft()]


class _Stream:
    """Packed documents of real corpora; every process reads its own part of each source."""

    def __init__(self, task: Task, stage: StageConfig, group: Distributed, step: int, saved: str) -> None:
        components, corpus = task.components, stage.corpus
        layout = components.tower_layout if stage.name == "vlm" else components.layout
        spelling = Spelling(components.tokenizer, layout, components.cfg.fae.image_size)
        drop, share = stage.caption_drop, WorkerShard(rank=group.rank, world=group.world)
        config = BatchConfig(rows=corpus.rows, width=corpus.width, caption_drop=drop, broken=corpus.broken)
        batches = Batches(read_mixture(corpus.mixture), spelling, config, share)
        self.stage, self.group, self.step, self.task = stage, group, step, task
        self.loader = loader(batches, corpus.workers)
        if saved:
            states = json.loads(saved)
            if len(states) != group.world:
                raise TrainingError(
                    f"the mixture was read by {len(states)} processes, now there are {group.world}; use as many again."
                )
            self.loader.load_state_dict(states[group.rank])

    def __enter__(self) -> Iterator[list[Any]]:
        return self._batches()

    def __exit__(self, *_: object) -> None:
        pass

    def settings(self) -> dict[str, str]:
        return {"feed": json.dumps(self.group.all_gather(self.loader.state_dict()))}

    def _batches(self) -> Iterator[list[Any]]:
        documents = iter(self.loader)
        for _ in range(self.step, self.stage.steps):
            yield [self.task.from_documents(*next(documents)) for _ in range(self.stage.accumulate)]
