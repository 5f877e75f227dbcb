"""Editing benchmarks: GEdit-Bench, ImgEdit-Bench and MagicBrush, in their layouts and with their arithmetic.

Nothing of theirs is in this package: users bring prompts and images. GEdit's Hub rows become `edits.jsonl`, one line an
edit, {"key": ..., "task_type": ..., "instruction": ..., "instruction_language": "en", "intersection_exist": true,
"image": "a.png"}; ImgEdit's basic_edit.json and MagicBrush's edit_sessions.json are read as they are published.
Judges of the first two hand back `ratings.jsonl`; MagicBrush compares pixels with targets, and takes similarities of
CLIP and DINO from a file. Later turns of MagicBrush are drawn twice: from their own input ("inde"), and in one
conversation, which reads its own images and never encodes them again ("iter").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np

from starflow2.benchmarks.folders import DrawnFolder, FolderSettings, read_folder
from starflow2.benchmarks.prompts import PromptRow, with_digests
from starflow2.benchmarks.records import check_complete, read_judged, read_lines, read_objects
from starflow2.benchmarks.results import Result, record_facts
from starflow2.core.images import pixel_distances, save_png
from starflow2.core.json_reader import JsonObject
from starflow2.core.provenance import png_text
from starflow2.core.serialize import from_dict, read_json
from starflow2.errors import ConfigError, DataError
from starflow2.evals.statistics import Row, Score, score_rows
from starflow2.pipeline import Drawing, StarFlow2

__all__ = [
    "EDITING",
    "EditLayout",
    "read_edits",
    "score_gedit",
    "score_imgedit",
    "score_magicbrush",
]

EditBenchmark = Literal["gedit", "imgedit", "magicbrush"]
EDITING: Final[tuple[EditBenchmark, ...]] = ("gedit", "imgedit", "magicbrush")
T = TypeVar("T")
_SAFE: Final = re.compile(r"[\w -]{1,120}")


# --------------------------------------------------------------------------------------------------------- what to edit


@dataclass(frozen=True, slots=True, kw_only=True)
class _GeditRow:
    key: str
    task_type: str
    instruction: str
    instruction_language: Literal["en", "cn"]
    image: str
    intersection_exist: bool = True

    def __post_init__(self) -> None:
        _check_names(self.key, self.task_type)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ImgeditRow:
    id: str
    prompt: str
    edit_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _MagicTurn:
    input: str
    output: str
    instruction: str
    mask: str


def _check_names(*names: str) -> None:
    for name in names:
        if not _SAFE.fullmatch(name):
            raise ConfigError(f"{name!r} names a file; expected letters, digits, spaces, - and _.")


def read_edits(benchmark: EditBenchmark, path: str | Path, images: Path) -> list[PromptRow]:
    """The edits of a benchmark's file. images: the folder of their source images, each of which has to be there.

    Raises DataError with file and line, or with file and key.
    """
    rows = {"gedit": _read_gedit, "imgedit": _read_imgedit, "magicbrush": _read_magicbrush}[benchmark](Path(path))
    names = [row.name for row in rows]
    double = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if double is not None:
        raise DataError(f"{path} has {double} twice; expected every edit once.")
    return [with_digests(row, _sources(row), images, path) for row in rows]


def _sources(row: PromptRow) -> list[str]:
    """Names of the images that a row edits, one a turn."""
    return list(row.row.get("images") or [row.row["image"]])


def _read_gedit(path: Path) -> list[PromptRow]:
    return [
        PromptRow(f"fullset/{e.task_type}/{e.instruction_language}/{e.key}", e.instruction, line.value)
        for e, line in zip([x.value for x in read_lines(path, _GeditRow)], read_objects(path), strict=True)
    ]


def _read_imgedit(path: Path) -> list[PromptRow]:
    rows = []
    for key, data in _json_object(path).items():
        found = _entry(_ImgeditRow, data, f"{path}: {key}")
        rows.append(PromptRow(key, found.prompt, {"key": key, "image": found.id, "edit_type": found.edit_type}))
    return rows


def _read_magicbrush(path: Path) -> list[PromptRow]:
    rows = []
    for key, data in _json_object(path).items():
        if not isinstance(data, list) or not data:
            raise DataError(f"{path}: {key} has no turns; expected a list of them.")
        turns = [_entry(_MagicTurn, turn, f"{path}: {key}") for turn in data]
        row = {
            "key": key,
            "images": [f"{key}/{turn.input}" for turn in turns],
            "targets": [f"{key}/{turn.output}" for turn in turns],
            "instructions": [turn.instruction for turn in turns],
        }
        rows.append(PromptRow(key, turns[0].instruction, row, tuple(turn.instruction for turn in turns)))
    return rows


def _json_object(path: Path) -> JsonObject:
    try:
        found = read_json(path)
    except ConfigError as error:
        raise DataError(str(error)) from error
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path} is no JSON object of edits by key; expected the file as it is published.")
    for key in found:
        if not _SAFE.fullmatch(key):
            raise DataError(f"{path}: key {key!r} names a file; expected letters, digits, spaces, - and _.")
    return found


def _entry(kind: type[T], data: object, where: str) -> T:
    try:
        return from_dict(kind, data)
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from error


# -------------------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True, slots=True)
class EditLayout:
    """Names of edited images: fullset/TASK/LANGUAGE/KEY.png, KEY.png, or KEY/KEY_1.png, KEY/KEY_inde_2.png, ..."""

    benchmark: EditBenchmark
    images: Path = Path()  # the folder of source images; nobody looks there for scoring
    stage: str = "joint"

    def files(self, row: PromptRow, samples: int) -> list[str]:
        if self.benchmark != "magicbrush":
            return [f"{row.name}.png"]
        turns = range(2, len(row.texts) + 1)
        inde, chained = ([f"{row.name}/{row.name}_{kind}_{i}.png" for i in turns] for kind in ("inde", "iter"))
        return [f"{row.name}/{row.name}_1.png", *inde, *chained]

    def draw(self, model: StarFlow2, rows: Sequence[PromptRow], settings: FolderSettings) -> list[list[Drawing]]:
        """Edited images of each row, in the order of its files."""
        return [self._draw_row(model, row, settings) for row in rows]

    def _draw_row(self, model: StarFlow2, row: PromptRow, settings: FolderSettings) -> list[Drawing]:
        config = settings.config(model)
        sources = [self.images / name for name in _sources(row)]
        alone = [
            model.edit(source, text, seed=settings.seed, tries=settings.tries, config=config)
            for source, text in zip(sources, row.texts, strict=True)
        ]
        return [*alone, *(_later_turns(model, row, sources[0], settings) if len(sources) > 1 else [])]

    def write(self, folder: Path, row: PromptRow, drawings: Sequence[Drawing]) -> None:
        for drawing, name in zip(drawings, self.files(row, 1), strict=True):
            save_png(drawing.image, folder / name, png_text(drawing.prompt, drawing.seed, drawing.settings))


def _later_turns(model: StarFlow2, row: PromptRow, source: Path, settings: FolderSettings) -> list[Drawing]:
    """Images of the second and further turns of one conversation."""
    config = settings.config(model)
    session, drawings = model.session(seed=settings.seed, config=config), list[Drawing]()
    about = config.recorded() | {"model": model.components.cfg.name}
    for i, text in enumerate(row.texts):
        made = session.add(*([source] if i == 0 else []), text).draw(tries=settings.tries)
        drawings.append(Drawing(made.image, "\n".join(row.texts[: i + 1]), settings.seed, about))
    return drawings[1:]


# -------------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True, slots=True, kw_only=True)
class _GeditRating:
    image: str
    semantics: float
    quality: float

    def __post_init__(self) -> None:
        for name in ("semantics", "quality"):
            if not 0 <= getattr(self, name) <= 10:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 to 10.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _ImgeditRating:
    image: str
    scores: tuple[int, int, int]

    def __post_init__(self) -> None:
        if not all(1 <= score <= 5 for score in self.scores):
            raise ConfigError(f"scores are {list(self.scores)}; expected three from 1 to 5.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Similarity:
    image: str
    clip_i: float
    dino: float
    clip_t: float

    def __post_init__(self) -> None:
        for name in ("clip_i", "dino", "clip_t"):
            if not -1 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a cosine.")


def score_gedit(folder: str | Path, ratings: str | Path) -> Result:
    """GEdit-Bench's score: sqrt(semantics x quality) of each image, means of a group of edits, then over groups.

    Columns are of the English full set; further ones of the intersection and of Chinese. Raises DataError with file
    and line.
    """
    drawn = _read("gedit", folder)
    judged = read_judged(ratings, _GeditRating)
    by_image = {f"{row.name}.png": row for row in drawn.drawn}
    lines = check_complete(judged.records, lambda r: r.image, by_image, ratings)
    rated = [(by_image[line.value.image].row, line.value) for line in lines]
    tables = {}
    for language in ("en", "cn"):
        own = [(row, r) for row, r in rated if row["instruction_language"] == language]
        tables[language] = _gedit_scores(own)
        tables[f"{language}, intersection"] = _gedit_scores([p for p in own if p[0].get("intersection_exist", True)])
    more = {f"{name}, {set_}": score for set_, table in tables.items() if set_ != "en" for name, score in table.items()}
    notes = "Overall: the root of semantics x quality for each image, the mean within groups and then over them."
    return _result(drawn, judged.judge, tables["en"], more, (notes, _judged(judged.judge, "GPT-4.1 or Qwen2.5-VL-72B")))


def _gedit_scores(rated: Sequence[tuple[JsonObject, _GeditRating]]) -> dict[str, Score]:
    names = ("semantics", "quality", "overall")
    rows = [
        Row(row["task_type"], row["key"], (r.semantics, r.quality, sqrt(r.semantics * r.quality))) for row, r in rated
    ]
    if not rows:
        return dict.fromkeys(names, Score(None))
    return score_rows(rows, names, np.random.default_rng(0), "averaged").scores.columns


def score_imgedit(folder: str | Path, ratings: str | Path) -> Result:
    """ImgEdit-Bench's score: the mean of three ratings rounded to cents, then means by type and over types.

    The published script also rounds the means of types; ours are not rounded. Raises DataError with file and line.
    """
    drawn = _read("imgedit", folder)
    judged = read_judged(ratings, _ImgeditRating)
    by_image = {f"{row.name}.png": row for row in drawn.drawn}
    lines = check_complete(judged.records, lambda r: r.image, by_image, ratings)
    rows = []
    for line in lines:
        own = by_image[line.value.image]
        rows.append(Row(own.row["edit_type"], own.name, (round(sum(line.value.scores) / 3, 2),)))
    above = sum(max(line.value.scores[1:]) > line.value.scores[0] for line in lines)
    scores = score_rows(rows, ("score",), np.random.default_rng(0), "averaged").scores
    columns = {kind: found["score"] for kind, found in sorted(scores.by_kind.items())} | {"overall": scores["score"]}
    notes = [_judged(judged.judge, "GPT-4o")]
    if above:
        notes.append(
            f"In {above} ratings the second or third score exceeds the first, which the judge's prompt forbids."
        )
    pooled = {"overall, images pooled": Score(float(np.mean([row.marks[0] for row in rows])))}
    return _result(drawn, judged.judge, columns, pooled, notes)


def score_magicbrush(folder: str | Path, targets: Path, similarities: str | Path | None = None) -> Result:
    """MagicBrush's distances from the target images: after all turns ("final"), and of single edits ("all").

    targets: the folder of published images. similarities: `similarities.jsonl` with the cosines of CLIP and DINO of
    every image. Raises DataError with file and line, and for a missing target.
    """
    drawn = _read("magicbrush", folder)
    pairs = [pair for row in drawn.drawn for pair in _pairs(row)]
    names: tuple[str, ...] = ("l1", "l2")
    judge, extra = "pixels", dict[str, tuple[float, ...]]()
    if similarities is not None:
        judged = read_judged(similarities, _Similarity)
        found = check_complete(judged.records, lambda r: r.image, [name for _, name, _ in pairs], similarities)
        extra = {r.value.image: (r.value.clip_i, r.value.dino, r.value.clip_t) for r in found}
        names, judge = (*names, "clip_i", "dino", "clip_t"), judged.judge
    rows: dict[str, list[Row]] = {"final": [], "all": []}
    for kinds, name, target in pairs:
        if not (targets / target).is_file():
            raise DataError(f"{targets / target} is not there; expected MagicBrush's target of {name}.")
        marks = (*pixel_distances(drawn.folder / name, targets / target), *extra.get(name, ()))
        for kind in kinds:
            rows[kind].append(Row("", name.split("/")[0], marks))
    tables = {kind: score_rows(own, names, np.random.default_rng(0), "plain").scores for kind, own in rows.items()}
    columns = {f"{name}, {kind} turns": tables[kind][name] for kind in tables for name in names}
    return _result(
        drawn, judge, columns, {}, ["Distances in [0, 1], less is better; final turns are of one conversation."]
    )


def _pairs(row: PromptRow) -> list[tuple[tuple[str, ...], str, str]]:
    """Images of a session: the tables that they count in, their file, and their target."""
    first, *rest = EditLayout("magicbrush").files(row, 1)
    targets, later = row.row["targets"], len(row.texts) - 1
    pairs = [(("all",) if later else ("final", "all"), first, targets[0])]
    pairs += [(("all",), name, target) for name, target in zip(rest[:later], targets[1:], strict=True)]
    return pairs + ([(("final",), rest[-1], targets[-1])] if later else [])


def _read(benchmark: EditBenchmark, folder: str | Path) -> DrawnFolder:
    drawn = read_folder(folder, EditLayout(benchmark))
    if not drawn.drawn:
        raise DataError(f"{folder} has no images; the model could read none of {len(drawn.unread)} instructions.")
    return drawn


def _result(
    drawn: DrawnFolder, judge: str, columns: dict[str, Score], more: dict[str, Score], notes: Sequence[str]
) -> Result:
    record = drawn.record
    return Result(
        benchmark="editing" if record is None else record.benchmark,
        model="unknown" if record is None else record.model,
        judge=judge,
        columns=columns,
        more=more,
        counts={"edits": len(drawn.drawn), "unread edits": len(drawn.unread)},
        made=record_facts(record),
        notes=tuple(note for note in notes if note),
    )


def _judged(judge: str, official: str) -> str:
    return f"Judged by {judge}; published numbers are of {official}."
