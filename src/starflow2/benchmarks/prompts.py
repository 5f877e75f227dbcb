"""Prompt files of drawing benchmarks, as their authors publish them: GenEval's metadata and DPG-Bench's prompts.

Rows are checked and kept as they stood, since they are written out again beside the images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Final, Literal, get_args

from starflow2.benchmarks.records import Placed, read_lines, read_objects
from starflow2.core.files import read_regular
from starflow2.core.images import MAX_BYTES
from starflow2.core.json_reader import JsonObject
from starflow2.core.text import read_text, shown
from starflow2.errors import ConfigError, DataError

__all__ = [
    "COLORS",
    "TAGS",
    "GenevalRow",
    "PromptRow",
    "Tag",
    "digest",
    "read_dpg_prompts",
    "read_geneval_prompts",
    "with_digests",
]

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]
TAGS: Final[tuple[Tag, ...]] = get_args(Tag)
COLORS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_SAFE: Final = re.compile(r"[\w-]{1,120}")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt to draw. name: of its file or folder. row: the line of the prompt file, whatever it held.

    turns: what is said in turn, where that is more than the prompt.
    """

    name: str
    prompt: str
    row: JsonObject
    turns: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All that a model has to read."""
        return self.turns or (self.prompt,)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Requirement:
    class_: str
    count: int
    color: str | None = None
    position: tuple[Relation, int] | None = None  # relation to the objects of an earlier requirement, by its number


@dataclass(frozen=True, slots=True, kw_only=True)
class GenevalRow:
    """One prompt of GenEval and what an image of it has to show."""

    tag: Tag
    prompt: str
    include: tuple[_Requirement, ...] = field(metadata={"of": _Requirement})
    exclude: tuple[_Requirement, ...] = field(default=(), metadata={"of": _Requirement})

    def __post_init__(self) -> None:
        if not self.prompt.strip() or not self.include:
            raise ConfigError("prompt or include is empty; expected a prompt and at least one object to find.")
        for number, asked in enumerate((*self.include, *self.exclude)):
            _check_requirement(asked, min(number, len(self.include)))


def _check_requirement(asked: _Requirement, earlier: int) -> None:
    if asked.count < 1:
        raise ConfigError(f"count is {asked.count} for class {asked.class_!r}; expected at least 1.")
    if asked.color is not None and asked.color not in COLORS:
        raise ConfigError(f"color is {asked.color!r}; expected one of {', '.join(COLORS)}.")
    if asked.position is not None and not 0 <= asked.position[1] < earlier:
        raise ConfigError(f"position points at requirement {asked.position[1]}; expected one before it.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _DpgRow:
    id: str
    prompt: str

    def __post_init__(self) -> None:
        if not _SAFE.fullmatch(self.id):
            raise ConfigError(f"id is {shown(self.id)}; expected letters, digits, - and _: it names a file.")
        if not self.prompt.strip():
            raise ConfigError("prompt is empty; expected what to draw.")


def read_geneval_prompts(path: str | Path) -> list[PromptRow]:
    """Prompts of GenEval's `evaluation_metadata.jsonl`, named by five digits. Raises DataError with file and line."""
    read_lines(path, GenevalRow)
    return [PromptRow(f"{i:05d}", line.value["prompt"], line.value) for i, line in enumerate(read_objects(path))]


def read_dpg_prompts(path: str | Path) -> list[PromptRow]:
    """Prompts of DPG-Bench by their id: a JSONL file of id and prompt, or the published folder with a text file each.

    Raises DataError with file and line, for an id twice, and for a folder without text files.
    """
    return _text_files(Path(path)) if Path(path).is_dir() else _without_doubles(read_lines(path, _DpgRow))


def _without_doubles(lines: Sequence[Placed[_DpgRow]]) -> list[PromptRow]:
    first: dict[str, str] = {}
    for line in lines:
        if line.value.id in first:
            raise DataError(f"{line.where}: id {line.value.id} stands at {first[line.value.id]} already.")
        first[line.value.id] = line.where
    return [PromptRow(x.value.id, x.value.prompt, {"id": x.value.id, "prompt": x.value.prompt}) for x in lines]


def _text_files(folder: Path) -> list[PromptRow]:
    texts = [(path.stem, read_text(path).strip()) for path in sorted(folder.glob("*.txt"))]
    if not texts:
        raise DataError(f"{folder} has no .txt files; expected the folder of DPG-Bench's prompts, or a JSONL file.")
    return [PromptRow(name, prompt, {"id": name, "prompt": prompt}) for name, prompt in texts]


def digest(rows: Iterable[PromptRow]) -> str:
    """Hash of prompts with all that their file said about them, in 16 hexadecimal digits."""
    text = json.dumps([[row.name, row.row] for row in rows], sort_keys=True)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def with_digests(row: PromptRow, images: Sequence[str], folder: Path, source: str | Path) -> PromptRow:
    """A row that also holds digests of the images it is about, so that a run cannot go on from other ones.

    source: the file of the row. Raises DataError for an image that is not below `folder`.
    """
    digests = []
    for name in images:
        try:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise FileNotFoundError(name)
            digests.append(blake2b(read_regular(folder / name, MAX_BYTES), digest_size=8).hexdigest())
        except OSError as error:
            raise DataError(f"{source}: {row.name} is about {name:.200}, which is not in {folder}.") from error
    return PromptRow(row.name, row.prompt, row.row | {"digests": digests}, row.turns)
