"""Frozen feature extractors, which the FAE reads: patch features of DINOv2, or of transformers' SigLIP.

Letters: B batch, N patches, F feature dim.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from starflow2.core.json_reader import JsonObject
from starflow2.errors import ConfigError
from starflow2.models.config import DinoConfig, PixelConfig, SiglipConfig
from starflow2.models.dino_layers import EPS, MLP_RATIO, DinoModel
from starflow2.models.huggingface import FUSED, Backbone
from starflow2.models.own_backbone import OwnBackbone
from starflow2.nn import at_least_fp32, check

__all__ = [
    "DinoFeatures",
    "SiglipFeatures",
    "features_of",
    "normalised",
    "to_tower",
]


def to_tower(images: Tensor, size: int, cfg: PixelConfig | None) -> Tensor:
    """Resize and normalise images (B, 3, s, s) in [-1, 1] for a tower: (B, 3, size, size). Unchanged if cfg is None."""
    given = size if cfg is None else cfg.picture_size
    check(images, "B C H W", "images", C=3, H=given, W=given)
    if cfg is None:
        return images
    if given != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    return normalised(images, cfg)


def normalised(images: Tensor, cfg: PixelConfig | None) -> Tensor:
    """Images (B, 3, h, w) in [-1, 1] with the colours that a tower expects. Unchanged if cfg is None."""
    if cfg is None:
        return images
    mean, std = (images.new_tensor(values)[:, None, None] for values in (cfg.mean, cfg.std))
    return ((images + 1) / 2 - mean) / std


class DinoFeatures(OwnBackbone):
    """Patch features of a DINOv2, without its class token; reads images in [-1, 1]."""

    kinds = ("dinov2",)
    hint = ": a model with register tokens is not supported, use the one without them"
    unseen = ("num_attention_heads", "layer_norm_eps", "hidden_act", "patch_size")

    def __init__(self, cfg: DinoConfig) -> None:
        super().__init__()
        self.cfg = cfg
        side = cfg.image_size // cfg.patch_size
        self.grid, self.feature_dim = (side, side), cfg.width
        self.model = DinoModel(cfg)

    def settings(self) -> JsonObject:
        cfg = self.cfg
        return {
            "architectures": ["Dinov2Model"],
            "model_type": "dinov2",
            "image_size": cfg.table_size or cfg.image_size,
            "patch_size": cfg.patch_size,
            "hidden_size": cfg.width,
            "num_hidden_layers": cfg.depth,
            "num_attention_heads": cfg.heads,
            "mlp_ratio": MLP_RATIO,
            "hidden_act": "gelu",
            "layer_norm_eps": EPS,
            "use_swiglu_ffn": cfg.swiglu,
        }

    def config_class(self) -> Any:
        from transformers import Dinov2Config  # imported here: only for folders that others have written

        return Dinov2Config

    def features(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """images: (B, 3, height, width) -> (B, N, F). masked: (B, N) bool, patches to replace by the mask token."""
        pixels = to_tower(images, self.cfg.image_size, self.cfg.pixels)
        return at_least_fp32(self.model(pixels.to(self.dtype), masked)[:, 1:])


class SiglipFeatures(Backbone):
    """Patch features of a SigLIP after its last norm; reads images in [-1, 1]. Its pooling head is unused."""

    kinds = ("siglip", "siglip_vision_model")
    other_towers = ("text_model.", "logit_scale", "logit_bias")  # a folder may hold the text tower too
    unseen = ("num_attention_heads", "layer_norm_eps", "hidden_act", "patch_size")

    def __init__(self, cfg: SiglipConfig) -> None:
        super().__init__()
        self.cfg = cfg
        from transformers import SiglipVisionConfig, SiglipVisionModel  # imported here: most models do not need it

        side = cfg.image_size // cfg.patch_size
        self.grid, self.feature_dim = (side, side), cfg.width
        self.model = SiglipVisionModel(
            SiglipVisionConfig(
                image_size=cfg.image_size,
                patch_size=cfg.patch_size,
                hidden_size=cfg.width,
                num_hidden_layers=cfg.depth,
                num_attention_heads=cfg.heads,
                intermediate_size=cfg.mlp_width,
                **FUSED,
            )
        )

    def features(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """images: (B, 3, height, width) -> (B, N, F). Raises ConfigError for `masked`: SigLIP has no mask token."""
        if masked is not None:
            raise ConfigError("masked is given, but SigLIP knows no hidden patches; train stage features on a DINOv2.")
        pixels = to_tower(images, self.cfg.image_size, self.cfg.pixels)
        return at_least_fp32(self.model(pixel_values=pixels.to(self.dtype)).last_hidden_state)


def features_of(cfg: DinoConfig | SiglipConfig) -> DinoFeatures | SiglipFeatures:
    """A new extractor of the kind and sizes of `cfg`."""
    return DinoFeatures(cfg) if isinstance(cfg, DinoConfig) else SiglipFeatures(cfg)
