"""Tasks: constructors store, `initialise` measures, and what a task trains and reads can be handed to it."""

from __future__ import annotations

import pytest
import torch

from model_cases import STAGES, tiny_components, tiny_model, tiny_run
from starflow2.models.components import build
from starflow2.training.tasks import TASKS

RUN = tiny_run(1)


@pytest.mark.parametrize("stage", STAGES)
def test_constructing_a_task_of_a_fresh_stage_leaves_every_weight_as_it_is(stage):
    components = tiny_components(STAGES[: STAGES.index(stage)])
    before = {name: value.clone() for name, value in components.state_dict().items()}
    TASKS[stage](components, RUN.stage(stage), 0)
    after = components.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_a_task_trains_and_reads_what_it_is_given():
    components = tiny_components(STAGES)
    head = torch.nn.ModuleDict({"head": components.flow.deep.head})
    for stage in STAGES:
        task = TASKS[stage](components, RUN.stage(stage), 0, dataset=list, trained=head)
        assert task.trained is head and task.make_batch(range(3)) == [0, 1, 2]


@pytest.mark.parametrize("stage", STAGES)
def test_a_task_with_its_own_dataset_needs_no_tokenizer(stage):
    TASKS[stage](build(tiny_model(), "meta"), RUN.stage(stage), 0, dataset=list)
