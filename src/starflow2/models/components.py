"""The parts of a model side by side: features, language model, codec, flow, joints, tokenizer. No files here.

What each part is lives in its own module; this one only knows which belong together.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from starflow2.flow import Flow
from starflow2.models.config import (
    FaeConfig,
    ModelConfig,
)
from starflow2.models.fae import Fae, FaeCodec
from starflow2.models.patches import PatchCodec
from starflow2.models.pretzel import Joints, Pretzel
from starflow2.models.protocols import Codec, FeatureExtractor
from starflow2.models.qwen import QwenStream
from starflow2.models.sequence import Layout
from starflow2.models.tokenizer import ChatTokenizer
from starflow2.models.vision import features_of

__all__ = [
    "Components",
    "build",
]


class Components(nn.Module):
    """The modules of a model and its tokenizer; which of them are trained is `stages`."""

    def __init__(self, cfg: ModelConfig, tokenizer: ChatTokenizer | None = None) -> None:
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        self.vocabulary: frozenset[str] = frozenset()
        self.finished_stages: tuple[str, ...] = ()
        self.fingerprints: dict[str, str] = {}  # of the parts that are only referred to, once they are loaded
        if cfg.features is not None:
            self.features = features_of(cfg.features)
        self.vlm = QwenStream(cfg.vlm)
        if isinstance(cfg.fae, FaeConfig):
            self.fae = Fae(cfg.fae)
        else:
            self.patches = PatchCodec(cfg.fae)
        self.flow = Flow(cfg.flow)
        deep = cfg.flow.deep
        self.joints = Joints(cfg.joints, deep.dim, cfg.vlm.width, deep.stack.width)

    @property
    def pretzel(self) -> Pretzel:
        """Both streams joined, over these weights."""
        return Pretzel(self.vlm, self.flow, self.joints)

    @property
    def joined(self) -> nn.ModuleDict:
        """What stage 3 trains: everything but the language model and the codec."""
        return nn.ModuleDict({"flow": self.flow, "joints": self.joints})

    @property
    def joined_above(self) -> nn.ModuleDict:
        """The same without the shallow blocks, under the same names."""
        return nn.ModuleDict({"flow": nn.ModuleDict({"deep": self.flow.deep}), "joints": self.joints})

    @property
    def layout(self) -> Layout:
        """How documents of this model spell a picture."""
        ids = self.cfg.vlm.special
        return Layout(self.cfg.flow.deep.grid, ids.vision_start, ids.vision_end, ids.image_pad, ids.pad)

    @property
    def tower_layout(self) -> Layout:
        """The same for documents whose pictures the language model's own vision tower sees."""
        return replace(self.layout, grid=self.cfg.vlm.image_grid)

    @property
    def codec(self) -> Codec:
        """Pictures to latents and back, without gradients to an FAE."""
        return FaeCodec(self.fae, self.features) if self.has_fae else self.patches

    @property
    def has_fae(self) -> bool:
        """Whether there are `fae` and `features`; else there are `patches`."""
        return isinstance(self.cfg.fae, FaeConfig)

    @property
    def encoder(self) -> nn.Module:
        """The module that runs once whenever pictures are encoded."""
        return self.fae.encoder if self.has_fae else self.patches

    @property
    def extractor(self) -> FeatureExtractor | None:
        return self.features if self.has_fae else None

    @property
    def device(self) -> torch.device:
        return self.flow.deep.head.weight.device


def build(cfg: ModelConfig, device: str | torch.device = "cpu") -> Components:
    """Components with fresh weights (or none, on the meta device)."""
    with torch.device(device):
        return Components(cfg)
