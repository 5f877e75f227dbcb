"""Run the arms of a comparison, one after another or several in parallel, each with its share of the threads.

At nano's size a training step is as fast on one thread as on two, so two parallel arms halve the total time. The
caller defines what an arm is and how it is scored (`ablations`, `codec_ablations`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TypeVar

import torch

from starflow2.errors import ConfigError
from starflow2.training.metrics import StepReport

__all__ = ["ProgressPrinter", "run_parallel"]

Unit = TypeVar("Unit")
Result = TypeVar("Result")
LINES = 10  # of progress per arm


@dataclass(frozen=True, slots=True)
class ProgressPrinter:
    """Prints the progress of an arm in ten lines. A class and not a closure, so that it can be sent to a process."""

    arm: str
    seed: int

    def __call__(self, report: StepReport) -> None:
        step, steps = report.step, report.steps
        if step == steps or (step * LINES // steps) > ((step - 1) * LINES // steps):
            loss, minutes = report.metrics["loss"], report.eta_s / 60
            line = f"{self.arm}, seed {self.seed}: step {step} of {steps}, loss {loss:.4f}"
            print(f"{line}, {minutes:.0f} minutes left", flush=True)


def run_parallel(work: Callable[[Unit], Result], units: Sequence[Unit], jobs: int = 1) -> Iterator[Result]:
    """Results of `work` for each unit as they arrive: in the order of `units` with one job, in any order with several.

    jobs: number of processes, which share this one's threads equally; with several, `work` and units have to be
    picklable. An exception in a process is raised here and no further unit is started. Raises ConfigError for jobs < 1.
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
