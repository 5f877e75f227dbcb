"""A codec or a feature extractor of your own, named by its class in a model's config: frozen, and saved with the model.

Images go to latents and back in any way; the flow models the latents. Not here: the codecs and extractors of this
package (`fae`, `patches`, `vision`), and language models of your own (`huggingface`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from starflow2.core.imports import find_object, foreign_code
from starflow2.errors import ConfigError
from starflow2.models.config import CodecConfig, ExtractorConfig
from starflow2.models.protocols import Codec, FeatureExtractor

__all__ = ["build_codec", "build_extractor"]


def build_codec(cfg: CodecConfig) -> nn.Module:
    """A new codec of the class and the settings that `cfg` names, also of a module in the current folder.

    Raises ConfigError for anything but an nn.Module, so that the config of a model folder cannot call other code, and
    for one that is no codec or has other sizes.
    """
    codec = _built("fae.codec", cfg.codec, "fae.settings", cfg.settings)
    if not isinstance(codec, Codec):
        raise ConfigError(f"{cfg.codec} lacks members of starflow2.models.protocols.Codec; expected all of them.")
    sizes, wanted = (codec.dim, tuple(codec.grid), codec.image_size), (cfg.latent_dim, cfg.grid, cfg.image_size)
    if sizes != wanted:
        raise ConfigError(
            f"{cfg.codec} has (channels, grid, image_size) {sizes}, its config {wanted}; expected the same."
        )
    return codec


def build_extractor(cfg: ExtractorConfig) -> nn.Module:
    """A new feature extractor of the class and the settings that `cfg` names; raises ConfigError as `build_codec`."""
    extractor = _built("features.extractor", cfg.extractor, "features.settings", cfg.settings)
    if not isinstance(extractor, FeatureExtractor):
        raise ConfigError(
            f"{cfg.extractor} lacks members of starflow2.models.protocols.FeatureExtractor; expected all of them."
        )
    sizes, wanted = (extractor.feature_dim, tuple(extractor.grid)), (cfg.feature_dim, cfg.grid)
    if sizes != wanted:
        raise ConfigError(f"{cfg.extractor} has (feature_dim, grid) {sizes}, its config {wanted}; expected the same.")
    return extractor


def _built(place: str, name: str, settings_place: str, settings: Mapping[str, Any]) -> nn.Module:
    """A module of the class `module:Class`, made with these settings."""
    found = find_object(name, place)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"{place} is {name!r}; expected a class that derives from torch.nn.Module.")
    with foreign_code(name, place):
        try:
            built: nn.Module = found(**settings)
        except TypeError as error:
            raise ConfigError(f"{settings_place} do not fit {name}: {error}.") from error
    return built
