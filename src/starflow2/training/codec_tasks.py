"""The first stages of nano: features by masked images, then the feature auto-encoder on top of them."""

from __future__ import annotations

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
    masked_image_loss,
    perceptual_loss,
)
from starflow2.training.task import WHOLE_BATCH, Dataset, LossAndMetrics, LossWeights, Task

__all__ = ["FaeTask", "FeaturesTask"]


class _ImageTask(Task):
    """A task on images alone; its loss is a mean over them."""

    def default_dataset(self) -> Dataset:
        return Scenes(self.seed)

    def counts(self, data: Any) -> dict[str, int]:
        return {"images": len(data)}

    def from_documents(self, images: Tensor, batch: Batch) -> Tensor:
        if not len(images):
            raise DataError("a batch of the mixture holds no image; give this stage sources with images.")
        return images


class FeaturesTask(_ImageTask):
    """Masked-image training of the DINOv2 that nano freezes afterwards."""

    def default_trained(self) -> nn.ModuleDict:
        cfg = _features_config(self.components)
        head = nn.Linear(cfg.width, 3 * cfg.patch_size**2)
        return nn.ModuleDict({"features": self.components.features, "pixel_head": head})

    def loss(self, data: Tensor, generator: torch.Generator, weights: LossWeights = WHOLE_BATCH) -> LossAndMetrics:
        images = data.to(self.components.device)
        rows, cols = self.components.features.grid
        rate = self.stage.hidden_share * torch.rand(len(images), 1, generator=generator)
        hidden = torch.rand(len(images), rows * cols, generator=generator) < rate
        feats = self.components.features.features(images, hidden.to(images.device))
        patch = _features_config(self.components).patch_size
        loss = masked_image_loss(feats, self.trained["pixel_head"], images, patch)
        return weights.apply("images", loss), {}


class FaeTask(_ImageTask):
    """Latents and decoders on frozen features."""

    def __init__(
        self,
        components: Components,
        stage: StageConfig,
        seed: int,
        *,
        dataset: Dataset | None = None,
        trained: nn.ModuleDict | None = None,
    ) -> None:
        super().__init__(components, stage, seed, dataset=dataset, trained=trained)
        self.lpips = _lpips().to(components.device) if stage.lpips else None

    def default_trained(self) -> nn.ModuleDict:
        _check_has_fae(self.components, "codec_weight" if self.stage.codec_weight else "stage fae")
        trained = nn.ModuleDict({"fae": self.components.fae})
        if self.stage.adversarial:
            trained["judge"] = FeatureDiscriminator(self.components.features.feature_dim)
        return trained

    def loss(self, data: Tensor, generator: torch.Generator, weights: LossWeights = WHOLE_BATCH) -> LossAndMetrics:
        loss, metrics, _ = self.terms(data.to(self.components.device), generator)
        return weights.apply("images", loss), metrics

    def terms(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss, its terms by name, and the latents (B, N, D) that it was computed on, with their gradient."""
        with torch.no_grad():
            feats = self.components.features.features(images)
        losses = self.components.fae.losses(images, feats.float(), generator)
        metrics = {name: getattr(losses, name) for name in ("feature", "kl", "pixel", "edge")}
        metrics |= self._network_losses(losses.drawn, images, feats)
        weights = {name: getattr(self.stage, name) for name in ("perceptual", "lpips", "adversarial")}
        added = sum(weight * metrics[name] for name, weight in weights.items() if weight)
        return losses.total + added + metrics.get("judge", 0.0), metrics, losses.latents

    def _network_losses(self, decoded: Tensor, images: Tensor, feats: Tensor) -> dict[str, Tensor]:
        """Losses that compare images through another network, those whose weight is not 0."""
        metrics: dict[str, Tensor] = {}
        if self.lpips is not None:
            metrics["lpips"] = self.lpips(decoded, images).mean()
        if not self.stage.perceptual and not self.stage.adversarial:
            return metrics
        decoded_feats = self.components.features.features(decoded)
        if self.stage.perceptual:
            metrics["perceptual"] = perceptual_loss(decoded_feats, feats)
        if self.stage.adversarial:
            discriminator = self.trained["judge"]
            assert isinstance(discriminator, FeatureDiscriminator)
            metrics["adversarial"], metrics["judge"] = adversarial_losses(discriminator, decoded_feats, feats)
        return metrics


def _features_config(components: Components) -> DinoConfig | SiglipConfig:
    """The sizes of the feature extractor that stage features trains. Raises ConfigError for one of a user's class."""
    _check_has_fae(components, "stage features")
    features = components.cfg.features
    if not isinstance(features, DinoConfig | SiglipConfig):
        raise ConfigError(
            f"stage features trains a DINOv2, but {components.cfg.name} has an extractor of its own class, which stays "
            "as it is; leave the stage out."
        )
    return features


def _check_has_fae(components: Components, setting: str) -> None:
    """Raise ConfigError for a model of native patches."""
    if components.cfg.features is None:
        raise ConfigError(
            f"{setting} trains an FAE or its features, but {components.cfg.name} has native patches instead; "
            "leave it out, or use a recipe with a FaeConfig."
        )


def _lpips() -> nn.Module:
    """LPIPS with its published weights. Raises ConfigError where the package is missing."""
    try:
        import lpips
    except ImportError as error:
        raise ConfigError(
            "the weight lpips is not 0, but the package lpips cannot be imported; install it with the torchvision that "
            "fits your torch, or use the weight perceptual, which needs neither."
        ) from error
    return lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)
