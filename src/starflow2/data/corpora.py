"""Real corpora as conversations: one adapter for each, from its published fields to turns of words and pictures.

`CORPORA` names them; docs/choices.md#corpora says where each schema was learnt. A sample that cannot be used raises
Broken with one of REASONS; nothing is guessed. Not here: reading files (shards), mixing and packing (mix).
"""

from __future__ import annotations

import json
import posixpath
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image as PilImage
from PIL import UnidentifiedImageError
from torch import Tensor

from starflow2.core.images import read_picture
from starflow2.data.dialogue import Dialogue, Turn
from starflow2.data.shards import PICTURES, Sample, inside, read_file
from starflow2.errors import DataError

__all__ = [
    "CORPORA",
    "REASONS",
    "Broken",
    "Corpus",
    "Photo",
    "decode",
    "understand",
]

Corpus = Literal["captions", "cc12m", "journeydb", "blip3o", "cambrian", "comm", "pico-banana", "omniedit", "zebra-cot"]

REASONS = (
    "unreadable file",  # the rest of a file is lost: cut off, vanished, no tar or parquet at all
    "bad UTF-8",
    "bad JSON",
    "wrong type",  # a field holds something else than the schema says
    "missing text",
    "empty text",
    "missing picture",  # no such member, column or file
    "empty picture",  # zero bytes
    "not a picture",
    "damaged picture",  # a picture that ends too early or cannot be decoded
    "huge picture",  # more pixels than anybody means
    "unfit picture",  # several frames, CMYK, 16 bits, transparent, less than 16 pixels a side
    "wrong order",  # turns or picture marks that do not match
    "too long",  # more positions than a row of a batch
)


class Broken(DataError):
    """A sample that cannot be used: `reason` is one of REASONS, `detail` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Photo:
    """A picture as the bytes of its file; see `decode`."""

    data: bytes


Part = str | Photo


def understand(corpus: Corpus, sample: Sample, pictures: str = "") -> Dialogue[Photo]:
    """The conversation that a raw sample of a corpus holds.

    `pictures`: the folder that paths of pictures are relative to, by default the folder of the sample's file.
    Raises Broken.
    """
    if sample.damage:
        raise Broken("bad UTF-8" if "UnicodeDecodeError" in sample.damage else "unreadable file", sample.damage)
    return CORPORA[corpus](_Record(sample.fields, pictures or posixpath.dirname(sample.source)))


def decode(photo: Photo, size: int) -> Tensor:
    """Its middle square, (3, size, size) in [-1, 1]. Raises Broken."""
    if not photo.data:
        raise Broken("empty picture", "it has no bytes")
    try:
        return read_picture(photo.data, size)
    except DataError as error:
        raise Broken(_picture_reason(error.__cause__), str(error)) from error
    except Exception as error:  # PIL's readers raise what they like on bad bytes
        raise Broken("damaged picture", f"{type(error).__name__}: {error}") from error


def _picture_reason(cause: BaseException | None) -> str:
    match cause:
        case None:  # whole, but one that would have to be guessed about
            return "unfit picture"
        case UnidentifiedImageError():
            return "not a picture"
        case PilImage.DecompressionBombError() | PilImage.DecompressionBombWarning():
            return "huge picture"
        case _:
            return "damaged picture"


# -- fields -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Record:
    """The fields of a sample, each checked as it is taken; `folder` is where paths of pictures start."""

    values: Mapping[str, Any]
    folder: str

    @property
    def json(self) -> _Record:
        """The object in the member or line "json"; the record itself where there is none, as in parquet."""
        if "json" not in self.values:
            return self
        try:
            value = json.loads(_decoded(self.values["json"]))
        except (ValueError, RecursionError) as error:
            raise Broken("bad JSON", str(error)) from error
        return _Record(_typed(value, dict, "the record"), self.folder)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def text(self, name: str) -> str:
        """Words that are there."""
        if not self.has(name):
            raise Broken("missing text", f"no {name}; there are {self._names}")
        words = _decoded(self.values[name], name).strip()
        if not words:
            raise Broken("empty text", f"{name} holds no words")
        return words

    def items(self, name: str, kind: type) -> list[Any]:
        """A list that is there, every item of one type."""
        if not self.has(name):
            raise Broken("missing text", f"no {name}; there are {self._names}")
        return [_typed(item, kind, f"{name}[{i}]") for i, item in enumerate(_typed(self.values[name], list, name))]

    def picture(self, *names: str) -> Photo:
        """The first of these fields that is there, its bytes or a row's {"bytes", "path"}."""
        for name in names:
            if self.has(name):
                return self._photo(self.values[name], name)
        raise Broken("missing picture", f"no {' or '.join(names[:3])}; there are {self._names}")

    def file(self, path: object) -> Photo:
        """The picture of that name below the folder."""
        name = _typed(path, str, "the path of the picture")
        try:
            return Photo(read_file(inside(self.folder, name)))
        except (OSError, ValueError) as error:
            raise Broken("missing picture", str(error)) from error

    def _photo(self, value: object, name: str) -> Photo:
        if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path"):
            return self.file(value["path"])
        return Photo(_typed(value.get("bytes") if isinstance(value, Mapping) else value, bytes, name))

    @property
    def _names(self) -> str:
        return ", ".join(self.values) or "no fields"


