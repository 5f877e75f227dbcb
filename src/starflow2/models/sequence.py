"""Documents as tensors: segments of text and images, packed into rows, with the positions of both streams.

A document is a list of segments. An image takes one slot to begin, one per latent and one to end; a slot holds the
index of its image, so that packing never touches pixels or latents. Not here: tokenizers and codecs.
Letters: B rows, T positions, N latents of one image, P images of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from starflow2.errors import DataError
from starflow2.nn import ByDocument

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
_PASS_COST = 256  # positions of padding that cost as much as another pass over the network


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids. is_target: the model learns to predict them."""

    ids: tuple[int, ...]
    is_target: bool = False


@dataclass(frozen=True, slots=True)
class Image:
    """An image, identified by its order among those of a batch. is_target: the model learns to draw it."""

    is_target: bool = False


Segment = Text | Image
Document = Sequence[Segment]


@dataclass(frozen=True, slots=True)
class Layout:
    """Token ids of an image (begin, one per latent, end), its grid of latents, and the padding id."""

    grid: tuple[int, int]
    begin: int
    end: int
    latent: int
    pad: int

    @property
    def num_latents(self) -> int:
        return self.grid[0] * self.grid[1]

    def ids(self, segment: Segment) -> list[int]:
        """Token ids of all slots of a segment."""
        if isinstance(segment, Text):
            return list(segment.ids)
        return [self.begin, *[self.latent] * self.num_latents, self.end]


