"""ISG-Bench: replies of words and images in the file that its script reads, and its score from a judge's answers.

Users bring ISG-Bench.jsonl and its folder of images, which are published under CC BY 4.0; nothing of them is in this
package. A reply is judged on four levels: structure (do words and images follow each other as in the reference?), which
needs no judge; block (is each block about the other one as it should be? 1 to 10); image (is in the image what should
be? yes or no, with prerequisites); holistic (1 to 10). A judge hands back `answers.jsonl`: after a line that names it,
one line an answer, {"id": "0000", "level": "block", "question": 0, "score": 7}; yes is 1, no is 0.

The published arithmetic is kept: a reply of another structure scores 1 for block and 0 for image, and a question of the
image level that has prerequisites counts as no, since the script looks for them in the wrong table. Columns without the
second stand beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, get_args

import numpy as np

from starflow2.benchmarks.folders import DrawnFolder, FolderSettings, read_folder
from starflow2.benchmarks.prompts import PromptRow, with_digests
from starflow2.benchmarks.records import Placed, check_complete, read_judged, read_objects
from starflow2.benchmarks.results import Result, record_facts
from starflow2.core.files import replacing
from starflow2.core.images import save_png
from starflow2.core.json_reader import JsonObject
from starflow2.core.provenance import png_text
from starflow2.core.serialize import read_json
from starflow2.core.text import shown
from starflow2.errors import ConfigError, DataError, PromptError
from starflow2.evals.statistics import Row, Score, score_rows
from starflow2.inference.events import Made, Wrote
from starflow2.pipeline import Drawing, StarFlow2

__all__ = ["GROUPS", "IsgAnswer", "IsgLayout", "Level", "read_isg", "score_isg", "write_output"]

Level = Literal["structure", "block", "image", "holistic"]
LEVELS: Final[tuple[Level, ...]] = get_args(Level)
REPLY: Final = "reply.json"  # of one reply, written behind its images
OUTPUT: Final = "output.jsonl"  # all replies, as ISG-Bench's own script reads them
TOKENS: Final = 512  # of a reply at most
PICTURES: Final = 8  # of a reply at most
WORST: Final = 1.0  # on the scale of a judge, which ends at 10
_SAFE: Final = re.compile(r"[\w-]{1,120}")
GROUPS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "style": ("Art Style Transfer", "Scene Attribute Transfer", "Photo Variation", "Portrait Variation"),
        "progress": ("Animation Images", "Animation Text-Image", "Attribute Transfer"),
        "3D": ("3D_object", "multi-Perspective Scene Generation"),
        "decomposition": ("Realistic Object Detection", "Imaginary Object Detection"),
        "complementation": ("HowTo", "Scientific"),
        "prediction": ("Prediction", "painting"),
        "story": ("visual storytelling text-image", "visual storytelling image", "visual storytelling text"),
        "VQA": ("Object_VQA", "Historical"),
    }
)  # columns of its tables, and the categories of its file that each of them holds
_GROUP_OF: Final = {category: group for group, categories in GROUPS.items() for category in categories}

Block = str | Drawing
Found = Mapping[tuple[str, str, int], float]  # scores of a judge by id, level and number of the question


# ----------------------------------------------------------------------------------------------------- what to reply to


def read_isg(path: str | Path, images: Path) -> list[PromptRow]:
    """The queries of ISG-Bench.jsonl, each with all of its line. images: the folder that their images are below.

    Raises DataError with file and line, also for an id that stands twice and for an image that is not there.
    """
    rows, places = list[PromptRow](), dict[str, str]()
    for line in read_objects(path):
        key = line.value.get("id")
        if not isinstance(key, str) or not _SAFE.fullmatch(key):
            raise DataError(f"{line.where}: id is {shown(key)}; expected letters, digits, - and _: it names a folder.")
        if key in places:
            raise DataError(f"{line.where}: id {key} stands at {places[key]} already.")
        places[key] = line.where
        rows.append(_query(key, line, images))
    return rows


def _query(key: str, line: Placed[JsonObject], images: Path) -> PromptRow:
    if not isinstance(line.value.get("Category"), str):
        raise DataError(f"{line.where}: Category is {shown(line.value.get('Category'))}; expected a name.")
    query, _ = (_blocks(line, name) for name in ("Query", "Golden"))
    texts = tuple(content for kind, content in query if kind == "text")
    if not texts:
        raise DataError(f"{line.where}: Query has no text; expected words that say what to do.")
    for level in ("image", "block"):
        try:
            list(_questions(line.value, level))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{line.where}: {level}_qa of predict is not as published: {error!r}.") from error
    row = PromptRow(key, " ".join(texts), line.value, texts)
    return with_digests(row, [content for kind, content in query if kind == "image"], images, line.where)


def _blocks(line: Placed[JsonObject], name: str) -> list[tuple[str, str]]:
    """Kind and content of the blocks of a query or a reference."""
    found = line.value.get(name)
    try:
        pairs = [(block["type"], block["content"]) for block in found or ()]
    except (KeyError, TypeError) as error:
        raise DataError(f"{line.where}: {name} is not a list of blocks with type and content: {error!r}.") from error
    bad = [pair for pair in pairs if pair[0] not in ("text", "image") or not isinstance(pair[1], str)]
    if bad or not pairs:
        wanted = "blocks of type text or image with their content"
        raise DataError(f"{line.where}: {name} has {shown(bad[0]) if bad else 'no block'}; expected {wanted}.")
    return pairs


@dataclass(frozen=True, slots=True)
class _Question:
    number: int
    parents: tuple[int, ...] = ()  # numbers of the questions that have to be answered yes before it counts


def _questions(row: JsonObject, level: Literal["image", "block"]) -> Iterator[_Question]:
    """Questions of a level that a judge can be asked, in the file's order."""
    found = row["predict"].get(f"{level}_qa") or []
    listed = next(iter(found.values())) if isinstance(found, dict) else found
    for place, question in enumerate(listed):
        if level == "image":
            yield _Question(int(question["id"]), tuple(int(parent) for parent in question["Preliminary"]))
        elif {"subject", "object", "Question"} <= set(question):
            yield _Question(place)


