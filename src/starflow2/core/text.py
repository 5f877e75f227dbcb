"""Text from outside: the one form in which it enters, and the one reader of text files.

Not here: what a model makes of words (models.prompts), and what may be written to a terminal (cli.options).
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

from starflow2.core.places import is_of_the_system
from starflow2.errors import DataError, PromptError, printable_line

__all__ = ["clean", "read_lines", "read_text", "shown"]

MAX_BYTES = 2**26  # of a text file, 64 MiB
MAX_MARKS = 30  # accents on a letter, as many as Unicode's stream-safe format allows
_WIDTHLESS = "\ufeff\u200b\u2060\u00ad"  # byte order mark, zero-width space, word joiner, soft hyphen
_BREAKS = "\x0b\x0c\x85\u2028\u2029"  # vertical tab, form feed, next line, line and paragraph separator
_TABLE = str.maketrans(dict.fromkeys(_WIDTHLESS, "") | dict.fromkeys(_BREAKS, "\n"))
# Signs that no reader sees, but a tokenizer does. Joiners and marks that scripts need (ZWJ, ZWNJ, LRM, RLM, variation
# selectors) are not among them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f"  # control characters, but tab and line breaks
    "\ud800-\udfff"  # halves of surrogate pairs: bytes that were not UTF-8
    "\u034f\u115f\u1160\u17b4\u17b5\u180e\u2800\u3164\uffa0"  # fillers
    "\u202a-\u202e\u2061-\u206f"  # marks that turn the order of the signs around them, invisible operators
    "\ufdd0-\ufdef\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"  # tags
    + "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(17))  # no characters
    + "]"
)


def clean(text: object, name: str = "the text") -> str:
    """Text as it enters: NFC, lines that end in \\n, without a byte order mark or other signs of no width.

    Raises PromptError for anything but a str, and for signs that are hidden from who reads the text: control
    characters, halves of surrogate pairs, marks that turn the order of words, tags, fillers.

    >>> clean("\\ufeffred\\u2028cafe\\u0301")
    'red\\ncafé'
    >>> clean("red \\x1b[31mhearts")
    Traceback (most recent call last):
        ...
    starflow2.errors.PromptError: the text has the hidden sign '\\x1b' at 4: 'red \\x1b[31mhearts'; remove it.
    """
    if not isinstance(text, str):
        raise PromptError(f"{name} is {shown(text)} ({type(text).__name__}); expected text (str).")
    found = _HIDDEN.search(text.translate(_TABLE))
    if found is None:
        _check_marks(text, name)
        return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n").translate(_TABLE))
    sign, at = found[0], text.index(found[0])
    around = shown(text[max(0, at - 20) : at + 20])
    if "\ud800" <= sign <= "\udfff":
        raise PromptError(f"{name} is not UTF-8 text: {around} has half a surrogate pair; encode it again.")
    raise PromptError(f"{name} has the hidden sign {sign!a} at {at}: {around}; remove it.")


def _check_marks(text: str, name: str) -> None:
    """Raise PromptError for more than MAX_MARKS marks on a letter: sorting them takes the square of their number."""
    marks = 0
    for sign in text if not text.isascii() else "":
        marks = marks + 1 if unicodedata.combining(sign) else 0
        if marks > MAX_MARKS:
            raise PromptError(f"{name} has more than {MAX_MARKS} marks on one letter; remove them.")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises DataError for a file that is none, or too large."""
    name = shown(str(path), 400)
    if not isinstance(path, str | os.PathLike):
        raise DataError(f"cannot read {name} ({type(path).__name__}): expected the name of a text file.")
    try:
        if Path(path).exists() and (not Path(path).is_file() or is_of_the_system(path)):
            raise DataError(f"cannot read {name}: it is no regular file; expected a UTF-8 text file.")
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {name}: {reason}.") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"cannot read {name}: it has more than {MAX_BYTES >> 20} MiB; expected a text file.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "it looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte {error.start} is not UTF-8"
        raise DataError(f"cannot read {name}: {kind}; save it as UTF-8 text.") from error


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 file without blanks around them, and without empty ones. Raises DataError as `read_text`."""
    lines = re.split(r"\r\n|\r|\n", read_text(path))  # no other line break ends one, unlike with `splitlines`
    return [line.strip() for line in lines if line.strip()]


def shown(value: object, most: int = 60) -> str:
    """`repr` for messages: at most `most` characters, those that do not print escaped.

    >>> shown("he\\u200barts")
    "'he\\\\u200barts'"
    """
    try:
        text = repr(value[: most + 1] if isinstance(value, str | bytes) else value)
    except Exception:  # a foreign object's own repr
        text = f"<{type(value).__name__}>"
    text = printable_line(text)
    return text if len(text) <= most else text[: most - 3] + "..."
