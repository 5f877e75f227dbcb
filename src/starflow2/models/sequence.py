"""Documents as tensors: segments of text and pictures, packed into rows, with the positions of both streams.

A document is a list of segments. A picture takes one slot to begin, one per latent and one to end; which picture
stands in a slot is an index, so that packing never touches pixels or latents. Not here: tokenizers and codecs.
Letters: B rows, T positions, N latents of one picture, P pictures of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from starflow2.errors import DataError

__all__ = [
    "IGNORE",
    "Batch",
    "Cursor",
    "Document",
    "Image",
    "Layout",
    "Pictures",
    "Segment",
    "Text",
    "TextRows",
    "image_mrope",
    "length_groups",
    "pack",
    "pad_rows",
    "text_mrope",
    "with_pictures",
]

IGNORE = -100  # label of positions that carry no next-token loss
_PASS_COST = 256


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids; `is_target`: they are to be predicted."""

    ids: tuple[int, ...]
    is_target: bool = False


@dataclass(frozen=True, slots=True)
class Image:
    """A picture, known by its place among the pictures of a batch; `is_target`: it is to be predicted."""

    is_target: bool = False


Segment = Text | Image
Document = Sequence[Segment]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a picture is spelled: its grid of latents, the ids around it, and the id that fills unused positions."""

    grid: tuple[int, int]
    begin: int
    end: int
    latent: int
    pad: int

    @property
    def num_latents(self) -> int:
        return self.grid[0] * self.grid[1]

    def ids(self, segment: Segment) -> list[int]:
        """Every slot of a segment as a token id."""
        if isinstance(segment, Text):
            return list(segment.ids)
        return [self.begin, *[self.latent] * self.num_latents, self.end]


@dataclass(slots=True)
class Cursor:
    """Where the next slot of a document stands, in the language model's positions and in the flow's.

    The flow sees text at (0, 0, step) and a latent at (row, column, step of its begin slot); see
    docs/choices.md#positions.
    """

    grid: tuple[int, int]
    mrope: int = 0
    step: int = 0

    def text(self, count: int) -> tuple[Tensor, Tensor]:
        """M-RoPE ids (3, count) and flow places (count, 3) of the next `count` tokens; moves on."""
        ids = torch.arange(self.mrope, self.mrope + count).expand(3, -1)
        places = torch.zeros(count, 3)
        places[:, 2] = torch.arange(self.step, self.step + count)
        self.mrope, self.step = self.mrope + count, self.step + count
        return ids, places

    def latents(self, first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor]:
        """The same, (3, n) and (n, 3), of latents [first, last) behind the begin slot; moves on with the last one."""
        ids, after = image_mrope(self.grid, self.mrope)
        last = ids.shape[1] if last is None else last
        if last == ids.shape[1]:
            self.mrope = after
        index = torch.arange(first, last)
        step = torch.full_like(index, self.step - 1)
        return ids[:, first:last], torch.stack([index // self.grid[1], index % self.grid[1], step], dim=-1).float()


@dataclass(frozen=True, slots=True)
class Pictures:
    """Where the pictures of a batch stand, in the order of its documents. All (P,)."""

    row: Tensor  # int64
    begin: Tensor  # int64, position of the begin slot; latent k stands at begin + 1 + k
    is_target: Tensor  # bool
    previous: Tensor  # int64, the picture before it in its document, -1 if none

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents packed into rows. The labels of a position are what the next one holds, where that is a target."""

    ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, IGNORE where nothing is to be predicted
    document: Tensor  # (B, T) int64, which document a position belongs to, -1 behind the last
    mrope: Tensor  # (3, B, T)
    places: Tensor  # (B, T, 3) float
    pictures: Pictures

    @property
    def attend(self) -> Tensor | None:
        """(B, T, T) bool, block-diagonal and causal; None where every row holds one document."""
        shares = (self.document != self.document[:, :1]) & (self.document >= 0)
        if not bool(shares.any()):
            return None
        same = self.document[:, :, None] == self.document[:, None]
        return same & torch.ones_like(same[0]).tril()

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        p = self.pictures
        pictures = Pictures(p.row.to(device), p.begin.to(device), p.is_target.to(device), p.previous.to(device))
        mrope, places = self.mrope.to(device), self.places.to(device)
        return Batch(self.ids.to(device), self.labels.to(device), self.document.to(device), mrope, places, pictures)


@dataclass(slots=True)
class _Row:
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    document: list[int] = field(default_factory=list)
    mrope: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)


def pack(documents: Sequence[Document], layout: Layout, width: int = 0) -> Batch:
    """Documents as rows of at most `width` positions, or of the longest document (0).

    Longest first, each into the first row that has room. Raises DataError for an empty document or one that is
    longer than `width`.

    >>> layout = Layout(grid=(1, 2), begin=1, end=2, latent=3, pad=0)
    >>> pack([[Text((7, 8)), Image(is_target=True)], [Text((9,))]], layout).ids
    tensor([[7, 8, 1, 3, 3, 2],
            [9, 0, 0, 0, 0, 0]])
    """
    lengths = [sum(len(layout.ids(s)) for s in document) for document in documents]
    if not lengths or min(lengths) == 0:
        raise DataError("cannot pack an empty document; give each at least one segment with one slot.")
    width = width or max(lengths)
    if max(lengths) > width:
        raise DataError(f"a document has {max(lengths)} positions; expected at most {width}.")
    rows: list[_Row] = []
    placed: dict[int, tuple[int, int]] = {}
    for i in sorted(range(len(documents)), key=lambda i: -lengths[i]):
        at = next((r for r, row in enumerate(rows) if len(row.ids) + lengths[i] <= width), len(rows))
        if at == len(rows):
            rows.append(_Row())
        placed[i] = (at, len(rows[at].ids))
        _write(rows[at], documents[i], i, layout)
    return _batch(rows, _pictures(documents, placed, layout), layout)


