"""What a user may say: empty, overlong and unknown words are refused by name, before anything is computed."""

from __future__ import annotations

import re

from starflow2.errors import PromptError, nearest
from starflow2.models.components import Components

__all__ = ["check_words", "normalized"]


def check_words(components: Components, text: str) -> None:
    """Raise PromptError for words that this model cannot read: none, too many, or some that it never learnt."""
    if not _words(text):
        raise PromptError("the prompt is empty; say what to draw, for instance 'two red hearts'.")
    count = len(components.tokenizer.drawing_prompt(normalized(components, text)))
    limit = components.cfg.max_prompt_tokens
    if count > limit:
        raise PromptError(f"the prompt has {count} tokens; this model reads up to {limit}.")
    unknown = [w for w in _words(text) if components.vocabulary and w not in components.vocabulary]
    if unknown:
        listed = ", ".join(dict.fromkeys(repr(w) for w in unknown))
        raise PromptError(
            f"this model never learnt {listed}.{nearest(unknown[0], components.vocabulary)} "
            f"It knows {len(components.vocabulary)} words: shapes, colours, sizes, places, counts."
        )


def normalized(components: Components, text: str) -> str:
    """The text as a model reads it: one with a lexicon has seen lower case and single spaces only."""
    return " ".join(text.lower().split()) if components.vocabulary else text


def _words(text: str) -> list[str]:
    return re.findall(r"[^\s.,;:!?]+", text.lower())
