"""Both streams over static lanes in plain torch: fused projections, one doubled pass for guidance, no host decisions.

The fallback where no compiled form runs, and what compiled forms are checked with; itself checked against
`JointStream.read` in tests. A compiled form overrides `_read`, `_draw_latents` and `unshallow`.
Letters: n lanes, R rows of a pass, P images, N latents, D latent dim, E language width, C flow width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow2.errors import ShapeError
from starflow2.flow import Affine
from starflow2.flow.affine import soft_clip
from starflow2.flow.block import scan
from starflow2.flow.solver import SEQUENTIAL, Solver
from starflow2.inference.backend import Chunk, Drawn, LaneMark, NewImage, Pair, Span, decoded_one_by_one
from starflow2.inference.lanes import STEP, KeyValues, Lanes
from starflow2.inference.lean_layers import (
    Attention,
    FlowLayers,
    Heads,
    LanguageLayers,
    Linear,
    RmsNorm,
    Rotation,
    attention,
    pass_over,
)
from starflow2.inference.packed import BlockWeights, PackedWeights
from starflow2.models.config import LanguageConfig
from starflow2.models.pretzel import WORDS_EPS
from starflow2.models.protocols import Codec
from starflow2.nn import at_least_fp32

__all__ = ["LeanBackend", "Pictures", "Rows"]


@dataclass(frozen=True, slots=True)
class Rows:
    """New positions of lanes at slots [first, first + lanes), M = R / lanes of each, after those that they hold."""

    first: int
    lanes: int
    x: Tensor  # (R, E) input of the language model
    base: Tensor  # (R, C) added to the flow's input
    is_latent: Tensor | None  # (R,) bool; None: no latents
    language_rotation: Tensor  # (R, K / 2) complex
    flow_rotation: Tensor  # (R, K / 2) complex
    all_latents: bool = False


@dataclass(frozen=True, slots=True)
class Pictures:
    """The images that are drawn in n lanes; `LeanBackend` needs them at slots [0, n), where `arrange` puts them."""

    main: Tensor  # (P,) slots
    blank: Tensor  # (P,) slots of their blank lanes, those of `main` where there is none
    slots: Tensor  # (n,) of all these lanes, rising
    source: Tensor  # (n,) slot of the main lane of the image that each lane is of
    is_tarflow: Tensor | None  # (P,) bool, which images have that rule of guidance; None: none of them
    is_guided: bool
    level: float


class LeanBackend:
    """Both streams over lanes, on packed weights, in torch."""

    name = "lean"

    def __init__(self, weights: PackedWeights) -> None:
        self.weights, self.lanes = weights, Lanes(weights)
        w, cfg, deep = weights, weights.language_cfg, weights.deep.cfg
        self._language, self._heads = LanguageLayers(w.language, w.language_norm), _heads(cfg)
        self._words_norm = RmsNorm(torch.ones_like(w.embed[0]), WORDS_EPS)
        self._deep = _Block(w.deep)
        self._shallow = [_Block(block) for block in w.shallow]
        self._context_in = Linear(w.context_in, w.context_in_bias)
        self._visual_skip = None if w.visual_skip is None else Linear(w.visual_skip)
        self._text_skip = None if w.text_skip is None else Linear(w.text_skip)
        self._adapter_in = Linear(w.adapter_in, w.adapter_in_bias)
        self._adapter_out = Linear(w.adapter_out, w.adapter_out_bias)
        self._lm_head = Linear(w.lm_head)
        adapter = 5 if w.cfg.adapter_stencil else 1
        own, above = w.near[:-1, :adapter], [w.near[:-1, :1]] + ([w.near[1:, 2:]] if deep.stencil else [])
        self._near = torch.cat([own, *above], dim=1)  # (N, adapter + flow), what is read of u at each latent
        self._adapter_width = adapter * deep.dim

    @property
    def dtype(self) -> torch.dtype:
        return self.lanes.u.dtype

    # -- lanes

    @property
    def nbytes(self) -> int:
        return self.lanes.nbytes

    @property
    def capacity(self) -> int:
        return self.lanes.capacity

    def expect(self, lanes: int) -> None:
        self.lanes.expect(lanes)

    def open(self) -> int:
        return self.lanes.open()

    def close(self, lane: int) -> None:
        self.lanes.close(lane)

    def fork(self, lane: int) -> int:
        twin = self.lanes.open()
        self.lanes.reserve(twin, self.length(lane) + 1)
        self.lanes.copy(lane, twin)
        return twin

    def bytes_for(self, lanes: int, positions: int) -> int:
        return self.lanes.bytes_for(lanes, positions)

    def reserve(self, lane: int, positions: int) -> None:
        self.lanes.reserve(lane, positions)

    def trim(self) -> None:
        self.lanes.trim()

    def length(self, lane: int) -> int:
        return self.lanes.lengths[self.lanes.slot_of[lane]]

    def mark(self, lane: int) -> LaneMark:
        slot = self.lanes.slot_of[lane]
        return LaneMark(self.lanes.lengths[slot], self.lanes.h[slot].clone(), self.lanes.g[slot].clone())

    def restore(self, lane: int, mark: LaneMark) -> None:
        self.lanes.truncate(lane, mark.length)
        slot = self.lanes.slot_of[lane]
        self.lanes.h[slot], self.lanes.g[slot] = mark.h, mark.g

    def arrange(self, drawing: Sequence[Pair], writing: Sequence[int]) -> None:
        lanes = [lane for pair in drawing for lane in (pair.lane, pair.blank) if lane is not None]
        self.lanes.arrange(lanes, writing)

    # -- reading

    @torch.no_grad()
    def append(self, lane: int, chunk: Chunk) -> None:
        self._read(self._rows(self.lanes.slot_of[lane], 1, [chunk]))

    @torch.no_grad()
    def append_each(self, lanes: Sequence[int], chunks: Sequence[Chunk]) -> None:
        by_slot = sorted(zip((self.lanes.slot_of[lane] for lane in lanes), chunks, strict=True), key=lambda x: x[0])
        for run in _alike([(slot, len(chunk)) for slot, chunk in by_slot]):
            self._read(self._rows(by_slot[run.start][0], len(run), [by_slot[i][1] for i in run]))

    def _rows(self, first: int, lanes: int, chunks: Sequence[Chunk]) -> Rows:
        w = self.weights
        device = w.embed.device
        ids = torch.tensor([number for chunk in chunks for number in chunk.ids], device=device)
        x = w.embed[ids]
        base = self.lanes.g.new_zeros(len(ids), w.deep.cfg.stack.width)
        is_latent = None
        for start, chunk in zip(accumulate(map(len, chunks), initial=0), chunks, strict=False):
            if chunk.begin is not None:
                begin = chunk.begin
                at = start + begin.at
                base[at] = w.at(begin.level).deep_noise + self._reference(begin.reference, slice(0, 1))[0]
            if chunk.span is not None:
                is_latent = torch.zeros(len(ids), dtype=torch.bool, device=device) if is_latent is None else is_latent
                first_row = start + chunk.span.at
                part = slice(first_row, first_row + chunk.span.last - chunk.span.first)
                x[part], base[part] = self._embedded(chunk.span)
                is_latent[part] = True
        mrope = torch.cat([chunk.mrope for chunk in chunks], dim=1).to(device)
        places = torch.cat([chunk.places for chunk in chunks]).to(device)
        return Rows(first, lanes, x, base, is_latent, w.language_rotation(mrope), w.flow_rotation(places))

    def _embedded(self, span: Span) -> tuple[Tensor, Tensor]:
        """Latents of a span as inputs of the language model (n, E) and of the flow (n, C)."""
        part = slice(span.first, span.last)
        near = span.u.to(self.lanes.u)[self._near[part]].flatten(1)
        added = self._added(span.level, span.reference)[part]
        return self._adapted(near, span.level), self._flow_base(near, added.to(self.weights.dtype))

    def _flow_base(self, near: Tensor, added: Tensor) -> Tensor:
        return self._deep.proj_in.onto(added, near[:, self._adapter_width :].to(self.weights.dtype))

    def _adapted(self, near: Tensor, level: float) -> Tensor:
        """Inputs of the adapter (n, ...) as the language model reads them, (n, E)."""
        constants = self.weights.at(level)
        hidden = F.silu(self._adapter_in(near[:, : self._adapter_width].to(self.weights.dtype)))
        out = self._adapter_out(hidden)
        return F.layer_norm(out, out.shape[-1:], constants.adapter_norm, constants.adapter_norm_bias)

    def _added(self, level: float, reference: Tensor | None) -> Tensor:
        """Terms of the flow's input at the slot of each latent beside its projection, (N, C)."""
        slots = self.weights.at(level).deep_slots
        return slots if reference is None else slots + self._reference(reference, slice(1, None))

    def _reference(self, reference: Tensor | None, targets: slice) -> Tensor:
        """The image before, around the targets [0, N] in `targets`, projected: (n, C)."""
        w = self.weights
        count = torch.arange(w.deep.cfg.num_latents + 1, device=w.near.device)[targets]
        if reference is None or w.reference is None:
            return torch.zeros(len(count), w.deep.cfg.stack.width, dtype=w.exact, device=count.device)
        window = reference.to(self.lanes.u)[w.stream.inputs.window(count[None])[0]]  # (n, side^2, D)
        return F.linear(window.flatten(1).to(w.exact), w.reference.to(w.exact))

    def _read(self, rows: Rows) -> None:
        """Both streams at new positions; they go into the caches, and the states at each lane's last one are kept."""
        lanes, each = self.lanes, len(rows.x) // rows.lanes
        slots = slice(rows.first, rows.first + rows.lanes)
        h, g = self._streams(rows, lanes.length[slots])
        lanes.length[slots] += each
        lanes.h[slots], lanes.g[slots] = h[each - 1 :: each], g[each - 1 :: each]
        lanes.lengths[slots] = [length + each for length in lanes.lengths[slots]]

    def _streams(self, rows: Rows, length: Tensor) -> tuple[Tensor, Tensor]:
        """States of both streams (R, E) and (R, C); length: (lanes,) positions that the lanes hold."""
        lanes, each = self.lanes, len(rows.x) // rows.lanes
        longest = max(lanes.lengths[rows.first : rows.first + rows.lanes]) + each
        visible = min(-(-longest // STEP) * STEP, lanes.capacity)
        position = length
        if each > 1:
            position = (length[:, None] + torch.arange(each, device=length.device)).flatten()
        now = pass_over(rows.first, rows.lanes, visible, position, lanes.u.dtype)
        h = self._language(rows.x, attention(lanes.language, now, rows.language_rotation, self._heads))
        attend = attention(lanes.flow, now, rows.flow_rotation, self._deep.heads)
        return h, at_least_fp32(self._deep.layers(self._flow_input(rows, h), attend))

    def _flow_input(self, rows: Rows, h: Tensor) -> Tensor:
        h = h.to(self.weights.dtype)
        if rows.all_latents:
            return self._latent_input(rows.base, h)
        words = torch.cat([h, self._words_norm(rows.x).to(h)], dim=-1) if self.weights.cfg.words else h
        e = self._context_in(words) + rows.base
        if rows.is_latent is None:
            return e
        return torch.where(rows.is_latent[:, None], self._latent_input(rows.base, h), e)

    def _latent_input(self, base: Tensor, h: Tensor) -> Tensor:
        """Eq. 3.1."""
        return base if self._visual_skip is None else self._visual_skip.onto(base, h)

    @torch.no_grad()
    def logits(self, lanes: Sequence[int]) -> Tensor:
        slots = [self.lanes.slot_of[lane] for lane in lanes]
        h, g = self.lanes.h[slots], self.lanes.g[slots]
        if self._text_skip is not None:
            h = self._text_skip.onto(h.to(self.weights.dtype), g.to(self.weights.dtype))
        return self._lm_head(h.to(self.weights.lm_head.dtype))

    # -- drawing

    @torch.no_grad()
    def start(self, lane: int, image: NewImage) -> None:
        lanes, slot = self.lanes, self.lanes.slot_of[lane]
        lanes.u[slot], lanes.drawn[slot] = 0, 0
        lanes.z[slot], lanes.strength[slot] = image.z.to(lanes.z), image.strength.to(lanes.z)
        lanes.added[slot] = self._added(image.level, image.reference)
        device = lanes.u.device
        lanes.language_rotation[slot] = self.weights.language_rotation(image.mrope.to(device))
        lanes.flow_rotation[slot] = self.weights.flow_rotation(image.places.to(device))
        lanes.counts[slot] = 0

    @torch.no_grad()
    def draw(self, pairs: Sequence[Pair], count: int) -> None:
        """The lanes must be those of the last `arrange`."""
        self._draw_latents(self._pictures(pairs), count)

    def _pictures(self, pairs: Sequence[Pair]) -> Pictures:
        slot, device = self.lanes.slot_of, self.lanes.u.device
        main = [slot[p.lane] for p in pairs]
        blank = [slot[p.lane if p.blank is None else p.blank] for p in pairs]
        source = dict(zip([*blank, *main], [*main, *main], strict=True))
        is_tarflow = [p.rule == "tarflow" for p in pairs]
        main_at, blank_at, slots, source_at = (
            torch.tensor(x, device=device)
            for x in (main, blank, sorted(source), [source[slot] for slot in sorted(source)])
        )
        tarflow = torch.tensor(is_tarflow, device=device) if any(is_tarflow) else None
        return Pictures(main_at, blank_at, slots, source_at, tarflow, main != blank, pairs[0].level)

    def latent_step(self, pairs: Sequence[Pair]) -> Callable[[], None]:
        """A function that draws the next latent of every image on the device alone: what a compiler or a graph takes.

        The lanes must be those of the last `arrange`.
        """
        pictures = self._pictures(pairs)
        return torch.no_grad()(lambda: self._draw_latents(pictures, 1))

    def _draw_latents(self, pictures: Pictures, count: int) -> None:
        """Sample `count` latents of every image, and read them but for the last of an image."""
        lanes, n = self.lanes, len(pictures.slots)
        for _ in range(count):
            index = lanes.drawn[:n].clone()  # (n,) of the latents
            self._sample(pictures, index)
            lanes.drawn[:n] += 1
            lanes.counts[:n] = [done + 1 for done in lanes.counts[:n]]
            follows = [done < lanes.z.shape[1] for done in lanes.counts[:n]]
            if not any(follows):
                return
            h, g = self._streams(self._latent_rows(pictures, index), lanes.length[:n])
            lanes.h[:n], lanes.g[:n] = h, g
            lanes.length[:n] += lanes.drawn[:n] < lanes.z.shape[1]
            lanes.lengths[:n] = [a + b for a, b in zip(lanes.lengths[:n], follows, strict=True)]

    def _sample(self, pictures: Pictures, index: Tensor) -> None:
        """u = mu + sigma z of latents `index` (n,), guided where there is a blank lane (eq. 3.5)."""
        lanes, p = self.lanes, pictures
        affine = self._deep.affine(lanes.g[: len(index)])
        raw = torch.cat([affine.log_scale, affine.mu], dim=-1)  # (n, 2 D)
        lanes.raw[p.slots, index] = raw
        own, at = _gaussian(raw[p.main]), index[p.main]
        if p.is_guided:
            blank, strength = _gaussian(raw[p.blank]), lanes.strength[p.main, at][:, None]
            guided = own.guide(blank, strength)
            if p.is_tarflow is not None:
                other, mask = own.guide(blank, strength, "tarflow"), p.is_tarflow[:, None]
                guided = Affine(*(torch.where(mask, a, b) for a, b in zip(_pair(other), _pair(guided), strict=True)))
            own = guided
        lanes.u[p.main, at] = own.denormalize(lanes.z[p.main, at])

    def _latent_rows(self, pictures: Pictures, index: Tensor) -> Rows:
        """Latents `index` (n,) just sampled, as new positions of all lanes."""
        lanes, slots = self.lanes, pictures.slots
        near = lanes.u[pictures.source[:, None], self._near[index]].flatten(1)  # (n, ...)
        base = self._flow_base(near, lanes.added[slots, index].to(self.weights.dtype))
        language, flow = lanes.language_rotation[slots, index], lanes.flow_rotation[slots, index]
        x = self._adapted(near, pictures.level).to(self.weights.embed.dtype)
        return Rows(0, len(slots), x, base, None, language, flow, all_latents=True)

    def drawn(self, pair: Pair) -> Drawn:
        def predicted(lane: int) -> Affine:
            return _gaussian(self.lanes.raw[self.lanes.slot_of[lane]][None].clone())

        u = self.lanes.u[self.lanes.slot_of[pair.lane], :-1].clone()
        return Drawn(u, predicted(pair.lane), None if pair.blank is None else predicted(pair.blank))

    # -- shallow blocks

    @torch.no_grad()
    def shallow(self, x: Tensor, level: float) -> Tensor:
        flow = self.weights.stream.flow
        levels = torch.full((len(x),), level, device=x.device, dtype=flow.deep.head.weight.dtype)
        return flow.shallow(x.to(levels.dtype), levels)[0].to(self.lanes.u)

    @torch.no_grad()
    def unshallow(self, u: Tensor, level: float, solver: Solver = SEQUENTIAL) -> Tensor:
        if solver != SEQUENTIAL:
            flow = self.weights.stream.flow
            levels = torch.full((len(u),), level, device=u.device, dtype=flow.deep.head.weight.dtype)
            return flow.shallow.inverse(u.to(levels.dtype), levels, solver).to(u)
        slots = self.weights.at(level).shallow_slots
        for i in reversed(range(len(self._shallow))):
            u = self._shallow[i].inverse(u, slots[i], self.weights.shallow_rotation(i), self.weights.near)
        return u

    def pixels(self, codec: Codec, x: Tensor) -> Tensor:
        return decoded_one_by_one(codec, x)

    # -- files

    def state(self, lane: int) -> dict[str, Tensor]:
        slot, length = self.lanes.slot_of[lane], self.length(lane)
        tensors = {"h": self.lanes.h[slot], "g": self.lanes.g[slot]}
        if not length:
            return tensors
        for name, cache in (("vlm", self.lanes.language.buffer), ("flow", self.lanes.flow.buffer)):
            for layer in range(len(cache)):
                kept = cache[layer, :, slot, None, :, :length]  # (2, 1, heads, T, K)
                tensors |= {f"{name}.{layer}.k": kept[0], f"{name}.{layer}.v": kept[1]}
        return tensors

    def load(self, state: Mapping[str, Tensor]) -> int:
        lane = self.open()
        length = state["flow.0.k"].shape[2] if "flow.0.k" in state else 0
        self.reserve(lane, length)
        self.lanes.set_length(self.lanes.slot_of[lane], length)
        for name, target in self.state(lane).items():
            if target.shape != state[name].shape:
                raise ShapeError(f"{name} has shape {tuple(state[name].shape)}; expected {tuple(target.shape)}.")
            target.copy_(state[name])
        return lane


class _Block:
    """An affine block: its projections, its layers, and its inverse one latent after the other."""

    def __init__(self, weights: BlockWeights) -> None:
        cfg, stack = weights.cfg, weights.cfg.stack
        self.cfg, self.heads = cfg, (stack.heads, stack.heads, stack.head_dim)
        self.proj_in = Linear(weights.proj_in)
        self.layers = FlowLayers(weights.layers, weights.final_norm, is_gelu=stack.activation == "gelu")
        self.head = Linear(weights.head, weights.head_bias)

    def affine(self, g: Tensor) -> Affine:
        """States (n, C) -> Gaussians (n, D), as `AffineBlock.affine`."""
        raw = self.head(g.to(self.head.weight.dtype))
        if self.cfg.clips_mean:
            return Affine.from_raw(soft_clip(raw, self.cfg.clip), self.cfg.scale)
        scale, mu = raw.chunk(2, dim=-1)
        if self.cfg.scale == "exp":
            return Affine(at_least_fp32(mu), at_least_fp32(soft_clip(scale, self.cfg.clip)))
        return Affine.from_raw(torch.cat([soft_clip(scale, self.cfg.clip), mu], dim=-1), self.cfg.scale)

    def inverse(self, u: Tensor, slots: Tensor, rotation: Tensor, near: Tensor) -> Tensor:
        """z -> x of a block without context, both (P, N, D); slots: (N, C), rotation: (N, K / 2), near: (N + 1, 5)."""
        z, stack = scan(u, self.cfg.direction), self.cfg.stack
        count, last = len(z), z.shape[1]
        buffer = z.new_zeros(count, last + 1, z.shape[2])
        cache = KeyValues(stack.depth, count, stack.heads, last, stack.head_dim, slots)
        views = cache.views(0, count, last)
        turns = [Rotation(turn.expand(count, -1), self.heads, slots.dtype) for turn in rotation]
        mask = torch.full((last, last), -torch.inf, dtype=slots.dtype, device=slots.device).triu(1)[:, None, None, None]
        everywhere = torch.arange(last, device=slots.device)
        index = torch.stack([cache.index(slice(0, count), n.expand(count)) for n in everywhere])
        read = (
            torch.cat([everywhere[:, None] - 1, near[:-1, 2:]], dim=1) if self.cfg.stencil else everywhere[:, None] - 1
        )
        for n in range(last):
            x = slots[n].expand(count, -1)
            if n:
                x = self.proj_in.onto(x, buffer[:, read[n]].flatten(1).to(x))
            attend = Attention(cache, self.heads, count, index[n], views, turns[n], mask[n])
            buffer[:, n] = self.affine(self.layers(x, attend)).denormalize(z[:, n])
        return scan(buffer[:, :-1], self.cfg.direction)


def _heads(cfg: LanguageConfig) -> Heads:
    return cfg.heads, cfg.kv_heads, cfg.width // cfg.heads


def _gaussian(raw: Tensor) -> Affine:
    """Log scales and means (..., 2 D) of latents."""
    log_scale, mu = raw.chunk(2, dim=-1)
    return Affine(mu, log_scale)


def _pair(affine: Affine) -> tuple[Tensor, Tensor]:
    return affine.mu, affine.log_scale


def _alike(found: Sequence[tuple[int, int]]) -> list[range]:
    """Runs of neighbouring slots, which rise, with as many new positions each, as ranges of indices."""
    breaks = [i for i, ((a, m), (b, n)) in enumerate(pairwise(found), 1) if b != a + 1 or m != n]
    starts = [0, *breaks, len(found)]
    return [range(a, b) for a, b in pairwise(starts)]
