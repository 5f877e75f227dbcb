"""Checks of a user's text before anything is computed: empty, too long, or with words the model never learned."""

from __future__ import annotations

from starflow2.errors import PromptError
from starflow2.models.components import Components
from starflow2.models.wording import hint, respelled, words_of

__all__ = ["check_words", "normalized"]


def check_words(components: Components, text: str) -> None:
    """Raise PromptError for a text without words, with too many tokens, or with words that the model never learned."""
    read = normalized(components, text)
    if not words_of(read):
        raise PromptError("the prompt is empty; say what to draw, for instance 'two pink hearts'.")
    count = len(components.tokenizer.drawing_prompt(read))
    limit = components.cfg.max_prompt_tokens
    if count > limit:
        raise PromptError(f"the prompt has {count} tokens; this model reads up to {limit}.")
    unknown = [w for w in words_of(read) if components.vocabulary and w not in components.vocabulary]
    if unknown:
        listed = ", ".join(dict.fromkeys(map(ascii, unknown)))
        hints = "".join(dict.fromkeys(hint(word, components.vocabulary) for word in unknown))
        raise PromptError(
            f"this model never learnt {listed}.{hints} "
            f"It knows {len(components.vocabulary)} words: shapes, colours, sizes, places, counts."
        )


def normalized(components: Components, text: str) -> str:
    """The text as the model reads it: respelled for a fixed vocabulary, unchanged for any other model."""
    return respelled(text, components.vocabulary) if components.vocabulary else text
