"""The checks of `starflow2 check`: they pass on a sound model and each catches the fault it is there for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from model_cases import STAGES, tiny_components
from starflow2 import nn, selfcheck
from starflow2.errors import DataError, StateError
from starflow2.flow import Affine, Jacobi
from starflow2.inference.decoder import BatchDecoder
from starflow2.inference.sampler import Sampler
from starflow2.models.pretzel import Pretzel
from starflow2.pipeline import StarFlow2
from starflow2.selfcheck import FLOAT32, FLOAT64, STREAMS64, Check, check_model


@pytest.fixture(scope="module")
def model() -> StarFlow2:
    return StarFlow2(tiny_components())


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
    monkeypatch.setattr(nn, "attention_mask", lambda *_: None)
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
    right = BatchDecoder._levels
    monkeypatch.setattr(BatchDecoder, "_levels", lambda self, count, level: right(self, count, level * self.rows))
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
    with pytest.raises(StateError, match="the checks need t2i"):
        check_model(StarFlow2(tiny_components(stages=("features", "fae", "vlm"))))


# -- both streams together --------------------------------------------------------------------------------------------


@pytest.fixture
def joined():
    return selfcheck._material(StarFlow2(tiny_components(STAGES, side=3)))


def test_a_model_of_stage_three_passes_every_check_of_both_streams(joined, monkeypatch):
    monkeypatch.setattr(selfcheck, "_PLAN", ())
    begun: list[str] = []
    checks = check_model(joined.model, begun.append)
    assert [check.name for check in checks] == begun and len(checks) >= 9
    assert [(check.name, check.note) for check in checks if not check.ok] == []
    assert check_model(StarFlow2(tiny_components())) == [], "without stage three they are left out"


def test_a_cache_of_both_streams_that_forgets_is_caught(joined, monkeypatch):
    right = nn.Cache.append

    def forgetful(self, layer, k, v):
        keys, values = right(self, layer, k, v)
        return keys, values if self.length == 0 else values * 0.9

    monkeypatch.setattr(nn.Cache, "append", forgetful)
    assert selfcheck._interleaved_float32(joined) > FLOAT32
    assert selfcheck._interleaved_float64(joined) > STREAMS64


def test_a_skip_that_does_not_close_is_caught(joined, monkeypatch):
    right = Pretzel.logits
    monkeypatch.setattr(Pretzel, "logits", lambda self, h, g: right(self, h, g) + 1e-6)
    assert selfcheck._closed_skips(joined) > 0


def test_rows_that_hear_what_others_do_are_caught(joined, monkeypatch):
    right = BatchDecoder._levels
    monkeypatch.setattr(BatchDecoder, "_levels", lambda self, count, level: right(self, count, level * self.rows))
    assert selfcheck._mixed_rows(joined) > FLOAT32


def test_rows_that_all_do_the_same_compare_nothing_and_fail(joined, monkeypatch):
    monkeypatch.setattr(selfcheck, "_steered", lambda sampler, asked: sampler)
    with pytest.raises(DataError, match="nothing was compared"):
        selfcheck._mixed_rows(joined)


def test_a_rewind_that_leaves_something_behind_is_caught(joined, monkeypatch):
    monkeypatch.setattr(nn.Cache, "truncate", lambda self, length: None)
    monkeypatch.setattr("starflow2.models.pretzel.PretzelCache.length", property(lambda self: self.flow.length))
    planned = [row for row in selfcheck._JOINT_PLAN if row[1] is selfcheck._fork_and_rewind]
    monkeypatch.setattr(selfcheck, "_PLAN", ())
    monkeypatch.setattr(selfcheck, "_JOINT_PLAN", tuple(planned))
    (check,) = check_model(joined.model)
    assert not check.ok


def test_an_inversion_at_another_level_is_caught(joined, monkeypatch):
    right = selfcheck.invert

    def elsewhere(sampler: Sampler, *args: Any) -> Any:
        other = copy.copy(sampler)
        other.__class__ = type("Other", (Sampler,), {"noise_level": 0.4})
        return right(other, *args)

    monkeypatch.setattr(selfcheck, "invert", elsewhere)
    assert selfcheck._inversion(joined) > FLOAT32


def test_patches_that_do_not_add_up_are_caught(joined, monkeypatch):
    right = Affine.log_prob
    monkeypatch.setattr(Affine, "log_prob", lambda self, u: right(self, u) + 0.1)
    assert selfcheck._patches(joined) > FLOAT32


def test_documents_that_see_each_other_are_caught(joined, monkeypatch):
    monkeypatch.setattr("starflow2.models.sequence.Batch.attend", property(lambda self: None))
    assert selfcheck._packed(joined) > FLOAT32


def test_a_picture_that_is_encoded_again_is_counted(joined, monkeypatch):
    right = BatchDecoder._completed

    def again(self, rows, states):
        told = right(self, rows, states)
        for event in told:
            self.sampler.noisy(event.picture.image[None], torch.tensor([0.1]))
        return told

    monkeypatch.setattr(BatchDecoder, "_completed", again)
    assert selfcheck._encodings(joined) == 2
    monkeypatch.setattr(Sampler, "noisy", lambda self, images, levels: joined.x[:1].to(self.dtype))
    with pytest.raises(DataError, match="ran the encoder 0 times"):
        selfcheck._encodings(joined)
