"""The plan against figures worked out by hand for the paper's size, and against real tensors at nano's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model_cases import tiny_tokenizer
from starflow2.errors import ConfigError
from starflow2.models.components import Components
from starflow2.training.parallel import Distributed
from starflow2.training.planner import (
    CAPTIONED,
    INTERLEAVED,
    SCHEMES,
    SHAPES,
    Hardware,
    Sizes,
    activation_bytes,
    flops,
    frozen_bytes,
    logit_bytes,
    plan,
    stage_kind,
    state_bytes,
    works,
)
from starflow2.training.recipes import mini, nano, paper
from starflow2.training.state import TrainState
from starflow2.training.tasks import TASKS

H100 = Hardware(gpus=1, peak=1e15, mfu=0.4)  # 400 TFLOP/s


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return Sizes.of(paper().model)


def close(value: float, hand: float, share: float = 0.04) -> bool:
    return abs(value - hand) <= share * hand


def test_weights_are_those_of_the_hand_count(sizes):
    hand = {"language": 6525.6, "head": 545.0, "deep": 2719.2, "shallow": 906.9, "features": 1136.5, "vision": 676.6}
    for part, millions in hand.items():
        assert close(sizes.weights[part] / 1e6, millions, 0.001), part


@pytest.mark.parametrize(
    ("stage", "shape", "hand"),
    [
        ("t2i", CAPTIONED, {"language": 1.67, "deep": 6.26, "shallow": 1.39, "features": 0.59, "": 9.9}),
        (
            "adapter",
            SHAPES["adapter"][0],
            {"language": 10.02, "head": 0.28, "shallow": 0.46, "features": 0.59, "": 11.4},
        ),
        ("joint", CAPTIONED, {"language": 8.35, "deep": 6.26, "shallow": 1.39, "features": 0.59, "": 16.6}),
        (
            "joint",
            INTERLEAVED,
            {"language": 25.9, "deep": 16.7, "shallow": 2.8, "head": 1.1, "features": 1.2, "": 47.7},
        ),
    ],
    ids=["t2i", "adapter", "joint, caption", "joint, interleaved"],
)
def test_teraflops_of_a_document_are_those_of_the_hand_count(sizes, stage, shape, hand):
    """Within 5 %: ours counts attention, which the hand figures leave out."""
    found: dict[str, float] = {}
    for work in works(sizes, stage, shape):
        found[work.part] = found.get(work.part, 0) + work.flops / 1e12
    found[""] = sum(found.values())
    for part, value in hand.items():
        assert close(found[part], value, 0.05), (part, found[part])


def test_hours_follow_from_flops_and_documents():
    rows = {row["stage"]: row for row in plan(paper(), H100)["stages"]}
    assert close(rows["t2i"]["gpu_hours"], 5500) and close(rows["adapter"]["gpu_hours"], 1580)
    assert close(rows["joint"]["gpu_hours"], 920 + 2650)
    assert close(rows["t2i"]["step_s"], 25)
    many = plan(paper(), replace(H100, gpus=64))["stages"][1]
    assert close(many["step_s"], 0.40) and close(many["gpu_hours"], 5500) and close(many["days"], 5500 / 64 / 24)


@pytest.mark.parametrize(
    ("scheme", "hand"),
    [("float32", 58.6), ("float32, 8-bit Adam", 36.6), ("bfloat16", 29.3), ("bfloat16, 8-bit Adam", 22.0)],
)
def test_state_of_what_trains_is_that_of_the_hand_count(sizes, scheme, hand):
    (chosen,) = (s for s in SCHEMES if s.name == scheme)
    stage = paper().stage("joint")
    found = {k: v for k, v in state_bytes(sizes, stage, chosen).items() if k != "average"}
    assert close(sum(found.values()) / 1e9, hand, 0.01)
    each = {row["scheme"]: row["bytes"] for row in plan(paper(), Hardware(gpus=8))["stages"][3]["plans"]}[scheme]
    assert all(each[name] == found[name] / 8 for name in found)


def test_frozen_parts_and_activations_are_those_of_the_hand_count(sizes):
    frozen = frozen_bytes(sizes, "joint")
    assert close(frozen["vlm"] / 1e9, 15.2 + 1.35, 0.01) and close(frozen["features"] / 1e9, 2.3, 0.02)
    assert frozen["flow"] == frozen["joints"] == 0
    only = replace(CAPTIONED, prefix=0)
    assert close(activation_bytes(sizes, "joint", only, recomputes=False) / 1e9, 2.3, 0.05)
    layer = 384 * 2 * (4 * 3584 + 2 * 4 * 128 + 2 * 18944)  # all of one language layer
    recomputed = activation_bytes(sizes, "joint", only, recomputes=True) - layer
    assert close(recomputed / 1e9, 0.16, 0.1)
    assert logit_bytes([replace(CAPTIONED, labels=1)]) == logit_bytes(SHAPES["joint"]) <= 0.2e9, "in chunks"
    assert logit_bytes([replace(CAPTIONED, labels=0)]) == 0


def test_what_fits_on_one_gpu_is_what_the_hand_count_says():
    """Without averaged weights float32 leaves next to nothing of 80 GiB, 8-bit Adam room for about 11 captions."""
    run = paper()
    stages = tuple(replace(s, optim=replace(s.optim, ema=0.0)) for s in run.stages)
    (row,) = (r for r in plan(replace(run, stages=stages), Hardware(gpus=1))["stages"] if r["stage"] == "joint")
    plans = {(p["scheme"], p["recomputes"]): p for p in row["plans"]}
    assert not plans["float32", False]["fits"]
    assert 0 < plans["float32", True]["left"] < 5e9, "80 GiB are just more than state and frozen parts"
    assert plans["float32, 8-bit Adam", False]["fits"]
    left = plans["float32, 8-bit Adam", False]["left"]
    caption = activation_bytes(Sizes.of(run.model), "joint", replace(CAPTIONED, prefix=0), recomputes=False)
    assert 9 <= left / caption <= 13
    (big,) = (r for r in plan(run, Hardware(gpus=1, gpu_memory=140))["stages"] if r["stage"] == "joint")
    assert big["plans"][0]["scheme"] == "float32" and big["plans"][0]["fits"]


def test_mini_fits_on_one_consumer_gpu():
    for row in plan(mini(), Hardware(gpus=1, gpu_memory=24))["stages"]:
        assert any(p["fits"] for p in row["plans"] if p["scheme"] == "float32"), row["stage"]


@pytest.mark.parametrize("name", [s.name for s in nano().stages])
def test_nanos_parameters_optimiser_and_average_are_those_of_the_real_tensors(name):
    run = nano()
    stage = run.stage(name)
    components = Components(run.model, tiny_tokenizer())
    task = TASKS[name](components, stage, 0)
    components.requires_grad_(False)
    task.trained.requires_grad_(True)
    state = TrainState.fresh(task.trained, stage.optim, Distributed())
    for parameter in task.trained.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in state.optimizers:
        optimizer.step()
    moments = [v for o in state.optimizers for s in o.state.values() for k, v in s.items() if k != "step"]
    planned = state_bytes(Sizes.of(run.model), stage, SCHEMES[0])
    assert planned["parameters"] == sum(p.nbytes for p in task.trained.parameters())
    assert planned["gradients"] == sum(p.grad.nbytes for p in task.trained.parameters() if p.grad is not None)
    assert planned["optimizer"] == sum(v.nbytes for v in moments)
    assert planned["average"] == sum(v.nbytes for v in state.ema.values())
    trained = {id(p) for p in task.trained.parameters()}
    frozen = sum(p.nbytes for p in components.parameters() if id(p) not in trained)
    if stage.kl_to_t2i:
        frozen += sum(p.nbytes for p in components.flow.deep.parameters())  # as it was
    assert sum(frozen_bytes(Sizes.of(run.model), stage_kind(stage)).values()) == frozen


def test_flops_of_a_trained_layer_are_those_that_torch_counts():
    """The deep block of nano, forward and backward, against torch's own counter of matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    sizes = Sizes.of(nano().model)
    body = Components(nano().model).flow.deep.body
    x, places = torch.randn(1, 192, 192, requires_grad=True), torch.zeros(1, 192, 3)
    # the counter knows nothing of the fused attention of CPUs
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        body(x, places).sum().backward()
    (work,) = (w for w in works(sizes, "t2i", CAPTIONED) if w.part == "deep")
    assert work.tokens == 192
    written_out = work.flops + 3 * 192 * 2.0 * 192 * work.attention  # written out, the masked half is there, too
    assert close(counter.get_total_flops(), written_out, 0.01)


@pytest.mark.parametrize("wrong", [{"gpus": 0}, {"gpu_memory": 0.0}, {"mfu": 1.5}, {"peak": -1.0}])
def test_hardware_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .*; expected"):
        Hardware(**wrong)


def test_shares_of_a_stages_shapes_add_up():
    assert all(sum(shape.share for shape in shapes) == 1 for shapes in SHAPES.values())
    sizes = Sizes.of(nano().model)
    assert all(sum(flops(sizes, stage).values()) > 0 for stage in SHAPES)
