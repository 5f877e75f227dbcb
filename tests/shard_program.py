"""A program for tests of several processes: runs of the tiny model, one after the other, each on processes of its own.

    python shard_program.py '[{"folder": "runs/two", "world": 2, "steps": 20, "stage": {"shard": {"mode": "fsdp"}}}]'

Everything is imported once and the processes are forked, which is most of their price. A run with `dies` ends with
SIGKILL of process 1 in that step, whereupon the others are killed, too; one with `dies_saving` in the background, when
all shards of that step's checkpoint are written and it has not taken the place of the one before. `double` trains in
float64.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from model_cases import tiny_run
from starflow2.data.dialogue import Dialogue, Turn
from starflow2.training import checkpoint as trainstate
from starflow2.training import datasets
from starflow2.training import loop as train
from starflow2.training import tasks as stages
from starflow2.training.config import OptimConfig, RunConfig, ShardConfig

WORDS = Dialogue((Turn(("is it red",), ("no",)), Turn(("what colour is it",), ("blue and yellow",))), "words")
RIGHT = datasets.joint_dialogue


def often_words(stage: Any, seed: int, index: int) -> Dialogue:
    """Documents of stage 3, in pairs: every third pair shows nothing, so that one process of two has no picture."""
    return WORDS if index // 2 % 3 == 1 else RIGHT(stage, seed, index)


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
    run = recipe(job["steps"], job.get("stage", {}), job.get("precision", "float32"))
    step = train._step

    def watched(state: Any, *rest: Any) -> Any:
        if state.step == job.get("dies") and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.step == job.get("asked") and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *rest)

    train._step = watched
    if "dies_saving" in job:
        take_over = trainstate._Shards._take_over

        def killed(self: Any, new: Any, done: Any, settings: Any) -> None:
            if done.name == str(job["dies_saving"]):
                os.kill(os.getpid(), signal.SIGKILL)
            take_over(self, new, done, settings)

        trainstate._Shards._take_over = killed  # type: ignore[method-assign]
    if job.get("double"):
        start_components = train._start_components
        train._start_components = lambda *args: start_components(*args).double()
    datasets.joint_dialogue = often_words
    if "spoil" in job and rank == 1:
        loss = stages.JointTask.loss
        calls: list[int] = []

        def spoiled(*args: Any) -> Any:
            calls.append(1)
            value, told = loss(*args)
            return value * (torch.inf if len(calls) == job["spoil"] else 1), told

        stages.JointTask.loss = spoiled  # type: ignore[method-assign]
    train.fit(run, "joint", job["folder"])


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


if __name__ == "__main__":
    for planned in json.loads(sys.argv[1]):
        expected = [0] * planned["world"]
        if "dies" in planned or "dies_saving" in planned:
            expected = [-signal.SIGKILL] * planned["world"]
        if "asked" in planned:
            expected = [3] * planned["world"]
        ended = start(planned)
        if ended != expected:
            sys.exit(f"{planned}: exit codes {ended}, expected {expected}")
