"""Short runs of the tiny model, and what they leave behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from model_cases import tiny_run
from starflow2.models.components import Components
from starflow2.training.config import RunConfig

STEPS, EVERY = 6, 2
RUN = tiny_run(STEPS, EVERY)


def lines(folder: Path, stage: str = "t2i") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / f"metrics-{stage}.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[tuple[float, ...]]:
    """Every number of a curve that does not measure time, exactly as written."""
    return [tuple(line[k] for k in ("step", "loss", "nats_per_dim", "grad_norm", "rate")) for line in lines(folder)]


def untimed(line: dict[str, float]) -> dict[str, float]:
    """A line of metrics without what another run on this machine would measure otherwise."""
    measured = ("time", "seconds", "data_wait_s", "memory_gb")
    return {k: v for k, v in line.items() if k not in measured and not k.endswith("_per_s")}


def weights(folder: Path) -> dict[str, bytes]:
    files = sorted((folder / "model").rglob("*.safetensors"))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def with_stage(name: str = "t2i", run: RunConfig = RUN, **changes: Any) -> RunConfig:
    return replace(run, stages=tuple(replace(s, **changes) if s.name == name else s for s in run.stages))


def with_optim(name: str = "t2i", run: RunConfig = RUN, **changes: Any) -> RunConfig:
    return with_stage(name, run, optim=replace(run.stage(name).optim, **changes))


TRAINED = {
    "features": {"features"}, "fae": {"fae"}, "vlm": {"vlm"}, "t2i": {"flow"}, "adapter": {"adapter"},
    "joint": {"flow", "adapter", "visual_skip", "text_skip", "reference"},
}  # fmt: skip


def modules_of(components: Components) -> dict[str, torch.nn.Module]:
    """The modules of a model by the names that `TRAINED` uses."""
    large = {name: getattr(components, name) for name in ("features", "fae", "vlm", "flow")}
    return large | dict(components.joints.named_children())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """True if both hold the same tensors to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_same_run(folder: Path, whole: Path) -> None:
    """The same computation once more: equal metrics and weights to the bit."""
    assert [line["step"] for line in lines(folder)] == list(range(1, STEPS + 1))
    assert curve(folder) == curve(whole)
    assert weights(folder) == weights(whole)
    assert same(*(load_file(f / "state-t2i.safetensors") for f in (whole, folder)))
