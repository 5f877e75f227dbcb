"""Real corpora as conversations: an adapter for each, from its published fields to a record of the `dialogue` schema.

`CORPORA` names them; docs/choices.md#corpora lists the sources of the schemas. `module:function` names one of your own.
A sample that cannot be used raises Broken with one of REASONS; nothing is guessed. Not here: reading files (shards),
the schema itself (messages), mixing and packing (mixture).
"""

from __future__ import annotations

import posixpath
import re
import zlib
from collections.abc import Callable, Mapping
from functools import cache

from starflow2.core.dialogue import Dialogue
from starflow2.core.imports import find_object
from starflow2.core.serialize import JsonObject
from starflow2.data.messages import TurnParts, conversation, read_dialogue
from starflow2.data.records import Broken, Part, Photo, Record, typed
from starflow2.data.shards import PICTURES, Sample
from starflow2.errors import ConfigError, nearest

__all__ = ["CORPORA", "Schema", "find_schema", "to_dialogue"]

Schema = Callable[[Record], JsonObject]  # from the fields of a sample to a record of the `dialogue` schema


def to_dialogue(corpus: str, sample: Sample, pictures: str = "") -> Dialogue[Photo]:
    """The conversation in a raw sample of a corpus. Raises Broken.

    pictures: the folder that paths of images are relative to, by default the folder of the sample's file.
    """
    if sample.damage:
        raise Broken("bad UTF-8" if "UnicodeDecodeError" in sample.damage else "unreadable file", sample.damage)
    record = Record(sample.fields, pictures or posixpath.dirname(sample.source))
    schema = find_schema(corpus)
    if schema is _dialogue:
        return read_dialogue(record)
    return read_dialogue(Record(schema(record), record.folder))


@cache
def find_schema(name: str) -> Schema:
    """The schema of a corpus of CORPORA, or a function `module:function` of your own, also from the current folder.

    Yours takes the fields of a sample as a dictionary (a JSON file or line as "json", parsed) and returns a record of
    the `dialogue` schema. Raises ConfigError for a name that is neither.

    >>> find_schema("cc12n")
    Traceback (most recent call last):
        ...
    starflow2.errors.ConfigError: corpus is 'cc12n'; expected captions, ... or module:function. Did you mean "cc12m"?
    """
    if name in CORPORA:
        return CORPORA[name]
    if ":" not in name:
        known = ", ".join(CORPORA)
        raise ConfigError(f"corpus is {name!r}; expected {known} or module:function.{nearest(name, CORPORA)}")
    function = find_object(name, "a corpus")

    def schema(record: Record) -> JsonObject:
        fields = dict(record.values)
        if "json" in fields:
            fields["json"] = record.json.values
        try:
            found = function(fields)
        except (Exception, SystemExit) as error:  # code of a user: it is counted, and `data check` shows it
            raise Broken("refused", f"{type(error).__name__}: {error}") from error
        return dict(typed(found, Mapping, f"what {name} returns"))

    return schema


def _dialogue(record: Record) -> JsonObject:
    """dialogue: the schema itself, docs/data.md."""
    return dict(record.values)


# -- images from words ------------------------------------------------------------------------------------------------


def _drawing(words: str, picture: Photo) -> JsonObject:
    return conversation("draw", ([words], [picture]))


def _pair(record: Record) -> JsonObject:
    """cc12m, blip3o: members .jpg and .txt of a tar."""
    return _drawing(record.text("txt"), record.picture(*PICTURES))


def _captions(record: Record) -> JsonObject:
    """captions: any image with text beside it: a .txt, or `text`, `caption` or `prompt` of a JSON object or a row."""
    if record.has("txt"):
        return _pair(record)
    fields = record.json
    name = next((name for name in ("text", "caption", "prompt") if fields.has(name)), "text")
    return _drawing(fields.text(name), record.picture(*PICTURES, "image"))


def _journeydb(record: Record) -> JsonObject:
    """journeydb: lines {img_path, prompt, Task2: {Caption}}; without a caption, the prompt without its --options."""
    line = record.json
    caption = Record(typed(line.values.get("Task2") or {}, dict, "Task2"), line.folder)
    words = caption.text("Caption") if caption.values.get("Caption") else _without_options(line.text("prompt"))
    return _drawing(words, line.file(line.values.get("img_path")))


def _without_options(prompt: str) -> str:
    """A Midjourney prompt without options of the program: "a fox --ar 3:2 --v 4" is "a fox"."""
    words = re.sub(r"(^|\s)--\w.*$", "", prompt, flags=re.DOTALL).strip()
    if not words:
        raise Broken("empty text", "the prompt holds options only")
    return words


# -- answers about images --------------------------------------------------------------------------------------------


def _cambrian(record: Record) -> JsonObject:
    """cambrian: lines {image?, conversations: [{from: human | gpt, value}]}, "<image>" where an image is shown."""
    line = record.json
    named = line.values.get("image") or []
    photos = [line.file(name) for name in (named if isinstance(named, list) else [named])]
    turns = [Record(turn, "") for turn in line.items("conversations", dict)]
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
    return conversation("understand", *zip(user, answers, strict=True))


