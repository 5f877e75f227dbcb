"""Are the speeds that a run logs those of the wall clock, and its counts those of what its steps were given?

    python scripts/true_speeds.py                                     # nano's t2i on the drawn world
    python scripts/true_speeds.py --stage joint --mixture mix.json    # on a mixture, packed

Takes the steps of a stage from its start on and compares every line of metrics with a clock and counts of its own, from
the first line on. Ends with 1 where images or latents per second differ by more than 2 %, or a count at all.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starflow2.core.serialize import JsonObject
from starflow2.models.checkpoint import save_components
from starflow2.models.hub import find_model
from starflow2.pipeline import StarFlow2
from starflow2.training.config import CorpusConfig, RunConfig
from starflow2.training.loop import fit
from starflow2.training.recipes import find
from starflow2.training.tasks import TASKS

ALLOWED = 0.02  # share by which a speed may differ


@dataclass(frozen=True, slots=True)
class Moment:
    """The clock and the images seen when a line of metrics was written."""

    seconds: float
    images: int


def watched(run: RunConfig, stage: str, folder: Path) -> tuple[list[JsonObject], list[Moment]]:
    """Train the stage in `folder`; returns its lines of metrics, and what was seen at each from outside."""
    moments, images, plain = list[Moment](), [0], TASKS[stage]

    def made(*given: Any, **options: Any) -> Any:
        task: Any = plain(*given, **options)
        loss = task.loss

        def counted(data: Any, *rest: Any) -> Any:
            images[0] += len(data) if not isinstance(data, tuple) else len(data[0])
            return loss(data, *rest)

        task.loss = counted
        return task

    TASKS[stage] = made
    try:
        fit(run, stage, folder, report=lambda line: moments.append(Moment(time.perf_counter(), images[0])))
    finally:
        TASKS[stage] = plain
    lines = [json.loads(line) for line in (folder / f"metrics-{stage}.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if "loss" in line], moments


def differences(lines: Sequence[JsonObject], moments: Sequence[Moment], num_latents: int) -> dict[str, float]:
    """By what share logged speeds differ from those seen between the first and the last line; counts, by how much."""
    first, last = lines[0], lines[-1]
    elapsed, images = moments[-1].seconds - moments[0].seconds, moments[-1].images - moments[0].images
    found = {"images": float(last["images"] - moments[-1].images)}
    found["latents"] = float(last["latents"] - num_latents * moments[-1].images)
    for name, seen in (("images", images), ("latents", num_latents * images)):
        # the rates are means since the start of the run, so the time of a line follows from what it counts
        logged = last[name] / last[f"{name}_per_s"] - first[name] / first[f"{name}_per_s"]
        found[f"{name}_per_s"] = (seen / logged) / (seen / elapsed) - 1
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", default="t2i", choices=["t2i", "adapter", "joint"])
    parser.add_argument("--model", default="nano", help="the model that goes on training")
    parser.add_argument("--mixture", default="", help="a mixture file; by default the drawn world")
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args(arguments)
    components = StarFlow2.from_pretrained(find_model(given.model)).components
    stage = replace(
        find("nano").stage(given.stage), steps=given.steps, batch=16, log_every=1, kl_to_t2i=0.0, distill=0.0
    )
    stage = replace(stage, corpus=CorpusConfig(mixture=given.mixture, rows=2, width=768))
    with tempfile.TemporaryDirectory() as place:
        run = find("nano")
        run = replace(run, model=components.cfg, stages=tuple(stage if s.name == stage.name else s for s in run.stages))
        save_components(components, Path(place) / "model")
        found = differences(*watched(run, stage.name, Path(place)), components.layout.num_latents)
    for name, value in found.items():
        print(f"{name}: {value:+.2%} from the clock" if name.endswith("_per_s") else f"{name}: {value:+.0f}")
    is_true = all(abs(v) <= ALLOWED if name.endswith("_per_s") else v == 0 for name, v in found.items())
    print("true" if is_true else "false")
    return 0 if is_true else 1


if __name__ == "__main__":
    sys.exit(main())
