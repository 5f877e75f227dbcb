"""Raw records of a corpus: fields that are checked when they are read, images as bytes, reasons to leave one out.

Nothing is guessed or repaired: what cannot be used raises `Broken` with one of REASONS, and costs one sample. Not here:
files (shards), what the fields of a corpus mean (corpora).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from starflow2.core.images import AS_UPLOADED, ImageForm, PictureError, read_picture
from starflow2.core.json_reader import parse_record
from starflow2.core.text import clean
from starflow2.data.shards import inside, read_file
from starflow2.errors import DataError, PromptError

__all__ = ["REASONS", "Broken", "Part", "Photo", "Record", "decode", "typed"]

REASONS = (
    "unreadable file",  # the rest of a file is lost: cut off, removed, not a tar or parquet file
    "bad UTF-8",
    "bad JSON",
    "wrong type",  # the value of a field has another type than in the schema
    "missing text",
    "empty text",
    "hidden signs",  # control characters and others that no reader sees
    "missing picture",  # no such member, column or file
    "empty picture",  # zero bytes
    "not a picture",
    "damaged picture",  # an image that ends too early or cannot be decoded
    "huge picture",  # more pixels than PIL decodes without a warning
    "unfit picture",  # several frames, CMYK, 16 bits, transparent without a colour to flatten it on, small
    "wrong order",  # turns or image marks that do not match
    "refused",  # an error in a schema of your own
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


def decode(photo: Photo, size: int, form: ImageForm = AS_UPLOADED) -> Tensor:
    """An image in the form that its source asks for, by default its central square, (3, size, size) in [-1, 1].

    Raises Broken.
    """
    if not photo.data:
        raise Broken("empty picture", "it has no bytes")
    try:
        return read_picture(photo.data, size, form)
    except PictureError as error:
        raise Broken(error.reason, str(error)) from error


@dataclass(frozen=True, slots=True)
class Record:
    """The fields of a sample, each checked when it is read; paths of images are relative to `folder`."""

    values: Mapping[str, Any]
    folder: str

    @property
    def json(self) -> Record:
        """The JSON object in the field "json"; the record itself without such a field, as in parquet."""
        if "json" not in self.values:
            return self
        try:
            value = parse_record(_decoded(self.values["json"]))
        except ValueError as error:
            raise Broken("bad JSON", str(error)) from error
        return Record(typed(value, dict, "the record"), self.folder)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def text(self, name: str, *, allows_blank: bool = False) -> str:
        """The text of a field, which must not be missing, nor empty unless that is allowed."""
        if not self.has(name):
            raise Broken("missing text", f"no {name}; there are {self._names}")
        try:
            words = clean(_decoded(self.values[name], name), name).strip()
        except PromptError as error:
            raise Broken("hidden signs", str(error)) from error
        if not words and not allows_blank:
            raise Broken("empty text", f"{name} holds no words")
        return words

    def items(self, name: str, kind: type) -> list[Any]:
        """The list in a field, which must not be missing, every item of one type."""
        if not self.has(name):
            raise Broken("missing text", f"no {name}; there are {self._names}")
        return [typed(item, kind, f"{name}[{i}]") for i, item in enumerate(typed(self.values[name], list, name))]

    def picture(self, *names: str) -> Photo:
        """The image in the first of these fields that exists: bytes, or {"bytes", "path"} as in parquet."""
        for name in names:
            if self.has(name):
                return self.photo(self.values[name], name)
        raise Broken("missing picture", f"no {' or '.join(names[:3])}; there are {self._names}")

    def file(self, path: object) -> Photo:
        """The image with this path below the folder."""
        name = typed(path, str, "the path of the picture")
        try:
            return Photo(read_file(inside(self.folder, name)))
        except (OSError, ValueError) as error:
            raise Broken("missing picture", str(error)) from error

    def photo(self, value: object, name: str) -> Photo:
        """The image that a value stands for: a `Photo`, bytes, or {"bytes", "path"} as in parquet."""
        if isinstance(value, Photo):
            return value
        if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path"):
            return self.file(value["path"])
        return Photo(typed(value.get("bytes") if isinstance(value, Mapping) else value, bytes, name))

    @property
    def _names(self) -> str:
        return ", ".join(self.values) or "no fields"


def _decoded(value: object, name: str = "the record") -> str:
    """A string, from one or from its UTF-8 bytes, with or without a byte order mark."""
    if not isinstance(value, bytes):
        return typed(value, str, name)
    try:
        return value.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Broken("bad UTF-8", f"{name}: {error}") from error


def typed(value: object, kind: type, name: str) -> Any:
    """The value, if it has this type. Raises Broken."""
    if not isinstance(value, kind):
        raise Broken("wrong type", f"{name} is {type(value).__name__}, expected {kind.__name__}")
    return value
