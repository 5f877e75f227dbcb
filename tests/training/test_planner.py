"""The plan against figures worked out by hand for the paper's size, and against real tensors at nano's."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from model_cases import tiny_tokenizer
from starflow2.errors import ConfigError
from starflow2.models.components import Components
from starflow2.training.counts import ReadCounts
from starflow2.training.memory import activation_bytes, frozen_bytes, logit_bytes, state_bytes
from starflow2.training.parallel import Distributed
from starflow2.training.planner import Hardware, plan, table
from starflow2.training.recipes import mini, nano, paper
from starflow2.training.roofline import GpuSpeed, drawing
from starflow2.training.state import TrainState
from starflow2.training.tasks import TASKS
from starflow2.training.work import CAPTIONED, INTERLEAVED, SHAPES, Sizes, flops, measured_flops, works

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


def test_hours_follow_from_flops_and_documents(sizes):
    rows = {row["stage"]: row for row in plan(paper(), H100, sizes)["stages"]}
    assert close(rows["t2i"]["gpu_hours"], 5500) and close(rows["adapter"]["gpu_hours"], 1580)
    assert close(rows["joint"]["gpu_hours"], (920 + 2650) / 2)
    assert close(rows["t2i"]["step_s"], 25)
    many = plan(paper(), replace(H100, gpus=64), sizes)["stages"][1]
    assert close(many["step_s"], 0.40) and close(many["gpu_hours"], 5500) and close(many["days"], 5500 / 64 / 24)


def test_state_of_what_trains_is_that_of_the_hand_count(sizes):
    stage = paper().stage("joint")
    found = {k: v for k, v in state_bytes(sizes, stage).items() if k != "average"}
    assert close(sum(found.values()) / 1e9, 58.6, 0.01)
    eight = replace(stage, optim=replace(stage.optim, optimizer_state_dtype="8bit"))
    assert close(state_bytes(sizes, eight)["optimizer"] / 1e9, 2 * 3.68, 0.01)


def test_frozen_parts_and_activations_are_those_of_the_hand_count(sizes):
    stage = paper().stage("joint")
    frozen = frozen_bytes(sizes, stage)
    assert close(frozen["vlm"] / 1e9, 15.2 + 1.35, 0.01) and close(frozen["features"] / 1e9, 2.3, 0.02)
    assert frozen["flow"] == frozen["joints"] == 0
    only = replace(CAPTIONED, prefix=0)
    assert close(activation_bytes(sizes, stage, only) / 1e9, 2.3, 0.05)
    layer = 384 * 2 * (4 * 3584 + 2 * 4 * 128 + 2 * 18944)  # all of one language layer
    again = replace(stage, checkpoint_activations="all")
    assert close((activation_bytes(sizes, again, only) - layer) / 1e9, 0.16, 0.1)
    some = activation_bytes(sizes, replace(stage, checkpoint_activations="trained"), only)
    assert activation_bytes(sizes, again, only) < some < activation_bytes(sizes, stage, only)
    assert logit_bytes([replace(CAPTIONED, labels=1)]) == logit_bytes(SHAPES["joint"]) <= 0.2e9, "in chunks"
    assert logit_bytes([replace(CAPTIONED, labels=0)]) == 0


@pytest.mark.parametrize("name", ["paper", "mini"])
def test_the_large_recipes_fit_their_machines_as_they_stand(sizes, name):
    if name == "paper":
        planned = plan(paper(), Hardware(gpus=8, gpu_memory=80), sizes)
    else:
        planned = plan(mini(), Hardware(gpus=1, gpu_memory=24))
    for row in planned["stages"]:
        assert row["fits"], (row["stage"], {k: round(v / 1e9, 1) for k, v in row["bytes"].items()})
        assert row["microbatches"] >= 1 and row["microbatch_documents"] >= 1


@pytest.mark.parametrize("name", ["fae", "t2i", "adapter", "joint"])
def test_the_memory_of_paper_on_eight_gpus_is_the_sum_over_a_model_on_meta(sizes, name):
    """Summed here over the parameters of the stage's own task: what trains in eighths, what is frozen whole."""
    run, components = paper(), sizes.components
    with torch.device("meta"):
        task = TASKS[name](components, run.stage(name), 0, dataset=lambda indices: None)
    trained = {id(p): p for p in task.trained.parameters()}
    state = sum(p.numel() for p in trained.values()) * (4 + 4 + 8 + 4) / 8  # weight, gradient, moments, average
    half = {id(p) for part in (components.vlm, components.features) for p in part.parameters()}  # as published
    frozen = sum(p.numel() * (2 if id(p) in half else 4) for p in components.parameters() if id(p) not in trained)
    (row,) = (r for r in plan(run, Hardware(gpus=8), sizes)["stages"] if r["stage"] == name)
    planned = row["bytes"]
    assert close(sum(planned[k] for k in ("parameters", "gradients", "optimizer", "average")), state, 0.05)
    assert close(planned["frozen"], frozen, 0.05)


