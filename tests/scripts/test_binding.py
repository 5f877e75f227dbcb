"""The script that measures which object an edit is understood to mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import script
from model_cases import STAGES, tiny_components
from starflow2.world.edits import Edit, suite_edits


@pytest.fixture
def binding() -> Any:
    return script("binding")


def naming(binding: Any) -> list[Edit]:
    edits = suite_edits("dev", "id", 4)
    return [e for e in edits if e.operation in binding.OPERATIONS and len(e.source.objects) > 1]


def test_the_named_object_changed_as_asked_is_the_target(binding):
    edits = naming(binding)
    assert {e.operation for e in edits} == set(binding.OPERATIONS)
    for edit in edits:
        changed, target = binding.changed(edit, edit.before), edit.target
        assert changed.background == target.background and set(changed.objects) == set(target.objects)


def test_a_prediction_of_the_target_changes_the_named_object_alone_and_one_of_the_source_none(binding):
    components, edits = tiny_components(STAGES), naming(binding)[:3]
    for goal, value in (("target", 1.0), ("source", 0.0)):

        def predict(components: Any, edits: Any, goal: str = goal) -> Any:
            return tuple(binding.encode(components, [getattr(e, name) for e in edits]) for name in ("source", goal))

        with torch.no_grad():  # a threshold of 0: random weights leave every latent where it is, more or less
            found = list(binding.projections(components, edits, predict, 0.0))
        assert [projection for named, projection in found if named] == pytest.approx([value] * len(edits), abs=1e-4)
        assert goal == "target" or all(projection == 0 for _, projection in found)


def test_what_is_predicted_does_not_depend_on_the_target(binding):
    components, edits = tiny_components(STAGES), naming(binding)[:2]
    with torch.no_grad():
        source, found = binding.predicted(components, edits)
        _, other = binding.predicted(components, [replace(e, step=replace(e.step, target=e.source)) for e in edits])
        _, moved = binding.predicted(components, [replace(e, step=replace(e.step, source=e.target)) for e in edits])
    assert source.shape == found.shape and torch.equal(found, other) and not torch.equal(found, moved)
