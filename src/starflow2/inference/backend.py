"""Interface of the code that runs both streams for the engine: lanes, one conversation each, and operations on them.

A lane holds the keys, values and last states of one sequence and, while an image is drawn, its latents. An image drawn
with guidance has a second lane, which reads no words (its blank lane). Two implementations: `lean` on packed weights,
and `streams` on any `JointStream`, slow and plain, which tests compare the first with.
Letters: M positions, N latents, D latent dim, E language width, C flow width, V vocabulary, P images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from starflow2.flow import Affine
from starflow2.flow.affine import Guidance
from starflow2.flow.solver import Solver
from starflow2.models.protocols import Codec

__all__ = ["Backend", "Begin", "Chunk", "Drawn", "LaneMark", "NewImage", "Pair", "Span", "decoded_one_by_one"]


@dataclass(frozen=True, slots=True)
class Begin:
    """The begin slot of an image among new positions: the noise level to come, and the image before it, if any."""

    at: int
    level: float
    reference: Tensor | None  # (N + 1, D), its last row zero


@dataclass(frozen=True, slots=True)
class Span:
    """Latents [first, last) of an image among new positions, from `at` on."""

    at: int
    first: int
    last: int
    u: Tensor  # (N + 1, D), its last row zero
    level: float
    reference: Tensor | None  # (N + 1, D)


@dataclass(frozen=True, slots=True)
class Chunk:
    """New positions of one lane: token ids, M-RoPE ids (3, M) and flow positions (M, 3); at most one image begins."""

    ids: Sequence[int]
    mrope: Tensor
    places: Tensor
    span: Span | None = None
    begin: Begin | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class NewImage:
    """An image to draw in a lane whose last position is a begin slot."""

    z: Tensor  # (N, D)
    level: float
    strength: Tensor  # (N,) guidance at each latent
    mrope: Tensor  # (3, N)
    places: Tensor  # (N, 3)
    reference: Tensor | None  # (N + 1, D)


@dataclass(frozen=True, slots=True)
class Pair:
    """The lanes of an image that is being drawn at a noise level; blank: None without guidance."""

    lane: int
    blank: int | None
    level: float
    rule: Guidance = "starflow"


@dataclass(frozen=True, slots=True)
class Drawn:
    """A finished image: u (N, D), and the Gaussians it was predicted to have in its lane and in the blank one."""

    u: Tensor
    conditional: Affine  # (1, N, D)
    unconditional: Affine | None


@dataclass(frozen=True, slots=True)
class LaneMark:
    """A state of a lane to return to; h: (E,), g: (C,) states at its last position."""

    length: int
    h: Tensor
    g: Tensor


def decoded_one_by_one(codec: Codec, x: Tensor) -> Tensor:
    """`Backend.pixels` in torch, whose sums depend on how many images it decodes together."""
    return torch.cat([codec.decode(one[None]) for one in x])


class Backend(Protocol):
    """Both streams over lanes. One thread at a time; lanes are numbers that stay the same until they are closed."""

    @property
    def name(self) -> str:
        """The path that runs, for users."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of latents."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all lanes."""
        ...

    @property
    def capacity(self) -> int:
        """Positions for which the lanes have room."""
        ...

    def expect(self, lanes: int) -> None:
        """Make room at once for lanes that are about to be opened; otherwise memory grows lane by lane."""
        ...

    def open(self) -> int:
        """A new empty lane."""
        ...

    def close(self, lane: int) -> None: ...

    def fork(self, lane: int) -> int:
        """A new lane with the same past, ready to draw if it is; the two never share memory.

        Where an image starts and its strength are those of its own lane: a fork may be the blank lane of any image.
        """
        ...

    def bytes_for(self, lanes: int, positions: int) -> int:
        """Bytes that all lanes would take with this many more lanes and room for `positions` in one of them."""
        ...

    def reserve(self, lane: int, positions: int) -> None:
        """Make room for this many positions in all in a lane."""
        ...

    def trim(self) -> None:
        """Give memory back that no lane needs."""
        ...

    def length(self, lane: int) -> int:
        """Positions that a lane holds."""
        ...

    def mark(self, lane: int) -> LaneMark: ...

    def restore(self, lane: int, mark: LaneMark) -> None:
        """Drop everything after a mark; what came before stays bit-equal."""
        ...

    def append(self, lane: int, chunk: Chunk) -> None:
        """Read new positions of one lane in one pass."""
        ...

    def append_each(self, lanes: Sequence[int], chunks: Sequence[Chunk]) -> None:
        """Read new positions of several lanes, of each its own chunk."""
        ...

    def logits(self, lanes: Sequence[int]) -> Tensor:
        """Next-token logits (n, V) after the last position of each lane."""
        ...

    def start(self, lane: int, image: NewImage) -> None:
        """Make a lane ready to draw."""
        ...

    def arrange(self, drawing: Sequence[Pair], writing: Sequence[int]) -> None:
        """Tell which lanes the coming steps are about."""
        ...

    def draw(self, pairs: Sequence[Pair], count: int) -> None:
        """Sample the next `count` latents of every image (eq. 3.5), and read them as far as another one follows.

        The last latent of an image is sampled but not read; who goes on appends it (`Span` of one latent). Nothing is
        checked: an image that is not finite shows when it is done.
        """
        ...

    def drawn(self, pair: Pair) -> Drawn:
        """The image of a lane, all of whose latents are sampled."""
        ...

    def shallow(self, x: Tensor, level: float) -> Tensor:
        """x (1, N, D) -> u through the shallow blocks."""
        ...

    def unshallow(self, u: Tensor, level: float, solver: Solver) -> Tensor:
        """u (P, N, D) -> x, the inverse of `shallow`."""
        ...

    def pixels(self, codec: Codec, x: Tensor) -> Tensor:
        """x (P, N, D) -> images (P, 3, height, width) by the codec, each with the same bits in any company."""
        ...

    def state(self, lane: int) -> dict[str, Tensor]:
        """All that a lane holds, for a file."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> int:
        """A new lane from `state`. Raises ShapeError for one that does not fit."""
        ...
