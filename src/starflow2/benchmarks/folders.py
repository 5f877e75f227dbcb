"""Images of a drawing benchmark in its published layout, drawn so that an interrupted run ends in the same bytes.

Prompts are drawn in fixed groups, and a group of which a file is missing is drawn again as a whole: rounding may depend
on which rows share a batch. `run.json` holds all that images depend on; images of two runs never mix.
Not here: the layouts of single benchmarks (`geneval`, `dpg`), and the judges.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import starflow2
from starflow2.benchmarks.prompts import PromptRow, digest
from starflow2.benchmarks.records import Placed, read_objects
from starflow2.benchmarks.stages import check_finished
from starflow2.core.fields import Config, Count, Positive, Seed, Weight, conform
from starflow2.core.files import TEMPORARY, check_writable, replacing
from starflow2.core.json_reader import JsonObject
from starflow2.core.locks import folder_lock
from starflow2.core.serialize import from_dict, read_json, to_dict
from starflow2.errors import ConfigError, DataError, OutputError, PromptError, StateError
from starflow2.evals.report import commit
from starflow2.evals.statistics import chunks
from starflow2.inference.config import DrawConfig
from starflow2.models.checkpoint import weights_digest
from starflow2.models.prompts import unknown_words
from starflow2.pipeline import Drawing, StarFlow2

__all__ = [
    "DrawnFolder",
    "FolderRecord",
    "FolderSettings",
    "Layout",
    "Unread",
    "draw_folder",
    "draw_prompts",
    "read_folder",
]

Made = TypeVar("Made")  # what a model makes of a prompt: images, or words and images

RECORD: Final = "run.json"
UNREAD: Final = "unread.json"
SAMPLES: Final = 4  # images of a prompt, in GenEval and in DPG-Bench
PROMPTS: Final = "prompts.jsonl"  # a copy of the prompt file, so that a folder can be scored on its own


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSettings(Config):
    """Settings of the images of a folder. None: the model's own."""

    samples: Count = SAMPLES  # images of a prompt
    seed: Seed = 42  # image j of every prompt has seed + j
    tries: Count = 1  # images drawn to keep one; 1: the plain sample
    guidance: Weight | None = None  # 0 = off
    prior_scale: Positive | None = None  # 1 = exact sampling
    at_once: Count = 32  # images drawn in one call

    def config(self, model: StarFlow2) -> DrawConfig:
        """These settings, with a model's own where they are None."""
        return DrawConfig.for_model(model.components, guidance=self.guidance, prior_scale=self.prior_scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderRecord:
    """All that the images of a folder depend on."""

    benchmark: str
    prompts: int
    prompts_digest: str
    samples: int
    seed: int
    tries: int
    guidance: float
    prior_scale: float
    at_once: int
    model: str
    weights: str
    version: str
    commit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Unread:
    """A prompt that the model cannot read. words: those that it never learnt, if that is the reason."""

    name: str
    prompt: str
    words: tuple[str, ...]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _UnreadList:
    prompts: tuple[Unread, ...]


@dataclass(frozen=True, slots=True)
class DrawnFolder:
    """A folder of drawn images. rows: all prompts; unread: those that the model cannot read, which have no image."""

    folder: Path
    record: FolderRecord | None  # None of another program's
    samples: int
    rows: Sequence[PromptRow]
    unread: Sequence[Unread]

    @property
    def drawn(self) -> list[PromptRow]:
        """Prompts that have images."""
        names = {prompt.name for prompt in self.unread}
        return [row for row in self.rows if row.name not in names]

    @property
    def unknown_words(self) -> list[tuple[str, int]]:
        """Words that the model never learnt, with the number of prompts that hold each, the most frequent first."""
        counts = Counter(word for prompt in self.unread for word in prompt.words)
        return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


class Layout(Protocol[Made]):
    """Where a benchmark wants its images, or whatever else it lets a model make."""

    @property
    def benchmark(self) -> str: ...

    @property
    def stage(self) -> str:
        """The stage of training that a model needs."""
        ...

    def draw(self, model: StarFlow2, rows: Sequence[PromptRow], settings: FolderSettings) -> list[list[Made]]:
        """The images of each prompt."""
        ...

    def files(self, row: PromptRow, samples: int) -> list[str]:
        """Names, relative to the folder, of all files of a prompt; the prompt is done when all of them are there."""
        ...

    def write(self, folder: Path, row: PromptRow, drawings: Sequence[Made]) -> None:
        """Write the files of a prompt."""
        ...


def draw_folder(
    model: StarFlow2,
    layout: Layout[Made],
    rows: Sequence[PromptRow],
    folder: Path,
    settings: FolderSettings,
    progress: Callable[[int, int], None] | None = None,
) -> DrawnFolder:
    """Draw all prompts that the model can read, as far as their files are missing; those it cannot are listed.

    progress: called with (prompts done, prompts in all). Raises ConfigError for a folder with images of another run,
    StateError for a model that cannot draw and while somebody else is drawing there, OutputError.
    """
    check_writable(folder / RECORD)
    _check_stage(model, layout)
    record = _record(model, layout, rows, settings)
    _check_same_run(folder, record)
    unread = [reason for row in rows if (reason := _unread(model, row)) is not None]
    found = DrawnFolder(folder, record, settings.samples, rows, unread)
    with folder_lock(folder, StateError, f"drawing {layout.benchmark}"):
        for half in folder.rglob(f"{TEMPORARY}*.tmp"):  # of a run that was killed
            half.unlink()
        _write(folder / RECORD, to_dict(record))
        _write(folder / UNREAD, to_dict(_UnreadList(prompts=tuple(unread))))
        with replacing(folder / PROMPTS) as temp:
            temp.write_text("".join(map(_line, rows)), encoding="utf-8")
        for done in _draw_missing(model, layout, found.drawn, folder, settings):
            if progress is not None:
                progress(done, len(found.drawn))
    return found


def read_folder(folder: str | Path, layout: Layout[Any], rows: Sequence[PromptRow] | None = None) -> DrawnFolder:
    """A finished folder, of ours or, given its prompts, of another program.

    rows: the prompts that it was drawn from; None: those that the folder has a copy of.
    Raises DataError for a folder that is half-written, of other prompts or of another benchmark.
    """
    folder = Path(folder)
    is_ours = (folder / RECORD).is_file()
    if not folder.is_dir() or not (is_ours or rows):
        raise DataError(
            f"{folder} is no folder of drawn prompts: it has no {RECORD}. Of another program: give --prompts."
        )
    record, unread = (_read_record(folder), _read_unread(folder)) if is_ours else (None, ())
    rows = _read_copy(folder) if rows is None else rows
    if record is not None:
        _check_record(folder, record, layout, rows)
    found = DrawnFolder(folder, record, SAMPLES if record is None else record.samples, rows, unread)
    names = [name for row in found.drawn for name in layout.files(row, found.samples)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} is half-written: {missing[0]} and {len(missing) - 1} more are missing; draw again.")
    return found


def _check_record(folder: Path, record: FolderRecord, layout: Layout[Any], rows: Sequence[PromptRow]) -> None:
    if record.benchmark != layout.benchmark:
        raise DataError(f"{folder} holds images of {record.benchmark}; expected {layout.benchmark}.")
    if record.prompts_digest != digest(rows):
        raise DataError(f"{folder} was drawn from another prompt file: {record.prompts} prompts, here {len(rows)}.")


def draw_prompts(model: StarFlow2, rows: Sequence[PromptRow], settings: FolderSettings) -> list[list[Drawing]]:
    """Images of each prompt, sample j with seed + j."""
    n, prompts, config = settings.samples, [row.prompt for row in rows], settings.config(model)
    drawings = model.generate(prompts, n=n, seed=settings.seed, tries=settings.tries, config=config)
    return [drawings[i * n : (i + 1) * n] for i in range(len(rows))]


def _check_stage(model: StarFlow2, layout: Layout[Any]) -> None:
    check_finished(layout.benchmark, layout.stage, model.components.cfg.name, model.components.finished_stages)


def _record(model: StarFlow2, layout: Layout[Any], rows: Sequence[PromptRow], settings: FolderSettings) -> FolderRecord:
    config = settings.config(model)
    return FolderRecord(
        benchmark=layout.benchmark,
        prompts=len(rows),
        prompts_digest=digest(rows),
        samples=settings.samples,
        seed=settings.seed,
        tries=settings.tries,
        guidance=config.guidance,
        prior_scale=config.prior_scale,
        at_once=settings.at_once,
        model=model.components.cfg.name,
        weights=weights_digest(model.components),
        version=starflow2.__version__,
        commit=commit(),
    )


def _check_same_run(folder: Path, record: FolderRecord) -> None:
    """Raise ConfigError if the folder holds images that depend on something else, OutputError if it is not ours."""
    if not (folder / RECORD).is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise OutputError(f"{folder} is not empty and has no {RECORD}; expected a new folder, or one of ours.")
        return
    before, now = to_dict(_read_record(folder)), to_dict(record)
    changed = [f"{name} was {before[name]!r} and is {now[name]!r}" for name in now if before[name] != now[name]]
    if changed:
        raise ConfigError(f"{folder} holds images of another run: {'; '.join(changed)}. Give another folder.")


def _read_record(folder: Path) -> FolderRecord:
    try:
        return from_dict(FolderRecord, read_json(folder / RECORD))
    except ConfigError as error:
        raise DataError(f"{folder} is no folder of drawn prompts: {error}") from error


def _read_unread(folder: Path) -> tuple[Unread, ...]:
    try:
        return from_dict(_UnreadList, read_json(folder / UNREAD)).prompts
    except ConfigError as error:
        raise DataError(f"{folder} has no list of prompts that were not read: {error} Draw again.") from error


def _line(row: PromptRow) -> str:
    return json.dumps({"name": row.name, "prompt": row.prompt, "row": row.row, "turns": row.turns}) + "\n"


def _read_copy(folder: Path) -> list[PromptRow]:
    lines = read_objects(folder / PROMPTS)
    for line in lines:
        if set(line.value) != {"name", "prompt", "row", "turns"}:
            raise DataError(f"{line.where} is not what drawing wrote; draw again.")
    return [_row_of(line) for line in lines]


def _row_of(line: Placed[JsonObject]) -> PromptRow:
    """A row of the folder's copy of its prompts. Raises DataError."""
    value = line.value
    turns = tuple(value["turns"]) if isinstance(value["turns"], list) else value["turns"]
    try:
        name, prompt = (conform(str, value[key], key) for key in ("name", "prompt"))
        return PromptRow(
            name, prompt, conform(JsonObject, value["row"], "row"), conform(tuple[str, ...], turns, "turns")
        )
    except ConfigError as error:
        raise DataError(f"{line.where} is not what drawing wrote: {error} Draw again.") from error


def _unread(model: StarFlow2, row: PromptRow) -> Unread | None:
    """Why the model cannot read a prompt; None if it can."""
    words: list[str] = []
    try:
        for text in row.texts:
            words += unknown_words(model.components, text)
        for text in row.texts:
            model.check_prompt(text)
    except PromptError as error:
        return Unread(name=row.name, prompt=row.prompt, words=tuple(dict.fromkeys(words)), reason=str(error))
    return None


def _draw_missing(
    model: StarFlow2, layout: Layout[Made], rows: Sequence[PromptRow], folder: Path, settings: FolderSettings
) -> Iterator[int]:
    """Draw group by group; after each, the number of prompts that are done."""
    done = 0
    for group in chunks(rows, max(1, settings.at_once // settings.samples)):
        late = {row.name for row in group if not _is_done(folder, layout.files(row, settings.samples))}
        drawings = layout.draw(model, group, settings) if late else [[] for _ in group]
        for row, own in zip(group, drawings, strict=True):
            if row.name in late:
                layout.write(folder, row, own)
        done += len(group)
        yield done


def _is_done(folder: Path, names: Sequence[str]) -> bool:
    return all((folder / name).is_file() for name in names)


def _write(path: Path, data: JsonObject) -> None:
    with replacing(path) as temp:
        temp.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
