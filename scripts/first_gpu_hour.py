"""Take real steps of a recipe at its full shapes on GPUs, and put memory and speed beside what the planner says.

    python scripts/first_gpu_hour.py paper                                # one GPU of 140 GB
    torchrun --nproc_per_node 8 scripts/first_gpu_hour.py paper           # a node
    python scripts/first_gpu_hour.py mini --stages t2i joint              # one of 24 GB

Weights are random, in the number format of their published files, and so are documents; nothing is read or written.
"""

from __future__ import annotations

import argparse
import os

import torch

from starflow2.core.serialize import JsonObject
from starflow2.training.config import RunConfig
from starflow2.training.dry_run import dry_run
from starflow2.training.metrics import peak_flops
from starflow2.training.planner import GIB, Hardware, plan
from starflow2.training.recipes import find


def measure(run: RunConfig, stage: str, device: str) -> JsonObject:
    """One step of a stage: seconds, share of the GPU's peak (0 where that is not known), and bytes, with the plan."""
    gpus = int(os.environ.get("WORLD_SIZE", "1"))
    peak = peak_flops(device)
    memory = torch.cuda.get_device_properties(0).total_memory / GIB if device == "cuda" else 80.0
    planned = plan(run, Hardware(gpus=gpus, gpu_memory=memory))
    (row,) = (row for row in planned["stages"] if row["stage"] == stage)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    facts = dry_run(run, stage, device)
    done = facts["documents"] * row["tflops_per_document"] * 1e12
    return {
        "stage": stage,
        "documents": facts["documents"],
        "seconds": facts["seconds"],
        "mfu": done / facts["seconds"] / (gpus * peak) if peak else 0.0,
        "peak_bytes": facts["peak_bytes"],
        "planned_bytes": row["total_bytes"],
        "planned_fits": row["fits"],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--stages", nargs="+", default=["t2i", "joint"])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(arguments)
    run = find(args.recipe)
    for stage in args.stages:
        found = measure(run, stage, args.device)
        if os.environ.get("RANK", "0") == "0":
            print(_line(found), flush=True)


def _line(found: JsonObject) -> str:
    speed = f"{found['documents']} documents in {found['seconds']:.2f} s, {found['mfu']:.1%} of peak"
    memory = f"{found['peak_bytes'] / 1e9:.1f} GB used, {found['planned_bytes'] / 1e9:.1f} GB planned"
    return f"{found['stage']}: {speed}; {memory}" + ("" if found["planned_fits"] else " (does not fit by plan)")


if __name__ == "__main__":
    main()
