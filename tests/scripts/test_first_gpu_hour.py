"""The script for the first hour on GPUs, here on a CPU with the tiny model."""

from __future__ import annotations

from helpers import script
from model_cases import tiny_run
from starflow2.training.planner import Hardware, plan


def test_a_measured_step_stands_beside_its_plan():
    run = tiny_run(2)
    found = script("first_gpu_hour").measure(run, "t2i", "cpu")
    (row,) = (row for row in plan(run, Hardware(gpus=1))["stages"] if row["stage"] == "t2i")
    assert found["documents"] == 4 and found["seconds"] > 0 and found["peak_bytes"] > 10**8
    assert found["planned_bytes"] == row["total_bytes"] and found["planned_fits"] and found["mfu"] == 0
