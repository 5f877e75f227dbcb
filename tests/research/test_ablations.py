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
from starflow2.research import ablations as compare
from starflow2.research.ablations import CompareConfig, compare_and_keep, summary, write

CONFIG = CompareConfig(steps=2, batch=4, seeds=(0, 1), unseen=4)
READY = ("features", "fae", "vlm", "t2i", "adapter")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Components, bool]]:
    """Scores are made up, and the parts that were to be scored are kept."""
    found: list[tuple[Components, bool]] = []

    def scores(components: Components, *, closed: bool, config: CompareConfig) -> dict[str, float]:
        found.append((components, closed))
        return {"geneval": float(len(found)), "mme": 300.0, "flow": 0.5, "text": 2.0}

    monkeypatch.setattr(compare, "_scores", scores)
    return found


def kept(tmp_path: Path) -> Path:
    """The folder of a model before stage 3."""
    save_components(tiny_components(READY), tmp_path / "model")
    return tmp_path / "model"


def test_arms_start_alike_and_change_nothing_that_is_frozen(tmp_path, seen):
    arms = ("stage 1", "stage 3", "stage 3, skips closed", "closed in use")
    rows = list(compare.compare(kept(tmp_path), CONFIG, arms=arms))
    original = tiny_components()
    assert [row["arm"] for row in rows] == 2 * ["stage 1", "stage 3", "closed in use", "stage 3, skips closed"]
    assert [closed for _, closed in seen] == 2 * [True, False, True, True]
    for components, _ in seen:
        for name, value in original.vlm.state_dict().items():
            assert torch.equal(value, components.vlm.state_dict()[name]), name
    before, skips = original.joints, ("visual_skip", "text_skip")
    first, opened, _, shut = (components.joints for components, _ in seen[:4])
    for name, value in before.state_dict().items():
        assert torch.equal(first.state_dict()[name], value), f"stage 1 trains {name}"
    for name in skips:
        was, is_open, is_shut = (getattr(joints, name).weight for joints in (before, opened, shut))
        assert torch.equal(was, is_shut) and not torch.equal(was, is_open), name
    table = write(rows, CONFIG, tmp_path / "out").read_text()
    assert "| stage 3 |" in table and "| 0, 1 |" in table and "2 steps of 4 documents" in table
    assert summary(rows)["stage 1"]["geneval"]["high"] == 5.0


def test_a_comparison_goes_on_where_it_stopped(tmp_path, seen):
    folder, arms = kept(tmp_path), ("stage 1", "stage 3", "closed in use")
    rows = list(compare.compare(folder, CONFIG, arms=arms))
    seen.clear()
    again = compare.compare(folder, CONFIG, arms=arms, done=rows[:4])  # stopped after seed 1's first arm
    assert [(r["arm"], r["seed"]) for r in again] == [(r["arm"], r["seed"]) for r in rows]
    assert len(seen) == 2, "stage 3 of seed 1, open and closed"
    half = compare.compare(folder, CONFIG, arms=arms, done=rows[:5])  # stopped between both uses of one training
    assert [(r["arm"], r["seed"]) for r in half] == [(r["arm"], r["seed"]) for r in rows], "no row comes twice"


def test_a_comparison_is_kept_and_never_written_over_by_another(tmp_path, seen):
    folder, config, output = kept(tmp_path), replace(CONFIG, seeds=(0,)), tmp_path / "out"
    rows = compare_and_keep(folder, config, output)
    told = read_json(output / "compare.json")
    assert told["rows"] == rows and told["summary"] == summary(rows) and len(seen) == len(rows) == len(compare.ARMS)
    assert compare_and_keep(folder, config, output) == rows
    assert len(seen) == len(rows), "nothing is trained twice"
    other = tmp_path / "other"
    components = tiny_components(READY)
    components.flow.deep.proj_in.weight.data.add_(1.0)
    save_components(components, other)
    for asked in ((folder, replace(config, steps=3)), (other, config)):
        with pytest.raises(ConfigError, match="another budget or model"):
            compare_and_keep(*asked, output)
    assert read_json(output / "compare.json") == told


def test_mixtures_of_transformers_start_afresh_beside_a_fresh_pretzel(tmp_path, seen):
    one_seed = replace(CONFIG, steps=1, batch=2, seeds=(0,))
    rows = list(compare.compare(kept(tmp_path), one_seed, arms=("fresh", "mot frozen", "mot finetuned")))
    pretzel, frozen, finetuned = (row["trained"] for row in rows)
    assert abs(frozen / pretzel - 1) < 0.05 and finetuned > frozen
    trained = load_components(tmp_path / "model").flow.state_dict()
    fresh = seen[0][0].flow.state_dict()
    assert any(not torch.allclose(fresh[name], value, atol=0.1) for name, value in trained.items())


def test_losses_on_unseen_documents_are_the_same_each_time_and_see_closed_skips():
    components = tiny_components(STAGES)
    open_, again, closed = (compare._losses(components, closed=c, count=4, batch=4) for c in (False, False, True))
    assert open_ == again and set(open_) == {"flow", "text"}
    assert abs(open_["flow"] - closed["flow"]) > 1e-4 and abs(open_["text"] - closed["text"]) > 1e-4


@pytest.mark.parametrize("stages", [("features", "fae", "vlm"), (*READY, "joint")])
def test_a_model_from_before_stage_2_or_from_after_stage_3_is_refused(tmp_path, stages):
    save_components(tiny_components(stages), tmp_path / "model")
    with pytest.raises(CheckpointError, match="needs a model of stages 1 and 2"):
        next(compare.compare(tmp_path / "model", CONFIG))


def test_an_unknown_arm_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="stage 4"):
        next(compare.compare(tmp_path, CONFIG, arms=("stage 4",)))
