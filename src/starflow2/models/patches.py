"""Native patches: pixels as latents, without an auto-encoder (the paper's future work).

A codec without weights: a patch of pixels is a latent, shifted and scaled by one constant per colour. Its inverse is
exact up to clipping. Not here: features and losses, which only an FAE has.
Letters: B batch, N latents, D latent dim.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from starflow2.models.config import PatchConfig
from starflow2.nn import at_least_fp32, check

__all__ = ["PatchCodec"]


class PatchCodec(nn.Module):
    """`Codec` whose latents are patches of pixels.

    >>> codec = PatchCodec(PatchConfig(image_size=4, patch_size=2, mean=(0.0, 0.0, 0.0), std=(0.5, 0.5, 0.5)))
    >>> codec.encode(torch.ones(1, 3, 4, 4)).shape, float(codec.encode(torch.ones(1, 3, 4, 4)).max())
    (torch.Size([1, 4, 12]), 2.0)
    """

    def __init__(self, cfg: PatchConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.dim, self.grid, self.image_size = cfg.latent_dim, cfg.grid, cfg.image_size
        self.extractor = None  # none: it reads pixels

    @property
    def encoder(self) -> nn.Module:
        """Module that runs once whenever images are encoded."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Encode images, as `encode` does; hooks on the module count the calls."""
        check(images, "B C H W", "images", C=3, H=self.image_size, W=self.image_size)
        side = self.cfg.patch_size
        x = rearrange(at_least_fp32(images), "b c (r p) (l q) -> b (r l) (c p q)", p=side, q=side)
        mean, std = self._statistics(x)
        return (x - mean) / std

    def encode(self, images: Tensor) -> Tensor:
        """images: (B, 3, height, width) in [-1, 1] -> latents (B, N, D), colour by colour, each row by row."""
        return self(images)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, N, D) -> images in [-1, 1]; noise on latents becomes noise on pixels."""
        check(latents, "B N D", "latents", D=self.dim)
        x = at_least_fp32(latents)
        mean, std = self._statistics(x)
        side, rows = self.cfg.patch_size, self.grid[0]
        images = rearrange(x * std + mean, "b (r l) (c p q) -> b c (r p) (l q)", r=rows, p=side, q=side)
        return images.clamp(-1, 1)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of the channels of a latent, 2 x (D,)."""
        both = torch.tensor([self.cfg.mean, self.cfg.std], dtype=like.dtype, device=like.device)
        mean, std = repeat(both, "s c -> s (c n)", n=self.cfg.patch_size**2)
        return mean, std
