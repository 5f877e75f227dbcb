"""The checks of `starflow2 check`: they pass on a sound model and each catches the fault it is there for."""

from __future__ import annotations

import pytest
import torch

from model_cases import tiny_parts
from starflow2 import nn, selfcheck
from starflow2.errors import ConfigError
from starflow2.flow import Affine, Flow, Jacobi
from starflow2.model import StarFlow2
from starflow2.selfcheck import FLOAT32, FLOAT64, Check, check_model


@pytest.fixture(scope="module")
def model() -> StarFlow2:
    return StarFlow2(tiny_parts())


@pytest.fixture(scope="module")
def material(model):
    return selfcheck._material(model)


def test_a_sound_flow_passes_every_check_and_an_untrained_codec_fails_its_own(model):
    begun: list[str] = []
    checks = check_model(model, begun.append)
    assert [check.name for check in checks] == begun
    assert [check.name for check in checks if not check.ok] == ["codec: PSNR of drawn scenes (dB)"]
    report = selfcheck.report(checks, model)
    assert report["ok"] is False and len(report["checks"]) == len(checks) >= 10
    assert all(set(row) == {"name", "value", "bound", "ok"} for row in report["checks"])
    assert selfcheck.table(checks).row_count == len(checks)


def test_a_log_determinant_of_the_wrong_sign_is_caught_both_ways(material, monkeypatch):
    right = Affine.normalize
    monkeypatch.setattr(Affine, "normalize", lambda self, u: (right(self, u)[0], -right(self, u)[1]))
    assert selfcheck._jacobian_of_twin(material) > FLOAT64
    assert selfcheck._jacobian_diagonal(material) > FLOAT64


def test_a_flow_that_looks_ahead_is_caught(material, monkeypatch):
    monkeypatch.setattr(nn, "_mask", lambda *_: None)
    assert selfcheck._leak(material) > 0
    assert selfcheck._roundtrip(material) > FLOAT32


def test_a_cache_that_forgets_is_caught(material, monkeypatch):
    right = nn.Cache.append

    def forgetful(self, layer, k, v):
        keys, values = right(self, layer, k, v)
        return keys, values if self.length == 0 else values * 0.9

    monkeypatch.setattr(nn.Cache, "append", forgetful)
    assert selfcheck._cached_is_full(material) > FLOAT32


def test_an_iteration_that_stops_too_soon_is_caught(material, monkeypatch):
    monkeypatch.setattr(selfcheck, "JACOBI", Jacobi(max_iterations=2))
    assert selfcheck._parallel_inverse(material) > FLOAT32
    assert selfcheck._parallel_sampling(material) > FLOAT64


def test_guidance_that_acts_at_zero_is_caught(material, monkeypatch):
    monkeypatch.setattr(Affine, "guide", lambda self, other, *_: Affine(0.5 * (self.mu + other.mu), self.log_scale))
    assert selfcheck._no_guidance(material) > FLOAT32


def test_rows_that_see_each_other_are_caught(material, model, monkeypatch):
    right = Flow.prior
    monkeypatch.setattr(Flow, "prior", lambda self, seeds: right(self, seeds) * len(seeds))
    assert selfcheck._batch_invariance(material) > FLOAT32


def test_a_check_that_crashes_is_one_that_fails_and_says_why(model, monkeypatch):
    def crash(*_):
        raise NotImplementedError("no such kernel\non this machine")

    monkeypatch.setattr(torch.linalg, "slogdet", crash)
    planned = [row for row in selfcheck._PLAN if row[1] is selfcheck._jacobian_of_twin]
    monkeypatch.setattr(selfcheck, "_PLAN", tuple(planned))
    (check,) = check_model(model)
    assert not check.ok and check.value is None
    assert check.to_json()["note"] == "NotImplementedError: no such kernel"


def test_a_bound_holds_in_its_direction_and_never_for_what_is_not_a_number():
    assert Check("a", 1.0, 1.0).ok and not Check("a", 1.1, 1.0).ok
    assert Check("a", 1.0, 1.0, "at least").ok and not Check("a", 0.9, 1.0, "at least").ok
    assert not Check("a", float("nan"), 1.0).ok and Check("a", float("nan"), 1.0).to_json()["value"] is None


def test_a_model_without_a_flow_is_refused():
    with pytest.raises(ConfigError, match="the checks need t2i"):
        check_model(StarFlow2(tiny_parts(stages=("features", "fae", "vlm"))))
