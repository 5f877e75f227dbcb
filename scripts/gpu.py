"""Jobs for a GPU that is there for minutes at a time; each fits a single call and goes on where it stopped.

    PYTHONPATH=src python scripts/gpu.py train --limit 560      # the stages of nano, again until all are done
    PYTHONPATH=src python scripts/gpu.py export --out "$OUT"    # the weights, in pieces that are small enough to carry
    PYTHONPATH=src python scripts/gpu.py join PIECES FOLDER     # elsewhere: the pieces as a model folder again
    PYTHONPATH=src python scripts/gpu.py speed                  # seconds per picture at several batch sizes
    PYTHONPATH=src python scripts/gpu.py suites --out "$OUT"    # every suite, test split, as JSON
    PYTHONPATH=src python scripts/gpu.py compare --out "$OUT"   # the paper's comparisons, three seeds

Needs what the library needs (no command-line extras). `--scale` multiplies the recipe's batches: a GPU has room, and
the steps stay the recipe's.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import signal
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from starflow2.errors import TrainingError
from starflow2.evals.report import write_json
from starflow2.evals.runner import SuiteName, score_suite
from starflow2.inference.config import DrawConfig
from starflow2.inference.sampler import Sampler
from starflow2.pipeline import StarFlow2
from starflow2.research.ablations import CompareConfig, compare_and_keep
from starflow2.training.config import RunConfig
from starflow2.training.loop import fit
from starflow2.training.metrics import StepReport
from starflow2.training.recipes import nano

RUN = Path("runs/gpu")
BEFORE_JOINT = Path("runs/gpu-before-joint")  # what the comparisons start from
PIECE = 15 * 2**20  # bytes of one file that comes back


def recipe(scale: int) -> RunConfig:
    """nano with batches `scale` times as large and checkpoints far apart."""
    run = nano()
    stages = tuple(replace(s, batch=scale * s.batch, save_every=1000, log_every=50) for s in run.stages)
    return replace(run, stages=stages)


def train(limit: float, scale: int, device: str) -> None:
    """Stages in order until all are done or `limit` seconds have passed; a second call goes on."""
    run = recipe(scale)
    timer = threading.Timer(limit, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    for stage in run.stages:
        done = RUN / f"{stage.name}.done"
        if done.is_file():
            continue
        if stage.name == "joint" and not BEFORE_JOINT.exists():
            shutil.copytree(RUN / "model", BEFORE_JOINT)
        print(f"{stage.name}: {stage.steps} steps of {stage.batch}", flush=True)
        try:
            fit(run, stage.name, RUN, device=device, report=_tell, workers=max(1, (os.cpu_count() or 2) - 2))
        except TrainingError as error:
            sys.exit(f"{stage.name}: {error}")
        done.touch()
    timer.cancel()
    print("all stages done")


def _tell(line: StepReport) -> None:
    values = " ".join(f"{name} {value:.4f}" for name, value in line.metrics.items())
    print(
        f"{line.stage} {line.step}/{line.steps} {values} {line.images_per_s:.0f}/s eta {line.eta_s:.0f} s", flush=True
    )


def export(out: Path) -> None:
    """The model folder as a tar file, cut into pieces."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(RUN / "model", "model")
        for metrics in sorted(RUN.glob("metrics-*.jsonl")):
            tar.add(metrics, metrics.name)
    data = packed.getvalue()
    out.mkdir(parents=True, exist_ok=True)
    for i, at in enumerate(range(0, len(data), PIECE)):
        (out / f"nano.tar.{i:02d}").write_bytes(data[at : at + PIECE])


def join(pieces: Path, folder: Path) -> None:
    """Undo `export`."""
    data = b"".join(p.read_bytes() for p in sorted(pieces.glob("nano.tar.*")))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(folder, filter="data")


def speed(device: str) -> None:
    """Seconds of drawing at several batch sizes with the model that is there."""
    model = StarFlow2.from_pretrained(RUN / "model", device=device)
    for batch in (1, 16, 128):
        config = DrawConfig.for_model(model.components, batch=batch)
        for _ in range(2):  # the first one warms up
            torch.cuda.synchronize() if device == "cuda" else None
            started = time.perf_counter()
            model.draw(["two red hearts"] * batch, list(range(batch)), config)
            seconds = time.perf_counter() - started
        print(f"batch {batch}: {seconds:.2f} s, {seconds / batch:.4f} s per picture, {Sampler(model.components).dtype}")


def suites(out: Path, device: str) -> None:
    """Every suite on the model that is there, test split; a suite whose file is there already is left out."""
    model = StarFlow2.from_pretrained(RUN / "model", device=device)
    for name in get_args(SuiteName):
        path = out / f"{name}.json"
        if not path.is_file():
            started = time.perf_counter()
            write_json(score_suite(model, name, "test").to_json(), path)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def comparisons(out: Path, device: str) -> None:
    """compare.json and compare.md: arms on equal budgets from the frozen parts that are there."""
    config, workers = CompareConfig(steps=1500, batch=128), max(1, (os.cpu_count() or 2) - 2)
    compare_and_keep(BEFORE_JOINT, config, out, device=device, workers=workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("train", "export", "join", "speed", "suites", "compare"))
    parser.add_argument("paths", nargs="*", type=Path, help="of join: the pieces, the folder to write")
    parser.add_argument("--limit", type=float, default=560.0, help="seconds")
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    asked = parser.parse_args()
    if asked.job == "train":
        train(asked.limit, asked.scale, asked.device)
    elif asked.job == "export":
        export(asked.out)
    elif asked.job == "join":
        join(*asked.paths)
    elif asked.job == "suites":
        suites(asked.out, asked.device)
    elif asked.job == "compare":
        comparisons(asked.out, asked.device)
    else:
        speed(asked.device)


if __name__ == "__main__":
    main()
