"""Checks of a user's text before anything is computed: empty, too long, or with words the model never learned."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from starflow2.core.text import clean, shown
from starflow2.errors import PromptError
from starflow2.models.components import Components
from starflow2.models.wording import contradiction, hint, respelled, words_of

__all__ = ["check_words", "listed_prompts", "normalized", "unknown_words"]

MAX_CHARACTERS = 100_000  # of a prompt, so that no tokenizer is given a book


def listed_prompts(prompts: object) -> list[str]:
    """One prompt, or several, as a list. Raises PromptError for anything else.

    >>> listed_prompts("two red hearts")
    ['two red hearts']
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray | memoryview):
        raise PromptError(f"prompts is {shown(prompts)} ({type(prompts).__name__}); expected text, or a list of texts.")
    return list(prompts)


def check_words(components: Components, text: str) -> None:
    """Raise PromptError for a text without words, with too many tokens, hidden signs or words it never learned.

    For a model with a fixed vocabulary, whose objects have one colour each, also for a "red blue circle".
    """
    read = normalized(components, text)
    if len(read) > MAX_CHARACTERS:
        raise PromptError(f"the prompt has {len(read)} characters; expected at most {MAX_CHARACTERS}.")
    if not words_of(read):
        raise PromptError("the prompt is empty; say what to draw, for instance 'two pink hearts'.")
    count = len(components.tokenizer.drawing_prompt(read))
    limit = components.cfg.max_prompt_tokens
    if count > limit:
        raise PromptError(f"the prompt has {count} tokens; this model reads up to {limit}.")
    unknown = unknown_words(components, text)
    if unknown:
        listed = ", ".join(map(ascii, unknown))
        hints = "".join(dict.fromkeys(hint(word, components.vocabulary) for word in unknown))
        raise PromptError(
            f"this model never learnt {listed}.{hints} "
            f"It knows {len(components.vocabulary)} words: shapes, colours, sizes, places, counts."
        )
    if components.vocabulary and (words := contradiction(read)):
        raise PromptError(
            f"{words!r} says two things of one object that exclude each other; say one of them, or name two objects."
        )


def unknown_words(components: Components, text: str) -> list[str]:
    """Words of a text that the model never learnt, each once; none for a model without a fixed vocabulary.

    Raises PromptError as `normalized` does.
    """
    words = dict.fromkeys(words_of(normalized(components, text)))
    return [word for word in words if components.vocabulary and word not in components.vocabulary]


def normalized(components: Components, text: str) -> str:
    """The text as the model reads it: without hidden signs; for a fixed vocabulary in compatible forms and respelled.

    Raises PromptError for what is no text, or has signs that no reader sees; see `core.text.clean`.
    """
    text = clean(text, "the prompt")
    return respelled(unicodedata.normalize("NFKC", text), components.vocabulary) if components.vocabulary else text
