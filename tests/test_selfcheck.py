"""The checks of `starflow2 check`: they pass on a sound model and each catches the fault it is there for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from model_cases import STAGES, tiny_components
from starflow2 import nn, selfcheck
from starflow2.errors import DataError, StateError
from starflow2.flow import Affine, Jacobi
from starflow2.flow.stepper import Stepper
from starflow2.inference.engine import Engine
from starflow2.inference.lanes import KeyValues
from starflow2.inference.lean import LeanBackend
from starflow2.inference.sampler import Sampler
from starflow2.models.pretzel import Pretzel
from starflow2.models.sequence import Batch
from starflow2.pipeline import StarFlow2
from starflow2.selfcheck import FLOAT32, FLOAT64, SAMPLED, STREAMS64, Check, check_model


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
    assert report["sampling"]["path"] == "lean" and report["sampling"]["note"].startswith("vlm.width is ")
    assert all(set(row) == {"name", "value", "bound", "ok"} for row in report["checks"])
    assert selfcheck.table(checks).row_count == len(checks)


@dataclass(frozen=True)
class Fault:
    """A fault in one method of the library, and the check that must catch it."""

    owner: Any
    name: str
    broken: Callable[[Any], Any]  # from the right method or value
    check: Callable[[Any], float]
    bound: float


def _wrong_sign(right: Any) -> Any:
    return lambda self, u: (right(self, u)[0], -right(self, u)[1])


def _forgetful(right: Any) -> Any:
    def append(self, layer, k, v):
        keys, values = right(self, layer, k, v)
        return keys, values if self.length == 0 else values * 0.9

    return append


def _faint(right: Any) -> Any:
    def read(self: Any, buffer: Any, target: int) -> Any:
        for layer in self.layers:
            layer.values[:, : self.run.prefix.length + target - 1].mul_(0.9)
        return right(self, buffer, target)

    return read


def _not_finite(right: Any) -> Any:
    return lambda self, *given: math.nan * right(self, *given)


def _forgetful_lanes(right: Any) -> Any:
    return lambda self, layer, index, kv: right(self, layer, index, kv * 0.99)


def _seen_by_neighbours(right: Any) -> Any:
    def views(self, first, lanes, visible):
        found = right(self, first, lanes, visible)
        return found if lanes < 3 else [(k.roll(1, 0), v.roll(1, 0)) for k, v in found]

    return views


def _guided_at_zero(right: Any) -> Any:
    return lambda self, other, *_: Affine(0.5 * (self.mu + other.mu), self.log_scale)


FLOW_FAULTS = {
    "sign of a log-determinant, by determinant": Fault(
        Affine, "normalize", _wrong_sign, selfcheck._jacobian_of_twin, FLOAT64
    ),
    "sign of a log-determinant, by diagonal": Fault(
        Affine, "normalize", _wrong_sign, selfcheck._jacobian_diagonal, FLOAT64
    ),
    "a flow that looks ahead": Fault(nn, "attention_mask", lambda _: lambda *_: None, selfcheck._leak, 0.0),
    "a flow that looks ahead and back": Fault(
        nn, "attention_mask", lambda _: lambda *_: None, selfcheck._roundtrip, FLOAT32
    ),
    "a cache that forgets": Fault(nn.Cache, "append", _forgetful, selfcheck._cached_is_full, FLOAT32),
    "steps that forget": Fault(Stepper, "_read", _faint, selfcheck._cached_is_full, FLOAT32),
    "steps that are not finite": Fault(Stepper, "_read", _not_finite, selfcheck._cached_is_full, FLOAT32),
    "an inverse that stops too soon": Fault(
        selfcheck, "JACOBI", lambda _: Jacobi(max_iterations=2), selfcheck._parallel_inverse, FLOAT32
    ),
    "sampling that stops too soon": Fault(
        selfcheck, "JACOBI", lambda _: Jacobi(max_iterations=2), selfcheck._parallel_sampling, FLOAT64
    ),
    "guidance that acts at zero": Fault(Affine, "guide", _guided_at_zero, selfcheck._no_guidance, FLOAT32),
    "rows that see each other": Fault(KeyValues, "views", _seen_by_neighbours, selfcheck._batch_invariance, SAMPLED),
}


@pytest.mark.parametrize("fault", FLOW_FAULTS.values(), ids=FLOW_FAULTS)
def test_every_fault_of_a_flow_is_caught_by_its_check(material, monkeypatch, fault):
    monkeypatch.setattr(fault.owner, fault.name, fault.broken(getattr(fault.owner, fault.name)))
    assert fault.check(material) > fault.bound


def test_a_check_that_crashes_is_one_that_fails_and_says_why(model):
    def crash(_):
        raise NotImplementedError("no such kernel\non this machine")

    (check,) = check_model(model, plan=[(Check("crashes", None, 0.0), crash)])
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


def test_a_model_of_stage_three_passes_every_check_of_both_streams(joined):
    begun: list[str] = []
    checks = check_model(joined.model, begun.append, selfcheck.JOINT_PLAN)
    assert [check.name for check in checks] == begun and len(checks) >= 9
    assert [(check.name, check.note) for check in checks if not check.ok] == []


def test_which_checks_run_follows_from_the_stages_of_a_model():
    planned = {check.name for check, _ in selfcheck.JOINT_PLAN}
    flow_alone = StarFlow2(tiny_components())
    names: list[str] = []
    with pytest.raises(KeyboardInterrupt):  # all are planned before the first is measured
        check_model(flow_alone, lambda name: names.append(name) or _stop())
    assert names == [selfcheck.FLOW_PLAN[0][0].name] and not planned & {c.name for c, _ in selfcheck.FLOW_PLAN}


def _stop() -> None:
    raise KeyboardInterrupt


def _off_by_a_little(right: Any) -> Any:
    return lambda self, h, g: right(self, h, g) + 1e-6


def _elsewhere(right: Any) -> Any:
    def invert(sampler: Sampler, *args: Any) -> Any:
        other = copy.copy(sampler)
        other.__class__ = type("Other", (Sampler,), {"noise_level": 0.4})
        return right(other, *args)

    return invert


JOINT_FAULTS = {
    "a cache of both streams that forgets, in float32": Fault(
        KeyValues, "write", _forgetful_lanes, selfcheck._interleaved_float32, FLOAT32
    ),
    "a cache of both streams that forgets, in float64": Fault(
        KeyValues, "write", _forgetful_lanes, selfcheck._interleaved_float64, STREAMS64
    ),
    "a skip that does not close": Fault(Pretzel, "logits", _off_by_a_little, selfcheck._closed_skips, 0.0),
    "rows that hear what others do": Fault(KeyValues, "views", _seen_by_neighbours, selfcheck._mixed_rows, SAMPLED),
    "an inversion at another level": Fault(selfcheck, "invert", _elsewhere, selfcheck._inversion, FLOAT32),
    "patches that do not add up": Fault(
        Affine, "log_prob", lambda right: lambda self, u: right(self, u) + 0.1, selfcheck._patches, FLOAT32
    ),
    "documents that see each other": Fault(
        Batch, "attend", lambda _: property(lambda self: None), selfcheck._packed, FLOAT32
    ),
}


@pytest.mark.parametrize("fault", JOINT_FAULTS.values(), ids=JOINT_FAULTS)
def test_every_fault_of_both_streams_is_caught_by_its_check(joined, monkeypatch, fault):
    monkeypatch.setattr(fault.owner, fault.name, fault.broken(getattr(fault.owner, fault.name)))
    assert fault.check(joined) > fault.bound


def test_rows_that_all_do_the_same_compare_nothing_and_fail(joined, monkeypatch):
    monkeypatch.setattr(selfcheck, "_steered", lambda sampler, asked: sampler)
    with pytest.raises(DataError, match="nothing was compared"):
        selfcheck._mixed_rows(joined)


def test_a_rewind_that_leaves_something_after_it_is_caught(joined, monkeypatch):
    monkeypatch.setattr(LeanBackend, "restore", lambda self, lane, mark: None)
    plan = [row for row in selfcheck.JOINT_PLAN if row[1] is selfcheck._fork_and_rewind]
    (check,) = check_model(joined.model, plan=plan)
    assert not check.ok


def test_an_image_that_is_encoded_again_is_counted(joined, monkeypatch):
    right = Engine._decoded

    def again(self, pictures):
        images = right(self, pictures)
        for image in images:
            self.sampler.noisy(image.image[None], torch.tensor([0.1]))
        return images

    monkeypatch.setattr(Engine, "_decoded", again)
    assert selfcheck._encodings(joined) == 2
    monkeypatch.setattr(Sampler, "noisy", lambda self, images, levels: joined.x[:1].to(self.dtype))
    with pytest.raises(DataError, match="ran the encoder 0 times"):
        selfcheck._encodings(joined)
