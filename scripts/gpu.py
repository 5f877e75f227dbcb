"""Jobs for a GPU that is available for minutes at a time; each fits a single call and continues where it stopped.

    PYTHONPATH=src python scripts/gpu.py train --limit 560      # the stages of nano; repeat until all are done
    PYTHONPATH=src python scripts/gpu.py export --out "$OUT"    # the weights, in pieces small enough to copy
    PYTHONPATH=src python scripts/gpu.py join PIECES FOLDER     # on another machine: the pieces as a model folder again
    PYTHONPATH=src python scripts/gpu.py speed                  # seconds per image at several batch sizes
    PYTHONPATH=src python scripts/gpu.py suites --out "$OUT"    # every suite, test split, as JSON
    PYTHONPATH=src python scripts/gpu.py compare --out "$OUT"   # the paper's comparisons, three seeds

Needs what the library needs (no command-line extras). `--scale` multiplies the recipe's batches, since a GPU has room;
the number of steps stays.
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
from starflow2.training.config import CorpusConfig, RunConfig
from starflow2.training.loop import fit
from starflow2.training.metrics import StepReport
from starflow2.training.recipes import nano

RUN = Path("runs/gpu")
BEFORE_JOINT = Path("runs/gpu-before-joint")  # where the comparisons start
PIECE = 15 * 2**20  # bytes of one file


def recipe(scale: int) -> RunConfig:
    """The recipe nano with batches `scale` times as large and fewer checkpoints."""
    run = nano()
    corpus = CorpusConfig(workers=max(1, (os.cpu_count() or 2) - 2))
    stages = (replace(s, batch=scale * s.batch, save_every=1000, log_every=50, corpus=corpus) for s in run.stages)
    return replace(run, stages=tuple(stages))


def train(limit: float, scale: int, device: str) -> None:
    """Train the stages in order until all are done or `limit` seconds have passed; a second call continues."""
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
            fit(run, stage.name, RUN, device=device, report=_print_step)
        except TrainingError as error:
            sys.exit(f"{stage.name}: {error}")
        done.touch()
    timer.cancel()
    print("all stages done")


def _print_step(line: StepReport) -> None:
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
    """Put the pieces that `export` wrote together again."""
    data = b"".join(p.read_bytes() for p in sorted(pieces.glob("nano.tar.*")))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(folder, filter="data")


def speed(device: str) -> None:
    """Measure seconds of drawing at several batch sizes."""
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
    """Score every suite on the test split; a suite whose file exists already is left out."""
    model = StarFlow2.from_pretrained(RUN / "model", device=device)
    for name in get_args(SuiteName):
        path = out / f"{name}.json"
        if not path.is_file():
            started = time.perf_counter()
            write_json(score_suite(model, name, "test").to_json(), path)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def comparisons(out: Path, device: str) -> None:
    """Write compare.json and compare.md: training runs of equal budgets from the same frozen components."""
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
    args = parser.parse_args()
    if args.job == "train":
        train(args.limit, args.scale, args.device)
    elif args.job == "export":
        export(args.out)
    elif args.job == "join":
        join(*args.paths)
    elif args.job == "suites":
        suites(args.out, args.device)
    elif args.job == "compare":
        comparisons(args.out, args.device)
    else:
        speed(args.device)


if __name__ == "__main__":
    main()
