"""The arms of a comparison, one after another or several side by side, each with its share of the threads.

At nano's size a step takes one thread as long as two, so that two arms at a time take half as long together. Not here:
what an arm is and how it is scored (compare, codecs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TypeVar

import torch

from starflow2.core.serialize import JsonObject
from starflow2.errors import ConfigError
from starflow2.training.metrics import StepReport

__all__ = ["ProgressPrinter", "run_parallel"]

Unit = TypeVar("Unit")
Row = JsonObject
TOLD = 10  # lines per arm


@dataclass(frozen=True, slots=True)
class ProgressPrinter:
    """Says how far an arm is, ten times on its way. An object and not a closure, so that processes can be handed it."""

    arm: str
    seed: int

    def __call__(self, at: StepReport) -> None:
        if at.step == at.steps or (at.step * TOLD // at.steps) > ((at.step - 1) * TOLD // at.steps):
            loss, minutes = at.metrics["loss"], at.eta_s / 60
            told = f"{self.arm}, seed {self.seed}: step {at.step} of {at.steps}, loss {loss:.4f}"
            print(f"{told}, {minutes:.0f} minutes left", flush=True)


def run_parallel(work: Callable[[Unit], list[Row]], units: Sequence[Unit], jobs: int = 1) -> Iterator[list[Row]]:
    """The rows of each unit as they come: in the order of `units` with one job, in any order with several.

    jobs: processes, each with that share of this one's threads; `work` and units have to be picklable then. A failure
    in one is raised here, and what has not begun is not begun. Raises ConfigError for fewer than one.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; expected at least 1.")
    if jobs == 1:
        yield from map(work, units)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    spawn = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        try:
            for done in as_completed([pool.submit(work, unit) for unit in units]):
                yield done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
