"""A model made ready for sampling: its settings, its precision, the code that runs it, and where images start."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Self

import torch
from torch import Tensor

from starflow2.core.fields import of_kind
from starflow2.core.torch_defaults import inference_defaults
from starflow2.errors import ConfigError, DataError, StateError
from starflow2.inference.backend import Backend
from starflow2.inference.config import DrawConfig
from starflow2.inference.lean import LeanBackend
from starflow2.inference.native import native_backend
from starflow2.inference.packed import PackedWeights, pack, unpackable
from starflow2.inference.streams import StreamBackend
from starflow2.models.components import Components
from starflow2.models.joint_stream import JointStream, Trace
from starflow2.models.pretzel import ALL_SKIPS
from starflow2.models.sequence import Layout
from starflow2.nn import check, raw_bytes

__all__ = ["Sampler"]


class Sampler:
    """A model made ready for sampling (docs/choices.md#sampling-in-float64).

    Its weights are copied at the first use and stay as they were. Raises ConfigError for settings that this model
    cannot take.
    """

    @inference_defaults()
    def __init__(self, components: Components, config: DrawConfig | None = None) -> None:
        self.components = of_kind(components, Components, "components", "load_components(folder) reads them")
        _check_precision(components)
        self.config = DrawConfig.for_model(components) if config is None else of_kind(config, DrawConfig, "config")
        self._check_cleanup()
        doubles = self.config.precision == "float64"
        self.dtype = torch.float64 if doubles else components.flow.deep.head.weight.dtype
        stream = components.pretzel.in_float64() if doubles else components.pretzel
        self._codec = components.codec_in_float64() if doubles else components.codec
        self.pretzel = self._with_skips(stream)
        self.start: Tensor | None = None  # (N, D) that every image starts from, None: drawn from the prior
        self.adjust_logits: Callable[[Tensor], Tensor] | None = None  # of next tokens (n, V), before one is chosen
        self._weights: dict[JointStream, PackedWeights] = {}

    def prior(self, shape: Sequence[int], generator: torch.Generator, config: DrawConfig | None = None) -> Tensor:
        """Where an image starts: `start`, or z of `shape` (N, D) at the prior scale of `config`."""
        if self.start is not None:
            return self.start
        return (config or self.config).prior_scale * torch.randn(tuple(shape), generator=generator)

    def backend(self) -> Backend:
        """The fastest code that runs this stream, without lanes yet."""
        return self._backend()[0]

    def path(self) -> tuple[str, str]:
        """The name of that code, and where it is or why no faster one runs."""
        backend, note = self._backend()
        return backend.name, note

    def _backend(self) -> tuple[Backend, str]:
        reason = unpackable(self.pretzel)
        if reason is not None:
            return StreamBackend(self.pretzel, self.dtype), reason
        if self.pretzel not in self._weights:
            self._weights[self.pretzel] = pack(self.pretzel)
        weights = self._weights[self.pretzel]
        native, note = native_backend(weights)
        return native or LeanBackend(weights), note

    def noisy(self, images: Tensor, levels: Tensor) -> Tensor:
        """Latents (P, N, D) of images from outside (P, 3, s, s) at their levels (P,).

        Their noise is that of seed 0 for each, so that no image depends on where it stands or what stands beside it.
        """
        levels = levels.to(self.components.device, self.dtype)
        x = self._codec.encode(images.to(levels)).to(self.dtype)
        eps = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0))
        return x + levels[:, None, None] * eps.to(x)

    def changed(self, **settings: Any) -> Self:
        """A sampler with other settings of `DrawConfig`, all but precision; no weights are copied.

        Raises ConfigError for guidance on a sampler `with_code`.
        """
        twin = copy.copy(self)
        twin.config = replace(self.config, **settings)
        if twin.config.precision != self.config.precision:
            raise ConfigError("precision cannot be changed without a copy of the weights; make another Sampler.")
        if self.start is not None and (twin.config.guidance or twin.config.edit_guidance):
            raise ConfigError(
                f"guidance is {twin.config.guidance} and edit_guidance {twin.config.edit_guidance}; a sampler with a "
                "code draws without guidance, or it would not undo the inversion. Use 0."
            )
        twin._check_cleanup()
        twin.pretzel = twin._with_skips(self.pretzel)
        return twin

    def _check_cleanup(self) -> None:
        """Raise ConfigError for a clean-up that a conversation's cache would not see."""
        if self.config.cleanup != "none" and "joint" in self.components.finished_stages:
            raise ConfigError(
                f"cleanup is {self.config.cleanup!r}; it works for models before stage joint, "
                f"and {self.components.cfg.name} has finished joint. Leave it out."
            )

    def _with_skips(self, stream: JointStream) -> JointStream:
        """The stream with the skips that the settings open; before stage joint they are untrained, so closed."""
        if self.config.skips is not None:
            return stream.with_skips(self.config.skips)
        return stream.with_skips(ALL_SKIPS if "joint" in self.components.finished_stages else ())

    def with_code(self, z: Tensor) -> Self:
        """A sampler whose images all start from z (N, D), whatever the seed, without guidance: exact inversion.

        Raises ShapeError for any other shape, and DataError for whole numbers, NaN and infinity.
        """
        deep = self.components.cfg.flow.deep
        check(z, "N D", "code", N=deep.num_latents, D=deep.dim)
        if not z.is_floating_point() or not bool(z.isfinite().all()):
            raise DataError("code has NaN or infinite numbers, or whole ones; expected one that invert returned.")
        twin = self.changed(guidance=0.0, edit_guidance=None)
        twin.start = z
        return twin

    def traced(self, trace: Trace) -> Self:
        """A sampler that adds every use of a skip to `trace` (eq. 5.1, 5.2)."""
        twin = copy.copy(self)
        twin.pretzel = self.pretzel.traced(trace)
        return twin

    @cached_property
    def fingerprint(self) -> str:
        """Tells models apart, and precisions: saved sessions fit only their own."""
        layout = "packed" if unpackable(self.pretzel) is None else "streams"  # of what a lane holds
        found = blake2b(f"{self.dtype} {layout}".encode(), digest_size=16)
        for module in (self.components.vlm, self.components.flow, self.components.joints):
            for value in module.state_dict().values():
                found.update(raw_bytes(value))
        return found.hexdigest()

    @property
    def layout(self) -> Layout:
        return self.components.layout

    @property
    def noise_level(self) -> float:
        """Noise level at which images are drawn."""
        return self.components.cfg.draw_level

    @property
    def upload_level(self) -> float:
        """Noise level at which images from outside enter."""
        return self.components.cfg.upload_level


def _check_precision(components: Components) -> None:
    """Raise StateError for a codec or flow in half precision, whose likelihoods would be off by hundreds of nats."""
    for name in ("fae", "flow", "joints"):
        module = getattr(components, name, None)
        types = () if module is None else (weight.dtype for weight in module.parameters())
        half = next((dtype for dtype in types if dtype.itemsize < 4), None)
        if half is not None:
            raise StateError(
                f"{name} has weights of {half}; expected float32 or float64, which exact likelihoods need: load the "
                "model again, or call float() on its components."
            )
