"""Weighted mixtures of real corpora as packed batches: a token budget, a part for each process, exact resume.

A mixture file is a JSON list of sources. Every choice is a function of (seed, rank, worker, number of the document), so
`state_dict` is a handful of numbers in JSON; documents that wait to be packed are read again when a run is resumed.
Letters: B rows, T positions, P images.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import MISSING, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from starflow2.core.dialogue import Dialogue, Turn, replace_pictures, turned_round, without_words
from starflow2.core.fields import Config, Count, Natural, Share
from starflow2.core.files import check_writable
from starflow2.core.images import AS_UPLOADED, Fit, ImageForm
from starflow2.core.ledger import append_line
from starflow2.core.serialize import JsonObject, from_dict, read_json, to_dict
from starflow2.data.corpora import find_schema, to_dialogue
from starflow2.data.progress import MixtureProgress
from starflow2.data.records import Broken, Photo, decode
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
    "conversations",
    "drop_words",
    "fits",
    "loader",
    "read_mixture",
    "words",
]

HOPELESS = 1000  # samples; a corpus whose first ones are all broken is an error
WAITING = 8  # documents that may wait for the next batch while shorter ones fill this one


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus of a mixture, and how its records become documents."""

    corpus: str  # the corpus whose schema it has (`corpora.CORPORA`), or module:function
    url: str  # a file, a folder or a pattern, local or remote
    weight: float  # of its documents relative to those of other sources
    format: Format = "auto"
    pictures: str = ""  # folder that paths of images are relative to; "": the folder of the file that names them
    # describe: a captioned image is shown, and its caption is the reply
    task: Literal["given", "describe"] = "given"
    question: str = "Describe the image."  # the user's words under describe; "": the image alone
    # how images become squares; auto: those of a document in which one is drawn are cropped, all others padded
    fit: Literal["auto", "crop", "pad", "stretch"] = "auto"
    flatten: str = ""  # colour behind transparent images; "": they count as broken
    caption_drop: float | None = None  # share of its drawings whose words are dropped; None: the stage's
    epochs: int = 0  # passes over it, after which the others go on without it; 0: no end
    note: str = ""  # for whoever reads the file: where it comes from, why this weight

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ConfigError(f"weight is {self.weight}; expected more than 0. Leave the source out instead.")
        if self.epochs < 0:
            raise ConfigError(f"epochs is {self.epochs}; expected 0, which is without end, or more.")
        if self.caption_drop is not None and not 0 <= self.caption_drop <= 1:
            raise ConfigError(f"caption_drop is {self.caption_drop}; expected a share of 0 to 1.")
        find_schema(self.corpus)
        ImageForm(flatten=self.flatten)

    def dialogue(self, sample: Sample) -> Dialogue[Photo]:
        """The conversation in a raw sample, turned round if the source asks for that. Raises Broken."""
        found = to_dialogue(self.corpus, sample, self.pictures)
        if self.task == "given":
            return found
        try:
            return turned_round(found, self.question)
        except ValueError as error:
            raise Broken("wrong order", str(error)) from error

    def form(self, conversation: Dialogue[Photo]) -> ImageForm:
        """How the images of a conversation become squares."""
        fit: Fit = "crop" if conversation.draws else "pad"
        return ImageForm(fit if self.fit == "auto" else self.fit, self.flatten)


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Config):
    """How documents are packed into batches; rows x width positions are the token budget of a batch."""

    rows: Count  # of a batch, at most
    width: Count  # positions of a row; a longer document is counted as broken
    seed: Natural = 0
    block: Count = 256  # samples of a source that are shuffled together; 1: files in their order
    documents: Natural = 0  # of a batch, at most; 0: as many as fit
    caption_drop: Share = 0.1  # share of documents with a drawn image whose words are dropped
    broken: str = ""  # file that lists broken samples, one JSON line each; "": they are only counted


