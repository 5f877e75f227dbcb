"""A dry run counts what the model has, and takes the very step that training takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model_cases import STAGES, tiny_components, tiny_run
from starflow2.errors import TrainingError
from starflow2.training.dry_run import dry_run
from starflow2.training.recipes import nano
from starflow2.training.tasks import TASKS

RUN = tiny_run(2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_on_meta_counts_what_the_stage_trains_and_reads(stage):
    components = tiny_components(STAGES)
    task = TASKS[stage](components, RUN.stage(stage), 0)
    facts = dry_run(RUN, stage)
    trained = sum(p.numel() for p in task.trained.parameters())
    head = trained - sum(p.numel() for p in components.features.parameters()) if stage == "features" else 0
    assert facts["parameters"]["trained"] == trained
    assert sum(facts["parameters"].values()) == sum(p.numel() for p in components.parameters()) + head
    assert facts["microbatch"]["documents"] == 4 and facts["microbatch"]["pictures"] == (8 if stage == "joint" else 4)
    assert facts["bytes_per_process"]["optimizer"] == 8 * trained
    assert "loss" not in facts


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_on_a_device_takes_a_step_and_measures_it(stage):
    facts = dry_run(RUN, stage, "cpu")
    assert torch.isfinite(torch.tensor([facts["loss"], facts["grad_norm"]])).all() and facts["grad_norm"] > 0
    assert facts["seconds"] > 0 and facts["peak_bytes"] > 10**8


def test_positions_of_a_microbatch_are_those_of_its_rows():
    facts = dry_run(RUN, "t2i")
    assert facts["microbatch"]["positions"] == 4 * (128 + 3 + 64)
    half = replace(RUN, stages=tuple(replace(s, accumulate=2) for s in RUN.stages))
    assert dry_run(half, "t2i")["microbatch"] == {"documents": 2, "positions": 2 * (128 + 3 + 64), "pictures": 2}


def test_the_real_recipe_is_counted_without_memory_for_its_weights():
    facts = dry_run(nano(), "joint")
    assert facts["parameters"]["trained"] > 3 * 10**6 and facts["microbatch"]["documents"] == 32


def test_a_batch_that_cannot_be_shared_is_refused():
    odd = replace(RUN, stages=tuple(replace(s, accumulate=3) for s in RUN.stages))
    with pytest.raises(TrainingError, match=r"batch 4 cannot be divided equally"):
        dry_run(odd, "t2i", "cpu")