def _replace_marks(words: str, mark: str, photo: Callable[[re.Match[str]], Photo | None]) -> tuple[Part, ...]:
    """Words with each mark replaced by an image, or removed where `photo` gives None."""
    parts: list[Part | None] = []
    end = 0
    for found in re.finditer(mark, words):
        parts += [words[end : found.start()].strip(), photo(found)]
        end = found.end()
    return tuple(part for part in (*parts, words[end:].strip()) if part)


# -- edits ------------------------------------------------------------------------------------------------------------


def _omniedit(record: Record) -> JsonObject:
    """omniedit: rows {omni_edit_id, src_img, edited_img, edited_prompt_list}; the id picks one of its wordings."""
    wordings = [words.strip() for words in record.items("edited_prompt_list", str)]
    if not any(wordings):
        raise Broken("empty text", "edited_prompt_list holds no words")
    wordings = [words for words in wordings if words]
    words = wordings[zlib.crc32(str(record.values.get("omni_edit_id")).encode(errors="replace")) % len(wordings)]
    user = (record.picture("src_img"), words)
    return conversation("edit", (user, [record.picture("edited_img")]))


def _pico_banana(record: Record) -> JsonObject:
    """pico-banana: lines {local_input_image, text, output_image}; of several turns {files, metadata_edit_turn_prompts}.

    Sources are not part of it: its download script writes local_input_image, or the file has the last name of the URL.
    """
    line = record.json
    if line.has("files"):
        return _edit_chain(line)
    edited = line.file(_present(line.values.get("output_image"), "output_image"))
    user = (_source(line, line.values.get("open_image_input_url")), line.text("text"))
    return conversation("edit", (user, [edited]))


def _source(line: Record, url: object) -> Photo:
    if line.has("local_input_image"):
        return line.file(line.values["local_input_image"])
    return line.file(posixpath.basename(typed(_present(url, "the source's URL"), str, "the source's URL")))


def _present(value: object, name: str) -> object:
    if not value:
        raise Broken("missing picture", f"no {name}")
    return value


def _edit_chain(line: Record) -> JsonObject:
    """Edits of the previous result: edit_turn1, edit_turn2, ..., final_image, one for each prompt."""
    files = {item.get("id"): item.get("url") for item in line.items("files", dict)}
    prompts = [words.strip() for words in line.items("metadata_edit_turn_prompts", str)]
    names = [f"edit_turn{i}" for i in range(1, len(prompts))] + ["final_image"]
    if not all(prompts) or not prompts:
        raise Broken("empty text", "metadata_edit_turn_prompts holds no words")
    results = [line.file(_present(files.get(name), name)) for name in names]
    source: tuple[Part, ...] = (_source(line, files.get("original_input_image")),)
    user = [(*source, prompts[0]), *((words,) for words in prompts[1:])]
    turns: list[TurnParts] = [(words, [photo]) for words, photo in zip(user, results, strict=True)]
    return conversation("edit", *turns)


# -- interleaved words and images -------------------------------------------------------------------------------------


def _comm(record: Record) -> JsonObject:
    """comm: lines {title, step_info: [[{type: text, content} | {type: image, image_path}]]}: a title, then its steps.

    The release is a pickle, which is not read here; docs/choices.md#corpora shows how to convert it to lines.
    """
    line = record.json
    parts = [part for step in line.items("step_info", list) for part in (_content(line, item) for item in step) if part]
    if not parts:
        raise Broken("empty text", "step_info holds nothing")
    title = (line.text("title"),) if line.values.get("title") else ()
    return conversation("story", (title, parts))


def _content(line: Record, item: object) -> Part:
    """One piece of a step; "" for blank text."""
    piece = Record(typed(item, dict, "step_info"), line.folder)
    match piece.values.get("type"):
        case "text":
            return typed(piece.values.get("content") or "", str, "content").strip()
        case "image":
            return piece.file(_present(piece.values.get("image_path"), "image_path"))
        case other:
            raise Broken("wrong type", f"a step of type {other!r}; expected text or image")


_MARK = r"(?:<image_start>)?\[((problem|reasoning)_image_\d+)\](?:<image_end>)?"


def _zebra_cot(record: Record) -> JsonObject:
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
    turn = ([*map(record.picture, problem), *user], [*reply, record.text("Final Answer")])
    return conversation("reason", turn)


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


CORPORA: dict[str, Schema] = {
    "captions": _captions,
    "dialogue": _dialogue,
    "cc12m": _pair,
    "journeydb": _journeydb,
    "blip3o": _pair,
    "cambrian": _cambrian,
    "comm": _comm,
    "pico-banana": _pico_banana,
    "omniedit": _omniedit,
    "zebra-cot": _zebra_cot,
}
