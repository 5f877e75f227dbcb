"""Checkpoints that stay, going back to one, going on with other settings, and between whole copies and shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model_cases import STAGES, tiny_folder, tiny_run
from run_cases import RUN, curve, lines, with_optim, with_stage
from starflow2.errors import ConfigError, TrainingError
from starflow2.models.checkpoint import load_components
from starflow2.training import checkpoint
from starflow2.training.checkpoint import Resume, store_for
from starflow2.training.config import OptimConfig, RunConfig, ShardConfig
from starflow2.training.loop import fit
from starflow2.training.parallel import Distributed


@pytest.fixture
def _alone() -> Iterator[None]:
    """Takes down the process group of one that shards without torchrun begin."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def steps_kept(folder: Path, run: RunConfig = RUN, stage: str = "t2i") -> list[int]:
    return sorted(store_for(folder, run.stage(stage), Distributed()).checkpoints())


def test_the_newest_checkpoints_stay_and_every_mth_and_a_run_goes_back_to_one(folder, whole):
    run = with_stage(steps=6, save_every=1, keep_last=2, keep_every=3)
    fit(run, "t2i", folder)
    assert steps_kept(folder) == [3, 5, 6]
    assert {p.name for p in folder.glob("state-*")} == {
        "state-t2i.safetensors", "state-t2i.3.safetensors", "state-t2i.5.safetensors",
    }  # fmt: skip
    steps: list[int] = []
    fit(run, "t2i", folder, resume="3", report=lambda line: steps.append(line.step))
    assert steps == [4, 5, 6] and curve(folder) == curve(whole), "the same course once more, bit for bit"
    with pytest.raises(TrainingError, match=r"no checkpoint of step 4 of stage t2i.*there are: 3, 5, 6"):
        fit(run, "t2i", folder, resume="4")


def test_going_back_removes_what_came_later_with_the_next_checkpoint(folder):
    fit(with_stage(steps=4, save_every=1, keep_last=9), "t2i", folder)
    fit(with_stage(steps=3, save_every=1, keep_last=9), "t2i", folder, resume="2")
    assert steps_kept(folder) == [1, 2, 3]


def test_weights_go_on_under_other_settings_and_the_optimiser_with_them(folder):
    fit(with_stage(steps=4), "t2i", folder)
    slow = with_optim(run=with_stage(steps=6), lr=1e-3, matrix_lr=1e-3)
    with pytest.raises(TrainingError, match=r"another optim\.lr .*--resume weights"):
        fit(slow, "t2i", folder)
    fit(replace(slow, seed=5), "t2i", folder, resume="weights")
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4, 5, 6]
    assert lines(folder)[4]["lr"] == pytest.approx(1e-3 * slow.stage("t2i").optim.rate(4, 6))
    assert lines(folder)[-1]["documents"] == 24, "what was read before still counts"


@pytest.mark.parametrize("text", ["automatic", "-3", "weights:", "weights:x", "none:3"])
def test_what_to_resume_is_read_strictly(text):
    with pytest.raises(ConfigError, match="expected auto, none, weights"):
        Resume.parse(text)
    assert Resume.parse("weights:12") == Resume("weights", 12) and Resume.parse("7") == Resume("auto", 7)


def test_without_a_checkpoint_weights_cannot_go_on(folder):
    with pytest.raises(TrainingError, match="no checkpoint of stage t2i"):
        fit(RUN, "t2i", folder, resume="weights")


SHARD = ShardConfig(mode="fsdp")
PLAIN = OptimConfig(lr=1e-3, matrix_lr=0.0, warmup_steps=1, decay_share=0.0)


def joint_run(steps: int, **changes: Any) -> RunConfig:
    run = tiny_run(steps, 2)
    return replace(run, stages=tuple(replace(s, optim=PLAIN, **changes) for s in run.stages))


@pytest.mark.usefixtures("_alone")
def test_a_run_goes_from_copies_to_shards_and_back_with_its_optimiser(tmp_path):
    """Six steps, two in each form, against six in one; AdamW's moments and the average are carried along."""
    for name in ("mixed", "plain"):
        tiny_folder(tmp_path / name, STAGES[:5])
    fit(joint_run(6), "joint", tmp_path / "plain")
    for steps, shard in ((2, ShardConfig()), (4, SHARD), (6, ShardConfig())):
        fit(joint_run(steps, shard=shard, keep_last=9), "joint", tmp_path / "mixed")
    mixed, plain = ([line["loss"] for line in lines(tmp_path / name, "joint")] for name in ("mixed", "plain"))
    assert len(mixed) == 6 and mixed == pytest.approx(plain, abs=1e-5)
    assert steps_kept(tmp_path / "mixed", stage="joint") == [2, 4, 6]
    one, other = (load_components(tmp_path / name / "model").state_dict() for name in ("mixed", "plain"))
    assert all(torch.allclose(one[k], other[k], atol=1e-4) for k in one)


@pytest.mark.usefixtures("_alone")
def test_a_checkpoint_whose_removal_a_kill_interrupts_is_cleared_by_the_next_save(tmp_path, monkeypatch):
    folder, shards = tiny_folder(tmp_path, STAGES[:5]), tmp_path / "state-joint"
    fit(joint_run(2, shard=SHARD), "joint", folder)

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if (path / "settings.json").is_file():
            (path / "settings.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("starflow2.training.checkpoint.shutil.rmtree", killed)
        checkpoint._remove(shards / "2")
    assert [p.name for p in shards.iterdir()] == [".2.old"] and not (shards / ".2.old" / "settings.json").exists()
    fit(joint_run(4, shard=SHARD), "joint", folder)
    assert [p.name for p in shards.iterdir()] == ["4"]


@pytest.mark.usefixtures("_alone")
def test_checkpoints_of_shards_stay_by_the_same_rule(tmp_path):
    folder = tiny_folder(tmp_path, STAGES[:5])
    run = joint_run(8, shard=SHARD, keep_every=4)
    fit(run, "joint", folder)
    assert steps_kept(folder, run, "joint") == [4, 8]
    fit(run, "joint", folder, resume="4")
    assert [line["step"] for line in lines(folder, "joint")] == list(range(1, 9))
