"""For the documentation site: doctests in docstrings as blocks of code, without the flags that only doctest reads."""

from __future__ import annotations

import re
from typing import Any

import griffe

__all__ = ["Doctests", "fenced"]


def fenced(text: str) -> str:
    """A docstring in which each run of lines from `>>>` to the next blank one is a fenced block.

    >>> fenced("Sum.\\n\\n>>> 1 + 1  # doctest: +SKIP\\n2")
    'Sum.\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```'
    """
    paragraphs = re.split(r"\n\s*\n", text)
    blocks = [f"```pycon\n{p}\n```" if p.lstrip().startswith(">>>") else p for p in paragraphs]
    return re.sub(r" *# doctest: \S+", "", "\n\n".join(blocks))


class Doctests(griffe.Extension):
    """Changes docstrings while they are read from the source."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
