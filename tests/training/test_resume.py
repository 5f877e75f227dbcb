"""A killed run repeats itself bit for bit; what cannot be resumed is refused; a full disk costs nothing."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model_cases import (
    STAGES,
    tiny_folder,
    tiny_model,
)
from run_cases import EVERY, RUN, STEPS, assert_same_run, lines, untimed, weights, with_optim, with_stage
from starflow2.errors import CheckpointError, ConfigError, OutputError, TrainingError
from starflow2.models import tensor_file
from starflow2.models.checkpoint import load_components
from starflow2.models.tensor_file import load_signed, save_tensors
from starflow2.training.loop import fit
from starflow2.training.metrics import StepReport

KILLED = """
import os, signal, sys, time
from pathlib import Path
tests, threads, *folders = sys.argv[1:]
sys.path.insert(0, tests)
import torch
import torch._dynamo  # which every optimizer imports: here once for all runs
torch.set_num_threads(int(threads))
from model_cases import tiny_run
from starflow2.models import tensor_file
from starflow2.training.loop import fit

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def after_a_checkpoint(folder):
    fit(run, "t2i", folder, evaluate=lambda parts, step: die() if step == 4 else {})

def while_writing_a_checkpoint(folder):
    write, count = tensor_file.save_file, []
    def half(tensors, path, **options):
        count.append(path)
        if len(count) == 2:
            Path(path).write_bytes(b"half")
            die()
        write(tensors, path, **options)
    tensor_file.save_file = half
    fit(run, "t2i", folder)

def at_any_moment(folder):
    fit(run, "t2i", folder, report=lambda _: time.sleep(0.05))

def later(stage):
    def moment(folder):
        fit(run, stage, folder, evaluate=lambda parts, step: die() if step == 4 else {})
    return moment

run = tiny_run(STEPS, EVERY)
moments = (after_a_checkpoint, while_writing_a_checkpoint, at_any_moment, later("adapter"), later("joint"))
for folder, moment in zip(folders, moments, strict=True):
    child = os.fork()
    if not child:
        moment(folder)
        os._exit(1)
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended:
        curve = Path(folder) / "metrics-t2i.jsonl"
        if moment is at_any_moment and curve.is_file() and curve.read_text().count("\\n") >= 3:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
        ended, status = os.waitpid(child, os.WNOHANG)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment.__name__, status)
"""


@pytest.fixture(scope="module")
def killed(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of runs that ended in SIGKILL: three of stage t2i, one of adapter and one of joint."""
    base = tmp_path_factory.mktemp("killed")
    folders = {name: base / name.replace(" ", "-") for name in ("after a checkpoint", "while writing one", "any time")}
    for folder in folders.values():
        shutil.copytree(ready, folder)
    folders |= {stage: tiny_folder(base / stage, STAGES[: STAGES.index(stage)]) for stage in ("adapter", "joint")}
    script = KILLED.replace("STEPS, EVERY", f"{STEPS}, {EVERY}")
    arguments = [Path(__file__).parents[1], torch.get_num_threads(), *folders.values()]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True)
    return folders


@pytest.mark.timeout(600)  # a fresh interpreter imports everything again, which takes minutes on a crowded machine
@pytest.mark.parametrize("moment", ["after a checkpoint", "while writing one", "any time"])
def test_a_run_killed_with_sigkill_and_resumed_gives_bit_equal_losses_and_weights(killed, whole, moment):
    folder = killed[moment]
    assert "t2i" not in load_components(folder / "model").finished_stages and len(lines(folder)) < STEPS
    fit(RUN, "t2i", folder)
    assert_same_run(folder, whole)


def test_a_run_without_interruption_repeats_itself_whatever_the_global_generator_does(folder, whole):
    torch.manual_seed(99)
    fit(RUN, "t2i", folder, report=lambda _: torch.randn(5))
    assert_same_run(folder, whole)


