"""Objectives against a second way of computing each."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal

from helpers import wake
from model_cases import WIDTH, tiny_model
from starflow2.flow import Context, Flow
from starflow2.losses import masked_picture_loss, ngp_loss, ntp_loss
from starflow2.sequence import IGNORE

HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


def a_flow(weight: str = "level") -> Flow:
    cfg = tiny_model().flow
    return Flow(replace(cfg, noise=replace(cfg.noise, weight=weight)))


def some_latents(rows: int = 5) -> tuple[torch.Tensor, Context]:
    return torch.randn(rows, 64, 4), Context(torch.randn(rows, 3, WIDTH))


@pytest.mark.parametrize("weight", ["level", "one"])
def test_ngp_loss_is_the_weighted_mean_of_the_rows_without_the_constant_and_nats_keep_it(weight):
    flow = wake(a_flow(weight))
    latents, context = some_latents()
    loss, nats = ngp_loss(flow, latents, context, torch.Generator().manual_seed(5))
    again = torch.Generator().manual_seed(5)
    levels = flow.cfg.noise.draw(5, again)
    noisy = latents + levels[:, None, None] * torch.randn(latents.shape, generator=again)
    rows = -flow.log_prob(noisy, context, levels) / (64 * 4)
    weights = levels if weight == "level" else torch.ones(5)
    assert loss.item() == pytest.approx((weights * (rows - HALF_LOG_TAU)).mean().item(), abs=1e-6)
    assert nats.item() == pytest.approx(rows.mean().item(), abs=1e-6)


def test_an_untrained_flow_is_a_standard_normal_and_its_ngp_loss_says_so():
    latents, context = some_latents()
    _, nats = ngp_loss(a_flow(), latents, context, torch.Generator().manual_seed(5))
    again = torch.Generator().manual_seed(5)
    levels = a_flow().cfg.noise.draw(5, again)
    noisy = latents + levels[:, None, None] * torch.randn(latents.shape, generator=again)
    assert nats.item() == pytest.approx(-Normal(0, 1).log_prob(noisy).mean().item(), abs=1e-5)


def test_ngp_loss_is_a_function_of_its_generator_alone():
    flow = wake(a_flow())
    latents, context = some_latents()
    draws = []
    for seed in (1, 1, 2):
        torch.randn(3)  # the global generator moves on and must not matter
        draws.append(ngp_loss(flow, latents, context, torch.Generator().manual_seed(seed))[0].item())
    assert draws[0] == draws[1] != draws[2]


def test_ntp_loss_is_the_mean_surprise_at_labelled_positions_in_float32():
    logits = torch.randn(2, 6, 11)
    labels = torch.randint(0, 11, (2, 6))
    labels[0, :4] = IGNORE
    picked = [-logits[b, t].log_softmax(-1)[labels[b, t]] for b in range(2) for t in range(6) if labels[b, t] != IGNORE]
    assert ntp_loss(logits, labels).item() == pytest.approx(torch.stack(picked).mean().item(), abs=1e-6)
    half = ntp_loss(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(ntp_loss(logits.bfloat16().float(), labels).item(), abs=1e-6)


def test_masked_picture_loss_reads_the_patches_row_by_row_channel_first():
    images = torch.randn(2, 3, 8, 12)
    patches = [images[:, :, r : r + 4, c : c + 4].flatten(1) for r in (0, 4) for c in (0, 4, 8)]
    feats = torch.stack(patches, dim=1)  # (B, N, 3 * 4 * 4)
    head = torch.nn.Linear(48, 48)
    torch.nn.init.eye_(head.weight)
    torch.nn.init.zeros_(head.bias)
    assert masked_picture_loss(feats, head, images, 4).item() == 0
    assert masked_picture_loss(feats + 0.5, head, images, 4).item() == pytest.approx(0.25)
