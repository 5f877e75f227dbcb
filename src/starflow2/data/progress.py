"""How much of a source has been read in its current pass, whoever read it: what lets another number of readers go on.

A reader's own position counts samples of the files that were its part. When the readers of a run change, all their
positions become one record by file, and the new readers leave out what it lists. What a reader had taken but not yet
used up, a block of samples at most, is read again: nothing is lost, a little comes twice.
Not here: reading (`shards`), the mixture's own state (`mixture`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from starflow2.core.serialize import JsonObject

__all__ = ["MixtureProgress", "PassProgress", "Place", "Reader", "Unit", "pass_units"]

ALL = -1  # in place of a number of samples
Reader = tuple[int, int, int, int]  # rank, number of ranks, worker of the rank, number of its workers
Place = tuple[int, int]  # number of a unit among those of a reader, and of the next sample in it
Counts = list[int]  # samples read of each of the interleaved parts that a file was read in; ALL of them


@dataclass(frozen=True, slots=True)
class Unit:
    """Share of one reader: the samples part, part + parts, ... of a file. name: the file without its folder."""

    file: str
    name: str
    part: int
    parts: int


@dataclass(frozen=True, slots=True)
class PassProgress:
    """Samples read of a source in pass number `epoch`, by file.

    files: one list of counts for every set of readers that the pass has had so far; a file that is not named was not
    begun. A sample was read if any of its file's lists counts it.
    """

    epoch: int = 0
    files: Mapping[str, list[Counts]] = field(default_factory=dict)

    def has_read(self, name: str, number: int) -> bool:
        """True if sample `number` of a file needs no more reading."""
        return any(_counts(counts, number) for counts in self.files.get(name, ()))

    def is_done(self, name: str) -> bool:
        """True if a whole file needs no more reading."""
        return any(all(count == ALL for count in counts) for counts in self.files.get(name, ()))

    def to_json(self) -> JsonObject:
        return {"epoch": self.epoch, "files": {name: [*lists] for name, lists in self.files.items()}}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> PassProgress:
        return cls(saved["epoch"], saved["files"])


def _counts(counts: Counts, number: int) -> bool:
    done, part = divmod(number, len(counts))
    return counts[part] == ALL or done < counts[part]


def pass_units(
    files: Sequence[tuple[str, str]], reader: Reader, epoch: int, shuffle_seed: int | None, progress: PassProgress
) -> list[Unit]:
    """Units that a reader reads in a pass, in order.

    files: with their names. shuffle_seed: of the order of the files, None for the order they are given in. progress:
    files of its pass that are done are left out.
    """
    rank, world, worker, workers = reader
    parts = -(-world * workers // len(files))  # so that there is a unit for each reader
    units = [Unit(file, name, part, parts) for file, name in files for part in range(parts)]
    if shuffle_seed is not None:
        units = [units[i] for i in np.random.default_rng([shuffle_seed, epoch]).permutation(len(units))]
    if epoch == progress.epoch:
        units = [unit for unit in units if not progress.is_done(unit.name)]
    return units[rank::world][worker::workers]


@dataclass(frozen=True, slots=True)
class MixtureProgress:
    """Samples read of the sources of a mixture, by corpus and place, and how often its readers changed."""

    sources: Mapping[str, PassProgress] = field(default_factory=dict)
    generation: int = 0

    def of(self, corpus: str, url: str) -> PassProgress:
        """Progress of a source: none of one that is new."""
        return self.sources.get(f"{corpus} {url}", PassProgress())

    def to_json(self) -> JsonObject:
        return {"generation": self.generation, "sources": {k: v.to_json() for k, v in self.sources.items()}}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> MixtureProgress:
        return cls({k: PassProgress.from_json(v) for k, v in saved["sources"].items()}, saved["generation"])

    def after(self, identity: Mapping[str, Any], workers: int, ranks: Sequence[object]) -> MixtureProgress:
        """Progress when the readers that began with this progress had the states `ranks`.

        identity: `Batches.identity` then. workers: of each process. ranks: the state of every process's loader.
        """
        states = {tuple(state["same"]["reader"]): state["documents"]["sources"] for state in _iterator_states(ranks)}
        workers = max(1, workers)
        readers: list[Reader] = [(r, len(ranks), w, workers) for r in range(len(ranks)) for w in range(workers)]
        _, _, seed, block, _ = identity["packing"]
        merged = {}
        for i, (source, names) in enumerate(zip(identity["sources"], identity["files"], strict=True)):
            before, positions = self.of(source["corpus"], source["url"]), []
            # of a worker that has delivered nothing yet
            start: Mapping[str, Any] = {"epoch": before.epoch, "place": (0, 0)}
            found = [states[reader][i]["samples"] if reader in states else start for reader in readers]
            epoch, shuffle_seed = min(state["epoch"] for state in found), seed if block > 1 else None
            for reader, state in zip(readers, found, strict=True):
                units = pass_units([(name, name) for name in names], reader, epoch, shuffle_seed, before)
                positions.append((state["epoch"], tuple(state["place"]), units))
            merged[f"{source['corpus']} {source['url']}"] = _merged(before, epoch, positions)
        return MixtureProgress(merged, self.generation + 1)


def _merged(before: PassProgress, epoch: int, positions: Sequence[tuple[int, Place, Sequence[Unit]]]) -> PassProgress:
    """Samples that all readers of a source together have read of pass `epoch`, the earliest that one of them is in.

    before: what had been read when they began. positions: of each reader its pass, its place in it and its units.
    """
    files = {name: [*lists] for name, lists in before.files.items()} if before.epoch == epoch else {}
    found: dict[str, Counts] = {}
    for own_epoch, place, units in positions:
        for unit, count in _read_units(units, place if own_epoch == epoch else (len(units), 0)):
            found.setdefault(unit.name, [0] * unit.parts)[unit.part] = count
    for name, counts in found.items():
        files.setdefault(name, []).append(counts)
    return PassProgress(epoch, files)


def _read_units(units: Sequence[Unit], place: Place) -> Iterator[tuple[Unit, int]]:
    """The units before a place, with the number of samples that were read of each."""
    number, samples = place
    for unit in units[:number]:
        yield unit, ALL
    if samples and number < len(units):
        yield units[number], samples


def _iterator_states(state: object) -> Iterator[Mapping[str, Any]]:
    """The states of `BatchIterator` in the state of a loader, wherever it keeps them."""
    if isinstance(state, Mapping):
        if "same" in state and "documents" in state:
            yield state
            return
        state = list(state.values())
    if isinstance(state, list):
        for value in state:
            yield from _iterator_states(value)
