"""FAE and flow end to end: no scale of the latents is rewarded, both learn, and weight 0 is stage t2i as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model_cases import LATENT, tiny_components, tiny_folder, tiny_run
from starflow2.errors import ConfigError
from starflow2.models.checkpoint import load_components
from starflow2.models.context import drawing_context
from starflow2.models.sequence import length_groups
from starflow2.training.config import OptimConfig, StageConfig
from starflow2.training.dry_run import dry_run
from starflow2.training.loop import fit
from starflow2.training.losses import ngp_loss
from starflow2.training.memory import state_bytes
from starflow2.training.planner import Hardware, plan
from starflow2.training.recipes import nano, nano_end_to_end, smoke
from starflow2.training.tasks import T2iTask
from starflow2.training.work import Sizes

STAGE = StageConfig(name="t2i", steps=1, batch=4, codec_weight=4.0)


def task_of(stage: StageConfig = STAGE) -> T2iTask:
    """In training mode, as `fit` leaves it before the first step, on woken parts."""
    task = T2iTask(tiny_components(), stage, 0)
    task.components.requires_grad_(False)
    task.trained.requires_grad_(True).train()
    return task


def flow_loss(task: T2iTask, data: Any) -> Tensor:
    """The flow's share of the loss alone, with the same noise at every call."""
    loss, metrics = task.loss(data, torch.Generator().manual_seed(1))
    cfg = task.components.cfg.fae
    codec = metrics["pixel"] + cfg.edge_weight * metrics["edge"] + cfg.feature_weight * metrics["feature"]
    return loss - task.stage.codec_weight * (codec + cfg.kl_weight * metrics["kl"])


def slope_of_scale(task: T2iTask, data: Any) -> tuple[float, float]:
    """The derivative of the flow's loss by the log of a factor on all latents before they are standardised, and the
    size of its gradient. A factor s on what the encoder gives is s on its means and 2 log s on its log-variances.
    """
    head = task.components.fae.encoder.head
    weight, bias = torch.autograd.grad(flow_loss(task, data), [head.weight, head.bias])
    means = (weight[:LATENT] * head.weight[:LATENT]).sum() + (bias[:LATENT] * head.bias[:LATENT]).sum()
    return float((means + 2 * bias[LATENT:].sum()).detach()), float(weight.norm() + bias.norm())


def spread(task: T2iTask) -> None:
    """Means far above the constant that batch norm adds to variances, log-variances far from where they are clamped."""
    head = task.components.fae.encoder.head
    with torch.no_grad():
        head.weight[:LATENT].mul_(30)
        head.weight[LATENT:] = 0
        head.bias[LATENT:] = -2


def test_no_scale_of_the_latents_makes_them_likelier():
    task = task_of()
    spread(task)
    data = task.make_batch(range(4))
    slope, size = slope_of_scale(task, data)
    assert size > 1e-3, "the flow's loss must reach the encoder, or nothing is trained end to end"
    assert abs(slope) <= 1e-3 * size
    task.components.fae.standardize.eval()  # its statistics no longer follow: a collapse becomes possible
    slope, size = slope_of_scale(task, data)
    assert abs(slope) > 0.05 * size


def test_noise_of_the_posterior_is_no_way_around_it():
    """Were the flow to see means under the statistics of samples, a wide posterior would shrink what it sees."""
    task = task_of()
    spread(task)
    data = task.make_batch(range(4))
    spreads = []
    for log_var in (-8.0, 4.0):
        with torch.no_grad():
            task.components.fae.encoder.head.bias[LATENT:] = log_var
            latents, _, _ = task._encode(data[0], torch.Generator().manual_seed(0))
        spreads.append(latents.flatten(0, 1).std(0, correction=0))
    assert all((std - 1).abs().max() < 1e-2 for std in spreads)