@dataclass(slots=True)
class Cursor:
    """Running positions of a document: those of its next slot, for the language model (M-RoPE) and for the flow.

    In the flow text is at (0, 0, step) and a latent at (row, column, step of its begin slot); see
    docs/choices.md#positions.
    """

    grid: tuple[int, int]
    mrope: int = 0
    step: int = 0

    def text(self, count: int) -> tuple[Tensor, Tensor]:
        """Advance over `count` tokens: their M-RoPE ids (3, count) and flow positions (count, 3)."""
        ids = torch.arange(self.mrope, self.mrope + count).expand(3, -1)
        places = torch.zeros(count, 3)
        places[:, 2] = torch.arange(self.step, self.step + count)
        self.mrope, self.step = self.mrope + count, self.step + count
        return ids, places

    def latents(self, first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor]:
        """M-RoPE ids (3, n) and flow positions (n, 3) of latents [first, last) of the image whose begin slot came last.

        Advances only over the image's last latent, so that an image may be read in pieces.
        """
        ids, after = image_mrope(self.grid, self.mrope)
        last = ids.shape[1] if last is None else last
        if last == ids.shape[1]:
            self.mrope = after
        index = torch.arange(first, last)
        step = torch.full_like(index, self.step - 1)
        return ids[:, first:last], torch.stack([index // self.grid[1], index % self.grid[1], step], dim=-1).float()


@dataclass(frozen=True, slots=True)
class Pictures:
    """Positions of the images of a batch, in the order of its documents. All (P,)."""

    row: Tensor  # int64
    begin: Tensor  # int64, position of the begin slot; latent k stands at begin + 1 + k
    is_target: Tensor  # bool
    previous: Tensor  # int64, index of the image before it in its document, -1 if none

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Batch:
    """Documents packed into rows. The label of a position is the token at the next one, where that is a target."""

    ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, IGNORE where nothing is to be predicted
    document: Tensor  # (B, T) int64, which document a position belongs to, -1 after the last
    mrope: Tensor  # (3, B, T)
    places: Tensor  # (B, T, 3) float
    pictures: Pictures
    shares_rows: bool  # True if some row holds more than one document
    sources: tuple[int, ...] = ()  # number of the source of each document in its mixture; () where there is none
    documents: ByDocument | None = None  # its attention without a mask over whole rows; None: by the mask

    @cached_property
    def attend(self) -> Tensor | ByDocument | None:
        """Which positions attend to which: `documents`, or `mask`."""
        return self.mask if self.documents is None else self.documents

    @cached_property
    def mask(self) -> Tensor | None:
        """(B, T, T) bool, block-diagonal and causal; None where every row holds one document.

        Built at the first access, from `shares_rows` and without waiting for the device, and kept.
        """
        if not self.shares_rows:
            return None
        return (self.document[:, :, None] == self.document[:, None]).tril()

    def by_document(self) -> Batch:
        """The batch with attention by document, for GPUs; on a CPU its mask is faster."""
        return replace(self, documents=ByDocument.of(self.document))

    def to(self, device: torch.device | str) -> Batch:
        """Copy of the batch on another device."""
        p = self.pictures
        pictures = Pictures(p.row.to(device), p.begin.to(device), p.is_target.to(device), p.previous.to(device))
        ids, labels, document = self.ids.to(device), self.labels.to(device), self.document.to(device)
        mrope, places = self.mrope.to(device), self.places.to(device)
        by_document = None if self.documents is None else self.documents.to(device)
        return Batch(ids, labels, document, mrope, places, pictures, self.shares_rows, self.sources, by_document)


@dataclass(slots=True)
class _Row:
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    document: list[int] = field(default_factory=list)
    mrope: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)


def pack(documents: Sequence[Document], layout: Layout, width: int = 0) -> Batch:
    """Pack documents into rows of at most `width` positions; 0: as long as the longest document.

    The longest document goes first, each into the first row that has room. Raises DataError for an empty document or
    one that is longer than `width`.

    >>> layout = Layout(grid=(1, 2), begin=1, end=2, latent=3, pad=0)
    >>> pack([[Text((7, 8)), Image(is_target=True)], [Text((9,))]], layout).ids
    tensor([[7, 8, 1, 3, 3, 2],
            [9, 0, 0, 0, 0, 0]])
    """
    lengths = [sum(len(layout.ids(s)) for s in document) for document in documents]
    if not lengths or min(lengths) == 0:
        found = f"document {lengths.index(0)} is empty" if lengths else "there is none"
        raise DataError(f"cannot pack documents: {found}; expected each to have at least one segment with one slot.")
    width = width or max(lengths)
    if max(lengths) > width:
        raise DataError(
            f"a document has {max(lengths)} positions; expected at most {width}: shorten it or give more width."
        )
    rows: list[_Row] = []
    starts: dict[int, tuple[int, int]] = {}  # row and first position of every document
    for i in sorted(range(len(documents)), key=lambda i: -lengths[i]):
        index = next((r for r, row in enumerate(rows) if len(row.ids) + lengths[i] <= width), len(rows))
        if index == len(rows):
            rows.append(_Row())
        starts[i] = (index, len(rows[index].ids))
        _write(rows[index], documents[i], i, layout)
    return _batch(rows, _pictures(documents, starts, layout), layout)


def _write(row: _Row, document: Document, index: int, layout: Layout) -> None:
    """Append a document to a row."""
    cursor, ids, is_target = Cursor(layout.grid), list[int](), list[bool]()
    for segment in document:
        own = layout.ids(segment)
        ids += own
        if isinstance(segment, Text):
            is_target += [segment.is_target] * len(own)
            pieces = [cursor.text(len(own))]
        else:  # only its begin is predicted as a token: latents are drawn, and where they end is certain
            is_target += [segment.is_target] + [False] * (len(own) - 1)
            pieces = [cursor.text(1), cursor.latents(), cursor.text(1)]
        row.mrope += [mrope for mrope, _ in pieces]
        row.places += [places for _, places in pieces]
    row.ids += ids
    row.labels += [ids[i] if is_target[i] else IGNORE for i in range(1, len(ids))] + [IGNORE]
    row.document += [index] * len(ids)


def _pictures(documents: Sequence[Document], starts: dict[int, tuple[int, int]], layout: Layout) -> Pictures:
    images: list[tuple[int, int, int, int]] = []
    for i, document in enumerate(documents):
        row, position = starts[i]
        previous = -1
        for segment in document:
            if isinstance(segment, Image):
                images.append((row, position, int(segment.is_target), previous))
                previous = len(images) - 1
            position += len(layout.ids(segment))
    columns = torch.tensor(images, dtype=torch.long).view(-1, 4).unbind(1)
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
    shares_rows = any(row.document[0] != row.document[-1] for row in rows)
    return Batch(ids, labels, document, mrope, places, pictures, shares_rows)


def with_pictures(embeds: Tensor, images: Tensor, batch: Batch) -> Tensor:
    """Embeddings (B, T, E) in which the slots of latents hold those of the images, (P, N, E)."""
    row = batch.pictures.row[:, None].expand(-1, images.shape[1])
    column = batch.pictures.begin[:, None] + 1 + torch.arange(images.shape[1], device=images.device)
    return embeds.index_put((row, column), images.to(embeds.dtype))


@dataclass(frozen=True, slots=True)
class TextRows:
    """Token rows of unequal length, padded at the right. ids: (B, T) int64, lengths: (B,)."""

    ids: Tensor
    lengths: Tensor

    @property
    def width(self) -> int:
        return int(self.ids.shape[1])

    def left_padded(self, states: Tensor) -> Tensor:
        """States (B, T, E) of these rows, shifted so that every row ends at the last position."""
        index = torch.arange(self.width, device=states.device)[None] - self.padding[:, None]
        index = index.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])
        return states.gather(1, index)

    @property
    def padding(self) -> Tensor:
        """Number of padding positions, (B,)."""
        return self.width - self.lengths

    @property
    def left_attend(self) -> Tensor:
        """(B, T) bool, True at real positions of the left-padded rows."""
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
    """M-RoPE ids of plain text: (3, B, T), all three axes count from `start`."""
    return torch.arange(start, start + length).expand(3, batch, length)


def image_mrope(grid: tuple[int, int], start: int) -> tuple[Tensor, int]:
    """M-RoPE ids (3, N) of an image whose first latent is at `start`, and the position of the token after it."""
    rows, cols = grid
    index = torch.arange(rows * cols)
    positions = torch.stack([torch.zeros_like(index), index // cols, index % cols]) + start
    return positions, start + max(grid)


def length_groups(lengths: Sequence[int], extra: int) -> list[list[int]]:
    """Split row indices into one or two groups of similar length, whichever costs less; no group for no rows.

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
