"""Several processes of one run: they end with the same weights, and their checkpoint resumes on another number."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from run_cases import lines, same
from starflow2.models.checkpoint import load_components

RUN = """
import hashlib, sys
from dataclasses import replace
from starflow2.training.loop import fit
from starflow2.training.parallel import Distributed
from starflow2.training.recipes import nano, smoke
from starflow2.training.tasks import TASKS, T2iTask

folder, steps = sys.argv[1], int(sys.argv[2])
run = smoke(nano())
run = replace(run, precision="float32", stages=tuple(replace(s, steps=steps, log_every=1) for s in run.stages))
tasks = []
TASKS["t2i"] = lambda *a, **o: tasks.append(T2iTask(*a, **o)) or tasks[-1]
fit(run, "t2i", folder)
digest = hashlib.blake2b()
for value in tasks[0].trained.state_dict().values():
    digest.update(value.numpy().tobytes())
open(f"{folder}/digest-{steps}-{Distributed.from_environment('cpu').rank}", "w").write(digest.hexdigest())
"""


def launch(folder: Path, steps: int, processes: int) -> None:
    script = folder / "run.py"
    script.write_text(RUN)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *start, str(script), str(folder), str(steps)], check=True, env=environment)


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics-t2i.jsonl").read_text().splitlines()]


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_processes_end_with_equal_weights_and_one_process_goes_on_from_their_checkpoint(
    smoke_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(smoke_model, tmp_path / "model")
    launch(tmp_path, 3, 2)
    assert (tmp_path / "digest-3-0").read_text() == (tmp_path / "digest-3-1").read_text()
    launch(tmp_path, 5, 1)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


TWO = """
import os, sys
tests, folder = sys.argv[1:]
sys.path.insert(0, tests)
import torch
from safetensors.torch import save_file
from model_cases import tiny_run
from shard_program import start
from starflow2.training.loop import fit
from starflow2.training.tasks import TASKS, T2iTask

def work(job, rank):
    torch.set_num_threads(1)
    tasks = []

    class WrongOnce(T2iTask):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.calls = 0
            tasks.append(self)

        def loss(self, *args):
            self.calls += 1
            loss, metrics = super().loss(*args)  # the other process has no reason of its own to skip step 2
            return (loss + torch.inf if rank == 1 and self.calls == 2 else loss), metrics

    TASKS["t2i"] = WrongOnce
    fit(tiny_run(3, 3), "t2i", folder)
    save_file({k: v.contiguous() for k, v in tasks[0].trained["flow"].state_dict().items()}, f"{folder}/rank-{rank}")

assert start({"world": 2}, work) == [0, 0]
"""


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_step_that_goes_wrong_in_one_process_is_skipped_by_all_and_their_weights_stay_equal(folder):
    subprocess.run([sys.executable, "-c", TWO, str(Path(__file__).parents[1]), str(folder)], check=True)
    first, second = load_file(folder / "rank-0"), load_file(folder / "rank-1")
    assert same(first, second), "both apply the same averaged gradients to the same weights"
    assert any(not torch.equal(v, load_components(folder / "model").flow.state_dict()[k]) for k, v in first.items())
    assert [line.get("skipped") for line in lines(folder)] == [None, 1, 1]
