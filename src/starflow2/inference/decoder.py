"""Batched decoding of conversations through one cache for both streams, each row in its own modality.

Each step appends one slot (a token, a begin, a latent or an end) to every unfinished row; a finished row gets a masked
slot, so results do not depend on the rest of the batch. Both guidance branches of an image take the same steps, the
unconditional one in a cache of its own that lives while images are being drawn.
Not here: pixels of uploads, files, the layout of conversations (session).
Letters: B rows, T new positions, N latents, D latent dim, E language width, C flow width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow2.core.fields import Config, Natural, Weight
from starflow2.errors import ConfigError, DataError
from starflow2.flow.affine import Affine, strengths
from starflow2.inference.events import Begun, Completed, DecodedImage, Ended, RowEvent, Stepped, Token
from starflow2.inference.sampler import Sampler
from starflow2.models.joint_stream import Latent, PretzelCache, Slots
from starflow2.models.sequence import Cursor

__all__ = [
    "BatchDecoder",
    "Branch",
    "ReplyLimits",
]


# -- one branch -----------------------------------------------------------------------------------------------


class Branch:
    """One guidance branch of B rows: its cache, a mask of real positions, and the states at each row's last slot."""

    def __init__(self, sampler: Sampler, rows: int) -> None:
        self.sampler, self.rows = sampler, rows
        self.cache: PretzelCache = sampler.pretzel.new_cache()
        device = sampler.components.device
        self.is_real = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self.cursors = [Cursor(sampler.layout.grid) for _ in range(rows)]
        cfg = sampler.components.cfg
        self.h = torch.zeros(rows, cfg.vlm.width, dtype=sampler.dtype, device=device)
        self.g = torch.zeros(rows, cfg.flow.deep.stack.width, dtype=sampler.dtype, device=device)

    @torch.no_grad()
    def append(
        self,
        ids: Sequence[Sequence[int]],
        latents: _Latents | None = None,
        begin: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Append slots to every row, as many as it has ids; rows may have none.

        latents fill the slots with the latent id, which come first in their rows; begin: rows (P,) that end with a
        begin slot, and the vectors (P, C) added there.
        """
        width = max(len(row) for row in ids)
        layout, device = self.sampler.layout, self.is_real.device
        padded = torch.full((self.rows, width), layout.pad)
        mrope, places = torch.zeros(3, self.rows, width, dtype=torch.long), torch.zeros(self.rows, width, 3)
        real = torch.zeros(self.rows, width, dtype=torch.bool)
        for i, row in enumerate(ids):
            if not row:
                continue
            count = len(row)
            padded[i, :count], real[i, :count] = torch.tensor(row), True
            span = latents.spans.get(i) if latents is not None else None
            mrope[:, i, :count], places[i, :count] = self._positions(i, count, span)
        self.is_real = torch.cat([self.is_real, real.to(device)], 1)
        slots = Slots(
            padded.to(device),
            mrope.to(device),
            places.to(device),
            latent=None if latents is None else latents.slots(),
            begin=None if begin is None else (begin[0], real.sum(1).to(device)[begin[0]] - 1, begin[1]),
            attend=None if bool(self.is_real.all()) else self.is_real,
        )
        states = self.sampler.pretzel.read(slots, self.cache)
        last = real.sum(1).to(device) - 1
        moved = (last >= 0).nonzero().flatten()
        self.h[moved], self.g[moved] = states.h[moved, last[moved]], states.g[moved, last[moved]].to(self.g.dtype)

    def _positions(self, row: int, count: int, span: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        cursor = self.cursors[row]
        return cursor.text(count) if span is None else cursor.latents(*span)

    def restart(self, rows: Sequence[int]) -> None:
        """Start these rows anew: their earlier positions are masked from now on."""
        self.is_real[list(rows)] = False
        for row in rows:
            self.cursors[row] = Cursor(self.sampler.layout.grid)

    def fork(self, copies: int = 1) -> Branch:
        """A copy with each row repeated `copies` times; the two never share memory."""
        twin = Branch(self.sampler, self.rows * copies)
        twin.cache = self.cache.fork(copies)
        twin.is_real = self.is_real.repeat_interleave(copies, 0)
        twin.cursors = [replace(c) for c in self.cursors for _ in range(copies)]
        twin.h, twin.g = (t.repeat_interleave(copies, 0) for t in (self.h, self.g))
        return twin


@dataclass(frozen=True, slots=True)
class _Latents:
    """Latents [first, last) of the pictures in some rows, embedded for both streams."""

    rows: Tensor  # (R,)
    adapted: Tensor  # (R, n, E)
    base: Tensor  # (R, n, C)
    spans: dict[int, tuple[int, int]]  # by row

    def slots(self) -> Latent:
        count = self.adapted.shape[1]
        at = torch.arange(count, device=self.rows.device).expand(len(self.rows), -1)
        row = self.rows[:, None].expand(-1, count)
        return Latent(row.flatten(), at.flatten(), self.adapted.flatten(0, 1), self.base.flatten(0, 1))


# -- rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ReplyLimits(Config):
    """Limits of a reply: tokens and images. `pictures` 0: words only; temperature 0: the likeliest token."""

    tokens: Natural = 64
    pictures: Natural = 1
    temperature: Weight = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokens + self.pictures:
            raise ConfigError(f"{self}: expected room for a token or a picture.")


@dataclass(slots=True)
class _Row:
    """State of one row while it replies."""

    seed: int
    generator: torch.Generator
    doing: Literal["text", "draw", "close", "done"] = "text"
    tokens: int = 0
    pictures: int = 0
    drawn: int = 0  # latents of the current image
    log_prob: float = 0.0
    unconditional_log_prob: float = 0.0
    reason: Literal["end", "limit"] = "end"


@dataclass(slots=True)
class LatentBuffers:
    """Latents of every row: those of the current image, and those of the previous one."""

    u: Tensor  # (B, N + 1, D), last row zero
    z: Tensor  # (B, N, D)
    previous: Tensor  # (B, N + 1, D)
    has_previous: Tensor  # (B,) bool

    def fork(self, copies: int) -> LatentBuffers:
        tensors = (getattr(self, name).repeat_interleave(copies, 0) for name in LatentBuffers.__slots__)
        return LatentBuffers(*tensors)


class BatchDecoder:
    """B conversations side by side: `read` and `see` append given words and images, `reply` lets the model go on."""

    def __init__(self, sampler: Sampler, rows: int) -> None:
        self.sampler, self.rows = sampler, rows
        self.conditional = Branch(sampler, rows)
        self.unconditional: Branch | None = None  # the unconditional branch, while pictures are drawn
        deep = sampler.components.cfg.flow.deep
        shape = rows, deep.num_latents + 1, deep.dim
        zeros = torch.zeros(shape, dtype=sampler.dtype, device=sampler.components.device)
        flags = torch.zeros(rows, dtype=torch.bool, device=sampler.components.device)
        self.buffers = LatentBuffers(zeros, zeros[:, :-1].clone(), zeros.clone(), flags)

    def fork(self, copies: int = 1) -> BatchDecoder:
        """A copy with each row repeated `copies` times; the two never share memory."""
        twin = BatchDecoder(self.sampler, self.rows * copies)
        twin.conditional, twin.buffers = self.conditional.fork(copies), self.buffers.fork(copies)
        return twin

    # -- input

    def read(self, ids: Sequence[Sequence[int]]) -> None:
        """Append text to every row; a row may get none."""
        if any(ids):
            self.conditional.append(ids)

    @torch.no_grad()
    def see(self, rows: Sequence[int], x: Tensor, noise_level: float) -> Tensor:
        """Append a whole image to each of `rows`: x (R, N, D) latents at `noise_level`; returns their u (R, N, D)."""
        index = torch.tensor(rows, device=x.device)
        level = self._levels(len(rows), noise_level)
        u, _ = self.sampler.pretzel.flow.shallow(x.to(self.sampler.dtype), level)
        self._begin(index, level)
        self.buffers.u[index] = F.pad(u, (0, 0, 0, 1))
        self._put_latents(self.conditional, index, (0, u.shape[1]), level)
        self._close(rows)
        return u

    # -- output

    def reply(
        self, seeds: Sequence[int], config: ReplyLimits, rows: Sequence[int] | None = None, *, draws: bool = False
    ) -> Iterator[RowEvent]:
        """Let `rows` (all by default) reply until each has ended; `draws`: every reply begins with an image.

        Image and words of row i come from seeds[i] alone. Raises DataError if a latent is not finite.
        """
        active = range(self.rows) if rows is None else rows
        states = {row: _Row(seed, torch.Generator().manual_seed(seed)) for row, seed in zip(active, seeds, strict=True)}
        if draws and config.pictures < 1:
            raise ConfigError(
                "draws is True but pictures is 0; a reply that begins with an image needs pictures of at least 1."
            )
        if draws:
            yield from self._start([*states], states)
        while any(s.doing != "done" for s in states.values()):
            yield from self._step(states, config)
        self.unconditional = None

    @torch.no_grad()
    def _step(self, states: dict[int, _Row], config: ReplyLimits) -> list[RowEvent]:
        """Append one slot to every unfinished row; returns the events of this step."""
        events: list[RowEvent] = []
        ids: list[list[int]] = [[] for _ in range(self.rows)]
        starting: list[int] = []
        layout = self.sampler.layout
        for row, token in self._words(states, config).items():
            state = states[row]
            if token == layout.begin:
                starting.append(row)
                continue
            ids[row] = [token]
            state.tokens += 1
            if token == self._end:
                state.doing = "done"
                events.append(Ended(row, state.reason))
            else:
                events.append(Token(row, token))
        drawing = [r for r, s in states.items() if s.doing == "draw" and r not in starting]
        if drawing:
            self._draw_next(drawing, states)
            for row in drawing:
                ids[row] = [layout.latent]
        for row, state in states.items():
            if state.doing == "close":
                ids[row], state.doing = [layout.end], "text"
        self._append(ids, drawing, states)
        if starting:
            events += self._start(starting, states)
        events += [Stepped(row, states[row].drawn, layout.num_latents) for row in drawing]
        return events + self._completed([r for r in drawing if states[r].drawn == layout.num_latents], states)

    @property
    def _end(self) -> int:
        return self.sampler.components.cfg.vlm.special.end

    def _words(self, states: dict[int, _Row], config: ReplyLimits) -> dict[int, int]:
        """Choose the next token of every row that is writing."""
        rows = [r for r, s in states.items() if s.doing == "text"]
        if not rows:
            return {}
        logits = self.sampler.pretzel.logits(self.conditional.h[rows], self.conditional.g[rows]).float()  # (R, V)
        s = self.sampler.components.cfg.vlm.special
        logits[:, [s.pad, s.user, s.assistant, s.vision_end, s.image_pad]] = -torch.inf
        logits[:, self.sampler.components.tokenizer.vocab :] = -torch.inf
        tokens: dict[int, int] = {}
        for row, scores in zip(rows, logits, strict=True):
            tokens[row] = self._choose(scores, states[row], config)
        return tokens

    def _choose(self, scores: Tensor, state: _Row, config: ReplyLimits) -> int:
        begin = self.sampler.layout.begin
        if state.pictures >= config.pictures:
            scores[begin] = -torch.inf
        elif not config.tokens:  # a picture or nothing
            return begin if scores[begin] > scores[self._end] else self._end
        if state.tokens >= config.tokens:
            state.reason = "limit"
            return self._end
        if not config.temperature:
            return int(scores.argmax())
        chances = (scores.cpu() / config.temperature).softmax(-1)
        return int(torch.multinomial(chances, 1, generator=state.generator))

    # -- pictures

    def _levels(self, count: int, level: float) -> Tensor:
        return torch.full((count,), level, dtype=self.sampler.dtype, device=self.sampler.components.device)

    @torch.no_grad()
    def _start(self, rows: list[int], states: dict[int, _Row]) -> list[RowEvent]:
        """Append begin slots, sample the prior, open the unconditional branch."""
        index = torch.tensor(rows, device=self.conditional.is_real.device)
        level = self._levels(len(rows), self.sampler.noise_level)
        self._begin(index, level)
        self.buffers.u[index] = 0
        shape = self.buffers.z.shape[1:]
        for row in rows:
            states[row].doing, states[row].drawn = "draw", 0
            states[row].log_prob = states[row].unconditional_log_prob = 0.0
            states[row].pictures += 1
            z = self.sampler.prior(shape, states[row].generator)
            self.buffers.z[row] = z.to(self.buffers.z)
        if self.sampler.config.guidance or self.sampler.config.edit_guidance:
            self._begin_unconditional(index, level)
        return [Begun(row) for row in rows]

    def _begin(self, index: Tensor, level: Tensor) -> None:
        """Append a begin slot to each of these rows."""
        previous, has = self.buffers.previous[index], self.buffers.has_previous[index]
        added = self.sampler.pretzel.inputs.begins(level, previous, has)
        ids: list[list[int]] = [[] for _ in range(self.rows)]
        for row in index.tolist():
            ids[row] = [self.sampler.layout.begin]
        self.conditional.append(ids, begin=(index, added))

    def _begin_unconditional(self, index: Tensor, level: Tensor) -> None:
        """Start these rows of the unconditional branch: the empty prompt and a begin slot."""
        self.unconditional = self.unconditional or Branch(self.sampler, self.rows)
        self.unconditional.restart(index.tolist())
        empty = self.sampler.components.tokenizer.drawing_prompt("")
        ids: list[list[int]] = [[] for _ in range(self.rows)]
        for row in index.tolist():
            ids[row] = empty
        self.unconditional.append(ids, begin=(index, self.sampler.pretzel.inputs.begins(level, None, None)))

    def _draw_next(self, rows: list[int], states: dict[int, _Row]) -> None:
        """Sample the next latent of every row that is drawing from its z (eq. 3.5)."""
        index = torch.tensor(rows, device=self.conditional.is_real.device)
        at = torch.tensor([states[r].drawn for r in rows], device=index.device)
        deep = self.sampler.pretzel.flow.deep
        conditional = deep.affine(self.conditional.g[index][:, None])
        affine, unconditional = conditional, None
        if self.unconditional is not None:
            unconditional = deep.affine(self.unconditional.g[index][:, None])
            affine = conditional.guide(unconditional, self._strengths(index, at), self.sampler.config.rule)
        u = affine.denormalize(self.buffers.z[index, at][:, None])  # (R, 1, D)
        finite = torch.isfinite(u).flatten(1).all(1)
        if not bool(finite.all()):
            bad = [states[row].seed for row, is_good in zip(rows, finite.tolist(), strict=True) if not is_good]
            raise DataError(f"latents of seeds {bad} are not finite; try a lower guidance.")
        self.buffers.u[index, at] = u[:, 0].to(self.buffers.u.dtype)
        self._note(rows, states, (conditional, unconditional), u)

    def _strengths(self, index: Tensor, at: Tensor) -> Tensor:
        """Guidance (R, 1, 1) of latents number `at` (R,) of the images that rows `index` are drawing."""
        config, buffers = self.sampler.config, self.buffers
        first_or_later = buffers.u.new_tensor([config.strength(follows=f) for f in (False, True)])
        guidance = first_or_later[buffers.has_previous[index].long()]
        return strengths(guidance, config.schedule, at.to(guidance), buffers.z.shape[1])[:, None, None]

    def _note(
        self, rows: list[int], states: dict[int, _Row], branches: tuple[Affine, Affine | None], u: Tensor
    ) -> None:
        """Add the log density of the new latents under both branches to their rows."""
        conditional, unconditional = branches
        gained = conditional.log_prob(u)[:, 0].tolist()
        without = gained if unconditional is None else unconditional.log_prob(u)[:, 0].tolist()
        for row, a, b in zip(rows, gained, without, strict=True):
            states[row].log_prob += a
            states[row].unconditional_log_prob += b
            states[row].drawn += 1

    def _append(self, ids: list[list[int]], drawing: list[int], states: dict[int, _Row]) -> None:
        """Append the next ids of every row; latents just sampled go into both branches."""
        if not any(ids):
            return
        latents = None
        if drawing:
            index = torch.tensor(drawing, device=self.conditional.is_real.device)
            spans = {r: (states[r].drawn - 1, states[r].drawn) for r in drawing}
            level = self._levels(len(drawing), self.sampler.noise_level)
            latents = self._embedded(index, spans, level, has=self.buffers.has_previous[index])
            if self.unconditional is not None:
                without_previous = torch.zeros_like(index, dtype=torch.bool)
                unconditional = self._embedded(index, spans, level, has=without_previous)
                only = [row if i in spans else [] for i, row in enumerate(ids)]
                self.unconditional.append(only, unconditional)
        self.conditional.append(ids, latents)

    def _put_latents(self, branch: Branch, index: Tensor, span: tuple[int, int], level: Tensor) -> None:
        """Append latents [first, last) of the images in several rows at once."""
        spans = {row: span for row in index.tolist()}
        ids: list[list[int]] = [[] for _ in range(self.rows)]
        for row in spans:
            ids[row] = [self.sampler.layout.latent] * (span[1] - span[0])
        branch.append(ids, self._embedded(index, spans, level, has=self.buffers.has_previous[index]))

    def _embedded(self, index: Tensor, spans: dict[int, tuple[int, int]], level: Tensor, *, has: Tensor) -> _Latents:
        targets = torch.stack([torch.arange(*spans[r], device=index.device) + 1 for r in index.tolist()])
        buffer, previous = self.buffers.u[index], self.buffers.previous[index]
        adapted, base = self.sampler.pretzel.latents(buffer, targets, level, previous, has)
        return _Latents(index, adapted, base, spans)

    def _close(self, rows: Sequence[int]) -> None:
        """Append an end slot to these rows; their image becomes the previous one."""
        ids: list[list[int]] = [[] for _ in range(self.rows)]
        for row in rows:
            ids[row] = [self.sampler.layout.end]
        self.conditional.append(ids)
        self._set_previous(rows)

    def _set_previous(self, rows: Sequence[int]) -> None:
        index = list(rows)
        self.buffers.previous[index] = self.buffers.u[index]
        self.buffers.has_previous[index] = True

    def _completed(self, rows: list[int], states: dict[int, _Row]) -> list[RowEvent]:
        """Decode finished images; the cache keeps the latents that were sampled."""
        if not rows:
            return []
        sampler, level = self.sampler, self.sampler.noise_level
        u = self.buffers.u[rows, :-1]
        levels = self._levels(len(rows), level)
        x = sampler.pretzel.flow.shallow.inverse(u, levels, sampler.config.shallow_solver)
        images = sampler.components.codec.decode(x.to(sampler.components.flow.deep.head.weight.dtype))
        self._set_previous(rows)
        events: list[RowEvent] = []
        for i, row in enumerate(rows):
            state = states[row]
            state.doing = "close"
            unconditional = None if self.unconditional is None else state.unconditional_log_prob
            events.append(Completed(row, DecodedImage(x[i], u[i], level, images[i], state.log_prob, unconditional)))
        return events
