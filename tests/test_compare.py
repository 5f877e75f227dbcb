"""The comparison's arms: equal starts and budgets, what each of them trains, and the summary over seeds."""

from __future__ import annotations

import json

import pytest
import torch

from model_cases import tiny_parts
from starflow2 import compare
from starflow2.checkpoint import save_parts
from starflow2.compare import CompareConfig, summary, write
from starflow2.errors import ConfigError
from starflow2.parts import Parts

CONFIG = CompareConfig(steps=2, batch=4, adapter_steps=1, seeds=(0, 1))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Parts, bool]]:
    """Scores are made up, and the parts that were to be scored are kept."""
    found: list[tuple[Parts, bool]] = []

    def scores(parts: Parts, *, closed: bool, config: CompareConfig) -> dict[str, float]:
        found.append((parts, closed))
        return {"geneval": float(len(found)), "mme": 300.0}

    monkeypatch.setattr(compare, "_scores", scores)
    return found


def test_arms_start_alike_and_change_nothing_that_is_frozen(tmp_path, seen):
    save_parts(tiny_parts(("features", "fae", "vlm")), tmp_path / "model")
    original = tiny_parts()
    arms = ("stage 1", "stage 3", "stage 3, skips closed", "closed in use")
    rows = compare.compare(tmp_path / "model", CONFIG, arms=arms)
    assert [row["arm"] for row in rows] == 2 * ["stage 1", "stage 3", "closed in use", "stage 3, skips closed"]
    assert [closed for _, closed in seen] == 2 * [True, False, True, True]
    for parts, _ in seen:
        for name, value in original.vlm.state_dict().items():
            assert torch.equal(value, parts.vlm.state_dict()[name]), name
    closed = seen[3][0].joints
    assert not closed.visual_skip.weight.any() and not closed.text_skip.weight.any(), "a closed skip learns nothing"
    assert seen[1][0].joints.visual_skip.weight.any()
    table = write(rows, CONFIG, tmp_path / "out").read_text()
    assert "| stage 3 |" in table and "2 steps of 4 documents" in table
    told = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert told["summary"] == summary(rows) and told["summary"]["stage 1"]["geneval"]["high"] == 5.0


def test_mixtures_of_transformers_are_arms_too(tmp_path, seen):
    save_parts(tiny_parts(("features", "fae", "vlm")), tmp_path / "model")
    one_seed = CompareConfig(steps=1, batch=2, seeds=(0,))
    rows = compare.compare(tmp_path / "model", one_seed, arms=("stage 3", "mot frozen", "mot finetuned"))
    pretzel, frozen, finetuned = (row["trained"] for row in rows)
    assert abs(frozen / pretzel - 1) < 0.05 and finetuned > frozen


def test_an_unknown_arm_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="stage 4"):
        compare.compare(tmp_path, CONFIG, arms=("stage 4",))
