"""Several processes of one run: they end with the same weights, and their checkpoint resumes on another number."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import hashlib, sys
from dataclasses import replace
from starflow2.training import loop as train
from starflow2.training.parallel import Distributed
from starflow2.training.recipes import nano, smoke

folder, steps = sys.argv[1], int(sys.argv[2])
run = smoke(nano())
run = replace(run, precision="float32", stages=tuple(replace(s, steps=steps, log_every=1) for s in run.stages))
kept = []
new_state = train._new_state
train._new_state = lambda *a: kept.append(new_state(*a)) or kept[-1]
train.fit(run, "t2i", folder)
digest = hashlib.blake2b()
for value in kept[0].trained.state_dict().values():
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
