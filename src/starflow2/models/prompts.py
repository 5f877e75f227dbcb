"""What a user may say: empty, overlong and unknown words are refused by name, before anything is computed."""

from __future__ import annotations

import re

from starflow2.errors import PromptError, nearest
from starflow2.models.components import Parts

__all__ = ["check_words", "heard"]


def check_words(parts: Parts, text: str) -> None:
    """Raise PromptError for words that this model cannot read: none, too many, or some that it never learnt."""
    if not _words(text):
        raise PromptError("the prompt is empty; say what to draw, for instance 'two red hearts'.")
    assert parts.tokenizer is not None
    count = len(parts.tokenizer.drawing_prompt(heard(parts, text)))
    limit = parts.cfg.max_prompt_tokens
    if count > limit:
        raise PromptError(f"the prompt has {count} tokens; this model reads up to {limit}.")
    unknown = [w for w in _words(text) if parts.lexicon and w not in parts.lexicon]
    if unknown:
        listed = ", ".join(dict.fromkeys(repr(w) for w in unknown))
        raise PromptError(
            f"this model never learnt {listed}.{nearest(unknown[0], parts.lexicon)} "
            f"It knows {len(parts.lexicon)} words: shapes, colours, sizes, places, counts."
        )


def heard(parts: Parts, text: str) -> str:
    """The text as a model reads it: one with a lexicon has seen lower case and single spaces only."""
    return " ".join(text.lower().split()) if parts.lexicon else text


def _words(text: str) -> list[str]:
    return re.findall(r"[^\s.,;:!?]+", text.lower())