def read_mixture(path: str | Path) -> tuple[Source, ...]:
    """The sources of a mixture file: [{"corpus": "cc12m", "url": "cc12m/*.tar", "weight": 3}, ...].

    All else may be left out. Raises ConfigError, naming file, place and nearest key.
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
    """The part of a tokenizer that mixtures use."""

    def document(self, turns: Sequence[Turn[Photo]]) -> list[Segment]: ...


@dataclass(frozen=True, slots=True)
class Item:
    """A conversation as a document. `length`: positions."""

    document: Document
    conversation: Dialogue[Tensor]  # its images (3, s, s) in [-1, 1]
    length: int
    source: int = 0  # number of its source in the mixture

    @property
    def images(self) -> tuple[Tensor, ...]:
        return self.conversation.pictures

    @property
    def kind(self) -> str:
        return self.conversation.kind


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a model encodes conversations: its tokenizer, its layout of images and their size in pixels."""

    tokenizer: Speller
    layout: Layout
    image_size: int

    def item(self, conversation: Dialogue[Photo], width: int = 0, form: ImageForm = AS_UPLOADED) -> Item:
        """The conversation as a document of at most `width` positions (0: of any length). Raises Broken."""
        document = self.tokenizer.document(conversation.turns)
        length = sum(len(self.layout.ids(segment)) for segment in document)
        if width and length > width:
            raise Broken("too long", f"{length} positions, a row has {width}")
        images = [decode(photo, self.image_size, form) for photo in conversation.pictures]
        return Item(document, replace_pictures(conversation, images), length)


def drop_words(conversation: Dialogue[Photo], rng: np.random.Generator, share: float) -> Dialogue[Photo]:
    """Remove the words from `share` of the conversations with a drawn image, in half of them the user's images, too.

    The counterpart of `training.datasets.drop_words`, which draws other random numbers: both train guidance's
    unconditional branch.
    """
    chance, shows = rng.random(2)
    if not conversation.draws or chance >= share:
        return conversation
    return without_words(conversation, shows=bool(shows < 0.5))


class _Repeated:
    """The samples of one source, pass after pass, with counts of the broken ones."""

    def __init__(self, source: Source, samples: Samples) -> None:
        self.source, self.samples = source, samples
        self.read, self.used, self.broken = 0, 0, Counter[str]()
        self._rest: Iterator[Sample] | None = None

    def state_dict(self) -> JsonObject:
        counts = {"read": self.read, "used": self.used, "broken": dict(self.broken)}
        return {"samples": self.samples.state_dict(), **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.samples.load_state_dict(state["samples"])
        self.read, self.used, self.broken = state["read"], state["used"], Counter(state["broken"])
        self._rest = None

    @property
    def is_finished(self) -> bool:
        """True after the last of the passes that the source allows."""
        return 0 < self.source.epochs <= self.samples.epoch

    def next(self) -> Sample | None:
        """The next raw sample; None where the last pass is at its end.

        Raises DataError where a whole pass or the first HOPELESS samples were all broken.
        """
        if not self.used and self.read >= HOPELESS:
            raise DataError(f"{self._name}: none of the first {self.read} samples can be used ({self._reasons}).")
        while True:
            self._rest = self._rest or iter(self.samples)
            for sample in self._rest:
                self.read += 1
                return sample
            self._rest = None
            if not self.samples.whole_passes:  # others had read the rest of this pass
                continue
            if not self.read:
                raise DataError(f"{self._name} has no sample for this process; use fewer processes or workers.")
            if not self.used:
                raise DataError(f"{self._name}: none of its {self.read} samples can be used ({self._reasons}).")
            if self.is_finished:
                return None

    @property
    def _name(self) -> str:
        return f"{self.source.corpus} at {self.source.url}"

    @property
    def _reasons(self) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in self.broken.most_common(3))


