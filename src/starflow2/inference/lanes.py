"""Static buffers of many sequences, one slot each: keys and values written in place, last states, images being drawn.

A lane is a number that stays; the slot it has may change, so that lanes that are stepped together are neighbours and
idle ones are never computed. Buffers grow and shrink with the longest lane, not with the work that was done.
Letters: S slots, N latents, D latent dim, E language width, C flow width, K head dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from starflow2.inference.packed import PackedWeights

__all__ = ["STEP", "KeyValues", "Lanes"]

STEP = 64  # positions by which the capacity grows, and to which the visible part of it is rounded
ALIGNED = 64  # bytes: the widest register
FEW = 2.0  # slots for each lane, from which on memory is given back: seldom, as all lanes are copied


class KeyValues:
    """Keys and values of a stack: (depth, 2, S, heads, capacity, K), position p of slot s at [layer, 0 or 1, s, :, p].

    Zero where nothing was written: what is masked must be finite.
    """

    def __init__(self, depth: int, slots: int, heads: int, capacity: int, dim: int, like: Tensor) -> None:
        self.buffer = _zeros((depth, 2, slots, heads, capacity, dim), like)
        self._rows = [layer.view(-1, dim) for layer in self.buffer]
        index = torch.arange(2 * slots * heads, device=like.device).view(2, slots, heads) * capacity
        self._first = index.transpose(0, 1).contiguous()  # (S, 2, heads), row of each slot's position 0
        self._views: dict[tuple[int, int, int], list[tuple[Tensor, Tensor]]] = {}

    def index(self, slots: slice | Tensor, position: Tensor) -> Tensor:
        """Rows of keys and values of R positions, one each in `slots`: (R, 2 * heads)."""
        return (self._first[slots] + position[:, None, None]).flatten(1)

    def write(self, layer: int, index: Tensor, kv: Tensor) -> None:
        """Store kv (R, 2 * heads, K) at `index`."""
        self._rows[layer].index_put_((index,), kv)  # index_copy_ would need rows that lie side by side, so a copy

    def views(self, first: int, lanes: int, visible: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (lanes, heads, visible, K) of neighbouring slots, layer by layer."""
        key = first, lanes, visible
        if key not in self._views:
            if len(self._views) > 256:
                self._views.clear()
            part = self.buffer[:, :, first : first + lanes, :, :visible]
            self._views[key] = [(layer[0], layer[1]) for layer in part]
        return self._views[key]


