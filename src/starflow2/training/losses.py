"""Losses: next-Gaussian prediction (flow NLL), next-token prediction, masked images, and the decoders' extra losses.

Letters: B batch, T positions, M labels, N latents, D latent dim, P images, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.flow import Context, Flow
from starflow2.flow.affine import standard_normal_log_prob
from starflow2.flow.noise import NoiseConfig, add_noise
from starflow2.models.joint_stream import JointStream, Output, read_documents
from starflow2.models.sequence import IGNORE, Batch
from starflow2.models.token_loss import Head, token_nats
from starflow2.nn import at_least_fp32
from starflow2.training.config import TextMean

__all__ = [
    "FeatureDiscriminator",
    "JointTerms",
    "Watch",
    "adversarial_losses",
    "after_images",
    "count_texts",
    "joint_loss",
    "last_edits",
    "latent_penalty",
    "lone_drawings",
    "masked_image_loss",
    "mean_nats",
    "ngp_loss",
    "ntp_loss",
    "perceptual_loss",
]

Watch = Callable[[Tensor], None]  # is given the values that a loss is the mean of


def ngp_loss(
    flow: Flow, latents: Tensor, context: Context, generator: torch.Generator, watch: Watch | None = None
) -> tuple[Tensor, Tensor]:
    """Next-Gaussian prediction: the flow's exact NLL under multi-noise (paper eq. 3.4).

    latents: (B, N, D) clean. Returns the weighted loss, nats per dim without the constant, and the
    plain mean of nats per dim with it, whose floor on held-out data is 1.419 + E[ln level]. watch: is given what the
    loss is the mean of, (B,).
    """
    noise = cast(NoiseConfig, flow.cfg.noise)
    level = noise.sample_levels(len(latents), generator).to(latents.device)
    noisy = add_noise(latents, level, generator)
    u, shallow_logdet = flow.shallow(noisy, level)
    z, deep_logdet = flow.deep(u, context, level)
    nats = -(standard_normal_log_prob(z) + (shallow_logdet + deep_logdet)) / math.prod(z.shape[1:])  # (B,)
    weight = noise.loss_weight(level)
    weighted = weight * (nats - 0.5 * math.log(2 * math.pi))
    if watch is not None:
        watch(weighted.detach())
    return weighted.mean() + latent_penalty(flow, u), nats.detach().mean()


def latent_penalty(flow: Flow, u: Tensor) -> Tensor:
    """Penalty on the mean square of intermediate latents u (P, N, D), a scalar; 0 if the flow's config has none."""
    weight = flow.cfg.latent_penalty
    return weight * at_least_fp32(u).square().mean() if weight and len(u) else u.new_zeros(())


def ntp_loss(head: Head, states: tuple[Tensor, ...], labels: Tensor, mean: TextMean = "reply") -> Tensor:
    """Next-token loss in nats: a mean over tokens, or over replies of each reply's mean over its tokens.

    head, states: as in `token_nats`, of the M positions with a label; labels: (B, T), IGNORE where there is none. The
    paper's eq. 3.6 sums over tokens; a mean over all tokens lets long lists drown one-word answers, so nano counts
    replies (docs/choices.md#reply-weights). 0 if there is no label.
    """
    return mean_nats(token_nats(head, states, labels[labels != IGNORE]), labels, mean)


def mean_nats(nats: Tensor, labels: Tensor, mean: TextMean = "reply") -> Tensor:
    """The mean of `ntp_loss`, of the nats (M,) of all labels (B, T) that are not IGNORE."""
    has_label = labels != IGNORE
    if not len(nats):
        return nats.sum()
    if mean == "token":
        return nats.mean()
    starts = _reply_starts(labels)
    reply = starts.flatten().cumsum(0).view_as(labels)[has_label] - 1  # (M,) number of the reply of each label
    count = torch.bincount(reply)
    return (nats / count[reply]).sum() / len(count)


def count_texts(labels: Tensor, mean: TextMean = "reply") -> int:
    """The number of replies or tokens that `ntp_loss` is the mean of; labels: (B, T)."""
    return int(((labels != IGNORE) if mean == "token" else _reply_starts(labels)).sum())


def _reply_starts(labels: Tensor) -> Tensor:
    """(B, T) bool, the first label of every reply."""
    has_label = labels != IGNORE
    return has_label & ~F.pad(has_label[:, :-1], (1, 0))


@dataclass(frozen=True, slots=True)
class JointTerms:
    """Both losses of eq. 3.7: the flow's, in weighted nats per dim without the constant, and the next-token loss.

    blind: the part of the first that comes from images whose own latents are hidden while they are predicted. out: the
    predictions for every image of the batch. image_nats: (P,) nats of every image, weighted as in the flow's loss, of
    which targets count; token_nats: (M,) nats of the labels that count, documents: (M,) theirs. Both without gradient.
    """

    flow: Tensor
    text: Tensor
    blind: Tensor
    out: Output
    image_nats: Tensor
    token_nats: Tensor
    documents: Tensor


def last_edits(batch: Batch) -> Tensor:
    """Targets that follow another image of their document and are its last: (P,) bool."""
    return _last_targets(batch) & (batch.pictures.previous >= 0)


def lone_drawings(batch: Batch) -> Tensor:
    """Targets that are the only image of their document: (P,) bool."""
    return _last_targets(batch) & (batch.pictures.previous < 0)


