"""Metrics of a run: reports for progress bars, JSON lines in a file, curves for TensorBoard and for whoever listens."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from starflow2.core.files import replacing
from starflow2.core.json_reader import parse_record
from starflow2.core.ledger import append_line
from starflow2.training.config import StageConfig
from starflow2.training.counts import ReadCounts

__all__ = ["Log", "MetricsWriter", "SpeedMeter", "StepReport", "peak_flops", "peak_memory"]

Log = Callable[[int, dict[str, float]], None]  # takes the step and its metrics, such as `run.log` of wandb or trackio
FlopsOf = Callable[[ReadCounts], float]  # floating-point operations that training on some data takes

PEAK = {  # dense bfloat16 operations per second of one GPU, by a part of its name; the first that fits
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True, slots=True)
class StepReport:
    """The metrics of one step and the progress of its stage."""

    stage: str
    step: int
    steps: int
    metrics: dict[str, float]
    images_per_s: float  # of all processes; mean since the run was started
    eta_s: float
    latents_per_s: float = 0.0  # the same


class SpeedMeter:
    """Speed since the start of a run, from what was read and the time on the wall."""

    def __init__(
        self, stage: StageConfig, step: int, read: ReadCounts, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """step, read: what the stage had behind it at the start of the run. clock: seconds."""
        self.stage, self.first_step, self.first_read = stage, step, read
        self.clock, self.started = clock, clock()

    @property
    def seconds(self) -> float:
        """Since the start of the run."""
        return self.clock() - self.started

    def rates(self, read: ReadCounts) -> dict[str, float]:
        """Amounts per second, as documents_per_s and so on; read: since the start of the stage."""
        seconds, first = self.seconds, asdict(self.first_read)
        return {f"{name}_per_s": (count - first[name]) / seconds for name, count in asdict(read).items()}

    def report(self, step: int, metrics: dict[str, float], read: ReadCounts) -> StepReport:
        """The report of `step`, after which `read` had been read."""
        rates, steps = self.rates(read), self.stage.steps
        left = self.seconds / max(1, step - self.first_step) * (steps - step)
        name, images, latents = self.stage.name, rates["images_per_s"], rates["latents_per_s"]
        return StepReport(name, step, steps, metrics, images, left, latents)


class MetricsWriter:
    """Writes metrics-STAGE.jsonl, and TensorBoard files beside it where that is installed.

    Lines of steps after `step` are removed: a resumed run takes these steps again. log: is called with every line, too.
    flops: of what was read, together with `peak` (of all processes, per second) for the share of it that is used.
    """

    def __init__(
        self,
        folder: Path,
        speed: SpeedMeter,
        *,
        log: Log | None = None,
        flops: FlopsOf | None = None,
        peak: float = 0.0,
        device: str = "cpu",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.speed, self.stage, self.log = speed, speed.stage, log
        self.flops, self.peak, self.device = flops, peak, device
        self.path, step = folder / f"metrics-{self.stage.name}.jsonl", speed.first_step
        lines = self.path.read_bytes().splitlines() if self.path.is_file() and step else []
        with replacing(self.path) as temp:
            temp.write_bytes(b"".join(line + b"\n" for line in lines if _step_of(line) <= step))
        self.board = _tensorboard(folder / "tensorboard" / self.stage.name)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.close()  # else the last two minutes of curves are lost

    def write_step(self, step: int, metrics: dict[str, float], read: ReadCounts) -> StepReport:
        """Write the metrics of a step, and what had been read after it."""
        report, rates = self.speed.report(step, metrics, read), self.speed.rates(read)
        amounts = {name: float(count) for name, count in asdict(read).items()}
        rates["positions_per_s"] = rates["text_tokens_per_s"] + rates["latents_per_s"]
        if self.flops is not None and self.peak:
            done = self.flops(read) - self.flops(self.speed.first_read)
            rates["mfu"] = done / self.speed.seconds / self.peak
        self.write(step, {**metrics, **amounts, **rates, "memory_gb": peak_memory(self.device) / 1e9})
        return report

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line of metrics, unless there are none."""
        if not metrics:
            return
        append_line(self.path, {"step": step, "time": time.time(), **metrics})
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(f"{self.stage.name}/{name}", value, step)
        if self.log is not None:
            self.log(step, {f"{self.stage.name}/{name}": value for name, value in metrics.items()})


def peak_flops(device: str) -> float:
    """Operations per second that this process's GPU can do at most in dense bfloat16; 0 where we do not know."""
    if device != "cuda":
        return 0.0
    name = torch.cuda.get_device_name()
    return next((flops for part, flops in PEAK.items() if part in name), 0.0)


def peak_memory(device: str) -> int:
    """The most bytes used so far: on a GPU by its allocator, on a CPU by this process."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def _step_of(line: bytes) -> float:
    """The step of a line of metrics; infinity for a line that was cut off by a power failure."""
    try:
        return float(parse_record(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
