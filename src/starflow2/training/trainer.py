"""One stage in training: a step, its checkpoints. `loop` drives it.

Every random choice of a step is a pure function of (seed, stage, microbatch, step).
"""

from __future__ import annotations

import contextlib
import math
import signal
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from starflow2.nn import at_least_fp32
from starflow2.training.checkpoint import CheckpointStore
from starflow2.training.config import StageConfig
from starflow2.training.parallel import Distributed, Replica, checkpoint_activations
from starflow2.training.state import TrainState
from starflow2.training.task import LossAndMetrics, LossWeights, Task

__all__ = ["StopSignal", "Trainer"]


class StopSignal:
    """Turns SIGTERM into a flag, so that a run ends with a checkpoint."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            self.previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, *_: object) -> None:
        self.requested = True

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ValueError, AttributeError):
            signal.signal(signal.SIGTERM, self.previous)


@dataclass(slots=True)
class Trainer:
    """A task in training, in one of the processes of a run."""

    task: Task
    device: str
    precision: str  # of autocast: float32 or bfloat16
    group: Distributed
    replica: Replica
    state: TrainState
    skipped_in_row: int = 0  # steps until now

    @classmethod
    def prepare(cls, task: Task, group: Distributed, *, device: str, precision: str) -> Trainer:
        """Place the trained weights on `device`, copied or sharded as the group does it, with fresh optimisers."""
        task.trained.requires_grad_(True)
        checkpoint_activations(task)
        replica = group.prepare(task, precision, device)
        state = TrainState.fresh(task.trained, task.stage.optim, group)
        return cls(task, device, precision, group, replica, state)

    @property
    def stage(self) -> StageConfig:
        return self.task.stage

    @property
    def is_done(self) -> bool:
        return self.state.step >= self.stage.steps

    def train_step(self, microbatches: Sequence[Any], stop: StopSignal | None = None) -> tuple[dict[str, float], bool]:
        """Take one optimiser step on this process's microbatches; returns metrics, and if any process shall stop.

        A step whose loss or gradient is not finite in any process changes no weight, average or running statistic, and
        is counted. The accelerator is waited for once, when it has computed the gradients.
        """
        optim = self.stage.optim
        rate = optim.rate(self.state.step, self.stage.steps)
        buffers = {k: v.clone() for k, v in self.task.trained.named_buffers()}
        means = self.replica.reduce(self.forward_backward(microbatches))
        (stopping,) = self.group.sum([int(stop is not None and stop.requested)])
        means["grad_norm"] = self.replica.clip(optim.clip)
        metrics = _to_host(means)
        is_finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        self._update_weights(rate, is_finite)
        if is_finite:
            self.state.update_average(optim.ema)
            self.skipped_in_row = 0
        else:
            _restore_buffers(self.task.trained, buffers)
            self.state.skipped += 1
            self.skipped_in_row += 1
        self.state.step += 1
        metrics |= {"rate": rate, "lr": rate * optim.lr} | (
            {"matrix_lr": rate * optim.matrix_lr} if optim.matrix_lr else {}
        )
        return metrics | ({"skipped": float(self.state.skipped)} if self.state.skipped else {}), stopping > 0

    def forward_backward(self, microbatches: Sequence[Any]) -> dict[str, Tensor]:
        """Run forward and backward on this process's microbatches; returns the mean loss and metrics."""
        means: dict[str, Tensor] = {}
        number = len(microbatches)
        weights = self.group.loss_weights(self.task, microbatches)
        for i, data in enumerate(microbatches):
            with self.replica.exchange(is_last=i == number - 1):
                # noise belongs to a microbatch, whichever process it falls to
                loss, metrics = self._loss(data, f"{self.group.rank * number + i}/{self.state.step}", weights[i])
                (loss / number).backward()
            _add(means, {"loss": loss, **metrics}, number)
        return means

    @torch.no_grad()
    def held_out_metrics(self, microbatches: Sequence[Any]) -> dict[str, float]:
        """Mean loss and metrics over microbatches of all processes, by averaged weights and always the same noise."""
        means: dict[str, Tensor] = {}
        number = len(microbatches)
        weights = self.group.loss_weights(self.task, microbatches)
        with self.state.averaged_weights(), self.replica.evaluating(), self.task.by_source.paused():
            for i, data in enumerate(microbatches):
                loss, metrics = self._loss(data, f"held out/{self.group.rank * number + i}", weights[i])
                _add(means, {"loss": loss, **metrics}, number)
        return {f"held_out_{name}": value for name, value in _to_host(self.replica.reduce(means)).items()}

    def _loss(self, data: Any, name: str, weights: LossWeights) -> LossAndMetrics:
        """The loss of a microbatch, whose noise is a function of the run's seed, the stage and `name`."""
        seed = zlib.crc32(f"{self.task.seed}/{self.stage.name}/{name}".encode())
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.replica.loss(data, torch.Generator().manual_seed(seed), weights)

    def save(self, store: CheckpointStore, position: dict[str, str]) -> None:
        """Write a checkpoint; `position`: where the data stands."""
        run = {"precision": self.precision, "seed": str(self.task.seed), **position}
        store.save(self.state, self.state.settings(self.stage, run))

    def _update_weights(self, rate: float, is_finite: bool) -> None:
        optim = self.stage.optim
        for optimizer, lr in zip(self.state.optimizers, (optim.lr, optim.matrix_lr), strict=False):
            for group in optimizer.param_groups:
                _set_learning_rate(group, lr * rate)
            if is_finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _add(means: dict[str, Tensor], values: dict[str, Tensor], number: int) -> None:
    """Add a microbatch's values to the means over `number` of them."""
    for name, value in values.items():
        part = value.detach() / number
        means[name] = means[name] + part if name in means else part


def _to_host(values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars as numbers, in one transfer."""
    stacked = torch.stack([at_least_fp32(value) for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


def _set_learning_rate(group: dict[str, Any], lr: float) -> None:
    """Set the learning rate of a parameter group; a tensor stays a tensor, which compiled steps need."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


@torch.no_grad()
def _restore_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Undo what a forward pass did to running statistics."""
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