def _write(row: _Row, document: Document, index: int, layout: Layout) -> None:
    """Append a document to a row."""
    cursor, ids, told = Cursor(layout.grid), list[int](), list[bool]()
    for segment in document:
        own = layout.ids(segment)
        ids += own
        if isinstance(segment, Text):
            told += [segment.is_target] * len(own)
            pieces = [cursor.text(len(own))]
        else:  # only its begin is predicted as a token: what follows is drawn, and its end is certain
            told += [segment.is_target] + [False] * (len(own) - 1)
            pieces = [cursor.text(1), cursor.latents(), cursor.text(1)]
        row.mrope += [mrope for mrope, _ in pieces]
        row.places += [places for _, places in pieces]
    row.ids += ids
    row.labels += [ids[i] if told[i] else IGNORE for i in range(1, len(ids))] + [IGNORE]
    row.document += [index] * len(ids)


def _pictures(documents: Sequence[Document], placed: dict[int, tuple[int, int]], layout: Layout) -> Pictures:
    found: list[tuple[int, int, int, int]] = []
    for i, document in enumerate(documents):
        row, at = placed[i]
        previous = -1
        for segment in document:
            if isinstance(segment, Image):
                found.append((row, at, int(segment.is_target), previous))
                previous = len(found) - 1
            at += len(layout.ids(segment))
    columns = torch.tensor(found, dtype=torch.long).view(-1, 4).unbind(1)
    return Pictures(columns[0], columns[1], columns[2].bool(), columns[3])


def _batch(rows: Sequence[_Row], pictures: Pictures, layout: Layout) -> Batch:
    shape = len(rows), max(len(row.ids) for row in rows)
    ids, labels, document = (torch.full(shape, fill) for fill in (layout.pad, IGNORE, -1))
    mrope, places = torch.zeros(3, *shape, dtype=torch.long), torch.zeros(*shape, 3)
    for i, row in enumerate(rows):
        end = len(row.ids)
        ids[i, :end], labels[i, :end] = torch.tensor(row.ids), torch.tensor(row.labels)
        document[i, :end] = torch.tensor(row.document)
        mrope[:, i, :end], places[i, :end] = torch.cat(row.mrope, 1), torch.cat(row.places)
    return Batch(ids, labels, document, mrope, places, pictures)


def with_pictures(embeds: Tensor, seen: Tensor, batch: Batch) -> Tensor:
    """Embeddings (B, T, E) with pictures (P, N, E) put into their slots."""
    row = batch.pictures.row[:, None].expand(-1, seen.shape[1])
    at = batch.pictures.begin[:, None] + 1 + torch.arange(seen.shape[1], device=seen.device)
    return embeds.index_put((row, at), seen.to(embeds.dtype))


@dataclass(frozen=True, slots=True)
class TextRows:
    """Token rows of unequal length, padded at the right. ids: (B, T) int64, lengths: (B,)."""

    ids: Tensor
    lengths: Tensor

    @property
    def width(self) -> int:
        return int(self.ids.shape[1])

    def left_padded(self, states: Tensor) -> Tensor:
        """Per-position states (B, T, E) moved so that every row ends at the last position."""
        index = torch.arange(self.width, device=states.device)[None] - self.padding[:, None]
        index = index.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])
        return states.gather(1, index)

    @property
    def padding(self) -> Tensor:
        return self.width - self.lengths

    @property
    def left_attend(self) -> Tensor:
        """(B, T) bool, True at real positions once left-padded."""
        index = torch.arange(self.width, device=self.ids.device)
        return index[None] >= self.padding[:, None]

    @property
    def left_positions(self) -> Tensor:
        """(B, T, 3) flow positions (0, 0, index) of left-padded text; negative at padding."""
        index = torch.arange(self.width, device=self.ids.device)[None] - self.padding[:, None]
        zeros = torch.zeros_like(index)
        return torch.stack([zeros, zeros, index], dim=-1).float()


def pad_rows(rows: Sequence[Sequence[int]], pad: int) -> TextRows:
    """Rows of ids as one right-padded batch."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return TextRows(ids, torch.tensor([len(r) for r in rows]))


def text_mrope(batch: int, length: int, start: int = 0) -> Tensor:
    """M-RoPE ids of plain text: (3, B, T), all three axes count on from `start`."""
    return torch.arange(start, start + length).expand(3, batch, length)


def image_mrope(grid: tuple[int, int], start: int) -> tuple[Tensor, int]:
    """M-RoPE ids (3, N) of a picture that begins at `start`, and where text goes on after it."""
    rows, cols = grid
    index = torch.arange(rows * cols)
    positions = torch.stack([torch.zeros_like(index), index // cols, index % cols]) + start
    return positions, start + max(grid)


def length_groups(lengths: Sequence[int], extra: int) -> list[list[int]]:
    """Row indices as one or two groups of similar length, whichever wastes less on padding; none of no rows.

    `extra` positions follow each row. A second pass over the network costs about as much as the
    padding of `_PASS_COST` positions, so rows are split only where that pays. Exact: a mean over
    rows weighted by group size is the mean over all.
    """
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])

    def cost(first: int, last: int) -> int:
        return (last - first) * (lengths[order[last - 1]] + extra)

    whole = cost(0, len(order))
    best = min(
        range(1, len(order)),
        key=lambda k: cost(0, k) + cost(k, len(order)),
        default=0,
    )
    if not best or cost(0, best) + cost(best, len(order)) + _PASS_COST >= whole:
        return [order]
    return [order[:best], order[best:]]
