"""The Pretzel: a frozen language stream and a deep flow stream over one interleaved sequence, joined at every position.

Both streams see the same slots under one causal mask. At a latent the language model reads the adapter's view of it
and its state enters the flow's input (eq. 3.1); at a text position the flow's state enters the language head (eq.
3.2). Both skips are zero at the start, so that training begins from two models that work.
Not here: transformers, pixels, sampling loops.
Letters: B rows, T positions, P images, N latents, D latent dim, E language width, C flow width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.errors import ConfigError, nearest
from starflow2.flow import Flow
from starflow2.flow.noise import NoiseEmbedding
from starflow2.models.config import JointsConfig
from starflow2.models.joint_stream import LatentInputs, PretzelCache, Skip, Slots, States, Trace
from starflow2.models.prefix import prefix_mask, two_pass_states
from starflow2.models.protocols import LanguageStream
from starflow2.nn import Cache, FiLM, zero_linear

__all__ = ["ALL_SKIPS", "WORDS_EPS", "Adapter", "Joints", "Pretzel", "reference_projection", "text_context"]

WORDS_EPS = torch.finfo(torch.float32).eps  # of the norm of embeddings, in any precision
PREFIX_SHARE = 0.1  # of slots before an image; from this share on, a pass of their own saves more than it costs
ALL_SKIPS: frozenset[Skip] = frozenset(get_args(Skip))


# -- joints between the streams -------------------------------------------------------------------------------


def text_context(cfg: JointsConfig, embeds: Tensor, h: Tensor) -> Tensor:
    """Input of the flow at text positions, before P_txt: states h (B, T, E), with `words` (B, T, 2E).

    embeds: (B, T, E) embeddings of the tokens. Last states predict the next token and keep little of their own
    token (docs/choices.md#words-beside-states).
    """
    return torch.cat([h, F.rms_norm(embeds, embeds.shape[-1:], eps=WORDS_EPS).to(h.dtype)], dim=-1) if cfg.words else h


class Adapter(nn.Module):
    """Intermediate latents u as the language model's input: MLP, norm, FiLM on the noise level, gain (paper section 4).

    The norm without weights comes before FiLM, which would otherwise be undone, and the gain last.
    """

    def __init__(self, cfg: JointsConfig, dim: int, width: int) -> None:
        super().__init__()
        inputs = dim * (5 if cfg.adapter_stencil else 1)
        self.mlp = nn.Sequential(nn.Linear(inputs, cfg.adapter_width), nn.SiLU(), nn.Linear(cfg.adapter_width, width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.noise_embedding = NoiseEmbedding(cfg.noise_width)
        self.film = FiLM(width, cfg.noise_width)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, u: Tensor, noise_level: Tensor) -> Tensor:
        """u: (B, n, inputs), noise_level: (B,) -> (B, n, E)."""
        normed = self.norm(self.mlp(u))
        return self.gain * self.film(normed, self.noise_embedding(noise_level).unsqueeze(1))

    @torch.no_grad()
    def set_scale(self, rms: float) -> None:
        """Set the root mean square of the outputs to that of the language model's own inputs."""
        self.gain.fill_(rms)


class Joints(nn.Module):
    """Modules between the streams: the adapter, both skips, and the projection of the previous image."""

    def __init__(self, cfg: JointsConfig, dim: int, width: int, flow_width: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.adapter = Adapter(cfg, dim, width)
        self.visual_skip = zero_linear(width, flow_width, bias=False)  # W_v, eq. 3.1
        self.text_skip = zero_linear(flow_width, width, bias=False)  # W_t, eq. 3.2
        if cfg.reference:
            self.reference = reference_projection(cfg, dim, flow_width)


def reference_projection(cfg: JointsConfig, dim: int, width: int) -> nn.Linear:
    """The projection of a window of the previous image's latents, in reading order, into the flow."""
    return zero_linear(cfg.reference**2 * dim, width, bias=False)


# -- the two streams ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pretzel:
    """Both streams and the joints between them, a `JointStream`; immutable, owns no weights.

    skips: names of the open ones. two_pass_prefix: read slots before images in a pass of their own where that saves
    memory and time (`prefix`). trace: a list to which every use of a skip is appended.
    """

    vlm: LanguageStream
    flow: Flow
    joints: Joints
    skips: frozenset[Skip] = ALL_SKIPS
    two_pass_prefix: bool = True
    trace: Trace | None = None

    def with_skips(self, skips: Collection[Skip]) -> Self:
        """Both streams with only these skips open. Raises ConfigError for an unknown name."""
        for skip in skips:
            if skip not in ALL_SKIPS:
                known = sorted(ALL_SKIPS)
                raise ConfigError(f"skips holds {skip!r}; expected some of {known}.{nearest(str(skip), known)}")
        return replace(self, skips=frozenset(skips))

    def traced(self, trace: Trace) -> Self:
        """Both streams, adding every use of a skip to `trace` (eq. 5.1, 5.2)."""
        return replace(self, trace=trace)

    def in_one_pass(self) -> Self:
        """Both streams, reading every batch in one pass of the language model."""
        return replace(self, two_pass_prefix=False)

    def in_float64(self) -> Self:
        """A twin over copies of the weights in double precision."""
        vlm, flow, joints = (_doubled(module) for module in (self.vlm, self.flow, self.joints))
        return replace(self, vlm=vlm, flow=flow, joints=joints)

    def new_cache(self) -> PretzelCache:
        return PretzelCache(self.vlm.new_cache(), Cache(self.flow.deep.cfg.stack.depth))

    @property
    def inputs(self) -> LatentInputs:
        """Embeds latents for the flow."""
        side = self.joints.cfg.reference
        return LatentInputs(self.flow, side, self.joints.reference if side else None)

    # -- one pass over anything

    def read(self, slots: Slots, cache: PretzelCache | None = None) -> States:
        """Both streams at new positions, after those in `cache`, which grows by them."""
        words = embeds = self.vlm.embed(slots.ids)
        latent = slots.latent
        if latent is not None:
            embeds = words.index_put((latent.row, latent.position), latent.adapted.to(words.dtype))
        h = self._language(slots, (words, embeds), cache)
        e = self.flow.deep.context_in(text_context(self.joints.cfg, words, h))  # (B, T, C), P_txt
        if slots.begin is not None:
            row, position, added = slots.begin
            e = e.index_put((row, position), added.to(e.dtype), accumulate=True)
        if latent is not None:
            base = latent.base + self._visual(latent.base, h[latent.row, latent.position])
            e = e.index_put((latent.row, latent.position), base.to(e.dtype))
        g = self.flow.deep.body(e, slots.places, slots.attend, None if cache is None else cache.flow)
        return States(h, g)

    def _language(self, slots: Slots, embeds: tuple[Tensor, Tensor], cache: PretzelCache | None) -> Tensor:
        """The language model's states (B, T, E). embeds: of tokens alone, and with latents in their slots."""
        words, whole = embeds
        trains = whole.requires_grad and not words.requires_grad
        if cache is None and slots.latent is not None and trains and self.two_pass_prefix:
            is_latent = torch.zeros_like(slots.ids, dtype=torch.bool)
            is_latent[slots.latent.row, slots.latent.position] = True
            first = prefix_mask(is_latent, slots.attend)
            if first.float().mean() >= PREFIX_SHARE:
                return two_pass_states(self.vlm, embeds, slots.mrope, first, slots.attend)
        return self.vlm.states(whole, slots.mrope, None if cache is None else cache.vlm, slots.attend)

    def _visual(self, base: Tensor, h: Tensor) -> Tensor:
        """W_v h of latents, eq. 3.1; zero if the skip is closed."""
        if "visual" not in self.skips:
            return torch.zeros_like(base)
        injected: Tensor = self.joints.visual_skip(h)
        if self.trace is not None:
            self.trace.append(("visual", base, injected))
        return injected

    def logits(self, h: Tensor, g: Tensor) -> Tensor:
        """Next-token logits of text positions, eq. 3.2: h (..., E), g (..., C) -> (..., V)."""
        if "text" not in self.skips:
            return self.vlm.logits(h)
        injected = self.joints.text_skip(g.to(self.joints.text_skip.weight.dtype))
        if self.trace is not None:
            self.trace.append(("text", h.flatten(0, -2), injected.flatten(0, -2)))
        return self.vlm.logits(h + injected)

    # -- images in their slots

    def adapted(self, u: Tensor, noise_level: Tensor) -> Tensor:
        """Whole images as the language model reads them: u (P, N, D), noise_level (P,) -> (P, N, E)."""
        index = torch.arange(u.shape[1], device=u.device).expand(len(u), -1)
        inputs = self.adapter_inputs(F.pad(u, (0, 0, 0, 1)).detach(), index)
        return self.joints.adapter(inputs, noise_level)

    def latents(
        self,
        buffer: Tensor,
        targets: Tensor,
        noise_level: Tensor,
        reference: Tensor | None,
        has_reference: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Latents before `targets` for the language model (P, n, E) and the flow (P, n, C), see `JointStream`."""
        adapted = self.joints.adapter(self.adapter_inputs(buffer.detach(), targets - 1), noise_level)
        return adapted, self.inputs.base(buffer, targets, noise_level, reference, has_reference)

    def adapter_inputs(self, buffer: Tensor, index: Tensor) -> Tensor:
        """Inputs of the adapter at latents `index` (P, n): the latent, and with a stencil those left and above.

        buffer: (P, N + 1, D), its last row zero -> (P, n, D), with a stencil (P, n, 5 D).
        """
        rows = torch.arange(len(buffer), device=buffer.device)[:, None]
        own = buffer[rows, index].to(self.joints.adapter.gain.dtype)
        if not self.joints.cfg.adapter_stencil:
            return own
        none = buffer.shape[1] - 1
        left = torch.where(index % self.flow.deep.cfg.grid[1] > 0, index - 1, none)
        near = torch.cat([left[..., None], self.flow.deep.above[index]], dim=-1)  # (P, n, 4)
        return torch.cat([own, buffer[rows[..., None], near].flatten(2).to(own)], dim=-1)


def _doubled(module: Any) -> Any:
    """A copy of a module in double precision."""
    return copy.deepcopy(module).double()
