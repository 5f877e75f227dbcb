"""The comparison of codecs: equal starts, what each arm trains, rows that are kept, a table that says what it is of."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch

from model_cases import tiny_components
from starflow2.errors import ConfigError
from starflow2.evals.statistics import Score, Scores
from starflow2.evals.suite import Report
from starflow2.models.checkpoint import save_components
from starflow2.research.codec_ablations import (
    ARMS,
    CLEANED,
    Arm,
    CodecsConfig,
    Measures,
    compare_codecs,
    start,
    write,
)
from starflow2.training.config import StageConfig


@dataclass(frozen=True, kw_only=True)
class Quick(CodecsConfig):
    """The budget with fewer captions read before the first step."""

    def stage(self, arm: Arm) -> StageConfig:
        return replace(super().stage(arm), whitening_captions=64)


CONFIG = Quick(steps=1, batch=2, seeds=(0,))


class MadeUpScores:
    """Draws one image for each arm and reports made-up scores; records the clean-up of each arm."""

    def __init__(self) -> None:
        self.cleanups: list[str] = []

    def __call__(self, drawer, split, *, quick, samples):
        assert drawer.draw(["a red circle"], [len(self.cleanups)]).isfinite().all()
        self.cleanups.append(drawer.config.cleanup)
        half = Scores(1, 1, {"lenient": Score(0.5)})
        bounds = {"clean": {"id": half}, "noise": {"id": half}}
        return Report(suite="geneval", split=split, quick=quick, n=1, parts={"id": half, "cg": half}, bounds=bounds)


@pytest.fixture
def folder(tmp_path):
    """A model to compare on."""
    save_components(tiny_components(("features", "fae", "vlm")), tmp_path / "model")
    return tmp_path / "model"


def test_every_arm_is_trained_and_scored_and_a_second_call_trains_nothing(folder, tmp_path):
    pytest.importorskip("torchmetrics")
    scores = MadeUpScores()
    measures = Measures(geneval=scores, images=8)
    rows = compare_codecs(folder, CONFIG, tmp_path / "out", measures=measures)
    assert [row["arm"] for row in rows] == [*ARMS, CLEANED]
    assert scores.cleanups == ["none", "none", "none", "tweedie"]
    flow, both, patches, cleaned = rows
    components = tiny_components()
    count = sum(p.numel() for p in components.fae.parameters())
    assert both["trained"] == flow["trained"] + count and patches["trained"] == cleaned["trained"] != flow["trained"]
    assert patches["psnr"] > 60 > flow["psnr"] and flow["psnr"] != both["psnr"]
    assert flow["floor"] == pytest.approx(1.419 + math.log(0.5), abs=1e-3) and flow["nats_per_dim"] > flow["floor"]
    assert patches["feature_fd"] is not None, "one judge for all arms"
    table = write(rows, CONFIG, tmp_path / "out").read_text()
    assert all(f"| {row['arm']} |" in table for row in rows) and "not between arms" in table
    again = compare_codecs(folder, CONFIG, tmp_path / "out", measures=measures)
    assert again == json.loads(json.dumps(rows))
    assert len(scores.cleanups) == 4, "what is trained is scored"
    with pytest.raises(ConfigError, match="another budget or model"):
        compare_codecs(folder, replace(CONFIG, steps=2), tmp_path / "out", measures=measures)


def test_arms_start_alike_from_what_is_frozen(folder):
    torch.manual_seed(9)
    default, both, patches = (start(arm, folder, 1) for arm in ARMS)
    for name in ("vlm", "fae", "features", "flow"):
        one, other = (getattr(components, name).state_dict() for components in (default, both))
        assert all(torch.equal(one[k], other[k]) for k in one), name
    words = default.vlm.state_dict()
    assert all(torch.equal(words[k], v) for k, v in patches.vlm.state_dict().items()) and not hasattr(patches, "fae")
    again = start("patches", folder, 1).flow.state_dict()
    assert all(torch.equal(again[k], v) for k, v in patches.flow.state_dict().items()), "a seed is a start"
    assert not torch.equal(start("patches", folder, 2).flow.deep.proj_in.weight, patches.flow.deep.proj_in.weight)
    assert CONFIG.stage("end to end").codec_weight > 0 == CONFIG.stage("patches").codec_weight
