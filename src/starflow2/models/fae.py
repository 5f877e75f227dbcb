"""Feature auto-encoder: frozen vision features <-> a few standardised latents -> pixels (FAE paper).

The encoder is a single attention layer; the feature decoder reconstructs the features from latents and
the pixel decoder renders them. Both decoders are trained on noisy latents, so that images sampled at a
noise level need no clean-up. Not here: the feature extractor itself (`vision`).
Letters: B batch, N latents, D latent dim, F feature dim, C width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from starflow2.models.config import FaeConfig
from starflow2.models.protocols import FeatureExtractor
from starflow2.nn import CausalStack, StackConfig, at_least_fp32, attention, check

__all__ = ["Fae", "FaeCodec", "FaeLosses"]


@dataclass(frozen=True, slots=True)
class FaeLosses:
    """Training losses of a batch, scalars, and the images and latents that they belong to.

    feature: MSE, kl: nats per channel, pixel: L1, edge: pyramid L1, total: their weighted sum.
    """

    total: Tensor
    feature: Tensor
    kl: Tensor
    pixel: Tensor
    edge: Tensor
    drawn: Tensor  # (B, 3, height, width), not clamped
    latents: Tensor  # (B, N, D) standardised sample of the posterior, without the noise that the decoders get


class Encoder(nn.Module):
    """One attention layer with a linear skip, then mean and log-variance (FAE: single attention)."""

    def __init__(self, cfg: FaeConfig) -> None:
        super().__init__()
        self.heads = cfg.encoder_heads
        self.qkvs = nn.Linear(cfg.feature_dim, 4 * cfg.encoder_width)
        self.head = nn.Linear(cfg.encoder_width, 2 * cfg.latent_dim)

    def forward(self, feats: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, F) -> mean, log-variance, 2 x (B, N, D)."""
        q, k, v, skip = self.qkvs(feats).chunk(4, dim=-1)
        q, k, v = (rearrange(t, "b n (h k) -> b h n k", h=self.heads) for t in (q, k, v))
        h = skip + rearrange(attention(q, k, v, None), "b h n k -> b n (h k)")
        mean, log_var = at_least_fp32(self.head(F.silu(h))).chunk(2, dim=-1)
        return mean, log_var.clamp(-12.0, 4.0)


class _Decoder(nn.Module):
    """Non-causal transformer with learned positions over latents or features: (B, N, width_in) -> (B, N, C)."""

    def __init__(self, width_in: int, stack: StackConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width_in, stack.width)
        self.position_table = nn.Parameter(nn.init.normal_(torch.empty(grid[0] * grid[1], stack.width), std=0.02))
        self.body = CausalStack(stack)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.proj_in(x) + self.position_table)


class FeatureDecoder(nn.Module):
    """Latents (B, N, D) -> features (B, N, F)."""

    def __init__(self, cfg: FaeConfig) -> None:
        super().__init__()
        self.stack = _Decoder(cfg.latent_dim, cfg.feature_decoder, cfg.grid)
        self.head = nn.Linear(cfg.feature_decoder.width, cfg.feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stack(x))


class _Upsample(nn.Module):
    """Double height and width: sub-pixel rearrangement, then a residual 3x3 convolution over the seams."""

    def __init__(self, channels_in: int, channels_out: int, *, mixes: bool) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels_in, 4 * channels_out, 1)
        self.mix = nn.Conv2d(channels_out, channels_out, 3, padding=1) if mixes else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.expand(x), 2)
        return x if self.mix is None else x + self.mix(F.relu(x))


