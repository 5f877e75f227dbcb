"""The first stages of nano: features by masked pictures, then the feature auto-encoder on top of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from starflow2.errors import ConfigError, DataError
from starflow2.models.components import Components
from starflow2.models.config import DinoConfig, SiglipConfig
from starflow2.models.sequence import Batch
from starflow2.training.config import StageConfig
from starflow2.training.datasets import Scenes
from starflow2.training.losses import (
    FeatureDiscriminator,
    adversarial_losses,
    masked_picture_loss,
    perceptual_loss,
)
from starflow2.training.task import WHOLE, LossAndMetrics, LossWeights

__all__ = [
    "FaeTask",
    "FeaturesTask",
]


class _Pictures:
    """A task that takes pictures alone; its loss is a mean over them."""

    def initialise(self) -> None:
        pass

    def counts(self, data: Any) -> dict[str, int]:
        return {"pictures": len(data)}

    def from_documents(self, images: Tensor, batch: Batch) -> Tensor:
        if not len(images):
            raise DataError("a batch of the mixture holds no picture; give this stage sources with pictures.")
        return images


class FeaturesTask(_Pictures):
    """Masked-picture training of the DINOv2 that nano freezes afterwards."""

    def __init__(self, components: Components, stage: StageConfig, seed: int) -> None:
        self.components, self.stage = components, stage
        self.make_batch: Callable[[range], Any] = Scenes(seed)
        cfg = _features_of(components, "stage features")
        self.patch = cfg.patch_size
        self.head = nn.Linear(cfg.width, 3 * cfg.patch_size**2)
        self.trained = nn.ModuleDict({"features": components.features, "pixel_head": self.head})

    def loss(self, images: Tensor, generator: torch.Generator, share: LossWeights = WHOLE) -> LossAndMetrics:
        images = images.to(self.components.device)
        rows, cols = self.components.features.grid
        rate = self.stage.hidden_share * torch.rand(len(images), 1, generator=generator)
        hidden = torch.rand(len(images), rows * cols, generator=generator) < rate
        feats = self.components.features.features(images, hidden.to(images.device))
        loss = masked_picture_loss(feats, self.head, images, self.patch)
        return share.of("pictures", loss), {}


class FaeTask(_Pictures):
    """Latents and decoders on frozen features."""

    def __init__(self, components: Components, stage: StageConfig, seed: int) -> None:
        self.components, self.stage = components, stage
        self.make_batch: Callable[[range], Any] = Scenes(seed)
        _features_of(components, "codec_weight" if stage.codec_weight else "stage fae")
        self.trained = nn.ModuleDict({"fae": components.fae})
        if stage.adversarial:
            self.trained["judge"] = FeatureDiscriminator(components.features.feature_dim)
        self.lpips = _lpips().to(components.device) if stage.lpips else None

    def loss(self, images: Tensor, generator: torch.Generator, share: LossWeights = WHOLE) -> LossAndMetrics:
        loss, extra, _ = self.terms(images.to(self.components.device), generator)
        return share.of("pictures", loss), extra

    def terms(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss, what it is made of, and the latents (B, N, D) it was taken at, with their gradient."""
        with torch.no_grad():
            feats = self.components.features.features(images)
        losses = self.components.fae.losses(images, feats.float(), generator)
        extra = {name: getattr(losses, name) for name in ("feature", "kl", "pixel", "edge")}
        extra |= self._seen(losses.drawn, images, feats)
        weights = {name: getattr(self.stage, name) for name in ("perceptual", "lpips", "adversarial")}
        added = sum(weight * extra[name] for name, weight in weights.items() if weight)
        return losses.total + added + extra.get("judge", 0.0), extra, losses.latents

    def _seen(self, drawn: Tensor, images: Tensor, feats: Tensor) -> dict[str, Tensor]:
        """The losses that look at pictures through another network, those that have a weight."""
        extra: dict[str, Tensor] = {}
        if self.lpips is not None:
            extra["lpips"] = self.lpips(drawn, images).mean()
        if not self.stage.perceptual and not self.stage.adversarial:
            return extra
        given = self.components.features.features(drawn)
        if self.stage.perceptual:
            extra["perceptual"] = perceptual_loss(given, feats)
        if self.stage.adversarial:
            judge = self.trained["judge"]
            assert isinstance(judge, FeatureDiscriminator)
            extra["adversarial"], extra["judge"] = adversarial_losses(judge, given, feats)
        return extra


def _features_of(components: Components, what: str) -> DinoConfig | SiglipConfig:
    """The sizes of what an FAE reads. Raises ConfigError for a model of native patches, which has neither."""
    if components.cfg.features is None:
        raise ConfigError(
            f"{what} trains an FAE or what it reads, and {components.cfg.name} has native patches in its place; "
            "leave it out, or use a recipe with a FaeConfig."
        )
    return components.cfg.features


def _lpips() -> nn.Module:
    """LPIPS with its published weights. Raises ConfigError where the package is missing."""
    try:
        import lpips
    except ImportError as error:
        raise ConfigError(
            "lpips is not 0, but that package cannot be imported; install it with the torchvision that fits torch, "
            "or use perceptual, which needs neither."
        ) from error
    net: nn.Module = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)
    return net
