"""The engine: many conversations, each stepped in its own modality with its own limits, settings and seed.

A row is one conversation: `open` it, `feed` it, let it `begin` a reply, and call `step` until its events end. Rows join
and leave between steps, and only rows that reply are computed. Given tokens are read together, in one pass just before
a reply needs them. A row that fails ends alone. Not here: arithmetic (`backend`), words and files (`session`), queues.
Letters: N latents, D latent dim, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow2.core.fields import of_kind
from starflow2.errors import ConfigError, DataError, PromptError, StateError
from starflow2.flow.affine import strengths
from starflow2.inference.backend import Backend, Begin, Chunk, LaneMark, NewImage, Pair, Span
from starflow2.inference.config import DrawConfig, ReplyLimits
from starflow2.inference.doors import InUse
from starflow2.inference.events import (
    Begun,
    Completed,
    DecodedImage,
    DrawnImage,
    Ended,
    Failed,
    RowEvent,
    Sampled,
    Stepped,
    Token,
)
from starflow2.inference.sampler import Sampler
from starflow2.models.sequence import Cursor

__all__ = ["Engine", "RowMark", "RowState"]

STRIDE = 8  # latents that are drawn in one step while no row writes
PASS = 512  # positions that are read in one pass, but for a row that has more
BESIDE = 4  # and beside rows that write, which wait meanwhile: docs/choices.md#steps-of-several-latents


@dataclass(frozen=True, slots=True)
class RowMark:
    """A state of a row to return to."""

    lane: LaneMark
    cursor: Cursor
    pending: tuple[int, ...]
    previous: Tensor | None
    unread: Span | None

    @property
    def length(self) -> int:
        return self.lane.length + len(self.pending)


@dataclass(frozen=True, slots=True)
class RowState:
    """A whole row outside the engine, all of it read: its lane, the image before the next one, and its positions."""

    lane: dict[str, Tensor]
    previous: Tensor | None  # (N + 1, D), its last row zero
    cursor: Cursor


@dataclass(slots=True)
class _Reply:
    """A reply that is being made."""

    seed: int
    generator: torch.Generator
    limits: ReplyLimits
    config: DrawConfig
    start: RowMark
    decodes: bool = True
    doing: Literal["text", "begin", "draw", "render"] = "text"
    tokens: int = 0
    pictures: int = 0
    drawn: int = 0  # latents of the current image
    pair: Pair | None = None
    room: int = 0  # positions that were reserved when it began

    @property
    def is_spent(self) -> bool:
        """True if the limits end the reply, whatever the model would say."""
        may_draw = not self.limits.tokens and self.pictures < self.limits.pictures
        return self.tokens >= self.limits.tokens and not may_draw


@dataclass(slots=True)
class _Row:
    lane: int
    cursor: Cursor
    pending: list[int]  # ids not yet read; the last latent of a drawn image, if it is not read either, comes first
    previous: Tensor | None = None  # (N + 1, D), the image before the next one, its last row zero
    unread: Span | None = None  # the last latent of a drawn image
    reply: _Reply | None = None


class Engine:
    """Conversations side by side on one model.

    >>> engine = Engine(sampler)  # doctest: +SKIP
    >>> row = engine.open()  # doctest: +SKIP
    >>> engine.feed(row, prompt_ids)  # doctest: +SKIP
    >>> engine.begin(row, ReplyLimits(), seed=0)  # doctest: +SKIP
    >>> for event in engine.run(): print(event)  # doctest: +SKIP
    """

    def __init__(self, sampler: Sampler, backend: Backend | None = None, *, budget: int | None = None) -> None:
        """budget: bytes that the caches of all rows may take; None: any number."""
        self.sampler = of_kind(sampler, Sampler, "sampler", "model.sampler() makes that of a model")
        self.backend, self.budget = backend or sampler.backend(), budget
        self._rows: dict[int, _Row] = {}
        self._numbers = itertools.count()
        self._blank: int | None = None  # a lane that has read the empty prompt and is ready to draw
        self.in_use = InUse()

    # -- rows

    def open(self) -> int:
        """A new, empty conversation; its number stays until it is released."""
        with self.in_use.claimed():
            return self._add(_Row(self.backend.open(), Cursor(self.sampler.layout.grid), []))

    def fork(self, row: int) -> int:
        """A new row with the same past as one that is not replying; what is pending there is read first, once."""
        with self.in_use.claimed():
            state = self._idle(row)
            self.read([row])
            return self._add(_Row(self.backend.fork(state.lane), replace(state.cursor), [], state.previous))

    def _add(self, row: _Row) -> int:
        number = next(self._numbers)
        self._rows[number] = row
        return number

    def expect(self, rows: int) -> None:
        """Make room at once for rows that are about to be opened."""
        with self.in_use.claimed():
            self.backend.expect(rows)

    def release(self, row: int) -> None:
        """Forget a conversation and give its memory back, whatever it is doing."""
        with self.in_use.claimed():
            state = self._row(row)
            self._end_image(state)
            self.backend.close(state.lane)
            del self._rows[row]
            self.backend.trim()

    def length(self, row: int) -> int:
        """Positions of a conversation, those to be read included."""
        state = self._row(row)
        return self.backend.length(state.lane) + len(state.pending)

    def states(self, row: int) -> tuple[Tensor, Tensor]:
        """States h (E,) and g (C,) at the last position of a row that is not replying, all of which is read now."""
        with self.in_use.claimed():
            state = self._idle(row)
            if state.pending:
                self._flush(row, state)
            lane = self.backend.mark(state.lane)
            return lane.h, lane.g

    @torch.no_grad()
    def next_logits(self, row: int) -> Tensor:
        """Next-token logits (V,) after the last position of a row that is not replying."""
        with self.in_use.claimed():
            state = self._idle(row)
            if state.pending:
                self._flush(row, state)
            logits = self.backend.logits([state.lane]).float()
            return (logits if self.sampler.adjust_logits is None else self.sampler.adjust_logits(logits))[0].cpu()

    def run(self) -> Iterator[RowEvent]:
        """Step until no row replies."""
        while self.is_busy:
            yield from self.step()

    def _room(self, row: int) -> int:
        return self.sampler.components.cfg.max_positions - self.length(row)

    def previous(self, row: int) -> Tensor | None:
        """Latents u (N, D) of the last image in a conversation."""
        previous = self._row(row).previous
        return None if previous is None else previous[:-1]

    def draft(self, row: int) -> Tensor | None:
        """Latents u (N, D) of the image that a row is drawing, zero where none is sampled yet; None without any."""
        reply = self._row(row).reply
        return None if reply is None or reply.pair is None or not reply.drawn else self.backend.drawn(reply.pair).u

    @property
    def is_busy(self) -> bool:
        """True while a row replies."""
        return any(state.reply is not None for state in self._rows.values())

    def _row(self, row: int) -> _Row:
        if row not in self._rows:
            raise StateError(f"row is {row}; expected one that is open: {sorted(self._rows)}.")
        return self._rows[row]

    def _idle(self, row: int) -> _Row:
        state = self._row(row)
        if state.reply is not None:
            raise StateError(f"row {row} is still replying; take its events to the end, or cancel it.")
        return state

    # -- input

    def feed(self, row: int, ids: Sequence[int]) -> None:
        """Append tokens to a conversation. Raises PromptError if it would be longer than the model reads."""
        with self.in_use.claimed():
            state = self._idle(row)
            self._check_room(row, len(ids))
            state.pending += ids

    @torch.no_grad()
    def see(self, row: int, x: Tensor, noise_level: float) -> Tensor:
        """Append an image that was encoded to latents x (N, D) at `noise_level`; returns its u (N, D)."""
        with self.in_use.claimed():
            state, layout = self._idle(row), self.sampler.layout
            self._check_room(row, layout.num_latents + 2)
            mark = self._mark(state)
            try:
                u = F.pad(self.backend.shallow(x[None], noise_level)[0], (0, 0, 0, 1))
                if state.unread is not None:
                    self._flush(row, state)
                self._make_room(row, state, len(state.pending) + layout.num_latents + 2)
                before = len(state.pending)
                begin = Begin(before, noise_level, state.previous)
                span = Span(before + 1, 0, layout.num_latents, u, noise_level, state.previous)
                ids = [*state.pending, layout.begin, *[layout.latent] * layout.num_latents, layout.end]
                parts = [state.cursor.text(before + 1), state.cursor.latents(), state.cursor.text(1)]
                self.backend.append(state.lane, _chunk(ids, parts, span, begin))
            except BaseException:
                self._restore(state, mark)
                raise
            state.pending, state.previous = [], u
            return u[:-1]

    def _check_room(self, row: int, wanted: int) -> None:
        if wanted > self._room(row):
            raise PromptError(
                f"the conversation has {self.length(row)} positions and this needs {wanted} more; this model reads up "
                f"to {self.sampler.components.cfg.max_positions}: rewind, or start a new one."
            )

    def _make_room(self, row: int, state: _Row, wanted: int, lanes: int = 0) -> None:
        """Reserve positions after those that are read. Raises StateError where the budget does not allow it."""
        positions = self.backend.length(state.lane) + wanted
        if state.reply is not None:
            positions = max(positions, state.reply.room)
        needed = 0 if self.budget is None else self.backend.bytes_for(lanes, positions)
        if self.budget is not None and needed > self.budget:
            raise StateError(
                f"row {row} needs room for {positions} positions, {needed} bytes with all other rows; the budget is "
                f"{self.budget}: release rows, or give a larger budget."
            )
        self.backend.reserve(state.lane, positions)

    def read(self, rows: Sequence[int]) -> None:
        """Read now what was fed to rows that are not replying, together; a reply would do it first."""
        with self.in_use.claimed():
            found = [(row, self._idle(row)) for row in rows]
            for row, state in found:
                self._make_room(row, state, len(state.pending))
            self._read_pending([state for _, state in found])

    def _flush(self, row: int, state: _Row) -> None:
        """Read what is pending in a row."""
        self._make_room(row, state, len(state.pending))
        self._read_pending([state])

    @torch.no_grad()
    def _read_pending(self, states: Sequence[_Row], *, begins: bool = False) -> None:
        """Read what is pending in rows that have room; `begins`: and begin slots of images that are to be drawn.

        Rows share a pass as long as it has no more than PASS positions, which bounds its memory.
        """
        unread = [state for state in states if state.pending or begins]
        while unread:
            ends = itertools.accumulate(len(state.pending) + begins for state in unread)
            count = max(1, sum(end <= PASS for end in ends))
            now, unread = unread[:count], unread[count:]
            chunks = [self._pending(state, begins=begins) for state in now]
            self.backend.append_each([state.lane for state in now], chunks)
            for state in now:
                state.pending, state.unread = [], None

    def _pending(self, state: _Row, *, begins: bool = False) -> Chunk:
        """Pending tokens and latents as new positions; the cursor advances over them."""
        ids = [*state.pending, *([self.sampler.layout.begin] if begins else [])]
        parts, count = [], len(ids)
        if state.unread is not None:
            parts.append(state.cursor.latents(state.unread.first, state.unread.last))
            count -= 1
        parts.append(state.cursor.text(count))
        begin = Begin(len(ids) - 1, self.sampler.noise_level, state.previous) if begins else None
        return _chunk(ids, parts, state.unread, begin)

    # -- output

    def begin(
        self,
        row: int,
        limits: ReplyLimits,
        seed: int,
        config: DrawConfig | None = None,
        *,
        draws: bool = False,
        decodes: bool = True,
    ) -> None:
        """Let a row reply from now on; `draws`: it begins with an image. Words and images come from `seed` alone.

        config: settings of this reply, of which precision and skips must be the engine's. decodes: images get pixels
        (`Completed`); else they stay latents (`Sampled`). Raises ConfigError, and StateError where the budget leaves
        no room.
        """
        with self.in_use.claimed():
            state, config = self._idle(row), config or self.sampler.config
            self._check_config(config)
            if draws and limits.pictures < 1:
                raise ConfigError(
                    "draws is True but pictures is 0; a reply that begins with an image needs pictures of at least 1."
                )
            per_image = self.sampler.layout.num_latents + 2
            used, pending = self.backend.length(state.lane), len(state.pending)
            room = max(self.sampler.components.cfg.max_positions - used, pending + 1)
            wanted = min(pending + limits.tokens + limits.pictures * per_image + 1, room)
            self._make_room(row, state, wanted, lanes=(1 + (self._blank is None)) * (limits.pictures > 0))
            generator = torch.Generator().manual_seed(seed)
            reply = _Reply(seed, generator, limits, config, self._mark(state), decodes, room=used + wanted)
            reply.doing = "begin" if draws else "text"
            state.reply = reply

    def _check_config(self, config: DrawConfig) -> None:
        own = self.sampler.config
        for name in ("precision", "skips"):
            if getattr(config, name) != getattr(own, name):
                raise ConfigError(
                    f"{name} is {getattr(config, name)!r}, the engine's {getattr(own, name)!r}; make another engine."
                )
        if self.sampler.start is not None and (config.guidance or config.edit_guidance):
            raise ConfigError("a sampler with a code draws without guidance; use guidance 0.")

    def cancel(self, row: int) -> None:
        """Take a reply back that is being made: the row is as it was before `begin`."""
        with self.in_use.claimed():
            state = self._row(row)
            if state.reply is not None:
                self._take_back(state)

    def _take_back(self, state: _Row) -> None:
        assert state.reply is not None
        self._end_image(state)
        start, state.reply = state.reply.start, None
        self._restore(state, start)

    def _end_image(self, state: _Row) -> None:
        """Close the blank lane of a row that draws."""
        if state.reply is not None and state.reply.pair is not None:
            if state.reply.pair.blank is not None:
                self.backend.close(state.reply.pair.blank)
            state.reply.pair = None

    @torch.no_grad()
    def step(self) -> list[RowEvent]:
        """Advance every row that replies: by a token, by the next latents, or by an image that becomes pixels."""
        with self.in_use.claimed():
            events = self._start_images()
            drawing, writing = self._doing("draw"), self._doing("text")
            pairs = [pair for _, _, reply in drawing if (pair := reply.pair) is not None]
            self.backend.arrange(pairs, [state.lane for _, state, _ in writing])
            events += self._write(writing) if writing else []
            events += self._draw(drawing, BESIDE if writing else STRIDE)
            return events + self._render()

    def _doing(self, what: str) -> list[tuple[int, _Row, _Reply]]:
        rows = ((number, state, state.reply) for number, state in self._rows.items())
        return [(number, state, reply) for number, state, reply in rows if reply is not None and reply.doing == what]

    # -- words

    def _write(self, writing: Sequence[tuple[int, _Row, _Reply]]) -> list[RowEvent]:
        """Choose the next token of every row that writes, and read the one before it."""
        over = [(row, state) for row, state, reply in writing if reply.is_spent or self._room(row) < 2]
        events: list[RowEvent] = [self._ended(row, state, "limit") for row, state in over]
        active = [(row, state, reply) for row, state, reply in writing if state.reply is not None]
        for row, state, _ in active:
            if len(state.pending) > 1:
                self._make_room(row, state, len(state.pending))
        self._read_pending([state for _, state, _ in active])
        for (row, state, reply), scores in zip(active, self._scores(active), strict=True):
            events += self._wrote(row, state, reply, self._choose(row, scores, reply))
        return events

    def _scores(self, active: Sequence[tuple[int, _Row, _Reply]]) -> Tensor:
        """Logits (n, V) of tokens that may follow, -inf for all others."""
        if not active:
            return torch.zeros(0, 0)
        logits = self.backend.logits([state.lane for _, state, _ in active]).float()
        if self.sampler.adjust_logits is not None:
            logits = self.sampler.adjust_logits(logits)
        s = self.sampler.components.cfg.vlm.special
        logits[:, [s.pad, s.user, s.assistant, s.vision_end, s.image_pad]] = -torch.inf
        logits[:, self.sampler.components.tokenizer.vocab :] = -torch.inf
        return logits.cpu()

    def _choose(self, row: int, scores: Tensor, reply: _Reply) -> int:
        begin, end, limits = self.sampler.layout.begin, self.sampler.components.cfg.vlm.special.end, reply.limits
        if reply.pictures >= limits.pictures or self._room(row) < self.sampler.layout.num_latents + 3:
            scores[begin] = -torch.inf
        if not limits.tokens:  # an image or nothing
            return begin if scores[begin] > scores[end] else end
        if not limits.temperature:
            return int(scores.argmax())
        above = scores.double() - scores.max()  # in float32 a temperature may be 0 or infinite
        chances = (above / limits.temperature).softmax(-1).float()
        return int(torch.multinomial(chances, 1, generator=reply.generator))

    def _wrote(self, row: int, state: _Row, reply: _Reply, token: int) -> list[RowEvent]:
        if token == self.sampler.layout.begin:
            reply.doing = "begin"
            return []
        if token == self.sampler.components.cfg.vlm.special.end:
            return [self._ended(row, state, "end")]
        state.pending.append(token)
        reply.tokens += 1
        return [Token(row, token)]

    def _ended(self, row: int, state: _Row, reason: Literal["end", "limit"]) -> Ended:
        state.pending.append(self.sampler.components.cfg.vlm.special.end)
        state.reply = None
        return Ended(row, reason)

    # -- images

    def _start_images(self) -> list[RowEvent]:
        """Read the begin slot of every row that is to draw, sample its prior and open its blank lane."""
        events, beginning = list[RowEvent](), self._doing("begin")
        guided = [reply for _, state, reply in beginning if reply.config.strength(follows=state.previous is not None)]
        if self.budget is None:
            self.backend.expect(len(guided) + (self._blank is None and bool(guided)))
        events += self._refused(beginning, lambda row, state, _: self._make_room(row, state, len(state.pending) + 1))
        ready = self._doing("begin")
        self._read_pending([state for _, state, _ in ready], begins=True)
        events += self._refused(ready, self._start)
        return events + [Begun(row) for row, state, reply in ready if state.reply is reply]

    def _refused(
        self, rows: Sequence[tuple[int, _Row, _Reply]], action: Callable[[int, _Row, _Reply], None]
    ) -> list[RowEvent]:
        """Do what rows need; a reply for which the budget has no room is taken back."""
        events: list[RowEvent] = []
        for row, state, reply in rows:
            try:
                action(row, state, reply)
            except StateError as error:
                self._take_back(state)
                events.append(Failed(row, error))
        return events

    def _start(self, row: int, state: _Row, reply: _Reply) -> None:
        """Make a row ready to draw whose begin slot is read."""
        layout, config = self.sampler.layout, reply.config
        z = self.sampler.prior((layout.num_latents, self.sampler.components.cfg.flow.deep.dim), reply.generator, config)
        guidance = config.strength(follows=state.previous is not None)
        index = torch.arange(layout.num_latents, dtype=torch.float64)
        rising = strengths(torch.tensor(guidance, dtype=torch.float64), config.schedule, index, layout.num_latents)
        strength = torch.as_tensor(rising).expand(layout.num_latents)
        mrope, places = replace(state.cursor).latents()
        image = NewImage(z, self.sampler.noise_level, strength, mrope, places, state.previous)
        self._make_room(row, state, layout.num_latents + 2, lanes=(1 + (self._blank is None)) * (guidance > 0))
        self.backend.start(state.lane, image)
        blank = self._open_blank(image) if guidance else None
        reply.pair = Pair(state.lane, blank, self.sampler.noise_level, config.rule)
        reply.doing, reply.drawn = "draw", 0
        reply.pictures += 1

    def _open_blank(self, image: NewImage) -> int:
        """A lane that draws the same image without words and without an image before it."""
        if self._blank is None:
            ids = self.sampler.components.tokenizer.drawing_prompt("")
            lane, cursor = self.backend.open(), Cursor(self.sampler.layout.grid)
            self.backend.reserve(lane, len(ids) + 1)
            begin = Begin(len(ids) - 1, image.level, None)
            self.backend.append(lane, _chunk(ids, [cursor.text(len(ids))], None, begin))
            mrope, places = cursor.latents()
            self.backend.start(lane, replace(image, mrope=mrope, places=places, reference=None))
            self._blank = lane
        blank = self.backend.fork(self._blank)
        self.backend.reserve(blank, self.backend.length(blank) + self.sampler.layout.num_latents + 1)
        return blank

    def _draw(self, drawing: Sequence[tuple[int, _Row, _Reply]], stride: int) -> list[RowEvent]:
        """Sample the next latents of every row that draws."""
        if not drawing:
            return []
        total = self.sampler.layout.num_latents
        count = min(stride, *(total - reply.drawn for _, _, reply in drawing))
        self.backend.draw([reply.pair for _, _, reply in drawing if reply.pair is not None], count)
        events: list[RowEvent] = []
        for row, _, reply in drawing:
            events += [Stepped(row, reply.drawn + i, total) for i in range(1, count + 1)]
            reply.drawn += count
            if reply.drawn == total:
                reply.doing = "render"
        return events

    def _render(self) -> list[RowEvent]:
        """Finish images whose latents are all drawn: those without pixels, and one of the others.

        All of the others where no other row waits.
        """
        ready = self._doing("render")
        with_pixels = [row for row, _, reply in ready if reply.decodes]
        if len(ready) < sum(state.reply is not None for state in self._rows.values()):
            with_pixels = with_pixels[:1]
        events, found = list[RowEvent](), dict[int, DrawnImage]()
        for row, state, reply in ready:
            if reply.decodes and row not in with_pixels:
                continue
            picture = self._drawn(reply)
            if picture is None:
                self._take_back(state)
                reason = f"latents of seed {reply.seed} are not finite; try a lower guidance."
                events.append(Failed(row, DataError(reason)))
                continue
            self._complete(state, reply, picture.u)
            if reply.decodes:
                found[row] = picture
            else:
                events.append(Sampled(row, picture))
        decoded = self._decoded(list(found.values()))
        return events + [Completed(row, picture) for row, picture in zip(found, decoded, strict=True)]

    def _drawn(self, reply: _Reply) -> DrawnImage | None:
        """The image that a reply has just drawn; None if it is not finite."""
        assert reply.pair is not None
        drawn = self.backend.drawn(reply.pair)
        if not bool(drawn.u.isfinite().all()):
            return None
        u, without = drawn.u[None], drawn.unconditional
        unconditional = None if without is None else float(without.log_prob(u).sum())
        return DrawnImage(drawn.u, float(drawn.conditional.log_prob(u).sum()), unconditional)

    def with_pixels(self, events: Sequence[RowEvent]) -> list[RowEvent]:
        """Events of this engine, in which every image has pixels: `Completed` for `Sampled`."""
        with self.in_use.claimed():
            drawn = [event for event in events if isinstance(event, Sampled)]
            decoded = iter(self._decoded([event.picture for event in drawn]))
            return [Completed(event.row, next(decoded)) if isinstance(event, Sampled) else event for event in events]

    @torch.no_grad()
    def _decoded(self, pictures: Sequence[DrawnImage]) -> list[DecodedImage]:
        if not pictures:
            return []
        level, solver = self.sampler.noise_level, self.sampler.config.shallow_solver
        latents = self.backend.unshallow(torch.stack([picture.u for picture in pictures]), level, solver)
        dtype = self.sampler.components.flow.deep.head.weight.dtype
        images = self.backend.pixels(self.sampler.components.codec, latents.to(dtype))
        return [
            DecodedImage(x, p.u, level, image, p.log_prob, p.unconditional_log_prob)
            for p, x, image in zip(pictures, latents, images, strict=True)
        ]

    def _complete(self, state: _Row, reply: _Reply, u: Tensor) -> None:
        """Go on to what follows an image, which from now on is the one before the next."""
        layout, buffer = self.sampler.layout, F.pad(u, (0, 0, 0, 1))
        self._end_image(state)
        count = layout.num_latents
        state.unread = Span(0, count - 1, count, buffer, self.sampler.noise_level, state.previous)
        state.pending, state.previous = [layout.latent, layout.end], buffer
        reply.doing = "text"

    # -- time and files

    def mark(self, row: int) -> RowMark:
        """The state of a row that is not replying, to `rewind` to."""
        with self.in_use.claimed():
            return self._mark(self._idle(row))

    def _mark(self, state: _Row) -> RowMark:
        lane = self.backend.mark(state.lane)
        return RowMark(lane, replace(state.cursor), tuple(state.pending), state.previous, state.unread)

    def rewind(self, row: int, mark: RowMark) -> None:
        """Forget everything since `mark`, which must be of this row; what came before stays bit-equal."""
        with self.in_use.claimed():
            self._restore(self._idle(row), mark)

    def _restore(self, state: _Row, mark: RowMark) -> None:
        self.backend.restore(state.lane, mark.lane)
        state.cursor, state.pending = replace(mark.cursor), list(mark.pending)
        state.previous, state.unread = mark.previous, mark.unread

    def save(self, row: int) -> RowState:
        """A copy of a whole row that is not replying; what is pending is read first."""
        with self.in_use.claimed():
            state = self._idle(row)
            if state.pending:
                self._flush(row, state)
            lane = {name: x.detach().clone() for name, x in self.backend.state(state.lane).items()}
            previous = None if state.previous is None else state.previous.clone()
            return RowState(lane, previous, replace(state.cursor))

    def load(self, saved: RowState) -> int:
        """A new row from a saved one, in an engine of the same model and precision. Raises ShapeError."""
        with self.in_use.claimed():
            previous = None if saved.previous is None else saved.previous.clone()
            return self._add(_Row(self.backend.load(saved.lane), replace(saved.cursor), [], previous))


def _chunk(ids: Sequence[int], parts: Sequence[tuple[Tensor, Tensor]], span: Span | None, begin: Begin | None) -> Chunk:
    """New positions from M-RoPE ids (3, m) and flow positions (m, 3) of their parts."""
    mrope, places = torch.cat([m for m, _ in parts], dim=1), torch.cat([p for _, p in parts])
    return Chunk(ids, mrope, places, span, begin)