def test_what_does_not_fit_says_which_flags_make_it_fit(sizes):
    run = paper()
    plain = replace(run, stages=tuple(replace(s, shard=replace(s.shard, mode="none")) for s in run.stages))
    (row,) = (r for r in plan(plain, Hardware(gpus=8), sizes)["stages"] if r["stage"] == "joint")
    assert not row["fits"] and row["total_bytes"] > 94e9, "weights, gradients, moments, average and frozen parts"
    assert row["flags"] == ["--shard.mode", "fsdp"]
    (tight,) = (r for r in plan(run, Hardware(gpus=8, gpu_memory=40), sizes)["stages"] if r["stage"] == "joint")
    assert not tight["fits"] and tight["flags"] == ["--checkpoint-activations", "all"]
    again = replace(run, stages=tuple(replace(s, checkpoint_activations="all") for s in run.stages))
    assert plan(again, Hardware(gpus=8, gpu_memory=40), sizes)["stages"][3]["fits"]
    (hopeless,) = (r for r in plan(run, Hardware(gpus=1, gpu_memory=24), sizes)["stages"] if r["stage"] == "joint")
    assert hopeless["flags"] is None
    console = Console(width=150, file=io.StringIO())
    console.print(table(plan(plain, Hardware(gpus=8), sizes)))
    assert "Stage joint does not fit" in console.file.getvalue() and "--shard.mode fsdp" in console.file.getvalue()


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
    planned = state_bytes(Sizes.of(run.model), stage)
    assert planned["parameters"] == sum(p.nbytes for p in task.trained.parameters())
    assert planned["gradients"] == sum(p.grad.nbytes for p in task.trained.parameters() if p.grad is not None)
    assert planned["optimizer"] == sum(v.nbytes for v in moments)
    assert planned["average"] == sum(v.nbytes for v in state.ema.values())
    trained = {id(p) for p in task.trained.parameters()}
    frozen = sum(p.nbytes for p in components.parameters() if id(p) not in trained)
    if stage.kl_to_t2i:
        frozen += sum(p.nbytes for p in components.flow.deep.parameters())  # as it was
    assert sum(frozen_bytes(Sizes.of(run.model), stage).values()) == frozen


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


def test_flops_of_what_was_read_are_those_of_its_documents():
    run = nano()
    components, stage = Components(run.model), run.stage("t2i")
    read = ReadCounts(documents=10, images=10, text_tokens=1280, latents=640)
    each = sum(flops(Sizes.of(run.model), "t2i").values())
    assert measured_flops(components, stage)(read) == pytest.approx(10 * each)
    assert measured_flops(components, stage)(ReadCounts()) == 0


def test_the_roofline_of_drawing_is_that_of_the_hand_count(sizes):
    """One image in bfloat16 on an H100: 256 steps that read 18.5 GB of both streams, at 3.35 TB/s."""
    gpu = GpuSpeed(bandwidth=3.35e12, peak=989e12)
    rows = {(row["precision"], row["batch"]): row for row in drawing(sizes, gpu)}
    one = rows["bfloat16", 1]
    assert close(one["seconds"]["latents"], 256 * 18.5e9 / 3.35e12, 0.02)
    assert close(one["seconds"]["shallow"], 256 * 1.81e9 / 3.35e12, 0.02)
    position = 2 * 28 * 4 * 128 + 2 * 24 * 3072  # keys and values of both streams
    assert one["cache_bytes"] == 2 * 384 * position * 2
    many = rows["bfloat16", 64]
    assert many["total_s"] < 8 * one["total_s"], "reading weights is shared"
    assert rows["float32", 1]["weight_bytes"] == 2 * one["weight_bytes"]
    assert close(rows["float32", 1]["total_s"], 2 * one["total_s"], 0.01)