def _decoded(value: object, name: str = "the record") -> str:
    """Text, or UTF-8 bytes of it."""
    if not isinstance(value, bytes):
        return _typed(value, str, name)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Broken("bad UTF-8", f"{name}: {error}") from error


def _typed(value: object, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise Broken("wrong type", f"{name} is {type(value).__name__}, expected {kind.__name__}")
    return value


# -- pictures from words ----------------------------------------------------------------------------------------------


def _drawing(words: str, picture: Photo) -> Dialogue[Photo]:
    return Dialogue((Turn((words,), (picture,)),), "draw")


def _pair(record: _Record) -> Dialogue[Photo]:
    """cc12m, blip3o: members .jpg and .txt of a tar."""
    return _drawing(record.text("txt"), record.picture(*PICTURES))


def _captions(record: _Record) -> Dialogue[Photo]:
    """captions: any picture with words beside it: a .txt, or `text`, `caption` or `prompt` of a JSON or a row."""
    if record.has("txt"):
        return _pair(record)
    told = record.json
    name = next((name for name in ("text", "caption", "prompt") if told.has(name)), "text")
    return _drawing(told.text(name), record.picture(*PICTURES, "image"))


def _journeydb(record: _Record) -> Dialogue[Photo]:
    """journeydb: lines {img_path, prompt, Task2: {Caption}}; the prompt, less its --options, where no caption is."""
    told = record.json
    about = _Record(_typed(told.values.get("Task2") or {}, dict, "Task2"), told.folder)
    words = about.text("Caption") if about.values.get("Caption") else _without_options(told.text("prompt"))
    return _drawing(words, told.file(told.values.get("img_path")))


def _without_options(prompt: str) -> str:
    """A Midjourney prompt without what steers the program: "a fox --ar 3:2 --v 4" is "a fox"."""
    words = re.sub(r"(^|\s)--\w.*$", "", prompt, flags=re.DOTALL).strip()
    if not words:
        raise Broken("empty text", "the prompt holds options only")
    return words


# -- answers about pictures -------------------------------------------------------------------------------------------


def _cambrian(record: _Record) -> Dialogue[Photo]:
    """cambrian: lines {image?, conversations: [{from: human | gpt, value}]}, "<image>" where a picture is shown."""
    told = record.json
    named = told.values.get("image") or []
    photos = [told.file(name) for name in (named if isinstance(named, list) else [named])]
    turns = [_Record(turn, "") for turn in told.items("conversations", dict)]
    system = turns.pop(0).text("value") + "\n" if turns and turns[0].values.get("from") == "system" else ""
    roles = [turn.values.get("from") for turn in turns]
    if not turns or roles != ["human", "gpt"] * (len(turns) // 2):
        raise Broken("wrong order", f"turns of {roles}; expected human and gpt in turn")
    asked = [turn.text("value") for turn in turns[::2]]
    if photos and not any("<image>" in words for words in asked):
        asked[0] = "<image>" * len(photos) + asked[0]
    asked[0] = system + asked[0]
    if sum(words.count("<image>") for words in asked) != len(photos):
        raise Broken("wrong order", f"{len(photos)} pictures do not match the marks of {asked}")
    left = iter(photos)
    shown = [_marked(words, "<image>", lambda _: next(left)) for words in asked]
    answers = [(turn.text("value"),) for turn in turns[1::2]]
    return Dialogue(tuple(map(Turn, shown, answers)), "understand")


def _marked(words: str, mark: str, photo: Callable[[re.Match[str]], Photo | None]) -> tuple[Part, ...]:
    """Words with what stands at each mark in its place; None leaves the mark out."""
    parts: list[Part | None] = []
    at = 0
    for found in re.finditer(mark, words):
        parts += [words[at : found.start()].strip(), photo(found)]
        at = found.end()
    return tuple(part for part in (*parts, words[at:].strip()) if part)


# -- edits ------------------------------------------------------------------------------------------------------------


def _omniedit(record: _Record) -> Dialogue[Photo]:
    """omniedit: rows {omni_edit_id, src_img, edited_img, edited_prompt_list}; the id picks one of its wordings."""
    wordings = [words.strip() for words in record.items("edited_prompt_list", str)]
    if not any(wordings):
        raise Broken("empty text", "edited_prompt_list holds no words")
    wordings = [words for words in wordings if words]
    words = wordings[zlib.crc32(str(record.values.get("omni_edit_id")).encode()) % len(wordings)]
    asked = (record.picture("src_img"), words)
    return Dialogue((Turn(asked, (record.picture("edited_img"),)),), "edit")


def _pico_banana(record: _Record) -> Dialogue[Photo]:
    """pico-banana: lines {local_input_image, text, output_image}; of several turns {files, metadata_edit_turn_prompts}.

    Sources are not downloaded: the release's own script writes local_input_image, or the file has the URL's last name.
    """
    told = record.json
    if told.has("files"):
        return _edit_chain(told)
    edited = told.file(_present(told.values.get("output_image"), "output_image"))
    asked = (_source(told, told.values.get("open_image_input_url")), told.text("text"))
    return Dialogue((Turn(asked, (edited,)),), "edit")


def _source(told: _Record, url: object) -> Photo:
    if told.has("local_input_image"):
        return told.file(told.values["local_input_image"])
    return told.file(posixpath.basename(_typed(_present(url, "the source's URL"), str, "the source's URL")))


def _present(value: object, name: str) -> object:
    if not value:
        raise Broken("missing picture", f"no {name}")
    return value


def _edit_chain(told: _Record) -> Dialogue[Photo]:
    """Edits one on another: edit_turn1, edit_turn2, ..., final_image, one for each prompt."""
    files = {item.get("id"): item.get("url") for item in told.items("files", dict)}
    prompts = [words.strip() for words in told.items("metadata_edit_turn_prompts", str)]
    names = [f"edit_turn{i}" for i in range(1, len(prompts))] + ["final_image"]
    if not all(prompts) or not prompts:
        raise Broken("empty text", "metadata_edit_turn_prompts holds no words")
    made = [told.file(_present(files.get(name), name)) for name in names]
    source: tuple[Part, ...] = (_source(told, files.get("original_input_image")),)
    asked = [(*source, prompts[0]), *((words,) for words in prompts[1:])]
    return Dialogue(tuple(Turn(words, (photo,)) for words, photo in zip(asked, made, strict=True)), "edit")


# -- words and pictures in turn ---------------------------------------------------------------------------------------


def _comm(record: _Record) -> Dialogue[Photo]:
    """comm: lines {title, step_info: [[{type: text, content} | {type: image, image_path}]]}: a title, then its steps.

    The release is a pickle, which we do not read; docs/choices.md#corpora says how to make lines of it.
    """
    told = record.json
    parts = [part for step in told.items("step_info", list) for part in (_content(told, item) for item in step) if part]
    if not parts:
        raise Broken("empty text", "step_info holds nothing")
    title = (told.text("title"),) if told.values.get("title") else ()
    return Dialogue((Turn(title, tuple(parts)),), "story")


def _content(told: _Record, item: object) -> Part:
    """One piece of a step; "" for words that say nothing."""
    piece = _Record(_typed(item, dict, "step_info"), told.folder)
    match piece.values.get("type"):
        case "text":
            return _typed(piece.values.get("content") or "", str, "content").strip()
        case "image":
            return piece.file(_present(piece.values.get("image_path"), "image_path"))
        case other:
            raise Broken("wrong type", f"a step of type {other!r}; expected text or image")


_MARK = r"(?:<image_start>)?\[((problem|reasoning)_image_\d+)\](?:<image_end>)?"


def _zebra_cot(record: _Record) -> Dialogue[Photo]:
    """zebra-cot: rows {Question, Text Reasoning Trace, Final Answer, problem_image_N, reasoning_image_N}.

    A picture stands at its mark [reasoning_image_1]. One of the problem that the question does not mark comes first.
    """
    question, trace = record.text("Question"), record.text("Text Reasoning Trace")
    held = [name for name in record.values if re.fullmatch(r"(problem|reasoning)_image_\d+", name) and record.has(name)]
    marks = [found[1] for found in re.finditer(_MARK, question + trace)]
    lost = [name for name in held if name.startswith("reasoning") and marks.count(name) != 1]
    if lost:
        raise Broken("wrong order", f"{lost[0]} is marked {marks.count(lost[0])} times, expected once")
    problem = sorted((n for n in held if n.startswith("problem") and f"[{n}]" not in question), key=_number)
    asked = _marked(question, _MARK, lambda found: record.picture(found[1]))
    told = _marked(trace, _MARK, lambda found: record.picture(found[1]) if found[2] == "reasoning" else None)
    turn = Turn((*map(record.picture, problem), *asked), (*told, record.text("Final Answer")))
    return Dialogue((turn,), "reason")


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


CORPORA: dict[Corpus, Callable[[_Record], Dialogue[Photo]]] = {
    "captions": _captions,
    "cc12m": _pair,
    "journeydb": _journeydb,
    "blip3o": _pair,
    "cambrian": _cambrian,
    "comm": _comm,
    "pico-banana": _pico_banana,
    "omniedit": _omniedit,
    "zebra-cot": _zebra_cot,
}
