"""The Pretzel: a frozen language stream and a deep flow stream over one interleaved sequence, joined at every position.

Both streams see the same slots under one causal mask. At a latent the language model reads the adapter's view of it
and its state enters the flow's input (eq. 3.1); at a text position the flow's state enters the language head (eq.
3.2). Both skips are zero at the start, so that training begins from two models that work.
Not here: transformers, pixels, sampling loops.
Letters: B rows, T positions, P pictures, N latents, D latent dim, E language width, C flow width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.errors import ShapeError
from starflow2.flow import Affine, Flow
from starflow2.flow.affine import standard_normal_log_prob
from starflow2.flow.noise import NoiseEmbedding
from starflow2.models.config import JointsConfig
from starflow2.models.prefix import prefix_mask, two_pass_states
from starflow2.models.protocols import LanguageStream
from starflow2.models.sequence import IGNORE, Batch
from starflow2.nn import Cache, FiLM, check, zero_linear

__all__ = [
    "Adapter",
    "Joints",
    "Latent",
    "Output",
    "Pretzel",
    "PretzelCache",
    "Skip",
    "Slots",
    "States",
    "text_context",
]

Skip = Literal["visual", "text"]
PREFIX_SHARE = 0.1  # of slots before a picture, from which on reading them apart saves more than a second pass costs
ALL_SKIPS: frozenset[Skip] = frozenset(get_args(Skip))


# -- what joins the streams -------------------------------------------------------------------------------


def text_context(cfg: JointsConfig, embeds: Tensor, h: Tensor) -> Tensor:
    """What the flow reads at text positions, before P_txt: states h (B, T, E), with `words` (B, T, 2E).

    The last states say what comes next; the word that stands there has faded (docs/choices.md#words-beside-states).
    """
    return torch.cat([h, F.rms_norm(embeds, embeds.shape[-1:]).to(h.dtype)], dim=-1) if cfg.words else h


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
        """Let outputs have this root mean square: that of the vectors the language model was trained on."""
        self.gain.fill_(rms)


class Joints(nn.Module):
    """All that stage 2 and 3 add: the adapter, both skips, and the way from the previous picture."""

    def __init__(self, cfg: JointsConfig, dim: int, width: int, flow_width: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.adapter = Adapter(cfg, dim, width)
        self.visual_skip = zero_linear(width, flow_width, bias=False)  # W_v, eq. 3.1
        self.text_skip = zero_linear(flow_width, width, bias=False)  # W_t, eq. 3.2
        if cfg.reference:
            self.reference = reference_in(cfg, dim, flow_width)


def reference_in(cfg: JointsConfig, dim: int, width: int) -> nn.Linear:
    """From the window of latents of the picture before, in reading order, into the flow."""
    return zero_linear(cfg.reference**2 * dim, width, bias=False)


# -- what goes in and comes out ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Latent:
    """Latents in their slots: what both streams read there, and where those slots are."""

    row: Tensor  # (M,)
    at: Tensor  # (M,) position among the new ones
    adapted: Tensor  # (M, E) for the language model
    base: Tensor  # (M, C) for the flow, without the skip


@dataclass(frozen=True, slots=True)
class Slots:
    """New positions of B rows: token ids with their positions, and what stands in those that are no text."""

    ids: Tensor  # (B, T)
    mrope: Tensor  # (3, B, T)
    places: Tensor  # (B, T, 3)
    latent: Latent | None = None
    begin: tuple[Tensor, Tensor, Tensor] | None = None  # rows (P,), positions (P,), what a begin slot adds (P, C)
    attend: Tensor | None = None  # (B, Tk) or (B, T, Tk) bool


@dataclass(frozen=True, slots=True)
class States:
    """Both streams at the new positions. h: (B, T, E) language, g: (B, T, C) flow."""

    h: Tensor
    g: Tensor


@dataclass(frozen=True, slots=True)
class Output:
    """A whole batch read in parallel.

    affine, u: Gaussians and intermediate latents (P, N, D) of every picture; z: (P, N, D) and log_prob: (P,) nats of
    its noisy latents x, shallow_logdet: (P,) nats, the part of the shallow blocks in it; h: (M, E) and g: (M, C) of the
    M positions with a label, labels: (M,), documents: (M,). head: states of such positions, to logits (M, V).
    """

    affine: Affine
    u: Tensor
    z: Tensor
    log_prob: Tensor
    shallow_logdet: Tensor
    h: Tensor
    g: Tensor
    labels: Tensor
    documents: Tensor
    head: Callable[[Tensor, Tensor], Tensor]

    @property
    def logits(self) -> Tensor:
        """(M, V), all at once; a loss over a large vocabulary takes them in chunks (`losses.token_nats`)."""
        return self.head(self.h, self.g)


class PretzelCache:
    """One cache for both streams: it grows by appending, rewinds by truncating, and both halves are equally long."""

    def __init__(self, vlm: Cache, flow: Cache) -> None:
        self.vlm, self.flow = vlm, flow

    @property
    def length(self) -> int:
        if self.vlm.length != self.flow.length:
            raise ShapeError(f"the halves of a cache hold {self.vlm.length} and {self.flow.length} positions.")
        return self.flow.length

    @property
    def nbytes(self) -> int:
        """Bytes held, spare capacity included."""
        return self.vlm.nbytes + self.flow.nbytes

    def truncate(self, length: int) -> None:
        """Forget everything behind `length`; the kept part stays bit-equal."""
        self.vlm.truncate(length)
        self.flow.truncate(length)

    def fork(self, copies: int = 1) -> PretzelCache:
        """A cache of its own with each row repeated `copies` times."""
        return PretzelCache(self.vlm.fork(copies), self.flow.fork(copies))


# -- the two streams ----------------------------------------------------------------------------------------


class Pretzel:
    """Both streams and the joints between them; owns no weights. `skips` says which of the two are open."""

    def __init__(self, vlm: LanguageStream, flow: Flow, joints: Joints) -> None:
        self.vlm, self.flow, self.joints = vlm, flow, joints
        self.skips: frozenset[Skip] = ALL_SKIPS
        self.two_pass_prefix = True  # what stands before pictures, where that saves work (`prefix`)
        self.trace: list[tuple[str, Tensor, Tensor]] | None = None

    def new_cache(self) -> PretzelCache:
        return PretzelCache(self.vlm.new_cache(), Cache(self.flow.deep.cfg.stack.depth))

    def in_float64(self) -> Self:
        """A twin over copies of the weights in double precision."""
        assert isinstance(self.vlm, nn.Module)
        vlm = cast(LanguageStream, copy.deepcopy(self.vlm).double())
        twin = type(self)(vlm, copy.deepcopy(self.flow).double(), copy.deepcopy(self.joints).double())
        twin.skips = self.skips
        return twin

    @contextmanager
    def traced(self) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
        """Inside, every skip leaves (its name, base (M, width), injected (M, width)) in the list (eq. 5.1, 5.2)."""
        self.trace = []
        try:
            yield self.trace
        finally:
            self.trace = None

    # -- one pass over anything

    def read(self, slots: Slots, cache: PretzelCache | None = None) -> States:
        """Both streams at new positions, behind those in `cache`, which grows by them."""
        words = embeds = self.vlm.embed(slots.ids)
        latent = slots.latent
        if latent is not None:
            embeds = words.index_put((latent.row, latent.at), latent.adapted.to(words.dtype))
        h = self._language(slots, (words, embeds), cache)
        e = self.flow.deep.context_in(text_context(self.joints.cfg, words, h))  # (B, T, C), P_txt
        if slots.begin is not None:
            row, at, added = slots.begin
            e = e.index_put((row, at), added.to(e.dtype), accumulate=True)
        if latent is not None:
            base = latent.base + self._visual(latent.base, h[latent.row, latent.at])
            e = e.index_put((latent.row, latent.at), base.to(e.dtype))
        g = self.flow.deep.body(e, slots.places, slots.attend, None if cache is None else cache.flow)
        return States(h, g)

    def _language(self, slots: Slots, embeds: tuple[Tensor, Tensor], cache: PretzelCache | None) -> Tensor:
        """The language model's states (B, T, E); embeds: words alone, and with latents in their places."""
        words, whole = embeds
        trains = whole.requires_grad and not words.requires_grad
        if cache is None and slots.latent is not None and trains and self.two_pass_prefix:
            is_latent = torch.zeros_like(slots.ids, dtype=torch.bool)
            is_latent[slots.latent.row, slots.latent.at] = True
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

    # -- what pictures put into their slots

    def adapted(self, u: Tensor, noise_level: Tensor) -> Tensor:
        """Whole pictures as the language model reads them: u (P, N, D), noise_level (P,) -> (P, N, E)."""
        index = torch.arange(u.shape[1], device=u.device).expand(len(u), -1)
        seen: Tensor = self.joints.adapter(self._seen(F.pad(u, (0, 0, 0, 1)).detach(), index), noise_level)
        return seen

    def begins(self, noise_level: Tensor, reference: Tensor | None, has_reference: Tensor | None) -> Tensor:
        """What is added at begin slots, (P, C): the noise level to come and the previous picture's first latent."""
        added = self.flow.deep.noise_embedding(noise_level)
        return added + self._reference(reference, has_reference, torch.zeros_like(noise_level[:, None]).long())[:, 0]

    def latents(
        self,
        buffer: Tensor,
        targets: Tensor,
        noise_level: Tensor,
        reference: Tensor | None,
        has_reference: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Latents in front of `targets`, as the language model (P, n, E) and the flow (P, n, C) read them.

        buffer: (P, N + 1, D), its last row zero; nothing behind a target's own predecessor is read. targets: (P, n)
        from 1 to N. reference: (P, N + 1, D), the picture before, where `has_reference` (P,) says there is one.
        """
        adapted = self.joints.adapter(self._seen(buffer.detach(), targets - 1), noise_level)
        return adapted, self._base(buffer, targets, noise_level, reference, has_reference)

    def _base(
        self,
        buffer: Tensor,
        targets: Tensor,
        noise_level: Tensor,
        reference: Tensor | None,
        has_reference: Tensor | None,
    ) -> Tensor:
        """What the flow reads there without the skip, (P, n, C)."""
        base = self.flow.deep.embed_at(buffer, targets) + self.flow.deep.noise_embedding(noise_level)[:, None]
        return base + self._reference(reference, has_reference, targets)

    def _seen(self, buffer: Tensor, index: Tensor) -> Tensor:
        """What the adapter reads at latents `index` (P, n): the latent, and with a stencil those left and above."""
        rows = torch.arange(len(buffer), device=buffer.device)[:, None]
        own = buffer[rows, index].to(self.joints.adapter.gain.dtype)
        if not self.joints.cfg.adapter_stencil:
            return own
        none = buffer.shape[1] - 1
        left = torch.where(index % self.flow.deep.cfg.grid[1] > 0, index - 1, none)
        near = torch.cat([left[..., None], self.flow.deep.above[index]], dim=-1)  # (P, n, 4)
        return torch.cat([own, buffer[rows[..., None], near].flatten(2).to(own)], dim=-1)

    def _reference(self, reference: Tensor | None, has_reference: Tensor | None, targets: Tensor) -> Tensor:
        """The previous picture's latents around the targets' places, projected: (P, n, C)."""
        if reference is None or has_reference is None or not self.joints.cfg.reference:
            return torch.zeros(*targets.shape, self.flow.deep.cfg.stack.width, device=targets.device)
        rows = torch.arange(len(reference), device=reference.device)[:, None, None]
        seen = reference[rows, self._window(targets)].flatten(2)  # (P, n, side^2 D)
        projected: Tensor = self.joints.reference(seen.to(self.joints.reference.weight.dtype))
        return projected * has_reference[:, None, None]

    def _window(self, targets: Tensor) -> Tensor:
        """Latents around targets (P, n) in reading order, N where there is none: (P, n, side^2)."""
        height, width = self.flow.deep.cfg.grid
        reach = self.joints.cfg.reference // 2
        steps = torch.arange(-reach, reach + 1, device=targets.device)
        at = targets[..., None, None]
        row, column = at // width + steps[:, None], at % width + steps
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (at < height * width)
        return torch.where(inside, row * width + column, height * width).flatten(-2)

    # -- a whole batch in parallel

    def forward(self, batch: Batch, x: Tensor, noise_level: Tensor, blind: Tensor | None = None) -> Output:
        """Read documents whole, for training and scoring.

        x: (P, N, D) noisy latents of the batch's pictures in order, noise_level: (P,) their levels. blind: (P,) bool,
        pictures whose own latents neither stream sees, for training: their `log_prob` is not that of an exact density.
        """
        check(x, "P N D", P=len(batch.pictures), N=self.flow.deep.cfg.num_latents, D=self.flow.deep.cfg.dim)
        u, shallow_logdet = self.flow.shallow(x, noise_level)
        states = self.read(self._slots(batch, u, noise_level, blind))
        index = batch.pictures.begin[:, None] + torch.arange(u.shape[1], device=u.device)
        affine = self.flow.deep.affine(states.g[batch.pictures.row[:, None], index])
        z, logdet = affine.normalize(u)
        has_label = batch.labels != IGNORE
        return Output(
            affine=affine,
            u=u,
            z=z,
            log_prob=standard_normal_log_prob(z) + logdet + shallow_logdet,
            shallow_logdet=shallow_logdet,
            h=states.h[has_label],
            g=states.g[has_label],
            head=self.logits,
            labels=batch.labels[has_label],
            documents=batch.document[has_label],
        )

    def _slots(self, batch: Batch, u: Tensor, noise_level: Tensor, blind: Tensor | None) -> Slots:
        slots = Slots(batch.ids, batch.mrope, batch.places, attend=batch.attend)
        pictures, count = batch.pictures, u.shape[1]
        if not len(pictures):
            return slots
        buffer = F.pad(u, (0, 0, 0, 1))  # (P, N + 1, D)
        reference, has_reference = buffer[pictures.previous], pictures.previous >= 0
        targets = torch.arange(1, count + 1, device=u.device).expand(len(u), -1)
        own = buffer if blind is None else buffer.masked_fill(blind[:, None, None], 0)
        adapted, base = self.latents(own, targets, noise_level, reference, has_reference)
        row = pictures.row[:, None].expand(-1, count).flatten()
        at = (pictures.begin[:, None] + targets).flatten()
        begins = self.begins(noise_level, reference, has_reference)
        latent = Latent(row, at, adapted.flatten(0, 1), base.flatten(0, 1))
        return replace(slots, latent=latent, begin=(pictures.row, pictures.begin, begins))
