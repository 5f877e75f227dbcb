"""The comparison's arms: equal starts and budgets, what each of them trains, and the summary over seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_cases import STAGES, tiny_components
from starflow2.core.serialize import read_json
from starflow2.errors import CheckpointError, ConfigError
from starflow2.models.checkpoint import load_components, save_components
from starflow2.models.components import Components
from starflow2.research.ablations import (
    ARMS,
    CompareConfig,
    Scores,
    compare,
    compare_and_keep,
    summary,
    unseen_losses,
    write,
)

CONFIG = CompareConfig(steps=2, batch=4, seeds=(0, 1), unseen=4)
READY = ("features", "fae", "vlm", "t2i", "adapter")


class RecordingScorer:
    """Made-up scores, and a record of the components that were scored."""

    def __init__(self) -> None:
        self.calls: list[tuple[Components, bool]] = []

    def __call__(self, components: Components, closed: bool, config: CompareConfig) -> Scores:
        self.calls.append((components, closed))
        return {"geneval": float(len(self.calls)), "mme": 300.0, "flow": 0.5, "text": 2.0}


@pytest.fixture
def scorer() -> RecordingScorer:
    return RecordingScorer()


def a_model(tmp_path: Path) -> Path:
    """The folder of a model before stage 3."""
    save_components(tiny_components(READY), tmp_path / "model")
    return tmp_path / "model"


def test_arms_start_alike_and_change_nothing_that_is_frozen(tmp_path, scorer):
    arms = ("stage 1", "stage 3", "stage 3, skips closed", "closed in use")
    rows = list(compare(a_model(tmp_path), CONFIG, arms=arms, scorer=scorer))
    original = tiny_components()
    assert [row["arm"] for row in rows] == 2 * ["stage 1", "stage 3", "closed in use", "stage 3, skips closed"]
    assert [closed for _, closed in scorer.calls] == 2 * [True, False, True, True]
    for components, _ in scorer.calls:
        for name, value in original.vlm.state_dict().items():
            assert torch.equal(value, components.vlm.state_dict()[name]), name
    before, skips = original.joints, ("visual_skip", "text_skip")
    first, opened, _, shut = (components.joints for components, _ in scorer.calls[:4])
    for name, value in before.state_dict().items():
        assert torch.equal(first.state_dict()[name], value), f"stage 1 trains {name}"
    for name in skips:
        at_start, is_open, is_shut = (getattr(joints, name).weight for joints in (before, opened, shut))
        assert torch.equal(at_start, is_shut) and not torch.equal(at_start, is_open), name
    table = write(rows, CONFIG, tmp_path / "out").read_text()
    assert "| stage 3 |" in table and "| 0, 1 |" in table and "2 steps of 4 documents" in table
    assert summary(rows)["stage 1"]["geneval"]["high"] == 5.0


def test_a_comparison_goes_on_where_it_stopped(tmp_path, scorer):
    folder, arms = a_model(tmp_path), ("stage 1", "stage 3", "closed in use")
    rows = list(compare(folder, CONFIG, arms=arms, scorer=scorer))
    scorer.calls.clear()
    again = compare(folder, CONFIG, arms=arms, done=rows[:4], scorer=scorer)  # stopped after seed 1's first arm
    assert [(r["arm"], r["seed"]) for r in again] == [(r["arm"], r["seed"]) for r in rows]
    assert len(scorer.calls) == 2, "stage 3 of seed 1, open and closed"
    half = compare(folder, CONFIG, arms=arms, done=rows[:5], scorer=scorer)  # stopped between both uses of one training
    assert [(r["arm"], r["seed"]) for r in half] == [(r["arm"], r["seed"]) for r in rows], "no row comes twice"


def test_a_comparison_is_kept_and_never_written_over_by_another(tmp_path, scorer):
    folder, config, output = a_model(tmp_path), replace(CONFIG, seeds=(0,)), tmp_path / "out"
    rows = compare_and_keep(folder, config, output, scorer=scorer)
    table = read_json(output / "compare.json")
    assert table["rows"] == rows and table["summary"] == summary(rows)
    assert len(scorer.calls) == len(rows) == len(ARMS)
    assert compare_and_keep(folder, config, output, scorer=scorer) == rows
    assert len(scorer.calls) == len(rows), "nothing is trained twice"
    other = tmp_path / "other"
    components = tiny_components(READY)
    components.flow.deep.proj_in.weight.data.add_(1.0)
    save_components(components, other)
    for other_budget in ((folder, replace(config, steps=3)), (other, config)):
        with pytest.raises(ConfigError, match="another budget or model"):
            compare_and_keep(*other_budget, output, scorer=scorer)
    assert read_json(output / "compare.json") == table


def test_mixtures_of_transformers_start_afresh_beside_a_fresh_pretzel(tmp_path, scorer):
    one_seed = replace(CONFIG, steps=1, batch=2, seeds=(0,))
    rows = list(compare(a_model(tmp_path), one_seed, arms=("fresh", "mot frozen", "mot finetuned"), scorer=scorer))
    pretzel, frozen, finetuned = (row["trained"] for row in rows)
    assert abs(frozen / pretzel - 1) < 0.05 and finetuned > frozen
    trained = load_components(tmp_path / "model").flow.state_dict()
    fresh = scorer.calls[0][0].flow.state_dict()
    assert any(not torch.allclose(fresh[name], value, atol=0.1) for name, value in trained.items())


def test_losses_on_unseen_documents_are_the_same_each_time_and_see_closed_skips():
    components = tiny_components(STAGES)
    open_, again, closed = (unseen_losses(components, closed=c, count=4, batch=4) for c in (False, False, True))
    assert open_ == again and set(open_) == {"flow", "text"}
    assert abs(open_["flow"] - closed["flow"]) > 1e-4 and abs(open_["text"] - closed["text"]) > 1e-4


@pytest.mark.parametrize("stages", [("features", "fae", "vlm"), (*READY, "joint")])
def test_a_model_from_before_stage_2_or_from_after_stage_3_is_refused(tmp_path, stages):
    save_components(tiny_components(stages), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"expected a model that has finished .* t2i, adapter, and not joint"):
        next(compare(tmp_path / "model", CONFIG))


def test_an_unknown_arm_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="stage 4"):
        next(compare(tmp_path, CONFIG, arms=("stage 4",)))
