"""Batches of a run, made ahead of time: from the drawn world by index, or from a mixture of real corpora as a stream.

Both yield, for every step, the list of this process's microbatches, and count what all processes have read. The drawn
world needs no position: its items are functions of their index. A stream's position is JSON and is stored in
checkpoints; other readers than those that wrote it go on as `data.progress` says.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, astuple
from typing import Any, Protocol

import torch

from starflow2.core.json_reader import JsonObject, parse_json
from starflow2.data.mixture import loader
from starflow2.data.progress import MixtureProgress
from starflow2.data.shards import WorkerShard
from starflow2.errors import ConfigError, TrainingError
from starflow2.models.sequence import Layout
from starflow2.training.config import StageConfig
from starflow2.training.counts import ReadCounts
from starflow2.training.datasets import corpus_batches
from starflow2.training.parallel import Distributed
from starflow2.training.task import Dataset, Task

__all__ = ["CorpusFeed", "Feed", "WorldFeed", "feed_for"]

log = logging.getLogger(__name__)
LATER = "Keep what the run has learnt with --resume weights, or start anew with --resume none."


class Feed(Protocol):
    """The microbatches of every step that is left; a context that is entered before the first step."""

    read: ReadCounts  # by all processes since the start of the stage, with the step that was yielded last

    def __enter__(self) -> Iterator[list[Any]]: ...

    def __exit__(self, *_: object) -> None: ...

    def position(self) -> dict[str, str]:
        """Entries of a checkpoint from which the feed can continue. All processes call it."""


def feed_for(
    task: Task,
    stage: StageConfig,
    group: Distributed,
    *,
    step: int,
    saved: Mapping[str, str] | None = None,
    workers: int = 0,
) -> Feed:
    """The feed of a stage from step `step` on.

    saved: what `position` gave for the checkpoint; None at the start. workers: processes that make batches of the drawn
    world; a mixture has its own setting.
    """
    saved = saved or {}
    read = _counts(saved.get("read", "{}"))
    if stage.corpus.mixture:
        feed = CorpusFeed(task, stage, group, step, read)
        if saved.get("feed"):
            feed.resume(_object(saved["feed"], "feed"))
        return feed
    return WorldFeed(task, stage, group, step, read, workers=workers)


def _object(text: str, name: str) -> JsonObject:
    """An entry of a checkpoint that is a JSON object. Raises TrainingError for any other text."""
    try:
        value = parse_json(text, name)
    except ConfigError as error:
        raise TrainingError(f"{error} Start anew with --resume none.") from error
    if not isinstance(value, dict):
        raise TrainingError(f"{name} is {type(value).__name__}; expected numbers and places by name. {LATER}")
    return value


def _counts(text: str) -> ReadCounts:
    found = _object(text, "read")
    names = ReadCounts.__dataclass_fields__
    if set(found) - set(names) or not all(type(count) is int and count >= 0 for count in found.values()):
        raise TrainingError(f"read is {text[:80]!a}; expected counts of {', '.join(names)}. {LATER}")
    return ReadCounts(**found)


def _layout(task: Task) -> Layout:
    return task.components.tower_layout if task.stage.name == "vlm" else task.components.layout


def _sum(group: Distributed, counts: ReadCounts) -> ReadCounts:
    """The counts of all processes together."""
    return ReadCounts(*group.sum(list(astuple(counts))))


class WorldFeed:
    """Batches of the drawn world by index; a thread, or several processes, make them ahead of the training."""

    def __init__(
        self, task: Task, stage: StageConfig, group: Distributed, step: int, read: ReadCounts, *, workers: int
    ) -> None:
        self.make_batch: Dataset = task.make_batch
        self.stage, self.step, self.group, self.read = stage, step, group, read
        self.num_latents = _layout(task).num_latents
        self.ahead = 1 + 2 * workers
        self.pool: Executor = ThreadPoolExecutor(1)
        if workers:
            self.pool = ProcessPoolExecutor(workers, torch.multiprocessing.get_context("spawn"))

    def __enter__(self) -> Iterator[list[Any]]:
        return self._batches()

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def position(self) -> dict[str, str]:
        return {"read": json.dumps(asdict(self.read))}

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
            microbatches = [microbatch.result() for microbatch in pending.popleft()]
            own = sum((ReadCounts.of(data, self.num_latents) for data in microbatches), ReadCounts())
            self.read += _sum(self.group, own)
            yield microbatches


class CorpusFeed:
    """Packed documents of real corpora; every process reads its own part of each source.

    A step takes microbatches, in every process as many, until it has the `batch` documents or `batch_positions`
    positions that the stage asks for, to the nearest microbatch. What a step has too many or too few of is made up for
    by the next ones, so that the mean is exact, whatever the number of processes.
    """

    def __init__(self, task: Task, stage: StageConfig, group: Distributed, step: int, read: ReadCounts) -> None:
        self.task, self.stage, self.group, self.step, self.read = task, stage, group, step, read
        self.ahead = 0  # documents or positions that the steps so far had too many of
        self.batches = corpus_batches(task.components, stage, WorkerShard(rank=group.rank, world=group.world))
        self.identity = self.batches.identity
        self.loader = loader(self.batches, stage.corpus.workers)

    def resume(self, saved: JsonObject) -> None:
        """Continue from the entry "feed" of a checkpoint: exactly with the same readers, else with none left out.

        Raises TrainingError for an entry that does not hold the place of a mixture.
        """
        try:
            changed = self._continue(saved)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise TrainingError(f"feed does not hold the place of a mixture ({error!r}). {LATER}") from error
        if changed and self.group.is_first:
            log.warning(
                "the mixture goes on with other %s: nothing that was left unread is lost, and up to a block of %d "
                "samples of each source and reader is read twice.",
                ", ".join(changed),
                self.batches.config.block,
            )

    def _continue(self, saved: JsonObject) -> list[str]:
        """Go to the place that `saved` names; returns what has changed since."""
        self.ahead = int(saved["ahead"])
        progress, changed = MixtureProgress.from_json(saved["progress"]), self._changes(saved)
        if changed:
            self.batches.continue_after(progress.after(saved["identity"], saved["workers"], saved["ranks"]))
        else:
            self.batches.continue_after(progress)
            self.loader.load_state_dict(saved["ranks"][self.group.rank])
        return changed

    def _changes(self, saved: JsonObject) -> list[str]:
        """Settings that differ from those of the checkpoint; documents of a microbatch follow the processes."""
        now = {**self.identity, "workers": self.stage.corpus.workers, "processes": self.group.world}
        before = {**saved["identity"], "workers": saved["workers"], "processes": len(saved["ranks"])}
        names = ("processes", "workers", "sources", "files", "packing")
        return [name for name in names if json.dumps(now[name]) != json.dumps(before[name])]

    def __enter__(self) -> Iterator[list[Any]]:
        return self._batches()

    def __exit__(self, *_: object) -> None:
        pass

    def position(self) -> dict[str, str]:
        feed = {
            "identity": self.identity,
            "workers": self.stage.corpus.workers,
            "progress": self.batches.progress.to_json(),
            "ahead": self.ahead,
            "ranks": self.group.all_gather(self.loader.state_dict()),
        }
        return {"feed": json.dumps(feed), "read": json.dumps(asdict(self.read))}

    def _batches(self) -> Iterator[list[Any]]:
        documents = iter(self.loader)
        for _ in range(self.step, self.stage.steps):
            yield self._next_step(documents)

    def _next_step(self, documents: Iterator[Any]) -> list[Any]:
        """Microbatches until the next one would lead further away from the size of a step than none."""
        microbatches, missing, size = list[Any](), self._size - self.ahead, 0
        while not microbatches or 2 * missing > size:
            images, batch = next(documents)
            microbatches.append(self.task.from_documents(images, batch))
            counts = _sum(self.group, ReadCounts.of((images, batch), _layout(self.task).num_latents))
            size = counts.positions if self.stage.corpus.batch_positions else counts.documents
            self.read, missing = self.read + counts, missing - size
        self.ahead = -missing
        return microbatches

    @property
    def _size(self) -> int:
        return self.stage.corpus.batch_positions or self.stage.batch
