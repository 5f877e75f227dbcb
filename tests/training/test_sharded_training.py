"""One model in shards over several processes: the numbers of one process, and checkpoints for any number of them."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model_cases import STAGES, tiny_folder, tiny_run
from shard_program import often_words

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
STEPS = 12
DIES = random.Random().randrange(5, STEPS - 1)  # behind the first checkpoint, at another step every time
FSDP = {"mode": "fsdp"}
RUNS: dict[str, dict[str, Any]] = {
    "one": {"world": 1, "steps": STEPS, "stage": {"accumulate": 2}},
    "two": {"world": 2, "steps": STEPS, "stage": {"shard": FSDP}},
    "one in float64": {"world": 1, "steps": STEPS, "stage": {"accumulate": 2}, "double": True},
    "two in float64": {"world": 2, "steps": STEPS, "stage": {"shard": FSDP}, "double": True},
    "copies": {"world": 2, "steps": 3},
    "frozen": {"world": 2, "steps": 3, "stage": {"shard": FSDP | {"frozen": "sharded"}}},
    "again": {"world": 2, "steps": 3, "stage": {"shard": FSDP, "checkpoint_activations": "all"}},
    "quarters": {"world": 1, "steps": 3, "stage": {"accumulate": 4}},
    "nodes": {"world": 4, "steps": 3, "stage": {"shard": {"mode": "hsdp", "processes": 2}}},
    "half": {"world": 2, "steps": 3, "stage": {"shard": FSDP}, "precision": "bfloat16"},
    "spoilt": {"world": 2, "steps": 3, "stage": {"shard": FSDP}, "spoil": 2},
    "killed": {"world": 2, "steps": STEPS, "stage": {"shard": FSDP}, "dies": DIES},
    "saving": {"world": 2, "steps": 10, "stage": {"shard": FSDP}, "dies_saving": 8},
    "asked": {"world": 2, "steps": 6, "stage": {"shard": FSDP}, "asked": 2},
}
LATER: dict[str, dict[str, Any]] = {
    "killed": {"world": 2, "steps": STEPS, "stage": {"shard": FSDP}},
    "saving": {"world": 2, "steps": 10, "stage": {"shard": FSDP}},
    "asked": {"world": 2, "steps": 6, "stage": {"shard": FSDP}},
    "to one": {"world": 1, "steps": 5, "stage": {"shard": FSDP, "accumulate": 4}},
    "to four": {"world": 4, "steps": 5, "stage": {"shard": FSDP}},
    "nothing left on one": {"world": 1, "steps": 3, "stage": {"shard": FSDP}},
}


def run(base: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Runs that come to their end share processes; one that is stopped has processes of its own."""
    plan: list[dict[str, Any]] = []
    whole: dict[int, dict[str, Any]] = {}
    for name, job in runs.items():
        one = {"folder": str(base / name), **job}
        if job.keys() & {"dies", "dies_saving", "asked"}:
            plan.append(one)
        else:
            whole.setdefault(job["world"], {"world": job["world"], "runs": []})["runs"].append(one)
    plan += whole.values()
    program = Path(__file__).parents[1] / "shard_program.py"
    subprocess.run([sys.executable, str(program), json.dumps(plan)], check=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all runs above."""
    base = tmp_path_factory.mktemp("shards")
    tiny_folder(base / "start", STAGES[:5])
    for name in RUNS:
        shutil.copytree(base / "start", base / name)
    run(base, RUNS)
    shutil.copytree(base / "saving", base / "as it died")
    for name in ("to one", "to four", "nothing left on one"):
        shutil.copytree(base / "frozen", base / name)
    run(base, LATER)
    return base


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics-joint.jsonl").read_text().splitlines()]


def curve(folder: Path, *names: str) -> list[list[float]]:
    return [[line[k] for k in names or ("loss", "flow", "text", "grad_norm")] for line in lines(folder)]


def farthest(one: list[list[float]], other: list[list[float]]) -> float:
    assert len(one) == len(other)
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest difference of each weight; biases of q, k and v separately."""
    assert one.keys() == other.keys()
    parts = {k: (v - other[k]).abs() for k, v in one.items()}
    for name in [k for k in parts if k.endswith("qkv.bias")]:
        parts |= zip((f"{name}/{part}" for part in "qkv"), parts.pop(name).chunk(3), strict=True)
    return {k: float(v.max()) for k, v in parts.items()}


def test_twelve_steps_of_two_processes_with_a_half_each_are_those_of_one_process(base):
    """In float64 all losses and weights; in float32 all but the biases of keys.

    A bias of keys moves no softmax (`test_nn`). Its gradient is rounding alone, which Adam divides by its own size:
    some of it is followed in full steps, in whichever direction the order of a sum gave it.
    """
    names = ("loss", "flow", "text")
    assert len(lines(base / "two")) == len(lines(base / "two in float64")) == STEPS
    assert farthest(curve(base / "one in float64", *names), curve(base / "two in float64", *names)) <= 1e-12
    exact = apart(weights(base / "one in float64"), weights(base / "two in float64"))
    assert max(exact.values()) <= 1e-10
    assert farthest(curve(base / "one", *names), curve(base / "two", *names)) <= 1e-5
    rounded = apart(weights(base / "one"), weights(base / "two"))
    assert max(value for name, value in rounded.items() if not name.endswith("/k")) <= 1e-5
    assert max(rounded.values()) <= 2e-3  # one of the steps of 1e-3, taken in opposite directions
    moved = apart(weights(base / "one"), weights(base / "start"))
    assert moved["flow.deep.head.weight"] > 1e-3 and moved["joints.text_skip.weight"] > 1e-3


def test_a_weight_that_no_process_uses_keeps_its_value(base):
    """The start token of the deep block, where a context starts the picture: no gradient, so no decay either."""
    for name in ("one", "two", "frozen"):
        assert torch.equal(weights(base / name)["flow.deep.start"], weights(base / "start")["flow.deep.start"])


@pytest.mark.parametrize(
    ("name", "like"), [("copies", "one"), ("frozen", "one"), ("again", "one"), ("nodes", "quarters")]
)
def test_whatever_is_divided_recomputed_or_copied_the_losses_stay(base, name, like):
    """Two copies; a sharded language model; activations computed twice; two nodes of two processes, a quarter each."""
    names = ("loss", "flow", "text")
    assert farthest(curve(base / like, *names)[:3], curve(base / name, *names)) <= 1e-5


def test_some_steps_gave_a_process_no_picture_at_all():
    stage = tiny_run(1).stage("joint")
    pictures = [len(often_words(stage, 0, i).pictures) for i in range(4 * STEPS)]
    halves = [(sum(pictures[i : i + 2]), sum(pictures[i + 2 : i + 4])) for i in range(0, len(pictures), 4)]
    assert any(a == 0 < b for a, b in halves) and any(b == 0 < a for a, b in halves)


def test_bfloat16_layers_keep_float32_weights_and_stay_close(base):
    half, full = curve(base / "half", "flow"), curve(base / "two", "flow")[:3]
    assert 0 < farthest(half, full) < 0.05
    assert {v.dtype for v in weights(base / "half").values() if v.is_floating_point()} == {torch.float32}


def test_a_step_that_goes_wrong_in_one_process_is_skipped_by_all(base):
    assert [line.get("skipped") for line in lines(base / "spoilt")] == [None, 1, 1]
    assert all(bool(v.isfinite().all()) for v in weights(base / "spoilt").values())


def test_a_run_one_of_whose_processes_was_killed_repeats_the_uninterrupted_one_bit_for_bit(base):
    assert curve(base / "killed") == curve(base / "two"), f"killed in step {DIES}"
    one, other = weights(base / "two"), weights(base / "killed")
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before_and_the_run_goes_on_from_there(base):
    left = {path.name for path in (base / "as it died" / "state-joint").iterdir()}
    new = ".8.new"
    assert left == {"4", new} and (base / "as it died" / "state-joint" / new / ".metadata").is_file()
    assert curve(base / "saving") == curve(base / "two")[:10]
    assert [path.name for path in (base / "saving" / "state-joint").iterdir()] == ["10"]


def test_a_signal_to_one_process_ends_all_with_a_checkpoint_and_the_run_goes_on_from_there(base):
    assert [line["step"] for line in lines(base / "asked")] == [1, 2, 3, 4, 5, 6]
    assert curve(base / "asked") == curve(base / "two")[:6]


def test_a_checkpoint_of_two_processes_goes_on_in_one_and_in_four_with_the_same_losses(base):
    one, four = curve(base / "to one"), curve(base / "to four")
    assert len(one) == 5 and one[:3] == four[:3] == curve(base / "frozen")
    assert farthest(one, four) <= 1e-5


def test_weights_that_one_process_gathers_are_those_that_two_wrote_bit_for_bit(base):
    two, one = weights(base / "frozen"), weights(base / "nothing left on one")
    assert two.keys() == one.keys() and all(torch.equal(two[k], one[k]) for k in two)


def test_only_the_last_checkpoint_stays(base):
    for name in ("two", "killed", "frozen"):
        (last,) = (base / name / "state-joint").iterdir()
        assert last.name == str(lines(base / name)[-1]["step"]) and (last / ".metadata").is_file()
