"""Turns of a conversation read into a row of an engine: what users said and showed, and replies that are over.

Images of such replies enter as uploads do. Not here: replies that the model makes (`engine`), their events
(`session`, `conversations`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from starflow2.errors import PromptError
from starflow2.inference.engine import Engine

__all__ = ["Part", "PastTurn", "read_image", "read_past", "read_user_turn"]

Part = str | Tensor  # words, or an image (3, s, s) in [-1, 1]
PastTurn = tuple[Sequence[Part], Sequence[Part]]  # a turn that is over: the user's parts and the reply's


def read_past(engine: Engine, row: int, past: Sequence[PastTurn], name: str = "the conversation") -> None:
    """Let a row read turns that are over. Raises PromptError, with `name`, for more than the model reads."""
    tokenizer, end = engine.sampler.components.tokenizer, engine.sampler.components.cfg.vlm.special.end
    for user, assistant in past:
        engine.feed(row, tokenizer.opens_user(is_first=not engine.length(row)))
        _append(engine, row, user, name)
        engine.feed(row, tokenizer.opens_reply())
        _append(engine, row, assistant, name)
        engine.feed(row, [end])


def read_user_turn(engine: Engine, row: int, parts: Sequence[Part], name: str = "the conversation") -> None:
    """Let a row read a user's turn and what opens the reply. Raises PromptError as `read_past` does."""
    tokenizer = engine.sampler.components.tokenizer
    engine.feed(row, tokenizer.opens_user(is_first=not engine.length(row)))
    _append(engine, row, parts, name)
    engine.feed(row, tokenizer.opens_reply())


def read_image(engine: Engine, row: int, image: Tensor) -> tuple[Tensor, Tensor]:
    """Let a row read an image (3, s, s) at the lowest noise level; returns its latents x and u, (N, D) each.

    docs/choices.md#picture-levels.
    """
    level = engine.sampler.upload_level
    x = engine.sampler.noisy(image[None], torch.tensor([level]))[0]
    return x, engine.see(row, x, level)


def _append(engine: Engine, row: int, parts: Sequence[Part], name: str) -> None:
    """Let a row read words and images in order. Raises PromptError before it is longer than the model reads."""
    sampler = engine.sampler
    encode = sampler.components.tokenizer.encode
    encoded = [(encode(part) if part else []) if isinstance(part, str) else part for part in parts]
    _check_room(engine, row, name, encoded)
    for part in encoded:
        if isinstance(part, list):
            engine.feed(row, part)
        else:
            read_image(engine, row, part)


def _check_room(engine: Engine, row: int, name: str, parts: Sequence[list[int] | Tensor]) -> None:
    sampler, per_image = engine.sampler, engine.sampler.layout.num_latents + 2
    length, most = engine.length(row), sampler.components.cfg.max_positions
    wanted = sum(len(part) if isinstance(part, list) else per_image for part in parts)
    if length + wanted + per_image > most:  # a reply needs room, too
        raise PromptError(
            f"{name} has {length} positions, this needs {wanted} more and a reply up to {per_image}; "
            f"this model reads up to {most}: say less."
        )