class Lanes:
    """All buffers, and which lane has which slot."""

    _STATE = (
        "length", "h", "g", "u", "z", "raw", "drawn", "added", "language_rotation", "flow_rotation", "strength",
    )  # fmt: skip
    length: Tensor  # (S,) int64
    h: Tensor  # (S, E) and
    g: Tensor  # (S, C): states at the last position
    # of the image that is being drawn
    u: Tensor  # (S, N + 1, D), last row zero
    z: Tensor  # (S, N, D)
    raw: Tensor  # (S, N, 2 D) log scale and mean of each latent, as predicted in this lane
    drawn: Tensor  # (S,) int64, latents sampled
    added: Tensor  # (S, N, C) added to the flow's input at the slot of each latent
    language_rotation: Tensor  # (S, N, K / 2) complex
    flow_rotation: Tensor  # (S, N, K / 2) complex
    strength: Tensor  # (S, N) guidance

    def __init__(self, weights: PackedWeights) -> None:
        self.weights = weights
        self.slots = self.capacity = 0
        self.lengths: list[int] = []  # by slot, the same numbers as `length`, on the host
        self.counts: list[int] = []  # likewise those of `drawn`
        self.slot_of: dict[int, int] = {}
        self._reserved: dict[int, int] = {}
        self._numbers = itertools.count()
        self._allocate(0, 0)

    # -- memory

    def _allocate(self, slots: int, capacity: int) -> None:
        w, deep, cfg = self.weights, self.weights.deep.cfg, self.weights.language_cfg
        states = torch.promote_types(w.dtype, torch.float32)
        like, complex_dtype = w.deep.head.new_empty(0, dtype=states), torch.complex(*2 * [torch.zeros(0, dtype=states)])
        count, dim = cfg.width // cfg.heads, deep.stack.head_dim
        self.language = KeyValues(cfg.depth, slots, cfg.kv_heads, capacity, count, w.embed)
        self.flow = KeyValues(deep.stack.depth, slots, deep.stack.heads, capacity, dim, w.deep.head)
        shapes = {
            "h": (cfg.width,), "g": (deep.stack.width,), "u": (deep.num_latents + 1, deep.dim),
            "z": (deep.num_latents, deep.dim), "raw": (deep.num_latents, 2 * deep.dim),
            "added": (deep.num_latents, deep.stack.width), "strength": (deep.num_latents,),
        }  # fmt: skip
        for name, shape in shapes.items():
            setattr(self, name, _zeros((slots, *shape), like))
        for name, pairs in (("language_rotation", count // 2), ("flow_rotation", dim // 2)):
            setattr(self, name, complex_dtype.new_zeros(slots, deep.num_latents, pairs, device=like.device))
        self.length, self.drawn = (torch.zeros(slots, dtype=torch.int64, device=like.device) for _ in range(2))
        self.slots, self.capacity = slots, capacity

    def _resize(self, slots: int, capacity: int) -> None:
        """Move all lanes into buffers of another size."""
        old = {name: getattr(self, name) for name in self._STATE}
        caches = self.language, self.flow
        order = sorted(self.slot_of, key=self.slot_of.__getitem__)
        source = [self.slot_of[lane] for lane in order]
        self._allocate(slots, capacity)
        self.lengths, self.counts = (
            [numbers[s] for s in source] + [0] * (slots - len(source)) for numbers in (self.lengths, self.counts)
        )
        self.slot_of = {lane: slot for slot, lane in enumerate(order)}
        if not source:
            return
        kept = max(self.lengths)
        kept_slots = slice(0, len(source)) if source == list(range(len(source))) else source
        for new, cache in zip((self.language, self.flow), caches, strict=True):
            new.buffer[:, :, : len(source), :, :kept] = cache.buffer[:, :, kept_slots, :, :kept]
        for name, value in old.items():
            getattr(self, name)[: len(source)] = value[kept_slots]

    def bytes_for(self, lanes: int, positions: int) -> int:
        """Bytes with this many more lanes, one of them of `positions`."""
        slots, longest = len(self.slot_of) + lanes, max([positions, *self._reserved.values()])
        return self._slot_bytes(_rounded(longest)) * slots

    def _slot_bytes(self, capacity: int) -> int:
        caches = (self.language.buffer, self.flow.buffer)
        per_position = sum(c.shape[0] * 2 * c.shape[3] * c.shape[5] * c.element_size() for c in caches)
        states = sum(getattr(self, n)[:0].new_empty(1, *getattr(self, n).shape[1:]).nbytes for n in self._STATE)
        return per_position * capacity + states

    @property
    def nbytes(self) -> int:
        return self._slot_bytes(self.capacity) * self.slots

    # -- lanes

    def expect(self, lanes: int) -> None:
        """Make room for this many more lanes in one step."""
        if len(self.slot_of) + lanes > self.slots:
            self._resize(len(self.slot_of) + lanes, self.capacity)

    def open(self) -> int:
        if len(self.slot_of) == self.slots:
            self.expect(max(1, self.slots // 4))
        lane, used = next(self._numbers), set(self.slot_of.values())
        slot = next(s for s in range(self.slots) if s not in used)
        self.slot_of[lane], self._reserved[lane] = slot, 0
        return lane

    def close(self, lane: int) -> None:
        self.truncate(lane, 0)
        del self.slot_of[lane], self._reserved[lane]

    def reserve(self, lane: int, positions: int) -> None:
        """Make room for this many positions in all."""
        self._reserved[lane] = positions
        if positions > self.capacity:
            self._resize(self.slots, _rounded(max(self._reserved.values())))

    def trim(self) -> None:
        """Give memory back that no lane needs; what is left has room for `STEP` more than the longest at most."""
        longest, slots = max(self._reserved.values(), default=0), len(self.slot_of)
        if self.capacity > longest + STEP or self.slots > max(slots + 2, FEW * slots):
            self._resize(slots, _rounded(longest))

    def truncate(self, lane: int, length: int) -> None:
        """Drop positions from `length` on; what was there is wiped, or a value that is not finite would outlive it."""
        slot = self.slot_of[lane]
        end = min(self.lengths[slot] + 1, self.capacity)  # a pass may have written one more
        for cache in (self.language, self.flow):
            cache.buffer[:, :, slot, :, length:end] = 0
        self.set_length(slot, length)

    def set_length(self, slot: int, length: int) -> None:
        self.lengths[slot] = length
        self.length[slot] = length

    def copy(self, source: int, target: int) -> None:
        """Let one lane hold what another does."""
        a, b = self.slot_of[source], self.slot_of[target]
        length = self.lengths[a]
        for cache in (self.language, self.flow):
            cache.buffer[:, :, b, :, :length] = cache.buffer[:, :, a, :, :length]
        for name in self._STATE:
            getattr(self, name)[b] = getattr(self, name)[a]
        self.lengths[b], self.counts[b] = length, self.counts[a]

    # -- neighbours

    def arrange(self, *groups: Sequence[int]) -> None:
        """Give the lanes of each group neighbouring slots, the first group from slot 0 on."""
        first = 0
        for group in groups:
            end = first + len(group)
            members = set(group)
            lane_at = {slot: lane for lane, slot in self.slot_of.items()}
            strangers = [slot for slot in range(first, end) if lane_at.get(slot) not in members]
            for lane in group:
                if not first <= self.slot_of[lane] < end:
                    self._exchange(lane, lane_at.get(strangers[-1]), strangers.pop())
            first = end

    def _exchange(self, lane: int, other: int | None, slot: int) -> None:
        """Move a lane to `slot`, and the lane that has it, if any, to the one it leaves."""
        old = self.slot_of[lane]
        both, turned = [old, slot], [slot, old]
        for cache in (self.language, self.flow):
            used = max(self.lengths[old], self.lengths[slot]) + 1  # a pass may have written one more
            cache.buffer[:, :, both, :, :used] = cache.buffer[:, :, turned, :, :used]
        for name in self._STATE:
            value = getattr(self, name)
            value[both] = value[turned]
        for numbers in (self.lengths, self.counts):
            numbers[old], numbers[slot] = numbers[slot], numbers[old]
        self.slot_of[lane] = slot
        if other is not None:
            self.slot_of[other] = old


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros in the dtype and on the device of `like`; on a CPU, memory that is only taken where it is written.

    `torch.zeros` writes all of it. Numpy asks the system for zeros, and for large pages, which are fewer to look up.
    """
    if like.device.type != "cpu" or type(like) is not Tensor:
        return like.new_zeros(shape)
    size = math.prod(shape) * like.element_size()
    room = np.zeros(size + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return torch.from_numpy(room[start : start + size]).view(like.dtype).view(shape)


def _rounded(positions: int) -> int:
    return -(-positions // STEP) * STEP