def test_sigterm_leaves_a_checkpoint_and_a_clear_error_and_the_run_goes_on_from_there(folder, whole):
    before = signal.getsignal(signal.SIGTERM)

    def terminate(line: StepReport) -> None:
        if line.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingError, match=r"step [34]; its checkpoint is written.*--resume auto") as caught:
        fit(RUN, "t2i", folder, report=terminate)
    stopped = int(re.findall(r"step (\d)", str(caught.value))[0])
    assert signal.getsignal(signal.SIGTERM) == before
    assert "t2i" not in load_components(folder / "model").finished_stages
    steps: list[int] = []
    fit(RUN, "t2i", folder, report=lambda line: steps.append(line.step))
    assert steps == list(range(stopped + 1, STEPS + 1))
    assert_same_run(folder, whole)


def test_sigterm_in_the_middle_of_a_save_lets_it_end_and_the_run_after_the_next_step(folder, whole, monkeypatch):
    asked: list[Path] = []

    def save(tensors: object, path: Path, **options: object) -> None:
        if not asked:
            os.kill(os.getpid(), signal.SIGTERM)
        asked.append(path)
        save_file(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file, "save_file", save)
        with pytest.raises(TrainingError, match=rf"step {EVERY + 1}; its checkpoint is written.*--resume auto"):
            fit(RUN, "t2i", folder)
    assert len(asked) == 2, "the checkpoint that was being written, and that of the end"
    fit(RUN, "t2i", folder)
    assert_same_run(folder, whole)


def test_a_line_of_metrics_cut_short_by_a_power_failure_does_not_stop_the_run(folder):
    fit(with_stage(steps=4), "t2i", folder)
    with (folder / "metrics-t2i.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    fit(RUN, "t2i", folder)
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_stage_is_not_trained_again_and_keeps_its_curve(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    steps: list[int] = []
    fit(RUN, "t2i", tmp_path / "run", report=lambda line: steps.append(line.step))
    assert not steps
    assert_same_run(tmp_path / "run", whole)


def test_without_resume_a_stage_starts_anew(folder):
    fit(with_stage(steps=2), "t2i", folder)
    steps: list[int] = []
    fit(with_stage(steps=3), "t2i", folder, resume="none", report=lambda line: steps.append(line.step))
    assert steps == [1, 2, 3] and [line["step"] for line in lines(folder)] == [1, 2, 3]


@pytest.fixture
def two_steps(folder: Path) -> Path:
    fit(with_stage(steps=2), "t2i", folder)
    return folder


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (with_stage(batch=8), r"batch \(4, now 8\)"),
        (with_optim(lr=1e-4), r"optim\.lr \(0\.002, now 0\.0001\)"),
        (with_optim(ema=0.5, clip=2.0), r"optim\.clip.*optim\.ema"),
        (with_stage(caption_drop=0.2), "caption_drop"),
        (replace(RUN, seed=7), r"seed \(0, now 7\)"),
        (replace(RUN, precision="bfloat16"), r"precision \(float32, now bfloat16\)"),
    ],
    ids=["batch", "lr", "two at once", "caption_drop", "seed", "precision"],
)
def test_resuming_with_other_settings_is_an_error_that_names_them(two_steps, run, named):
    with pytest.raises(TrainingError, match=f"another .*{named}.*--resume none"):
        fit(run, "t2i", two_steps)


def test_resuming_with_more_steps_goes_on_and_precision_auto_takes_what_the_run_began_with(two_steps):
    steps: list[int] = []
    run = replace(with_stage(steps=3, save_every=1), precision="auto")
    fit(run, "t2i", two_steps, report=lambda line: steps.append(line.step))
    assert steps == [3]


def test_a_folder_with_a_model_of_another_size_is_refused_by_the_part_that_differs(folder):
    other = replace(RUN, model=replace(tiny_model(), fae=replace(tiny_model().fae, kl_weight=0.5)))
    with pytest.raises(TrainingError, match=r"another fae than the recipe.*--output"):
        fit(other, "t2i", folder)


