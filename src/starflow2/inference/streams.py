"""Lanes over any `JointStream`, one row at a time and every latent of every branch by itself: slow and plain.

For streams that cannot be packed (the baseline of `research.mot`, other language models), and as the twin that tests
compare faster forms with. Not here: anything that makes it fast.
Letters: M positions, N latents, D latent dim, V vocabulary, P images.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow2.flow import Affine
from starflow2.flow.solver import SEQUENTIAL, Solver
from starflow2.inference.backend import Chunk, Drawn, LaneMark, NewImage, Pair, Span, decoded_one_by_one
from starflow2.models.joint_stream import JointStream, Latent, PretzelCache, Slots
from starflow2.models.protocols import Codec
from starflow2.nn import Cache

__all__ = ["StreamBackend"]


@dataclass(slots=True)
class _Lane:
    cache: PretzelCache
    h: Tensor  # (E,)
    g: Tensor  # (C,)
    image: NewImage | None = None
    u: Tensor | None = None  # (N + 1, D), last row zero
    predicted: list[Affine] = field(default_factory=list)  # (1, 1, D) of each latent


class StreamBackend:
    """Lanes over a `JointStream`, which is only ever asked to `read`."""

    name = "streams"

    def __init__(self, stream: JointStream, dtype: torch.dtype) -> None:
        """dtype: of latents, that of the stream's flow or better."""
        self.stream, self.dtype = stream, dtype
        self._lanes: dict[int, _Lane] = {}
        self._numbers = itertools.count()

    @property
    def device(self) -> torch.device:
        return self.stream.flow.deep.head.weight.device

    # -- lanes

    @property
    def nbytes(self) -> int:
        return sum(lane.cache.nbytes for lane in self._lanes.values())

    @property
    def capacity(self) -> int:
        return max((lane.cache.length for lane in self._lanes.values()), default=0)

    def expect(self, lanes: int) -> None:
        """Nothing: caches grow."""

    def open(self) -> int:
        number = next(self._numbers)
        widths = self.stream.vlm.width, self.stream.flow.deep.cfg.stack.width
        h, g = (torch.zeros(width, dtype=self.dtype, device=self.device) for width in widths)
        self._lanes[number] = _Lane(self.stream.new_cache(), h, g)
        return number

    def close(self, lane: int) -> None:
        del self._lanes[lane]

    def fork(self, lane: int) -> int:
        number, old = next(self._numbers), self._lanes[lane]
        u = None if old.u is None else old.u.clone()
        self._lanes[number] = _Lane(old.cache.fork(), old.h.clone(), old.g.clone(), old.image, u, list(old.predicted))
        return number

    def bytes_for(self, lanes: int, positions: int) -> int:
        """A guess: as many bytes for each position as there are now."""
        held = sum(self.length(lane) for lane in self._lanes)
        return self.nbytes + lanes * positions * (self.nbytes // max(1, held))

    def reserve(self, lane: int, positions: int) -> None:
        """Nothing: caches grow."""

    def trim(self) -> None:
        """Nothing: a closed lane leaves nothing behind."""

    def length(self, lane: int) -> int:
        return self._lanes[lane].cache.length

    def mark(self, lane: int) -> LaneMark:
        kept = self._lanes[lane]
        return LaneMark(kept.cache.length, kept.h.clone(), kept.g.clone())

    def restore(self, lane: int, mark: LaneMark) -> None:
        kept = self._lanes[lane]
        if mark.length:
            kept.cache.truncate(mark.length)
        else:
            kept.cache = self.stream.new_cache()
        kept.h, kept.g = mark.h, mark.g

    def arrange(self, drawing: Sequence[Pair], writing: Sequence[int]) -> None:
        """Nothing: every lane is by itself."""

    # -- reading

    @torch.no_grad()
    def append(self, lane: int, chunk: Chunk) -> None:
        kept = self._lanes[lane]
        device = self.device
        latent = begin = None
        if chunk.span is not None:
            span = chunk.span
            adapted, base = self._embedded(span)
            position = torch.arange(span.at, span.at + span.last - span.first, device=device)
            latent = Latent(torch.zeros_like(position), position, adapted[0], base[0])
        if chunk.begin is not None:
            reference, has_reference = self._reference(chunk.begin.reference)
            added = self.stream.inputs.begins(self._levels(1, chunk.begin.level), reference, has_reference)
            zero = torch.zeros(1, dtype=torch.int64, device=device)
            begin = zero, zero + chunk.begin.at, added
        ids, mrope, places = torch.tensor([list(chunk.ids)]), chunk.mrope[:, None], chunk.places[None]
        slots = Slots(ids.to(device), mrope.to(device), places.to(device), latent, begin)
        states = self.stream.read(slots, kept.cache)
        kept.h, kept.g = states.h[0, -1].clone(), states.g[0, -1].to(self.dtype).clone()

    def _levels(self, count: int, level: float) -> Tensor:
        return torch.full((count,), level, dtype=self.dtype, device=self.device)

    def _reference(self, reference: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if reference is None:
            return None, None
        return reference[None].to(self.dtype), torch.ones(1, dtype=torch.bool, device=reference.device)

    def _embedded(self, span: Span) -> tuple[Tensor, Tensor]:
        """Latents of a span for the language model (1, n, E) and the flow (1, n, C)."""
        targets = torch.arange(span.first + 1, span.last + 1, device=self.device)[None]
        buffer, level = span.u[None].to(self.dtype), self._levels(1, span.level)
        return self.stream.latents(buffer, targets, level, *self._reference(span.reference))

    def append_each(self, lanes: Sequence[int], chunks: Sequence[Chunk]) -> None:
        for lane, chunk in zip(lanes, chunks, strict=True):
            self.append(lane, chunk)

    @torch.no_grad()
    def logits(self, lanes: Sequence[int]) -> Tensor:
        return torch.cat([self.stream.logits(self._lanes[i].h[None], self._lanes[i].g[None]) for i in lanes])

    # -- drawing

    def start(self, lane: int, image: NewImage) -> None:
        kept = self._lanes[lane]
        kept.image, kept.predicted = image, []
        kept.u = F.pad(torch.zeros_like(image.z, dtype=self.dtype, device=self.device), (0, 0, 0, 1))

    def draw(self, pairs: Sequence[Pair], count: int) -> None:
        for _ in range(count):
            for pair in pairs:
                self._draw_one(pair)

    @torch.no_grad()
    def _draw_one(self, pair: Pair) -> None:
        lanes = [self._lanes[lane] for lane in (pair.lane, pair.blank) if lane is not None]
        main, deep = lanes[0], self.stream.flow.deep
        assert main.image is not None and main.u is not None
        index = len(main.predicted)
        affines = [deep.affine(lane.g[None, None]) for lane in lanes]  # (1, 1, D)
        guided = affines[0]
        if len(affines) > 1:
            guided = affines[0].guide(affines[1], main.image.strength[index].to(self.dtype), pair.rule)
        u = guided.denormalize(main.image.z[index].to(self.dtype).to(self.device))[0, 0]
        for number, lane, affine in zip((pair.lane, pair.blank), lanes, affines, strict=False):
            image, buffer = lane.image, lane.u
            assert number is not None and image is not None and buffer is not None
            lane.predicted.append(affine)
            buffer[index] = u
            if index + 1 < len(image.z):
                part = slice(index, index + 1)
                span = Span(0, index, index + 1, buffer, image.level, image.reference)
                pad = [0]  # the slot holds a latent, whatever its id
                self.append(number, Chunk(pad, image.mrope[:, part], image.places[part], span))

    def drawn(self, pair: Pair) -> Drawn:
        def predicted(lane: int) -> Affine:
            found = self._lanes[lane].predicted
            return Affine(torch.cat([a.mu for a in found], 1), torch.cat([a.log_scale for a in found], 1))

        u = self._lanes[pair.lane].u
        assert u is not None
        return Drawn(u[:-1].clone(), predicted(pair.lane), None if pair.blank is None else predicted(pair.blank))

    # -- shallow blocks

    @torch.no_grad()
    def shallow(self, x: Tensor, level: float) -> Tensor:
        return self.stream.flow.shallow(x.to(self.dtype), self._levels(len(x), level))[0]

    @torch.no_grad()
    def unshallow(self, u: Tensor, level: float, solver: Solver = SEQUENTIAL) -> Tensor:
        return self.stream.flow.shallow.inverse(u, self._levels(len(u), level), solver)

    def pixels(self, codec: Codec, x: Tensor) -> Tensor:
        return decoded_one_by_one(codec, x)

    # -- files

    def state(self, lane: int) -> dict[str, Tensor]:
        kept = self._lanes[lane]
        tensors = {"h": kept.h, "g": kept.g}
        for name, cache in (("vlm", kept.cache.vlm), ("flow", kept.cache.flow)):
            tensors |= {f"{name}.{key}": value for key, value in cache.state().items()}
        return tensors

    def load(self, state: Mapping[str, Tensor]) -> int:
        number = self.open()
        lane = self._lanes[number]
        lane.h, lane.g = state["h"].clone(), state["g"].clone()
        if "flow.0.k" in state:
            lane.cache = PretzelCache(*(Cache.from_state(_under(name, state)) for name in ("vlm", "flow")))
        return number


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names begin with `name` and a dot, without that."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
