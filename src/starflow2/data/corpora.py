"""Real corpora as conversations: an adapter for each, from its published fields to turns of words and images.

`CORPORA` names them; docs/choices.md#corpora lists the sources of the schemas. A sample that cannot be used raises
Broken with one of REASONS; nothing is guessed. Not here: reading files (shards), mixing and packing (mixture).
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
    "to_dialogue",
]

Corpus = Literal["captions", "cc12m", "journeydb", "blip3o", "cambrian", "comm", "pico-banana", "omniedit", "zebra-cot"]

REASONS = (
    "unreadable file",  # the rest of a file is lost: cut off, removed, not a tar or parquet file
    "bad UTF-8",
    "bad JSON",
    "wrong type",  # the value of a field has another type than in the schema
    "missing text",
    "empty text",
    "missing picture",  # no such member, column or file
    "empty picture",  # zero bytes
    "not a picture",
    "damaged picture",  # an image that ends too early or cannot be decoded
    "huge picture",  # more pixels than PIL decodes without a warning
    "unfit picture",  # several frames, CMYK, 16 bits, transparent, less than 16 pixels a side
    "wrong order",  # turns or image marks that do not match
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
    """An image as the bytes of its file; see `decode`."""

    data: bytes


Part = str | Photo


def to_dialogue(corpus: Corpus, sample: Sample, pictures: str = "") -> Dialogue[Photo]:
    """The conversation in a raw sample of a corpus. Raises Broken.

    pictures: the folder that paths of images are relative to, by default the folder of the sample's file.
    """
    if sample.damage:
        raise Broken("bad UTF-8" if "UnicodeDecodeError" in sample.damage else "unreadable file", sample.damage)
    return CORPORA[corpus](_Record(sample.fields, pictures or posixpath.dirname(sample.source)))


def decode(photo: Photo, size: int) -> Tensor:
    """The central square of an image, (3, size, size) in [-1, 1]. Raises Broken."""
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
        case None:  # undamaged, but of a kind that has no one reading as RGB
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
    """The fields of a sample, each checked when it is read; paths of images are relative to `folder`."""

    values: Mapping[str, Any]
    folder: str

    @property
    def json(self) -> _Record:
        """The JSON object in the field "json"; the record itself without such a field, as in parquet."""
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
        """The text of a field, which must not be missing or empty."""
        if not self.has(name):
            raise Broken("missing text", f"no {name}; there are {self._names}")
        words = _decoded(self.values[name], name).strip()
        if not words:
            raise Broken("empty text", f"{name} holds no words")
        return words

    def items(self, name: str, kind: type) -> list[Any]:
        """The list in a field, which must not be missing, every item of one type."""
        if not self.has(name):
            raise Broken("missing text", f"no {name}; there are {self._names}")
        return [_typed(item, kind, f"{name}[{i}]") for i, item in enumerate(_typed(self.values[name], list, name))]

    def picture(self, *names: str) -> Photo:
        """The image in the first of these fields that exists: bytes, or {"bytes", "path"} as in parquet."""
        for name in names:
            if self.has(name):
                return self._photo(self.values[name], name)
        raise Broken("missing picture", f"no {' or '.join(names[:3])}; there are {self._names}")

    def file(self, path: object) -> Photo:
        """The image with this path below the folder."""
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
    """A string, from one or from its UTF-8 bytes."""
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


# -- images from words ------------------------------------------------------------------------------------------------


def _drawing(words: str, picture: Photo) -> Dialogue[Photo]:
    return Dialogue((Turn((words,), (picture,)),), "draw")


def _pair(record: _Record) -> Dialogue[Photo]:
    """cc12m, blip3o: members .jpg and .txt of a tar."""
    return _drawing(record.text("txt"), record.picture(*PICTURES))


def _captions(record: _Record) -> Dialogue[Photo]:
    """captions: any image with text beside it: a .txt, or `text`, `caption` or `prompt` of a JSON object or a row."""
    if record.has("txt"):
        return _pair(record)
    fields = record.json
    name = next((name for name in ("text", "caption", "prompt") if fields.has(name)), "text")
    return _drawing(fields.text(name), record.picture(*PICTURES, "image"))


def _journeydb(record: _Record) -> Dialogue[Photo]:
    """journeydb: lines {img_path, prompt, Task2: {Caption}}; without a caption, the prompt without its --options."""
    line = record.json
    caption = _Record(_typed(line.values.get("Task2") or {}, dict, "Task2"), line.folder)
    words = caption.text("Caption") if caption.values.get("Caption") else _without_options(line.text("prompt"))
    return _drawing(words, line.file(line.values.get("img_path")))


def _without_options(prompt: str) -> str:
    """A Midjourney prompt without options of the program: "a fox --ar 3:2 --v 4" is "a fox"."""
    words = re.sub(r"(^|\s)--\w.*$", "", prompt, flags=re.DOTALL).strip()
    if not words:
        raise Broken("empty text", "the prompt holds options only")
    return words


# -- answers about images --------------------------------------------------------------------------------------------


def _cambrian(record: _Record) -> Dialogue[Photo]:
    """cambrian: lines {image?, conversations: [{from: human | gpt, value}]}, "<image>" where an image is shown."""
    line = record.json
    named = line.values.get("image") or []
    photos = [line.file(name) for name in (named if isinstance(named, list) else [named])]
    turns = [_Record(turn, "") for turn in line.items("conversations", dict)]
    system = turns.pop(0).text("value") + "\n" if turns and turns[0].values.get("from") == "system" else ""
    roles = [turn.values.get("from") for turn in turns]
    if not turns or roles != ["human", "gpt"] * (len(turns) // 2):
        raise Broken("wrong order", f"turns of {roles}; expected human and gpt alternately")
    questions = [turn.text("value") for turn in turns[::2]]
    if photos and not any("<image>" in words for words in questions):
        questions[0] = "<image>" * len(photos) + questions[0]
    questions[0] = system + questions[0]
    if sum(words.count("<image>") for words in questions) != len(photos):
        raise Broken("wrong order", f"{len(photos)} images do not match the marks of {questions}")
    rest = iter(photos)
    user = [_replace_marks(words, "<image>", lambda _: next(rest)) for words in questions]
    answers = [(turn.text("value"),) for turn in turns[1::2]]
    return Dialogue(tuple(map(Turn, user, answers)), "understand")


def _replace_marks(words: str, mark: str, photo: Callable[[re.Match[str]], Photo | None]) -> tuple[Part, ...]:
    """Words with each mark replaced by an image, or removed where `photo` gives None."""
    parts: list[Part | None] = []
    end = 0
    for found in re.finditer(mark, words):
        parts += [words[end : found.start()].strip(), photo(found)]
        end = found.end()
    return tuple(part for part in (*parts, words[end:].strip()) if part)


# -- edits ------------------------------------------------------------------------------------------------------------


def _omniedit(record: _Record) -> Dialogue[Photo]:
    """omniedit: rows {omni_edit_id, src_img, edited_img, edited_prompt_list}; the id picks one of its wordings."""
    wordings = [words.strip() for words in record.items("edited_prompt_list", str)]
    if not any(wordings):
        raise Broken("empty text", "edited_prompt_list holds no words")
    wordings = [words for words in wordings if words]
    words = wordings[zlib.crc32(str(record.values.get("omni_edit_id")).encode()) % len(wordings)]
    user = (record.picture("src_img"), words)
    return Dialogue((Turn(user, (record.picture("edited_img"),)),), "edit")


def _pico_banana(record: _Record) -> Dialogue[Photo]:
    """pico-banana: lines {local_input_image, text, output_image}; of several turns {files, metadata_edit_turn_prompts}.

    Sources are not part of it: its download script writes local_input_image, or the file has the last name of the URL.
    """
    line = record.json
    if line.has("files"):
        return _edit_chain(line)
    edited = line.file(_present(line.values.get("output_image"), "output_image"))
    user = (_source(line, line.values.get("open_image_input_url")), line.text("text"))
    return Dialogue((Turn(user, (edited,)),), "edit")


def _source(line: _Record, url: object) -> Photo:
    if line.has("local_input_image"):
        return line.file(line.values["local_input_image"])
    return line.file(posixpath.basename(_typed(_present(url, "the source's URL"), str, "the source's URL")))


def _present(value: object, name: str) -> object:
    if not value:
        raise Broken("missing picture", f"no {name}")
    return value


def _edit_chain(line: _Record) -> Dialogue[Photo]:
    """Edits of the previous result: edit_turn1, edit_turn2, ..., final_image, one for each prompt."""
    files = {item.get("id"): item.get("url") for item in line.items("files", dict)}
    prompts = [words.strip() for words in line.items("metadata_edit_turn_prompts", str)]
    names = [f"edit_turn{i}" for i in range(1, len(prompts))] + ["final_image"]
    if not all(prompts) or not prompts:
        raise Broken("empty text", "metadata_edit_turn_prompts holds no words")
    results = [line.file(_present(files.get(name), name)) for name in names]
    source: tuple[Part, ...] = (_source(line, files.get("original_input_image")),)
    user = [(*source, prompts[0]), *((words,) for words in prompts[1:])]
    return Dialogue(tuple(Turn(words, (photo,)) for words, photo in zip(user, results, strict=True)), "edit")


# -- interleaved words and images -------------------------------------------------------------------------------------


def _comm(record: _Record) -> Dialogue[Photo]:
    """comm: lines {title, step_info: [[{type: text, content} | {type: image, image_path}]]}: a title, then its steps.

    The release is a pickle, which is not read here; docs/choices.md#corpora shows how to convert it to lines.
    """
    line = record.json
    parts = [part for step in line.items("step_info", list) for part in (_content(line, item) for item in step) if part]
    if not parts:
        raise Broken("empty text", "step_info holds nothing")
    title = (line.text("title"),) if line.values.get("title") else ()
    return Dialogue((Turn(title, tuple(parts)),), "story")


def _content(line: _Record, item: object) -> Part:
    """One piece of a step; "" for blank text."""
    piece = _Record(_typed(item, dict, "step_info"), line.folder)
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

    An image replaces its mark, such as [reasoning_image_1]. Images of the problem without a mark come first.
    """
    question, trace = record.text("Question"), record.text("Text Reasoning Trace")
    names = [n for n in record.values if re.fullmatch(r"(problem|reasoning)_image_\d+", n) and record.has(n)]
    marks = [found[1] for found in re.finditer(_MARK, question + trace)]
    wrong = [name for name in names if name.startswith("reasoning") and marks.count(name) != 1]
    if wrong:
        raise Broken("wrong order", f"{wrong[0]} is marked {marks.count(wrong[0])} times, expected once")
    problem = sorted((n for n in names if n.startswith("problem") and f"[{n}]" not in question), key=_number)
    user = _replace_marks(question, _MARK, lambda found: record.picture(found[1]))
    reply = _replace_marks(trace, _MARK, lambda found: record.picture(found[1]) if found[2] == "reasoning" else None)
    turn = Turn((*map(record.picture, problem), *user), (*reply, record.text("Final Answer")))
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
