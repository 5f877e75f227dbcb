"""Weighted mixtures of real corpora as packed batches: a token budget, a share for each process, exact resume.

A mixture file is a JSON list of sources. Every choice is a function of (seed, rank, worker, number of the document), so
`state_dict` is a handful of numbers, as JSON can hold them; what waits half-packed is drawn again.
Letters: B rows, T positions, P pictures.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from starflow2.core.files import check_writable
from starflow2.core.serialize import from_dict, read_json
from starflow2.data.corpora import Broken, Corpus, Photo, decode, understand
from starflow2.data.dialogue import Dialogue, Turn, pictures, without_words
from starflow2.data.shards import Format, Sample, Samples, WorkerShard, needs
from starflow2.errors import ConfigError, DataError
from starflow2.models.sequence import Batch, Document, Layout, Segment, pack

__all__ = [
    "BatchConfig",
    "BatchIterator",
    "Batches",
    "Item",
    "Source",
    "Speller",
    "Spelling",
    "broken_counts",
    "drop_words",
    "fits",
    "loader",
    "read_mixture",
]

HOPELESS = 1000  # samples; a corpus with none to use among its first so many is an error
WAITING = 8  # documents that may wait for the next batch while smaller ones fill this one


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus of a mixture."""

    corpus: Corpus  # whose schema it has
    url: str  # a file, a folder or a pattern, here or remote
    weight: float  # documents, relative to those of the other sources
    format: Format = "auto"
    pictures: str = ""  # folder that paths of pictures start at, "" = that of the file that names them

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ConfigError(f"weight is {self.weight}; expected more than 0: leave the source out instead.")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How documents become batches; rows x width positions is the token budget of one."""

    rows: int  # at most, of a batch
    width: int  # positions of a row; a longer document is counted as broken
    seed: int = 0
    block: int = 256  # samples of a source that are shuffled among each other, 1 = files in their order
    caption_drop: float = 0.1  # share of documents with a drawn picture whose words are dropped
    broken: str = ""  # file that lists broken samples, one JSON line each, "" = they are only counted

    def __post_init__(self) -> None:
        if self.rows < 1 or self.width < 1:
            raise ConfigError(f"rows and width are {self.rows} and {self.width}; expected at least 1 of each.")


def read_mixture(path: str | Path) -> tuple[Source, ...]:
    """The sources of a mixture file: [{"corpus": "cc12m", "url": "cc12m/*.tar", "weight": 3}, ...].

    `format` and `pictures` may be left out. Raises ConfigError, naming file, place and nearest key.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} holds {type(entries).__name__}; expected a list of one or more sources.")
    usual = {f.name: f.default for f in fields(Source) if f.default is not MISSING}
    sources = []
    for i, entry in enumerate(entries):
        try:
            sources.append(from_dict(Source, {**usual, **entry} if isinstance(entry, dict) else entry))
        except ConfigError as error:
            raise ConfigError(f"{path}, source {i + 1}: {error}") from error
    return tuple(sources)


# -- documents --------------------------------------------------------------------------------------------------------


class Speller(Protocol):
    """What a tokenizer has to offer here."""

    def document(self, turns: Sequence[Turn[Photo]]) -> list[Segment]: ...


