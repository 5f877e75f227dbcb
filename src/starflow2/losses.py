"""Objectives: next-Gaussian prediction (flow NLL), next-token, and the masked-picture one of features.

Letters: B batch, T positions, N latents, D latent dim, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.flow import Context, Flow
from starflow2.flow.noise import NoiseConfig, add_noise
from starflow2.nn import at_least_fp32
from starflow2.pretzel import Pretzel
from starflow2.sequence import IGNORE, Batch

__all__ = ["JointTerms", "joint_loss", "masked_picture_loss", "ngp_loss", "ntp_loss"]


def ngp_loss(flow: Flow, latents: Tensor, context: Context, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Next-Gaussian prediction: the flow's exact NLL under multi-noise (paper eq. 3.4).

    latents: (B, N, D) clean. Returns the weighted loss, nats per dim without the constant, and the
    plain mean of nats per dim with it, whose floor on held-out data is 1.419 + E[ln level].
    """
    assert flow.cfg.noise is not None
    level = flow.cfg.noise.draw(len(latents), generator).to(latents.device)
    noisy = add_noise(latents, level, generator)
    nats = flow.nats_per_dim(noisy, context, level)  # (B,)
    weight = flow.cfg.noise.loss_weight(level)
    loss = (weight * (nats - 0.5 * math.log(2 * math.pi))).mean()
    return loss, nats.detach().mean()


def ntp_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token loss in nats over labels that are not IGNORE; logits (..., V)."""
    return F.cross_entropy(at_least_fp32(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORE)


@dataclass(frozen=True, slots=True)
class JointTerms:
    """Both losses of eq. 3.7: the flow's, in weighted nats per dim without the constant, and the next-token loss."""

    flow: Tensor
    text: Tensor


def joint_loss(pretzel: Pretzel, batch: Batch, pictures: tuple[Tensor, Tensor], noise: NoiseConfig) -> JointTerms:
    """Both losses of packed documents; a term without anything to predict is 0.

    pictures: noisy latents (P, N, D) and their levels (P,). Only pictures that are targets count in the flow's loss.
    """
    noisy, level = pictures
    out = pretzel.forward(batch, noisy, level)
    is_target = batch.pictures.is_target
    nats = -out.log_prob / math.prod(noisy.shape[1:]) - 0.5 * math.log(2 * math.pi)
    weighted = (noise.loss_weight(level) * nats)[is_target]
    flow = weighted.mean() if len(weighted) else out.log_prob.sum() * 0
    text = ntp_loss(out.logits, out.labels) if len(out.labels) else out.logits.sum() * 0
    return JointTerms(flow, text)


def masked_picture_loss(feats: Tensor, head: nn.Linear, images: Tensor, patch: int) -> Tensor:
    """MSE of pixels that a linear head reads off features of a partly hidden picture.

    feats: (B, N, F); images: (B, 3, h, w). Hidden and visible patches count alike: the features
    must both guess what is hidden and keep what they see.
    """
    target = F.unfold(images, patch, stride=patch).transpose(1, 2)  # (B, N, 3 * patch^2)
    return F.mse_loss(at_least_fp32(head(feats)), target)