def test_both_learn_on_a_repeated_batch_and_nothing_else_moves():
    task = task_of()
    before = {k: v.clone() for k, v in task.components.state_dict().items()}
    data = task.make_batch(range(4))
    optimizer = torch.optim.Adam(task.trained.parameters(), lr=2e-3)
    flow, codec = [], []
    for _ in range(12):
        loss, _ = task.loss(data, torch.Generator().manual_seed(1))
        with torch.no_grad():
            flow.append(float(flow_loss(task, data)))
        codec.append((float(loss.detach()) - flow[-1]) / task.stage.codec_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert flow[-1] < flow[0] - 0.01 and codec[-1] < 0.9 * codec[0]
    moved = {k.split(".")[0] for k, v in task.components.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"fae", "flow"}


def test_without_a_weight_the_stage_is_what_it_was_bit_for_bit():
    task = task_of(replace(STAGE, codec_weight=0.0))
    assert set(task.trained) == {"flow"} and not task.components.fae.training
    images, rows = task.make_batch(range(4))
    loss, metrics = task.loss((images, rows), torch.Generator().manual_seed(1))
    assert set(metrics) == {"nats_per_dim"}
    generator, expected = torch.Generator().manual_seed(1), torch.zeros(())
    with torch.no_grad():
        latents = task.components.codec.encode(images)
    for group in length_groups([len(r) for r in rows], 64):
        context = drawing_context(task.components, [rows[i] for i in group])
        expected = expected + len(group) / 4 * ngp_loss(task.components.flow, latents[group], context, generator)[0]
    assert torch.equal(loss, expected)


def test_a_run_trains_both_and_repeats_itself_when_it_is_resumed(tmp_path):
    run, found = tiny_run(steps=2, save_every=1), []
    optim = OptimConfig(warmup_steps=1, decay_share=0.0)  # a rate that does not depend on the number of steps
    stages = tuple(replace(s, codec_weight=4.0, batch=2, optim=optim) if s.name == "t2i" else s for s in run.stages)
    run = replace(run, stages=stages)
    for name in ("whole", "stopped"):
        folder = tiny_folder(tmp_path / name)
        if name == "stopped":
            first = tuple(replace(s, steps=1) for s in stages)
            fit(replace(run, stages=first), "t2i", folder)
        found.append(load_components(fit(run, "t2i", folder)))
    whole, stopped = (components.state_dict() for components in found)
    assert all(torch.equal(whole[k], stopped[k]) for k in whole)
    start = tiny_components(("features", "fae", "vlm"))
    for name in ("encoder.head.weight", "pixel_decoder.out.weight", "standardize.running_var"):
        assert not torch.equal(found[0].fae.state_dict()[name], start.fae.state_dict()[name])
    assert torch.equal(found[0].features.state_dict().popitem()[1], start.features.state_dict().popitem()[1])


@pytest.mark.parametrize(("name", "weight"), [("joint", 1.0), ("fae", 1.0), ("t2i", -1.0)])
def test_a_weight_where_nothing_would_use_it_is_refused(name, weight):
    with pytest.raises(ConfigError, match=f"codec_weight is {weight}( in stage {name}|; expected at least 0)"):
        StageConfig(name=name, steps=1, batch=1, codec_weight=weight)


def test_the_recipe_is_nano_but_for_the_weight_and_takes_a_step_in_miniature():
    run = smoke(nano_end_to_end())
    assert run.model == nano().model
    plain = tuple(replace(s, codec_weight=0.0) for s in nano_end_to_end().stages)
    assert plain == nano().stages and run.stage("t2i").codec_weight > 0
    facts = dry_run(run, "t2i", "cpu")
    assert torch.tensor([facts["loss"], facts["grad_norm"]]).isfinite().all()
    assert facts["parameters"]["trained"] > dry_run(smoke(nano()), "t2i")["parameters"]["trained"]


def test_the_plan_counts_what_trains():
    run = nano_end_to_end()
    components = Sizes.of(run.model).components
    both = sum(p.numel() for module in (components.fae, components.flow) for p in module.parameters())
    assert state_bytes(Sizes.of(run.model), run.stage("t2i"))["parameters"] == 4 * both
    rows = {r["stage"]: r["tflops_by_part"] for r in plan(run, Hardware(gpus=1))["stages"]}
    assert rows["t2i"]["fae"] == rows["fae"]["fae"]