# -------------------------------------------------------------------------------------------------------------- replies


@dataclass(frozen=True, slots=True)
class IsgLayout:
    """A folder for each query: its images, 1.png, 2.png, ..., and reply.json, which says what follows what."""

    images: Path = Path()  # the folder of the queries' images; nobody looks there for scoring
    benchmark: str = "isg"
    stage: str = "joint"

    def files(self, row: PromptRow, samples: int) -> list[str]:
        return [f"{row.name}/{REPLY}"]

    def draw(self, model: StarFlow2, rows: Sequence[PromptRow], settings: FolderSettings) -> list[list[Block]]:
        """One reply to each query; none to a query that is longer than what the model reads."""
        replies = list[list[Block]]()
        for row in rows:
            try:
                replies.append(self._reply(model, row, settings))
            except PromptError:
                replies.append([])
        return replies

    def _reply(self, model: StarFlow2, row: PromptRow, settings: FolderSettings) -> list[Block]:
        config = settings.config(model)
        about = config.recorded() | {"model": model.components.cfg.name}
        session, blocks = model.session(seed=settings.seed, config=config), list[Block]()
        session.add(*(b["content"] if b["type"] == "text" else self.images / b["content"] for b in row.row["Query"]))
        for event in session.run(tokens=TOKENS, pictures=PICTURES, tries=settings.tries):
            if isinstance(event, Made):
                blocks.append(Drawing(event.image, row.prompt, settings.seed, about))
            elif isinstance(event, Wrote):
                before = blocks.pop() if blocks and isinstance(blocks[-1], str) else ""
                blocks.append(f"{before}{event.text}")
        trimmed = [block.strip() if isinstance(block, str) else block for block in blocks]
        return [block for block in trimmed if block != ""]

    def write(self, folder: Path, row: PromptRow, drawings: Sequence[Block]) -> None:
        place, blocks = folder / row.name, list[JsonObject]()
        place.mkdir(parents=True, exist_ok=True)
        for block in drawings:
            if isinstance(block, Drawing):
                name = f"{sum(b['type'] == 'image' for b in blocks) + 1}.png"
                save_png(block.image, place / name, png_text(block.prompt, block.seed, block.settings))
                blocks.append({"type": "image", "content": name})
            else:
                blocks.append({"type": "text", "content": block})
        with replacing(place / REPLY) as temp:
            temp.write_text(json.dumps({"output": blocks}, ensure_ascii=False) + "\n", encoding="utf-8")