@dataclass(frozen=True, slots=True)
class Item:
    """A document with its pictures in order, each (3, s, s) in [-1, 1]. `length`: positions."""

    document: Document
    images: tuple[Tensor, ...]
    kind: str
    length: int


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a model writes conversations down: its tokenizer, its spelling of pictures and their size in pixels."""

    tokenizer: Speller
    layout: Layout
    image_size: int

    def item(self, conversation: Dialogue[Photo], width: int = 0) -> Item:
        """The conversation as a document of at most `width` positions (0: any). Raises Broken where it is not."""
        document = self.tokenizer.document(conversation.turns)
        length = sum(len(self.layout.ids(segment)) for segment in document)
        if width and length > width:
            raise Broken("too long", f"{length} positions, a row has {width}")
        images = tuple(decode(photo, self.image_size) for photo in conversation.pictures)
        return Item(document, images, conversation.kind, length)


def drop_words(conversation: Dialogue[Photo], rng: np.random.Generator, share: float) -> Dialogue[Photo]:
    """In `share` of those with a drawn picture the user says nothing; in half of these, shows nothing either.

    As stages.dropped does with drawn scenes: guidance needs the unconditional branch.
    """
    chance, shows = rng.random(2)
    drawn = any(pictures(turn.assistant) for turn in conversation.turns)
    if not drawn or chance >= share:
        return conversation
    return without_words(conversation, shows=bool(shows < 0.5))


class _Stock:
    """One source, over and over, without its broken samples, which it counts."""

    def __init__(self, source: Source, samples: Samples) -> None:
        self.source, self.samples = source, samples
        self.read, self.used, self.broken = 0, 0, Counter[str]()
        self._left: Iterator[Sample] | None = None

    def state_dict(self) -> dict[str, Any]:
        counts = {"read": self.read, "used": self.used, "broken": dict(self.broken)}
        return {"samples": self.samples.state_dict(), **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.samples.load_state_dict(state["samples"])
        self.read, self.used, self.broken = state["read"], state["used"], Counter(state["broken"])
        self._left = None

    def next(self) -> Sample:
        """The next raw sample. Raises DataError where a whole pass, or a long stretch, held nothing to use."""
        if not self.used and self.read >= HOPELESS:
            raise DataError(f"{self._name}: none of the first {self.read} samples can be used ({self._told}).")
        while True:
            self._left = self._left or iter(self.samples)
            for sample in self._left:
                self.read += 1
                return sample
            self._left = None
            if not self.read:
                raise DataError(f"{self._name} has no sample for this process; use fewer processes or workers.")
            if not self.used:
                raise DataError(f"{self._name}: none of its {self.read} samples can be used ({self._told}).")

    @property
    def _name(self) -> str:
        return f"{self.source.corpus} at {self.source.url}"

    @property
    def _told(self) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in self.broken.most_common(3))


class _Documents:
    """Documents of a mixture without end, each source by its weight."""

    def __init__(self, batches: Batches, worker: tuple[int, int]) -> None:
        self.batches, self.place = batches, [batches.share.rank, worker[0]]
        self.drawn, self.lists = 0, True
        weights = np.array([source.weight for source in batches.sources])
        self.weights = weights / weights.sum()
        each = zip(batches.sources, batches.samples, strict=True)
        self.stocks = [_Stock(source, copy(samples)) for source, samples in each]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "sources": [stock.state_dict() for stock in self.stocks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drawn = state["drawn"]
        for stock, own in zip(self.stocks, state["sources"], strict=True):
            stock.load_state_dict(own)

    def next(self) -> Item:
        config, spelling = self.batches.config, self.batches.spelling
        rng = np.random.default_rng([config.seed, *self.place, self.drawn])
        stock = self.stocks[int(rng.choice(len(self.stocks), p=self.weights))]
        while True:
            sample = stock.next()
            try:
                conversation = understand(stock.source.corpus, sample, stock.source.pictures)
                item = spelling.item(drop_words(conversation, rng, config.caption_drop), config.width)
            except Broken as error:
                self._count(stock, sample, error)
                continue
            stock.used += 1
            self.drawn += 1
            return item

    def _count(self, stock: _Stock, sample: Sample, error: Broken) -> None:
        stock.broken[error.reason] += 1
        if self.batches.config.broken and self.lists:
            told = {"reason": error.reason, "corpus": stock.source.corpus, "source": sample.source, "key": sample.key}
            with open(self.batches.config.broken, "a", encoding="utf-8") as file:  # a line at once: workers share it
                file.write(json.dumps({**told, "detail": error.detail[:300]}) + "\n")


# -- batches ----------------------------------------------------------------------------------------------------------


class Batches(IterableDataset[tuple[Tensor, Batch]]):
    """Pictures (P, 3, s, s) in [-1, 1] with the batch they stand in, without end; what a stage's task takes as data.

    `share`: which part of every source this process reads; torch workers divide that part further. Raises DataError
    where a source holds nothing to use, OutputError where the list of broken samples cannot be written.
    """

    def __init__(
        self, sources: Sequence[Source], spelling: Spelling, config: BatchConfig, share: WorkerShard | None = None
    ) -> None:
        if not sources:
            raise ConfigError("a mixture needs at least one source.")
        self.sources, self.spelling, self.config = tuple(sources), spelling, config
        self.share = share or WorkerShard()
        if config.broken:
            check_writable(config.broken)
        how: dict[str, Any] = {"share": self.share, "seed": config.seed, "block": config.block}
        self.samples = tuple(Samples(source.url, source.format, **how) for source in sources)  # files are found once

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)


@dataclass(frozen=True, slots=True)
class _Drawn:
    number: int  # among all that this process drew
    before: dict[str, Any]  # state of the documents when it was still to be drawn
    item: Item


class BatchIterator:
    """Batches in order, and where they stand."""

    def __init__(self, batches: Batches) -> None:
        info = get_worker_info()
        worker = (0, 1) if info is None else (info.id, info.num_workers)
        share, config = batches.share, batches.config
        self._batches, self._documents = batches, _Documents(batches, worker)
        self._waiting: list[_Drawn] = []
        self._same: dict[str, Any] = {  # what must not have changed for a state to mean anything
            "reader": [share.rank, share.world, *worker],
            "packing": [config.rows, config.width, config.seed, config.block, config.caption_drop],
            "sources": [[s.corpus, s.url, s.weight, s.format, s.pictures] for s in batches.sources],
            "files": [samples.fingerprint for samples in batches.samples],
        }

    def __iter__(self) -> BatchIterator:
        return self

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts: the documents from the oldest that waits, and which of those are waiting."""
        state = self._waiting[0].before if self._waiting else self._documents.state_dict()
        first = state["drawn"]
        waiting = [drawn.number - first for drawn in self._waiting]
        return {"same": self._same, "documents": state, "again": self._documents.drawn - first, "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there. Raises DataError where mixture, packing or the number of processes and workers differ."""
        for name, value in self._same.items():
            if state["same"][name] != value:
                raise DataError(f"cannot resume: {name} was {state['same'][name]} and is {value}; restore it.")
        documents = self._documents
        documents.load_state_dict(state["documents"])
        documents.lists = False  # these are in the list already
        drawn = [self._draw() for _ in range(state["again"])]
        documents.lists = True
        self._waiting = [drawn[i] for i in state["waiting"]]

    def __next__(self) -> tuple[Tensor, Batch]:
        config, spelling = self._batches.config, self._batches.spelling
        items = self._chosen(config)
        images = [image for item in items for image in item.images]
        size = spelling.image_size
        pictures = torch.stack(images) if images else torch.zeros(0, 3, size, size)  # (P, 3, s, s)
        return pictures, pack([item.document for item in items], spelling.layout, config.width)

    def _chosen(self, config: BatchConfig) -> list[Item]:
        """Documents of one batch: those that waited first, then new ones until WAITING of them found no room."""
        chosen: list[Item] = []
        lengths: list[int] = []
        waited, self._waiting = self._waiting, []
        while len(self._waiting) < WAITING:
            drawn = waited.pop(0) if waited else self._draw()
            if fits([*lengths, drawn.item.length], config.rows, config.width):
                chosen.append(drawn.item)
                lengths.append(drawn.item.length)
            else:
                self._waiting.append(drawn)
        self._waiting += waited
        return chosen

    def _draw(self) -> _Drawn:
        before = self._documents.state_dict()
        return _Drawn(before["drawn"], before, self._documents.next())


def fits(lengths: Sequence[int], rows: int, width: int) -> bool:
    """Whether `pack` makes at most `rows` rows of documents of these lengths.

    Where m of the longest fit into a row, first fit fills all rows but one to more than m / (m + 1) on average, so most
    answers need no packing.
    """
    total, m = sum(lengths), width // max(lengths)
    if total > rows * width or m == 0:
        return False
    return total * (m + 1) <= rows * width * m or _num_rows(lengths, width) <= rows


def _num_rows(lengths: Sequence[int], width: int) -> int:
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = next((i for i, taken in enumerate(rows) if taken + length <= width), len(rows))
        if at == len(rows):
            rows.append(0)
        rows[at] += length
    return len(rows)


def loader(batches: Batches, workers: int = 0) -> Any:
    """torchdata's StatefulDataLoader over the batches, read ahead by `workers` processes (0: by none).

    Its state_dict is JSON; load it into a new loader before the first batch. Raises ConfigError without torchdata.
    """
    stateful = needs("torchdata.stateful_dataloader")
    return stateful.StatefulDataLoader(batches, batch_size=None, num_workers=workers, collate_fn=_as_it_is)


def _as_it_is(data: tuple[Tensor, Batch]) -> tuple[Tensor, Batch]:
    return data


def broken_counts(state: object) -> Counter[str]:
    """How many samples were broken, by reason: of all sources and workers in the state of a loader or an iterator."""
    found = Counter[str]()
    if isinstance(state, Mapping):
        for name, value in state.items():
            found += Counter(value) if name == "broken" else broken_counts(value)
    elif isinstance(state, list):
        for value in state:
            found += broken_counts(value)
    return found
