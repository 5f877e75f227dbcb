"""Metrics of a run: reports for progress bars, JSON lines in a file, curves for TensorBoard."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starflow2.core.files import replacing
from starflow2.core.json_reader import parse_record
from starflow2.core.ledger import append_line
from starflow2.training.config import StageConfig

__all__ = ["MetricsWriter", "StepReport"]


@dataclass(frozen=True, slots=True)
class StepReport:
    """The metrics of one step and the progress of its stage."""

    stage: str
    step: int
    steps: int
    metrics: dict[str, float]
    images_per_s: float  # mean since the run was started
    eta_s: float

    @classmethod
    def of(
        cls, stage: StageConfig, step: int, metrics: dict[str, float], seconds: float, first_step: int = 0
    ) -> StepReport:
        """The report of `step`, taken `seconds` after `first_step`."""
        per_step = seconds / max(1, step - first_step)
        return cls(stage.name, step, stage.steps, metrics, stage.batch / per_step, per_step * (stage.steps - step))


class MetricsWriter:
    """Writes metrics-STAGE.jsonl, and TensorBoard files beside it where that is installed.

    Lines of steps after `step` are removed: a resumed run takes these steps again.
    """

    def __init__(self, folder: Path, stage: StageConfig, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.stage, self.first_step = folder / f"metrics-{stage.name}.jsonl", stage, step
        self.clock = time.perf_counter()
        lines = self.path.read_bytes().splitlines() if self.path.is_file() and step else []
        with replacing(self.path) as temp:
            temp.write_bytes(b"".join(line + b"\n" for line in lines if _step_of(line) <= step))
        self.board = _tensorboard(folder / "tensorboard" / stage.name)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.close()  # else the last two minutes of curves are lost

    def write_step(self, step: int, metrics: dict[str, float], seconds: float) -> StepReport:
        """Write the metrics of a step that took `seconds`."""
        report = StepReport.of(self.stage, step, metrics, time.perf_counter() - self.clock, self.first_step)
        self.write(step, {**metrics, "seconds": seconds, "images_per_s": report.images_per_s})
        return report

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line of metrics, unless there are none."""
        if not metrics:
            return
        append_line(self.path, {"step": step, "time": time.time(), **metrics})
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(f"{self.stage.name}/{name}", value, step)


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
