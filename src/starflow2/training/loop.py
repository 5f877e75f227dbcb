"""Training: one loop for every stage. A recipe says how long and on what; a `Task` says what trains and its loss.

A run that is killed at any moment and resumed from its last checkpoint repeats the uninterrupted run bit for bit. Not
here: scoring (a callable is passed in), a step (`trainer`), the processes of a run (`parallel`), files of checkpoints
(`checkpoint`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from starflow2.core.torch_defaults import torch_defaults
from starflow2.errors import TrainingError
from starflow2.models.checkpoint import save_components
from starflow2.models.components import Components
from starflow2.training.checkpoint import CheckpointStore, store_for
from starflow2.training.config import Precision, RunConfig, StageConfig
from starflow2.training.datasets import check_source
from starflow2.training.loader import Feed, feed_for
from starflow2.training.metrics import MetricsWriter, StepReport
from starflow2.training.parallel import Distributed, check_batch_divides
from starflow2.training.run_lock import run_lock
from starflow2.training.start import start_stage
from starflow2.training.task import Task
from starflow2.training.tasks import TASKS
from starflow2.training.trainer import StopSignal, Trainer

__all__ = ["Evaluate", "Report", "fit", "fit_task", "try_step"]

Report = Callable[[StepReport], None]
Evaluate = Callable[[Components, int], dict[str, float]]  # the model with averaged weights and the step, to metrics


@torch_defaults()
def fit(
    run: RunConfig,
    stage_name: str,
    folder: str | Path,
    *,
    resume: bool = True,
    device: str = "cpu",
    report: Report | None = None,
    evaluate: Evaluate | None = None,
    workers: int = 0,
) -> Path:
    """Train one stage in `folder` and return the model folder it wrote, folder/model.

    Earlier stages must be in folder/model. With `resume`, continues from the last checkpoint there. `workers` processes
    make the batches (0: a thread does), which changes nothing but the speed. `report` is called at every metric line,
    `evaluate` whenever a checkpoint is written. Raises TrainingError, also while another run trains in the folder,
    ConfigError, DataError, OutputError.
    """
    stage, folder = run.stage(stage_name), Path(folder)
    check_source(run.model, stage)
    group = Distributed.from_environment(device, stage.shard)
    check_batch_divides(stage, group, evaluates=evaluate is not None)
    with run_lock(folder, group, f"training stage {stage_name}"):
        store = store_for(folder, stage, group)
        components = start_stage(run, stage_name, folder, device, group.sharded_components(stage))
        checkpoint = store.settings(run, stage) if resume else None
        task = _stage_task(components, run, stage, is_resumed=checkpoint is not None)
        precision = checkpoint["precision"] if checkpoint else _pick_precision(run.precision, device)
        precision = group.broadcast_choice(precision)
        trainer = Trainer.prepare(task, group, device=device, precision=precision)
        if checkpoint is not None:
            trainer.resume(store, checkpoint)
        position = checkpoint.get("feed", "") if checkpoint is not None else ""
        feed = feed_for(task, stage, group, step=trainer.state.step, saved=position, workers=workers)
        writer = MetricsWriter(folder, stage, trainer.state.step) if group.is_first else None
        _train(trainer, feed, store, writer, report, evaluate)
        with trainer.state.averaged_weights(), group.unsharded(components):
            if group.is_first:
                save_components(components, folder / "model")
        group.barrier()
    return folder / "model"


@torch_defaults()
def fit_task(
    task: Task,
    *,
    device: str = "cpu",
    report: Report | None = None,
    workers: int = 0,
) -> dict[str, float]:
    """Train a task as `fit` does, in this process and without files; its modules end with averaged weights.

    For short runs, comparisons and fine-tuning. Returns the last step's metrics. Nothing is saved on the way, and
    `task.initialise` is left to the caller.
    """
    stage, group = task.stage, Distributed()
    trainer = Trainer.prepare(task, group, device=device, precision=_pick_precision("auto", device))
    metrics: dict[str, float] = {}
    started = time.perf_counter()
    with StopSignal() as stop, feed_for(task, stage, group, step=0, workers=workers) as batches:
        for microbatches in batches:
            metrics, stopping = trainer.train_step(microbatches, stop)
            step = trainer.state.step
            if report is not None and (step % stage.log_every == 0 or trainer.is_done):
                report(StepReport.of(stage, step, metrics, time.perf_counter() - started))
            if stopping:
                raise TrainingError(f"stopped by a signal at step {step} of {stage.steps}.")
    task.trained.load_state_dict(trainer.state.ema or task.trained.state_dict())
    task.trained.eval().requires_grad_(False)
    return metrics


@torch_defaults()
def try_step(task: Task, run: RunConfig, group: Distributed, device: str) -> dict[str, float]:
    """Take the first step of a stage as `fit` does, without files; returns its metrics. For dry runs."""
    check_batch_divides(task.stage, group)
    precision = group.broadcast_choice(_pick_precision(run.precision, device))
    trainer = Trainer.prepare(task, group, device=device, precision=precision)
    with feed_for(task, replace(task.stage, steps=1), group, step=0) as batches:
        return trainer.train_step(next(batches))[0]


def _stage_task(components: Components, run: RunConfig, stage: StageConfig, *, is_resumed: bool) -> Task:
    """The task of a stage, initialised if nothing of the stage was trained before; all else in the model is frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)  # of modules that a task makes, such as a head
        task = TASKS[stage.name](components, stage, run.seed)
        if not is_resumed and stage.name not in components.finished_stages:
            task.initialise()
    components.finished_stages = (*(s for s in components.finished_stages if s != stage.name), stage.name)
    components.requires_grad_(False)
    return task


def _train(
    trainer: Trainer,
    feed: Feed,
    store: CheckpointStore,
    writer: MetricsWriter | None,
    report: Report | None,
    evaluate: Evaluate | None,
) -> None:
    """Take the steps that are left, with metrics and checkpoints. Raises TrainingError where a signal ends the run."""
    stage, state = trainer.stage, trainer.state
    with StopSignal() as stop, writer or contextlib.nullcontext(), feed as batches:
        for microbatches in batches:
            started = time.perf_counter()
            metrics, stopping = trainer.train_step(microbatches, stop)
            if writer is not None and (state.step % stage.log_every == 0 or trainer.is_done):
                line = writer.write_step(state.step, metrics, time.perf_counter() - started)
                if report is not None:
                    report(line)
            if state.step % stage.save_every == 0 or trainer.is_done or stopping:
                trainer.save(store, feed.position())
                if writer is not None and evaluate is not None:
                    with state.averaged_weights():
                        writer.write(state.step, evaluate(trainer.task.components, state.step))
            if stopping and not trainer.is_done:
                store.close()
                raise TrainingError(
                    f"stopped by a signal at step {state.step}; its checkpoint is written, continue with --resume auto."
                )
    store.close()


def _pick_precision(wanted: Precision, device: str) -> str:
    """bfloat16 where this machine multiplies it faster than float32; some CPUs do not."""
    if wanted != "auto":
        return wanted
    if device != "cpu":
        return "bfloat16"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 512, dtype=dtype), torch.randn(512, 512, dtype=dtype)
        runs = []
        for _ in range(10):
            started = time.perf_counter()
            a @ b
            runs.append(time.perf_counter() - started)
        seconds[dtype] = min(runs)
    return "bfloat16" if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else "float32"
