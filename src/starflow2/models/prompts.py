"""Checks of a user's text before anything is computed: empty, too long, or with words the model never learned."""

from __future__ import annotations

import re

from starflow2.errors import PromptError, nearest
from starflow2.models.components import Components

__all__ = ["check_words", "normalized"]


def check_words(components: Components, text: str) -> None:
    """Raise PromptError for a text without words, with too many tokens, or with words that the model never learned."""
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
    """Lower-case text with single spaces for a model with a fixed vocabulary, unchanged text for any other."""
    return " ".join(text.lower().split()) if components.vocabulary else text


def _words(text: str) -> list[str]:
    return re.findall(r"[^\s.,;:!?]+", text.lower())