class _Documents:
    """A stream of documents from all sources by their weights, endless unless every source has `epochs`."""

    def __init__(self, batches: Batches, worker: tuple[int, int]) -> None:
        self.batches, self.reader = batches, [batches.shard.rank, worker[0]]
        self.generation = [batches.progress.generation] if batches.progress.generation else []
        self.drawn, self.lists_broken = 0, True
        each = zip(batches.sources, batches.samples, strict=True)
        self.streams = [_Repeated(source, copy(samples)) for source, samples in each]

    def state_dict(self) -> JsonObject:
        return {"drawn": self.drawn, "sources": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drawn = state["drawn"]
        for stream, saved in zip(self.streams, state["sources"], strict=True):
            stream.load_state_dict(saved)

    def next(self) -> Item:
        """The next document. Raises DataError where a source cannot be used, or all have made their passes."""
        rng = np.random.default_rng([self.batches.config.seed, *self.reader, self.drawn, *self.generation])
        while True:
            stream = self._choose(rng)
            item = self._first_usable(stream, rng)
            if item is not None:
                stream.used += 1
                self.drawn += 1
                return replace(item, source=self.streams.index(stream))

    def _choose(self, rng: np.random.Generator) -> _Repeated:
        """A source by its weight, one that has passes left."""
        weights = np.array([0.0 if stream.is_finished else stream.source.weight for stream in self.streams])
        if not weights.any():
            raise DataError(
                "every source of the mixture has made as many passes as its epochs say; raise them, or train less."
            )
        return self.streams[int(rng.choice(len(self.streams), p=weights / weights.sum()))]

    def _first_usable(self, stream: _Repeated, rng: np.random.Generator) -> Item | None:
        """The next document of a source, broken samples left out; None where its last pass is at its end."""
        while (sample := stream.next()) is not None:
            try:
                return self._item(stream.source, sample, rng)
            except Broken as error:
                self._count_broken(stream, sample, error)
        return None

    def _item(self, source: Source, sample: Sample, rng: np.random.Generator) -> Item:
        config, conversation = self.batches.config, source.dialogue(sample)
        share = config.caption_drop if source.caption_drop is None else source.caption_drop
        kept = drop_words(conversation, rng, share)
        return self.batches.spelling.item(kept, config.width, source.form(conversation))

    def _count_broken(self, stream: _Repeated, sample: Sample, error: Broken) -> None:
        stream.broken[error.reason] += 1
        if self.batches.config.broken and self.lists_broken:
            line = {"reason": error.reason, "corpus": stream.source.corpus, "source": sample.source, "key": sample.key}
            append_line(self.batches.config.broken, {**line, "detail": error.detail[:300]})


def words(sources: Sequence[Source], limit: int) -> Iterator[str]:
    """The texts of the first samples of all sources, at most `limit` samples; no image is decoded."""
    for source in sources:
        for sample in islice(Samples(source.url, source.format), -(-limit // len(sources))):
            with suppress(Broken):
                turns = source.dialogue(sample).turns
                yield from (p for turn in turns for p in (*turn.user, *turn.assistant) if isinstance(p, str))


# -- batches ----------------------------------------------------------------------------------------------------------


class Batches(IterableDataset[tuple[Tensor, Batch]]):
    """An endless stream of images (P, 3, s, s) in [-1, 1] with the batch that they stand in.

    A task's `from_documents` converts its items to the input of the loss. shard: the part of every source that this
    process reads; torch workers divide that part further. Raises DataError where a source has no sample to use,
    OutputError where the list of broken samples cannot be written.
    """

    def __init__(
        self, sources: Sequence[Source], spelling: Spelling, config: BatchConfig, shard: WorkerShard | None = None
    ) -> None:
        if not sources:
            raise ConfigError("sources is empty; a mixture needs at least one source.")
        self.sources, self.spelling, self.config = tuple(sources), spelling, config
        self.shard, self.progress = shard or WorkerShard(), MixtureProgress()
        if config.broken:
            check_writable(config.broken)
        self.samples = tuple(  # files are looked for once
            Samples(source.url, source.format, shard=self.shard, seed=config.seed, block=config.block)
            for source in sources
        )

    def continue_after(self, progress: MixtureProgress) -> None:
        """Begin with what other readers have left of the sources; call it before the first batch."""
        self.progress = progress
        for source, samples in zip(self.sources, self.samples, strict=True):
            samples.continue_after(progress.of(source.corpus, source.url))

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)

    @property
    def identity(self) -> JsonObject:
        """Settings that must be equal, beside the readers, for a position to mean the same place in the same stream."""
        config = self.config
        packing = [config.rows, config.width, config.seed, config.block, config.caption_drop]
        sources = [to_dict(replace(source, note="")) for source in self.sources]
        files = [samples.names for samples in self.samples]
        return {"packing": packing, "documents": config.documents, "sources": sources, "files": files}


def conversations(batches: Batches) -> Iterator[Dialogue[Tensor]]:
    """The conversations that `batches` would pack, one after the other, with images (3, s, s) in [-1, 1]."""
    documents = _Documents(batches, (0, 1))
    while True:
        yield documents.next().conversation


@dataclass(frozen=True, slots=True)
class _Read:
    """A document that has been read."""

    number: int  # among all that this process has read
    before: JsonObject  # state of the stream before it was read
    item: Item


class BatchIterator:
    """Batches in order; `state_dict` says where the next one starts."""

    def __init__(self, batches: Batches) -> None:
        info = get_worker_info()
        worker = (0, 1) if info is None else (info.id, info.num_workers)
        reader = [batches.shard.rank, batches.shard.world, *worker]
        self._batches, self._documents = batches, _Documents(batches, worker)
        self._waiting: list[_Read] = []
        files = [samples.fingerprint for samples in batches.samples]
        self._same: JsonObject = {"reader": reader, **batches.identity, "files": files}  # when a state is loaded

    def __iter__(self) -> BatchIterator:
        return self

    def state_dict(self) -> JsonObject:
        """Where the next batch starts: the stream at the oldest waiting document, and which documents are waiting."""
        state = self._waiting[0].before if self._waiting else self._documents.state_dict()
        first = state["drawn"]
        waiting = [document.number - first for document in self._waiting]
        return {"same": self._same, "documents": state, "again": self._documents.drawn - first, "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Raises DataError where mixture, packing or number of processes or workers differ."""
        for name, value in self._same.items():
            if state["same"][name] != value:
                raise DataError(f"cannot resume: {name} was {state['same'][name]} and is {value}; restore it.")
        documents = self._documents
        documents.load_state_dict(state["documents"])
        documents.lists_broken = False  # these are in the list already
        again = [self._read() for _ in range(state["again"])]
        documents.lists_broken = True
        self._waiting = [again[i] for i in state["waiting"]]

    def __next__(self) -> tuple[Tensor, Batch]:
        config, spelling = self._batches.config, self._batches.spelling
        items = self._choose(config)
        images = [image for item in items for image in item.images]
        size = spelling.image_size
        pictures = torch.stack(images) if images else torch.zeros(0, 3, size, size)  # (P, 3, s, s)
        batch = pack([item.document for item in items], spelling.layout, config.width)
        return pictures, replace(batch, sources=tuple(item.source for item in items))

    def _choose(self, config: BatchConfig) -> list[Item]:
        """Documents of one batch: first those that were waiting, then new ones until WAITING of them do not fit."""
        most = config.documents or sys.maxsize
        chosen: list[Item] = []
        lengths: list[int] = []
        waited, self._waiting = self._waiting, []
        while len(self._waiting) < WAITING and len(chosen) < most:
            document = waited.pop(0) if waited else self._read()
            if fits([*lengths, document.item.length], config.rows, config.width):
                chosen.append(document.item)
                lengths.append(document.item.length)
            else:
                self._waiting.append(document)
        self._waiting += waited
        return chosen

    def _read(self) -> _Read:
        before = self._documents.state_dict()
        return _Read(before["drawn"], before, self._documents.next())


def fits(lengths: Sequence[int], rows: int, width: int) -> bool:
    """True if `pack` needs at most `rows` rows for documents of these lengths.

    If m of the longest fit into a row, first fit fills all rows but one to more than m / (m + 1) on average, so that
    most answers need no packing.
    """
    total, m = sum(lengths), width // max(lengths)
    if total > rows * width or m == 0:
        return False
    return total * (m + 1) <= rows * width * m or _num_rows(lengths, width) <= rows


def _num_rows(lengths: Sequence[int], width: int) -> int:
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        row = next((i for i, used in enumerate(rows) if used + length <= width), len(rows))
        if row == len(rows):
            rows.append(0)
        rows[row] += length
    return len(rows)


def loader(batches: Batches, workers: int = 0) -> Any:
    """A StatefulDataLoader of torchdata over the batches; `workers` processes read ahead (0: none).

    Its state_dict is JSON; load it into a new loader before the first batch. Raises ConfigError without torchdata.
    """
    stateful = needs("torchdata.stateful_dataloader")
    return stateful.StatefulDataLoader(batches, batch_size=None, num_workers=workers, collate_fn=_identity)


def _identity(data: tuple[Tensor, Batch]) -> tuple[Tensor, Batch]:
    return data


def broken_counts(state: object) -> Counter[str]:
    """Numbers of broken samples by reason, over all sources and workers in the state of a loader or an iterator."""
    found = Counter[str]()
    if isinstance(state, Mapping):
        for name, value in state.items():
            found += Counter(value) if name == "broken" else broken_counts(value)
    elif isinstance(state, list):
        for value in state:
            found += broken_counts(value)
    return found
