"""The `dialogue` schema: a conversation of words and images as a JSON object. Every corpus is brought to it.

    {"messages": [
        {"role": "user", "content": [{"type": "image", "image": "1.png"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A kite."}]}

A message may hold any number of images, and so may a reply, which then draws them. docs/data.md has the rules. Not
here: the fields of other corpora (corpora), images as bytes (records).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from starflow2.core.dialogue import Dialogue, Turn
from starflow2.core.serialize import JsonObject
from starflow2.data.records import Broken, Part, Photo, Record, typed

__all__ = ["TurnParts", "conversation", "read_dialogue"]

TurnParts = tuple[Sequence[Part], Sequence[Part]]  # of the user and of the reply


def conversation(kind: str, *turns: TurnParts) -> JsonObject:
    """A record of the `dialogue` schema with these turns; a turn without parts of the user is a reply alone.

    >>> conversation("understand", (["How many?"], ["Two."]))["messages"][1]
    {'role': 'assistant', 'content': [{'type': 'text', 'text': 'Two.'}]}
    """
    sides = [(role, parts) for turn in turns for role, parts in zip(("user", "assistant"), turn, strict=True)]
    messages = [
        {"role": role, "content": [_content(part) for part in parts]}
        for role, parts in sides
        if parts or role == "assistant"
    ]
    return {"kind": kind, "messages": messages}


def _content(part: Part) -> JsonObject:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}


def read_dialogue(record: Record) -> Dialogue[Photo]:
    """The conversation in a record of the `dialogue` schema. Raises Broken.

    Images are members of the sample, files below the record's folder, or bytes; parts without an image of their own
    take those of the field `images` in turn.
    """
    line = record.json
    messages = [Record(message, line.folder) for message in line.items("messages", dict)]
    images = iter(typed(line.values.get("images") or [], list, "images"))
    sides = [(message.text("role"), tuple(_parts(message, record, images))) for message in messages]
    if next(images, None) is not None:
        raise Broken("wrong order", "images holds more than the parts of type image")
    draws = any(isinstance(part, Photo) for role, parts in sides if role == "assistant" for part in parts)
    kind = line.values.get("kind") or ("draw" if draws else "understand")
    return Dialogue(_turns(sides), typed(kind, str, "kind"))


def _parts(message: Record, record: Record, images: Iterator[Any]) -> Iterator[Part]:
    """The words and images of a message, blank text left out. Raises Broken for a message of neither."""
    content = message.values.get("content")
    if isinstance(content, str):
        yield message.text("content")
        return
    is_empty = True
    for item in message.items("content", dict):
        part = _part(Record(item, record.folder), record, images)
        if part:
            is_empty = False
            yield part
    if is_empty:
        raise Broken("empty text", "content holds nothing")


def _part(item: Record, record: Record, images: Iterator[Any]) -> Part:
    """One piece of a message; "" for blank text."""
    match item.values.get("type"):
        case "text":
            return item.text("text", allows_blank=True)
        case "image":
            image = item.values.get("image")
            return _image(next(images, None) if image is None else image, record)
        case other:
            raise Broken("wrong type", f"a part of type {other!r}; expected text or image")


def _image(value: object, record: Record) -> Photo:
    if value is None:
        raise Broken("missing picture", "a part of type image names none, and images has no further one")
    if not isinstance(value, str):
        return record.photo(value, "image")
    return record.picture(value) if record.has(value) else record.file(value)


def _turns(sides: list[tuple[str, tuple[Part, ...]]]) -> tuple[Turn[Photo], ...]:
    """Turns of user and assistant; a system message begins the first of them, an opening reply has no user's side."""
    system: tuple[Part, ...] = ()
    if sides and sides[0][0] == "system":
        (_, system), *sides = sides
    if sides and sides[0][0] == "assistant":
        sides = [("user", ()), *sides]
    roles = [role for role, _ in sides]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise Broken("wrong order", f"messages of {roles}; expected user and assistant alternately")
    parts = [parts for _, parts in sides]
    parts[0] = (*system, *parts[0])
    return tuple(Turn(user, reply) for user, reply in zip(parts[::2], parts[1::2], strict=True))