@pytest.mark.parametrize(
    ("data", "error"),
    [(b"not tensors", CheckpointError), (None, TrainingError)],
    ids=["rubbish", "foreign safetensors"],
)
def test_a_checkpoint_that_is_none_is_refused(folder, data, error):
    path = folder / "state-t2i.safetensors"
    if data is None:
        save_file({"x": torch.zeros(2)}, path)
    else:
        path.write_bytes(data)
    with pytest.raises(error, match=r"state-t2i\.safetensors"):
        fit(RUN, "t2i", folder)


def test_a_checkpoint_of_other_weights_is_refused(two_steps):
    path = two_steps / "state-t2i.safetensors"
    save_tensors({"weights/flow.nothing": torch.zeros(2)}, path, load_signed(path)[1])
    with pytest.raises(TrainingError, match="weights of another model"):
        fit(RUN, "t2i", two_steps)


@pytest.mark.parametrize(
    ("stages", "asked", "first"),
    [((), "t2i", "features"), (("features",), "t2i", "fae"), (("features", "fae"), "t2i", "vlm")],
)
def test_a_stage_without_its_predecessors_says_which_to_run(tmp_path, stages, asked, first):
    if stages:
        tiny_folder(tmp_path, stages)
    with pytest.raises(TrainingError, match=f"run --stage {first} first"):
        fit(RUN, asked, tmp_path)


def test_a_second_run_in_a_folder_is_refused_by_who_trains_there(folder):
    refused: list[str] = []

    def again(_: StepReport) -> None:
        with pytest.raises(TrainingError) as caught:
            fit(RUN, "t2i", folder)
        refused.append(str(caught.value))

    fit(with_stage(steps=2), "t2i", folder, report=again)
    assert len(refused) == 2 and f"process {os.getpid()} on" in refused[0] and "training stage t2i" in refused[0]
    assert [line["step"] for line in lines(folder)] == [1, 2]


def test_an_unknown_stage_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match='Did you mean "t2i"'):
        fit(RUN, "t2l", tmp_path)


FULL = {
    "safetensors' own": SafetensorError("I/O error: No space left on device (os error 28)"),
    "the system's": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=list(FULL))
def test_a_disk_that_fills_up_at_a_checkpoint_leaves_the_one_before_and_the_run_goes_on_later(
    folder, whole, monkeypatch, error
):
    written: list[object] = []

    def full(tensors: object, path: Path, **options: object) -> None:
        written.append(path)
        if len(written) > 1:
            path.write_bytes(b"half")
            raise error
        save_file(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file, "save_file", full)
        with pytest.raises(OutputError, match=r"state-t2i\.safetensors.*No space left"):
            fit(RUN, "t2i", folder)
    assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]
    steps: list[int] = []
    fit(RUN, "t2i", folder, report=lambda line: steps.append(line.step))
    assert steps == [3, 4, 5, 6]
    assert_same_run(folder, whole)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["adapter", "joint"])
def test_stages_two_and_three_killed_and_resumed_repeat_the_uninterrupted_run_bit_for_bit(killed, tmp_path, stage):
    folder = killed[stage]
    assert stage not in load_components(folder / "model").finished_stages and len(lines(folder, stage)) == 4
    fit(RUN, stage, folder)
    whole = tiny_folder(tmp_path, STAGES[: STAGES.index(stage)])
    fit(RUN, stage, whole)
    one, other = ([untimed(line) for line in lines(f, stage)] for f in (folder, whole))
    assert one == other and len(one) == STEPS
    assert weights(folder) == weights(whole)
    old, new = (load_file(f / f"state-{stage}.safetensors") for f in (whole, folder))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


@pytest.mark.parametrize(("stage", "first"), [("adapter", "t2i"), ("joint", "adapter")])
def test_stages_two_and_three_ask_for_the_one_before(tmp_path, stage, first):
    tiny_folder(tmp_path, STAGES[: STAGES.index(first)])
    with pytest.raises(TrainingError, match=f"run --stage {first} first"):
        fit(RUN, stage, tmp_path)
