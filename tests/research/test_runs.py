"""Arms of a comparison: in order or in parallel, with their share of the threads, failures raised, progress printed."""

from __future__ import annotations

import os

import pytest
import torch

from starflow2.errors import ConfigError, DataError
from starflow2.research.runs import ProgressPrinter, run_parallel
from starflow2.training.metrics import StepReport


def trained(unit: int) -> list[dict[str, int]]:
    """Facts about the process that runs it; must be importable from a spawned one."""
    if unit == 13:
        raise DataError("unlucky")
    return [{"unit": unit, "process": os.getpid(), "threads": torch.get_num_threads()}]


def test_one_job_keeps_to_this_process_and_begins_an_arm_when_it_is_asked_for():
    begun = []
    rows = run_parallel(lambda unit: begun.append(unit) or [{"unit": unit}], [3, 1, 2])
    assert next(rows) == [{"unit": 3}] and begun == [3]
    assert [row[0]["unit"] for row in rows] == [1, 2]


def test_several_jobs_divide_the_threads_among_processes():
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        rows = [row for result in run_parallel(trained, [3, 1, 2], jobs=2) for row in result]
    finally:
        torch.set_num_threads(threads)
    assert sorted(row["unit"] for row in rows) == [1, 2, 3]
    assert all(row["process"] != os.getpid() and row["threads"] == 2 for row in rows)


def test_a_failure_in_a_process_arrives_here():
    with pytest.raises(DataError, match="unlucky"):
        list(run_parallel(trained, [13, 1], jobs=2))


def test_no_job_is_refused():
    with pytest.raises(ConfigError, match="jobs is 0"):
        next(run_parallel(trained, [1], jobs=0))


def test_an_arm_prints_its_progress_ten_times(capsys):
    report = ProgressPrinter("patches", 2)
    for step in range(10, 801, 10):
        report(StepReport("t2i", step, 800, {"loss": 0.5}, 1.0, 120.0))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0] == "patches, seed 2: step 80 of 800, loss 0.5000, 2 minutes left"
