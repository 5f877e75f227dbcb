"""A codec of your own, named by its class in a model's config: frozen, and saved with the model.

Images go to latents and back in any way; the flow models the latents. Not here: the two codecs of this package (`fae`,
`patches`).
"""

from __future__ import annotations

from torch import nn

from starflow2.core.imports import find_object
from starflow2.errors import ConfigError
from starflow2.models.config import CodecConfig
from starflow2.models.protocols import Codec

__all__ = ["build_codec"]


def build_codec(cfg: CodecConfig) -> nn.Module:
    """A new codec of the class and the settings that `cfg` names, also of a module in the current folder.

    Raises ConfigError for anything but an nn.Module, so that the config of a model folder cannot call other code, and
    for one that is no codec or has other sizes.
    """
    found = find_object(cfg.codec, "fae.codec")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"fae.codec is {cfg.codec!r}; expected a class that derives from torch.nn.Module.")
    try:
        codec: nn.Module = found(**cfg.settings)
    except TypeError as error:
        raise ConfigError(f"fae.settings do not fit {cfg.codec}: {error}.") from error
    if not isinstance(codec, Codec):
        raise ConfigError(f"{cfg.codec} lacks members of starflow2.models.protocols.Codec; expected all of them.")
    sizes, wanted = (codec.dim, tuple(codec.grid), codec.image_size), (cfg.latent_dim, cfg.grid, cfg.image_size)
    if sizes != wanted:
        raise ConfigError(
            f"{cfg.codec} has (channels, grid, image_size) {sizes}, its config {wanted}; expected the same."
        )
    return codec
