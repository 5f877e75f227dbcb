"""Training: one loop for every stage. A recipe says how long and on what; a `Task` says what trains and its loss.

A run that is killed at any moment and resumed from its last checkpoint repeats the uninterrupted run bit for bit. Not
here: scoring (a callable is passed in), a step (`trainer`), the processes of a run (`parallel`), files of checkpoints
(`checkpoint`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from starflow2.core.files import named_place
from starflow2.core.torch_defaults import torch_defaults
from starflow2.errors import OutputError, TrainingError
from starflow2.models.checkpoint import save_components
from starflow2.models.components import Components
from starflow2.training.checkpoint import CheckpointStore, Resume, Saved, store_for
from starflow2.training.config import Precision, RunConfig, StageConfig
from starflow2.training.datasets import check_source
from starflow2.training.evaluation import Evaluate, Evaluator
from starflow2.training.kept import check_kept, keep_model
from starflow2.training.loader import Feed, feed_for
from starflow2.training.metrics import Log, MetricsWriter, SpeedMeter, StepReport, peak_flops
from starflow2.training.mixture_check import check_mixture
from starflow2.training.parallel import Distributed, check_batch_divides
from starflow2.training.run_lock import run_lock
from starflow2.training.start import check_start, start_stage
from starflow2.training.task import Task
from starflow2.training.tasks import task_maker
from starflow2.training.trainer import StopSignal, Trainer
from starflow2.training.work import measured_flops

__all__ = ["Evaluate", "Log", "Report", "fit", "fit_task", "try_step"]

Report = Callable[[StepReport], None]


@torch_defaults()
def fit(
    run: RunConfig,
    stage_name: str,
    folder: str | Path,
    *,
    resume: str = "auto",
    device: str = "cpu",
    report: Report | None = None,
    evaluate: Evaluate | None = None,
    log: Log | None = None,
) -> Path:
    """Train one stage in `folder` and return the model folder it wrote, folder/model.

    Earlier stages must be in folder/model. resume: as in `Resume.parse`. `report` is called at every metric line,
    `evaluate` in the first process at every evaluation (under shards with a whole copy of the model), `log` with every
    line of metrics. Raises TrainingError, also while another run trains in the folder, ConfigError, DataError,
    OutputError.
    """
    stage, folder, wanted = run.stage(stage_name), named_place(folder, "folder", OutputError), Resume.parse(resume)
    check_source(run.model, stage)
    check_start(run, stage_name, folder)
    check_mixture(stage)
    check_kept(run.model, stage, folder)
    group = Distributed.from_environment(device, stage.shard)
    check_batch_divides(stage, group)
    with run_lock(folder, group, f"training stage {stage_name}"):
        store = store_for(folder, stage, group)
        components = start_stage(run, stage_name, folder, device, group.sharded_components(stage))
        saved = store.find(wanted, run)
        task = _stage_task(components, run, stage, is_resumed=saved is not None)
        trainer = Trainer.prepare(task, group, device=device, precision=_precision(run, saved, wanted, group, device))
        if saved is not None:
            store.load(trainer.state, saved)
        before, workers = _read_before(saved, wanted), stage.corpus.workers
        feed = feed_for(task, stage, group, step=trainer.state.step, saved=before, workers=workers)
        writer = _writer(trainer, feed, folder, log) if group.is_first else None
        _Run(trainer, feed, store, writer, Evaluator(trainer, evaluate), report).take_steps()
        with trainer.state.averaged_weights(), group.unsharded(components):
            if group.is_first:
                save_components(components, folder / "model")
                keep_model(components, stage, folder)
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
    feed = feed_for(task, stage, group, step=0, workers=workers)
    metrics, speed = dict[str, float](), SpeedMeter(stage, 0, feed.read)
    with StopSignal() as stop, feed as batches:
        for microbatches in batches:
            metrics, stopping = trainer.train_step(microbatches, stop)
            step = trainer.state.step
            if report is not None and (step % stage.log_every == 0 or trainer.is_done):
                report(speed.report(step, metrics, feed.read))
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
        task = task_maker(stage)(components, stage, run.seed)
        if not is_resumed and stage.name not in components.finished_stages:
            task.initialise()
    components.finished_stages = (*(s for s in components.finished_stages if s != stage.name), stage.name)
    components.requires_grad_(False)
    return task


def _precision(run: RunConfig, saved: Saved | None, wanted: Resume, group: Distributed, device: str) -> str:
    """That of the checkpoint that a run goes on from, unless it goes on with settings of its own."""
    if saved is not None and (wanted.mode == "auto" or run.precision == "auto"):
        return group.broadcast_choice(saved.settings["precision"])
    return group.broadcast_choice(_pick_precision(run.precision, device))


def _read_before(saved: Saved | None, wanted: Resume) -> dict[str, str]:
    """Progress through the data in a checkpoint: how much was read, and where, unless they start anew."""
    kept = ("read", "feed") if wanted.mode == "auto" else ("read",)
    return {name: saved.settings[name] for name in kept if name in saved.settings} if saved is not None else {}


def _writer(trainer: Trainer, feed: Feed, folder: Path, log: Log | None) -> MetricsWriter:
    stage, device = trainer.stage, trainer.device
    flops = measured_flops(trainer.task.components, stage)
    speed, peak = SpeedMeter(stage, trainer.state.step, feed.read), trainer.group.world * peak_flops(device)
    return MetricsWriter(folder, speed, log=log, flops=flops, peak=peak, device=device)


@dataclass(slots=True)
class _Run:
    """The steps of a stage that are left, with metrics, checkpoints and evaluations."""

    trainer: Trainer
    feed: Feed
    store: CheckpointStore
    writer: MetricsWriter | None
    evaluator: Evaluator
    report: Report | None

    def take_steps(self) -> None:
        """Raises TrainingError where a signal, or a loss that is not finite for good, ends the run."""
        stage, state = self.trainer.stage, self.trainer.state
        with StopSignal() as stop, self.writer or contextlib.nullcontext(), self.feed as batches:
            if not state.step:  # what later held-out losses are compared with
                self._write_measured(self.evaluator.held_out())
            started = time.perf_counter()
            for microbatches in batches:
                waited = time.perf_counter() - started
                metrics, stopping = self.trainer.train_step(microbatches, stop)
                times = {"seconds": time.perf_counter() - started, "data_wait_s": waited}
                is_last = self.trainer.is_done or stopping
                if state.step % stage.log_every == 0 or self.trainer.is_done:
                    self._write(metrics | times | self.trainer.task.by_source.take(self.trainer.group))
                self._check_finite()
                if is_saved := (state.step % stage.save_every == 0 or is_last):
                    self.trainer.save(self.store, self.feed.position())
                if stopping and not self.trainer.is_done:
                    self._stop()
                if self.evaluator.is_due(is_saved=is_saved):
                    self._write_measured(self.evaluator())
                started = time.perf_counter()
        self.store.close()

    def _write(self, metrics: dict[str, float]) -> None:
        if self.writer is None:
            return
        line = self.writer.write_step(self.trainer.state.step, metrics, self.feed.read)
        if self.report is not None:
            self.report(line)

    def _write_measured(self, metrics: dict[str, float]) -> None:
        if self.writer is not None:
            self.writer.write(self.trainer.state.step, metrics)

    def _stop(self) -> None:
        self.store.close()
        raise TrainingError(
            f"stopped by a signal at step {self.trainer.state.step}; its checkpoint is written, continue with "
            "--resume auto."
        )

    def _check_finite(self) -> None:
        """End a run that cannot recover: its weights do not change any more, so every step would be skipped."""
        stage, trainer = self.trainer.stage, self.trainer
        if trainer.skipped_in_row < stage.max_skipped:
            return
        self.store.close()
        raise TrainingError(
            f"the loss or its gradient was not finite in the last {trainer.skipped_in_row} steps, up to step "
            f"{trainer.state.step}; look for the first such step in metrics-{stage.name}.jsonl and go back before it "
            "with a lower learning rate: --resume weights:STEP --optim.lr LR."
        )


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
