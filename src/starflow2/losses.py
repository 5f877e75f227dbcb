"""Objectives: next-Gaussian prediction (flow NLL), next-token, and the masked-picture one of features.

Letters: B batch, T positions, N latents, D latent dim, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.flow import Context, Flow
from starflow2.flow.noise import add_noise
from starflow2.nn import at_least_fp32
from starflow2.sequence import IGNORE

__all__ = ["masked_picture_loss", "ngp_loss", "ntp_loss"]


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


def masked_picture_loss(feats: Tensor, head: nn.Linear, images: Tensor, patch: int) -> Tensor:
    """MSE of pixels that a linear head reads off features of a partly hidden picture.

    feats: (B, N, F); images: (B, 3, h, w). Hidden and visible patches count alike: the features
    must both guess what is hidden and keep what they see.
    """
    target = F.unfold(images, patch, stride=patch).transpose(1, 2)  # (B, N, 3 * patch^2)
    return F.mse_loss(at_least_fp32(head(feats)), target)
