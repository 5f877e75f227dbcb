"""One runner for every suite of the drawn world, the report that it returns, and the lock that freezes the items.

A suite is a frozen dataclass with its options: it says which items it has, how a chunk of them is run, and how the
outputs are graded. `evaluate` does the rest. Suites know no model: what is scored is a callable over uint8 images and
words, so that a test can score an oracle. `runner` runs them on models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from importlib.resources import files
from typing import Any, ClassVar, Final, Generic, Literal, Protocol, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from starflow2.core.json_reader import parse_json
from starflow2.errors import ConfigError, DataError
from starflow2.evals.statistics import Scored, Scores, chunks, gap
from starflow2.world.scene import IMAGE_SIZE, Scene, Split, render

__all__ = [
    "IMAGES_AT_ONCE",
    "Codec",
    "Graded",
    "Images",
    "Job",
    "Part",
    "Progress",
    "Report",
    "Runs",
    "Section",
    "Suite",
    "TruthSuite",
    "ceiling",
    "check_choice",
    "check_lock",
    "checked_images",
    "checked_texts",
    "digest",
    "evaluate",
    "graded",
    "jobs",
    "lock_text",
    "roundtrip_scenes",
    "select",
    "verify_lock",
]

# seen combinations, held-out ones, held-out wording; new prompts of seen combinations, busy scenes; plain words
Part = Literal["id", "cg", "paraphrase", "new", "scenes", "plain"]
Images = NDArray[np.uint8]  # (n, 64, 64, 3)
Codec = Callable[[Images], Images]  # images after a round trip
Progress = Callable[[int, int], None]  # items done, items in all
Bounds = dict[str, dict[str, Scores]]  # scores to read others against, by name and part
Section = dict[str, object]  # of the lock file
LOCK_VERSION: Final = 1
IMAGES_AT_ONCE: Final = 64  # images asked of a callable at a time

_Call = TypeVar("_Call")
_CallIn = TypeVar("_CallIn", contravariant=True)
_Item = TypeVar("_Item")
_Task = TypeVar("_Task")
_Output = TypeVar("_Output")

Runs = Mapping[str, Sequence[tuple[_Item, _Output]]]  # by set of items, in most suites a part: items with outputs


@dataclass(frozen=True, slots=True)
class Job(Generic[_Task]):
    """An item with a seed. index: of its task in the full suite, so that a quick run starts from the same seeds."""

    index: int
    seed: int
    task: _Task


def jobs(tasks: Iterable[_Task], seed_base: int, samples: int = 1, stride: int = 1) -> list[Job[_Task]]:
    """`samples` jobs for each task, those of one task together; j of task i has seed `seed_base + stride i + j`."""
    return [Job(i, seed_base + stride * i + j, task) for i, task in enumerate(tasks) for j in range(samples)]


@dataclass(frozen=True, slots=True)
class Graded:
    """Scores of a run by part, ID minus CG, and floors, ceilings and controls, by name and part."""

    parts: dict[str, Scores]
    gap: Scores | None = None
    bounds: Bounds = field(default_factory=dict)
    settings: dict[str, int] = field(default_factory=dict)  # options of the suite that scores depend on


def graded(
    scored: Mapping[str, Scored], bounds: Bounds | None = None, settings: dict[str, int] | None = None
) -> Graded:
    """The scores of scored parts, with the gap of "id" and "cg" if both are there."""
    difference = gap(scored["id"], scored["cg"]) if {"id", "cg"} <= scored.keys() else None
    return Graded({part: rows.scores for part, rows in scored.items()}, difference, bounds or {}, settings or {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(Graded):
    """Scores of one suite on one split.

    n: number of items. model, weights: name and digest, where the scored thing is a model.
    """

    suite: str
    split: Split
    quick: bool
    n: int
    model: str | None = None
    weights: str | None = None

    def with_bound(self, name: str, parts: dict[str, Scores]) -> Report:
        """This report with one more bound."""
        return replace(self, bounds=self.bounds | {name: parts})

    def to_json(self) -> dict[str, object]:
        """The report as JSON can hold it; settings and bounds stand beside the other keys."""
        head = {"suite": self.suite, "split": self.split, "quick": self.quick, "n": self.n, **self.settings}
        sets = {"parts": self.parts, **self.bounds}
        tables = {name: {part: scores.to_json() for part, scores in parts.items()} for name, parts in sets.items()}
        more = {"gap": self.gap and self.gap.to_json(), "model": self.model, "weights": self.weights}
        return head | tables | {name: value for name, value in more.items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """Undo `to_json`."""
        fields = {name: data[name] for name in ("suite", "split", "quick", "n", "model", "weights") if name in data}
        rest = {name: value for name, value in data.items() if name not in fields and name != "gap"}
        tables = {
            name: {part: Scores.from_json(scores) for part, scores in parts.items()}
            for name, parts in rest.items()
            if isinstance(parts, dict)
        }
        settings = {name: value for name, value in rest.items() if name not in tables}
        difference = Scores.from_json(data["gap"]) if "gap" in data else None
        return cls(**fields, settings=settings, parts=tables.pop("parts"), gap=difference, bounds=tables)


class Suite(Protocol[_CallIn, _Item, _Output]):
    """The rules of one benchmark. What it scores is a callable; every suite documents its own."""

    name: ClassVar[str]  # in reports and in the lock
    chunk: ClassVar[int]  # items per call of `run`

    def items(self, split: Split) -> Mapping[str, Sequence[_Item]]:
        """All items, set by set, in their frozen order. Raises ConfigError for options that name no set."""
        ...

    def quick(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """The items of one set that a quick run takes: one in eight."""
        ...

    def run(self, call: _CallIn, items: Sequence[_Item]) -> Sequence[_Output]:
        """One output per item. Raises DataError if `call` returns anything but what its type says."""
        ...

    def grade(self, runs: Runs[_Item, _Output]) -> Graded:
        """Scores of a whole run."""
        ...

    def lock(self) -> Section:
        """The suite's section of the lock, by name and made afresh: settings, and count and hash of all items."""
        ...