class PixelDecoder(nn.Module):
    """Features (B, N, F) -> images (B, 3, height, width), roughly in [-1, 1]."""

    def __init__(self, cfg: FaeConfig) -> None:
        super().__init__()
        self.grid = cfg.grid
        self.stack = _Decoder(cfg.feature_dim, cfg.pixel_decoder, cfg.grid)
        widths = (cfg.pixel_decoder.width, *cfg.pixel_channels)
        last = len(cfg.pixel_channels) - 1
        self.upsample = nn.Sequential(*(_Upsample(*pair, mixes=i < last) for i, pair in enumerate(pairwise(widths))))
        self.step = cfg.pixels_per_step
        kernel = 3 if self.step == 1 else 1
        self.out = nn.Conv2d(widths[-1], 3 * self.step**2, kernel, padding=kernel // 2)

    def forward(self, feats: Tensor) -> Tensor:
        h = rearrange(self.stack(feats), "b (r c) w -> b w r c", r=self.grid[0])
        h = F.relu(self.upsample(h)) if len(self.upsample) else h
        return F.pixel_shuffle(self.out(h), self.step)


class Fae(nn.Module):
    """Encoder and decoders, with latents standardised by running statistics of training.

    The feature extractor is not part of this module; `FaeCodec` joins the two.
    """

    def __init__(self, cfg: FaeConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.dim, self.grid, self.image_size = cfg.latent_dim, cfg.grid, cfg.image_size
        self.encoder = Encoder(cfg)
        # per-channel mean and variance, running in training, stored with the weights
        self.standardize = nn.BatchNorm1d(cfg.latent_dim, affine=False, momentum=0.02)
        self.feature_decoder = FeatureDecoder(cfg)
        self.pixel_decoder = PixelDecoder(cfg)

    def encode_features(self, feats: Tensor) -> Tensor:
        """Features (B, N, F) -> standardised latents (B, N, D) float32, the posterior mean."""
        check(feats, "B N F", "feats", F=self.cfg.feature_dim)
        mean, _ = self.encoder(feats)
        stored = self.standardize  # not called: in train mode it would use, and change by, this batch
        return F.batch_norm(_rows(mean), stored.running_mean, stored.running_var, eps=stored.eps).view(mean.shape)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, N, D), clean or noisy up to noise_max -> images (B, 3, height, width)."""
        check(latents, "B N D", "latents", D=self.dim)
        return at_least_fp32(self.pixel_decoder(self.feature_decoder(latents))).clamp(-1, 1)

    def losses(self, images: Tensor, feats: Tensor, generator: torch.Generator | None = None) -> FaeLosses:
        """Training losses of one batch: images (B, 3, height, width), their features feats (B, N, F)."""
        mean, log_var = self.encoder(feats)
        draw = torch.randn(2, *mean.shape, generator=generator).to(mean.device)
        level = torch.rand(len(mean), 1, 1, generator=generator).to(mean.device)
        latents = self.standardize(_rows(mean + torch.exp(0.5 * log_var) * draw[0])).view(mean.shape)
        rebuilt = self.feature_decoder(latents + self.cfg.noise_max * level * draw[1])
        drawn = at_least_fp32(self.pixel_decoder(rebuilt))
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
        feature = F.mse_loss(at_least_fp32(rebuilt), at_least_fp32(feats))
        pixel = F.l1_loss(drawn, images)
        edge = _pyramid_l1(drawn, images)
        cfg = self.cfg
        total = pixel + cfg.edge_weight * edge + cfg.feature_weight * feature + cfg.kl_weight * kl
        return FaeLosses(total, feature, kl, pixel, edge, drawn, latents)


def _rows(x: Tensor) -> Tensor:
    """(B, N, D) -> (B * N, D), float32 or better."""
    return at_least_fp32(x).flatten(0, 1)


def _pyramid_l1(a: Tensor, b: Tensor, levels: int = 3) -> Tensor:
    """Mean L1 distance of the Laplacian bands of two image batches."""
    loss = a.new_zeros(())
    difference = a - b  # the pyramid is linear
    for _ in range(levels):
        smaller = F.avg_pool2d(difference, 2)
        band = difference - F.interpolate(smaller, scale_factor=2.0, mode="nearest")
        loss = loss + band.abs().mean()
        difference = smaller
    return loss


@dataclass(frozen=True)
class FaeCodec:
    """`Codec` over an FAE and the extractor whose features it was trained on, without gradients to either."""

    fae: Fae
    extractor: FeatureExtractor

    @property
    def dim(self) -> int:
        return self.fae.dim

    @property
    def grid(self) -> tuple[int, int]:
        return self.fae.grid

    @property
    def image_size(self) -> int:
        return self.fae.image_size

    @property
    def encoder(self) -> nn.Module:
        """Module that runs once whenever images are encoded."""
        return self.fae.encoder

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        check(images, "B C H W", "images", C=3, H=self.image_size, W=self.image_size)
        if not len(images):  # a microbatch may have no images; attention rejects an empty batch
            return images.new_zeros(0, math.prod(self.grid), self.dim)
        return self.fae.encode_features(self.extractor.features(images))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.fae.decode(latents)