def _last_targets(batch: Batch) -> Tensor:
    previous = batch.pictures.previous
    is_last = torch.ones_like(batch.pictures.is_target)
    is_last[previous[previous >= 0]] = False
    return is_last & batch.pictures.is_target


def joint_loss(
    pretzel: JointStream,
    batch: Batch,
    pictures: tuple[Tensor, Tensor],
    noise: NoiseConfig,
    blind: Tensor | None = None,
    text_mean: TextMean = "reply",
) -> JointTerms:
    """All losses of packed documents; a term without anything to predict is 0.

    pictures: noisy latents (P, N, D) and their levels (P,). Only images that are targets count in the flow's loss.
    text_mean: as in `ntp_loss`.
    blind: (P,) bool, targets that are predicted without sight of their own latents (our choice:
    docs/choices.md#what-an-edit-changes). Their loss is no exact likelihood, so it is a term of its own, and labels
    after them do not count.
    """
    noisy, level = pictures
    out = read_documents(pretzel, batch, noisy, level, blind)
    exact, weight = batch.pictures.is_target, noise.loss_weight(level)
    targets = max(1, int(exact.sum()))
    if blind is not None:
        exact = exact & ~blind
    nats = -out.log_prob / math.prod(noisy.shape[1:]) - 0.5 * math.log(2 * math.pi)
    flow = (weight * nats)[exact].sum() / targets if bool(exact.any()) else out.log_prob.sum() * 0
    text, token_nats, documents = _text_loss(pretzel, batch, out, blind, text_mean)
    hidden = nats.new_zeros(()) if blind is None else (weight * _gaussian_nats(out))[blind].sum() / targets
    flow = flow + latent_penalty(pretzel.flow, out.u)
    return JointTerms(flow, text, hidden, out, (weight * nats).detach(), token_nats.detach(), documents)


def _text_loss(
    pretzel: JointStream, batch: Batch, out: Output, blind: Tensor | None, mean: TextMean
) -> tuple[Tensor, Tensor, Tensor]:
    """The next-token loss, the nats of the tokens that count (M,) and their documents (M,).

    Replies after a hidden image could only be guessed and add nothing to the mean.
    """
    labels = batch.labels if blind is None else batch.labels.masked_fill(after_images(batch, blind), IGNORE)
    counted = (labels != IGNORE)[batch.labels != IGNORE]  # (M,)
    nats = token_nats(pretzel.logits, (out.h[counted], out.g[counted]), labels[labels != IGNORE])
    share = count_texts(labels, mean) / max(1, count_texts(batch.labels, mean))
    return mean_nats(nats, labels, mean) * share, nats, out.documents[counted]


def after_images(batch: Batch, chosen: Tensor) -> Tensor:
    """(B, T) bool, the positions after the begin slot of a chosen image in its document; chosen: (P,) bool."""
    row, begin = batch.pictures.row[chosen], batch.pictures.begin[chosen]
    is_same = batch.document[row] == batch.document[row, begin][:, None]
    is_after = is_same & (torch.arange(batch.ids.shape[1], device=row.device) > begin[:, None])
    return torch.zeros_like(batch.ids).index_add_(0, row, is_after.long()).bool()


def _gaussian_nats(out: Output) -> Tensor:
    """Nats per dim of the deep flow's Gaussians alone, without the constant: (P,).

    u has no gradient where it is the target, or the shallow flow would shrink it: its log-determinant counts once.
    """
    nats = -out.affine.log_prob(out.u.detach()).sum(-1) / math.prod(out.u.shape[1:])
    return nats - 0.5 * math.log(2 * math.pi)


def masked_image_loss(feats: Tensor, head: nn.Module, images: Tensor, patch: int) -> Tensor:
    """MSE of pixels that a linear head predicts from features of a partly hidden image.

    feats: (B, N, F); images: (B, 3, h, w). Hidden and visible patches count alike: the features must both predict
    hidden patches and keep visible ones.
    """
    target = F.unfold(images, patch, stride=patch).transpose(1, 2)  # (B, N, 3 * patch^2)
    return F.mse_loss(at_least_fp32(head(feats)), target)


# -- pixel decoders ---------------------------------------------------------------------------------------


class FeatureDiscriminator(nn.Module):
    """Tells decoded images from true ones, patch by patch, by frozen features (as in StyleGAN-T's DINO heads)."""

    def __init__(self, feature_dim: int, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(feature_dim, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def forward(self, feats: Tensor) -> Tensor:
        """(B, N, F) -> (B, N), above 0 for true images."""
        return self.mlp(self.norm(at_least_fp32(feats))).squeeze(-1)


def perceptual_loss(decoded: Tensor, true: Tensor) -> Tensor:
    """Distance of images in a frozen extractor's features (B, N, F), each normalised over F; 0 where they agree."""
    width = decoded.shape[-1:]
    return F.mse_loss(F.layer_norm(at_least_fp32(decoded), width), F.layer_norm(at_least_fp32(true), width))


def adversarial_losses(discriminator: FeatureDiscriminator, decoded: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Hinge losses of the decoder, whose images should pass for true ones, and of the discriminator.

    decoded, true: features (B, N, F). The first has no gradient to the discriminator, the second none to the decoder,
    so that one step on their sum moves both, each its own way.
    """
    frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
    decoder_loss = -torch.func.functional_call(discriminator, frozen, (decoded,)).mean()
    on_true = F.relu(1 - discriminator(true.detach())).mean()
    on_decoded = F.relu(1 + discriminator(decoded.detach())).mean()
    return decoder_loss, on_true + on_decoded