def evaluate(
    suite: Suite[_Call, _Item, _Output],
    call: _Call,
    split: Split,
    *,
    quick: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Run `call` on all items of a suite and grade what it returns.

    split: "dev" (for every choice) or "test" (to report). quick: one item in eight. progress: called with (items done,
    items in all). Raises ConfigError for an unknown split, and what the suite raises.
    """
    sets = select(suite, split, quick=quick)
    total, done = sum(map(len, sets.values())), 0
    runs: dict[str, list[tuple[_Item, _Output]]] = {name: [] for name in sets}
    for name, items in sets.items():
        for chunk in chunks(items, suite.chunk):
            runs[name] += zip(chunk, suite.run(call, chunk), strict=True)
            done += len(chunk)
            if progress:
                progress(done, total)
    found = suite.grade(runs)
    scores = (found.parts, found.gap, found.bounds, found.settings)
    return Report(*scores, suite=suite.name, split=split, quick=quick, n=total)


def select(suite: Suite[_Call, _Item, _Output], split: Split, *, quick: bool = False) -> dict[str, Sequence[_Item]]:
    """The items of a run, set by set. Raises ConfigError for an unknown split."""
    check_choice("split", split, get_args(Split))
    return {name: suite.quick(items) if quick else items for name, items in suite.items(split).items()}


class TruthSuite(Suite[_CallIn, _Item, _Output], Protocol[_CallIn, _Item, _Output]):
    """A suite whose images come through a codec, which bounds its scores."""

    def truth(self, items: Sequence[_Item], codec: Codec | None) -> Sequence[_Output]:
        """Outputs of a perfect model, with true images after the codec's round trip."""
        ...


def ceiling(
    suite: TruthSuite[Any, _Item, _Output], split: Split, codec: Codec | None, *, quick: bool = False
) -> dict[str, Scores]:
    """The scores of true images after a codec's round trip, by part, which no model that draws through it can pass.

    codec: add the sampling noise to the latents inside it for the second ceiling.
    """
    sets = select(suite, split, quick=quick)
    return suite.grade({n: list(zip(items, suite.truth(items, codec), strict=True)) for n, items in sets.items()}).parts


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raise ConfigError if the value of an argument is not among those that are known."""
    if value not in (known := tuple(known)):
        raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def checked_images(images: Images, count: int) -> Images:
    """The images that a callable returned. Raises DataError unless they are uint8 (count, 64, 64, 3)."""
    images, expected = np.asarray(images), (count, IMAGE_SIZE, IMAGE_SIZE, 3)
    if images.shape != expected or images.dtype != np.uint8:
        raise DataError(f"images: expected uint8 {expected}, got {images.dtype} {images.shape}")
    return images


def checked_texts(texts: Iterable[str], count: int) -> list[str]:
    """The answers that a callable returned. Raises DataError unless they are `count` texts."""
    answers = list(texts)
    if len(answers) != count or not all(isinstance(text, str) for text in answers):
        raise DataError(f"answers: expected {count} texts, got {len(answers)} of {set(map(type, answers))}")
    return answers


def roundtrip_scenes(codec: Codec | None, scenes: Sequence[Scene]) -> Images:
    """(n, 64, 64, 3): true images of the scenes, after the codec's round trip if there is a codec."""
    images: list[Images] = []
    for chunk in chunks(scenes, IMAGES_AT_ONCE):
        truth = np.stack([render(scene) for scene in chunk])
        images += list(truth if codec is None else checked_images(codec(truth), len(chunk)))
    return np.stack(images)


# ------------------------------------------------------------------------------------------------------------- the lock


def digest(rows: Iterable[Sequence[object]]) -> Section:
    """Count and hash of items given as words and integers: rendered bytes may differ between library versions."""
    plain = [list(row) for row in rows]
    return {"count": len(plain), "blake2b": blake2b(json.dumps(plain).encode(), digest_size=16).hexdigest()}


def lock_text() -> str:
    """worldbench.lock, which has one section per suite."""
    return (files("starflow2") / "assets" / "worldbench.lock").read_text(encoding="utf-8")


def verify_lock(*suites: Suite[Any, Any, Any]) -> None:
    """Raise DataError if a suite made by this code is not the frozen one that scores are published for."""
    fresh: Section = {"version": LOCK_VERSION}
    for suite in suites:
        fresh |= suite.lock()
    check_lock(parse_json(lock_text(), "worldbench.lock"), fresh)


def check_lock(frozen: Mapping[str, object], fresh: Mapping[str, object]) -> None:
    """Raise DataError, naming the changed keys, if a section of `fresh` is not the same in `frozen`."""
    if not isinstance(frozen, Mapping):
        raise DataError(f"worldbench.lock holds {type(frozen).__name__}; expected one section per suite.")
    old, new = _flatten({name: frozen.get(name, {}) for name in fresh}), _flatten(fresh)
    changed = sorted(key for key in old | new if old.get(key) != new.get(key))
    if changed:
        raise DataError(f"worldbench.lock: the benchmark is no longer the frozen one; changed: {', '.join(changed)}")


def _flatten(tree: Mapping[str, object], above: str = "") -> Section:
    """Nested keys joined by dots."""
    flat: Section = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return flat