def write_output(drawn: DrawnFolder) -> Path:
    """Write all replies as ISG-Bench's own script reads them: its lines, with `output` or, without a reply, null."""
    replied = {row.name for row in drawn.drawn}
    with replacing(drawn.folder / OUTPUT) as temp, temp.open("w", encoding="utf-8") as file:
        for row in drawn.rows:
            blocks = _reply(drawn.folder, row) if row.name in replied else None
            place = drawn.folder.resolve() / row.name
            for block in blocks or ():
                block["content"] = str(place / block["content"]) if block["type"] == "image" else block["content"]
            line = {name: value for name, value in row.row.items() if name != "digests"} | {"output": blocks or None}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return drawn.folder / OUTPUT


def _reply(folder: Path, row: PromptRow) -> list[JsonObject]:
    """Blocks of a reply. Raises DataError for one that is damaged or has lost an image."""
    path = folder / row.name / REPLY
    try:
        blocks = [{"type": b["type"], "content": b["content"]} for b in read_json(path)["output"]]
    except (ConfigError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no reply: {error}. Let the model reply again.") from error
    lost = [b["content"] for b in blocks if b["type"] == "image" and not (path.parent / b["content"]).is_file()]
    if lost:
        raise DataError(f"{path.parent / lost[0]} is missing; remove {path} and let the model reply again.")
    return blocks


# -------------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True, slots=True, kw_only=True)
class IsgAnswer:
    id: str
    level: Literal["block", "image", "holistic"]
    score: float
    question: int = 0  # its id at the level of images, its place in the list at that of blocks

    def __post_init__(self) -> None:
        if self.level == "image" and self.score not in (0, 1):
            raise ConfigError(f"score is {self.score:g}; expected 1 for yes or 0 for no at the level of images.")
        if self.level != "image" and not WORST <= self.score <= 10:
            raise ConfigError(f"score is {self.score:g}; expected 1 to 10.")


@dataclass(frozen=True, slots=True)
class _Marks:
    """Scores of one reply by level; None where there is nothing to score. kept: image with its prerequisites."""

    group: str
    name: str
    structure: float
    block: float | None
    image: float | None
    kept: float | None
    holistic: float


def score_isg(folder: str | Path, answers: str | Path) -> Result:
    """ISG-Bench's four scores, each the mean of its eight groups' means. Raises DataError with file and line."""
    drawn = read_folder(folder, IsgLayout())
    if not drawn.drawn:
        raise DataError(f"{folder} has no reply; the model could read none of {len(drawn.unread)} queries.")
    replies = {row.name: _reply(drawn.folder, row) for row in drawn.drawn}
    right = {row.name for row in drawn.drawn if _kinds(replies[row.name]) == _kinds(row.row["Golden"])}
    judged = read_judged(answers, IsgAnswer)
    wanted = [key for row in drawn.drawn for key in _asked(row, row.name in right, bool(replies[row.name]))]
    lines = check_complete(judged.records, lambda a: (a.id, a.level, a.question), wanted, answers)
    found: Found = {(a.id, a.level, a.question): a.score for a in (line.value for line in lines)}
    pictured = {_group(row) for row in drawn.rows if list(_questions(row.row, "image"))}
    marks = [_marks(row, found, row.name in right, pictured) for row in drawn.drawn]
    drawn_names = {row.name for row in drawn.drawn}
    missed = [_marks(row, {}, False, pictured) for row in drawn.rows if row.name not in drawn_names]
    return _result(drawn, judged.judge, marks, missed)


def _group(row: PromptRow) -> str:
    """The group of a row's category; "" for one that the published script does not know, and so does not count."""
    return _GROUP_OF.get(row.row["Category"], "")


def _kinds(blocks: Sequence[JsonObject]) -> list[str]:
    return [block["type"] for block in blocks]


def _asked(row: PromptRow, is_right: bool, has_reply: bool) -> list[tuple[str, str, int]]:
    """Answers that a judge owes about a reply: on all levels if its structure is right, else on the whole alone."""
    wanted = [(row.name, "holistic", 0)] if has_reply else []
    if is_right:
        wanted += [(row.name, "image", question.number) for question in _questions(row.row, "image")]
        wanted += [(row.name, "block", question.number) for question in _questions(row.row, "block")]
    return wanted


def _marks(row: PromptRow, found: Found, is_right: bool, pictured: set[str]) -> _Marks:
    """Scores of one reply. pictured: groups that have questions about images."""
    group = _group(row)
    holistic = found.get((row.name, "holistic", 0), WORST)
    asked = list(_questions(row.row, "image"))
    if not is_right:
        image, kept = 0.0 if group in pictured else None, 0.0 if asked else None
        return _Marks(group, row.name, 0.0, WORST, image, kept, holistic)
    blocks = [found[row.name, "block", question.number] for question in _questions(row.row, "block")]
    yes = {question.number: found[row.name, "image", question.number] == 1 for question in asked}
    alone = [not question.parents and yes[question.number] for question in asked]
    image = (sum(alone) / len(asked) if asked else 0.0) if group in pictured else None
    kept = sum(_with_parents(asked, yes)) / len(asked) if asked else None
    block = float(np.mean(blocks)) if blocks else None
    return _Marks(group, row.name, 1.0, block, image, kept, holistic)


def _with_parents(asked: Sequence[_Question], yes: Mapping[int, bool]) -> list[bool]:
    """Is each question answered yes, and all of its prerequisites before it?"""
    holds: dict[int, bool] = {}
    for question in asked:
        holds[question.number] = yes[question.number] and all(holds.get(parent, False) for parent in question.parents)
    return [holds[question.number] for question in asked]


def _result(drawn: DrawnFolder, judge: str, marks: Sequence[_Marks], missed: Sequence[_Marks]) -> Result:
    columns, more = dict[str, Score](), dict[str, Score]()
    for level in LEVELS:
        columns[level], groups = _means(marks, level)
        more |= {f"{level}, {group}": score for group, score in groups.items()}
    more["image, prerequisites counted"] = _means(marks, "kept")[0]
    if missed:
        more |= {f"{level}, unread queries wrong": _means([*marks, *missed], level)[0] for level in LEVELS}
    record = drawn.record
    return Result(
        benchmark="isg",
        model="unknown" if record is None else record.model,
        judge=judge,
        columns=columns,
        more=more,
        counts={"queries": len(marks), "unread queries": len(missed), "of no group": sum(not m.group for m in marks)},
        made=record_facts(record),
        notes=tuple(_notes(judge, missed)),
    )


def _means(marks: Sequence[_Marks], level: str) -> tuple[Score, dict[str, Score]]:
    """The mean of groups' means at a level, and these; replies without a score there are left out."""
    values = [(m.group, m.name, getattr(m, level)) for m in marks]
    rows = [Row(group, name, (value,)) for group, name, value in values if group and value is not None]
    if not rows:
        return Score(None), {}
    scores = score_rows(rows, (level,), np.random.default_rng(0), "averaged").scores
    return scores[level], {group: scores.by_kind[group][level] for group in GROUPS if group in scores.by_kind}


def _notes(judge: str, missed: Sequence[_Marks]) -> Iterator[str]:
    yield (
        "A reply of another structure scores 1 for block and 0 for image. As in the published script, questions with "
        "prerequisites count as no; 'prerequisites counted' has them as they were meant."
    )
    yield f"Judged by {judge}; published numbers are of GPT-4o or GPT-4.1."
    if missed:
        yield f"The model could not read {len(missed)} queries; they are left out of the columns."
