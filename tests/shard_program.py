"""A program for tests of several processes: runs of the tiny model, one after the other, each on processes of its own.

    python shard_program.py '[{"folder": "runs/two", "world": 2, "steps": 20, "stage": {"shard": {"mode": "fsdp"}}}]'

Everything is imported once and the processes are forked, which is most of their price; `{"world": 2, "runs": [...]}`
trains several runs in the same processes. A run with `dies` ends with SIGKILL of process 1 in that step, whereupon the
others are killed, too; one with `dies_saving` in the background, when all shards of that step's checkpoint are written
and it has not taken the place of the one before. `double` trains in float64.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # every process makes an optimizer, which imports it: seconds, here once for all of them

from model_cases import tiny_run
from starflow2.core.dialogue import Dialogue, Turn
from starflow2.models.components import Components
from starflow2.training.checkpoint import ShardStore
from starflow2.training.config import OptimConfig, RunConfig, ShardConfig, StageConfig
from starflow2.training.datasets import Documents, joint_dialogue
from starflow2.training.loop import fit
from starflow2.training.task import LossAndMetrics
from starflow2.training.tasks import TASKS, JointTask

with suppress(ImportError):
    import torch.utils.tensorboard  # where it is installed, every run writes its curves

WORDS = Dialogue((Turn(("is it red",), ("no",)), Turn(("what colour is it",), ("blue and yellow",))), "words")


def often_words(stage: StageConfig, seed: int, index: int) -> Dialogue:
    """Documents of stage 3, in pairs: every third pair shows nothing, so that one process of two has no image."""
    return WORDS if index // 2 % 3 == 1 else joint_dialogue(stage, seed, index)


@dataclass
class Job:
    """What happens to a run, by the keys of its entry."""

    job: dict[str, Any]
    rank: int
    microbatches: int = 0  # begun so far

    def make_task(self, components: Components, stage: StageConfig, seed: int) -> JointTask:
        if self.job.get("double"):
            components.double()
        dataset = Documents.of(components, partial(often_words, stage, seed))
        return _Watched(components, stage, seed, dataset=dataset, job=self)

    def begin(self) -> None:
        """Called before every microbatch, which here is a step of a process."""
        self.microbatches += 1
        for key, name in (("dies", signal.SIGKILL), ("asked", signal.SIGTERM)):
            if self.rank == 1 and self.microbatches - 1 == self.job.get(key):
                os.kill(os.getpid(), name)

    @property
    def is_spoilt(self) -> bool:
        return self.rank == 1 and self.microbatches == self.job.get("spoil")


class _Watched(JointTask):
    def __init__(self, *args: Any, job: Job, **options: Any) -> None:
        super().__init__(*args, **options)
        self.job = job

    def loss(self, *args: Any) -> LossAndMetrics:
        self.job.begin()
        loss, metrics = super().loss(*args)
        return loss * (torch.inf if self.job.is_spoilt else 1), metrics


def recipe(steps: int, changes: dict[str, Any], precision: str) -> RunConfig:
    """Stage 3 in float32 with AdamW alone, whose steps do not magnify rounding, at a rate that is always the same."""
    changes = dict(changes)
    shard = ShardConfig(**changes.pop("shard", {}))
    optim = OptimConfig(
        **{"lr": 1e-3, "matrix_lr": 0.0, "decay_share": 0.0, "warmup_steps": 1} | changes.pop("optim", {})
    )
    run = tiny_run(steps, 4, precision)
    return replace(run, stages=tuple(replace(s, shard=shard, optim=optim, **changes) for s in run.stages))


def work(job: dict[str, Any], rank: int) -> None:
    torch.set_num_threads(1)
    for one in job.get("runs", [job]):
        train(one, rank)


def train(job: dict[str, Any], rank: int) -> None:
    run = recipe(job["steps"], job.get("stage", {}), job.get("precision", "float32"))
    if "dies_saving" in job:
        replace_last = ShardStore._replace_last

        def killed(self: ShardStore, new: Path, done: Path, settings: dict[str, str]) -> None:
            if done.name == str(job["dies_saving"]):
                os.kill(os.getpid(), signal.SIGKILL)
            replace_last(self, new, done, settings)

        ShardStore._replace_last = killed  # type: ignore[method-assign]
    TASKS["joint"] = Job(job, rank).make_task  # type: ignore[assignment]
    fit(run, "joint", job["folder"])


def start(job: dict[str, Any], work: Callable[[dict[str, Any], int], None] = work) -> list[int]:
    """Fork the processes of a run; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job["world"]):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(job["world"]), "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            try:
                work(job, rank)
            except BaseException as error:
                if "asked" not in job:
                    traceback.print_exc()
                os._exit(3 if type(error).__name__ == "TrainingError" else 1)
            os._exit(0)
        children.append(child)
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] < 0 or codes[child] == 1:  # torchrun, too, ends the others
            for other in children:
                if other not in codes:
                    os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def expected_codes(planned: dict[str, Any]) -> set[int]:
    """Exit codes that the processes of a run may end with: each with one of them, at least one with the lowest."""
    if "dies" in planned or "dies_saving" in planned:
        return {-signal.SIGKILL, 1}  # 1: it noticed that the other was gone before it was killed as well
    return {3} if "asked" in planned else {0}


if __name__ == "__main__":
    for planned in json.loads(sys.argv[1]):
        expected, ended = expected_codes(planned), start(planned)
        if not set(ended) <= expected or min(expected) not in ended:
            sys.exit(f"{planned}: exit codes {ended}, expected {sorted(expected)}")
