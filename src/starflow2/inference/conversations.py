"""Many conversations in one batch, turn by turn, for suites and servers with a queue.

Row i depends on its own words, images and seed alone. Not here: one conversation that goes on (session).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow2.core.torch_defaults import inference_defaults
from starflow2.errors import ConfigError, PromptError
from starflow2.inference.decoder import BatchDecoder, ReplyLimits
from starflow2.inference.events import Completed, DecodedImage, RowEvent, Token
from starflow2.inference.sampler import Sampler

__all__ = ["Part", "PastTurn", "ReplyPart", "UserTurns", "generate_replies", "reply_after"]

Part = str | Tensor  # words, or an image (3, s, s) in [-1, 1]
UserTurns = Sequence[Sequence[Part]]  # parts of each user turn of one conversation
PastTurn = tuple[Sequence[Part], Sequence[Part]]  # a turn that is over: the user's parts and the reply's
ReplyPart = str | DecodedImage  # words or an image of the model's
Watch = Callable[[RowEvent], None]


@inference_defaults()
def generate_replies(
    sampler: Sampler,
    conversations: Sequence[UserTurns],
    seeds: Sequence[int],
    limits: ReplyLimits,
    *,
    draws: bool = False,
    watch: Watch | None = None,
) -> list[list[list[ReplyPart]]]:
    """Parts of the model's replies, by conversation, user turn and order within the reply.

    draws: every reply is an image; else the model decides, within `limits`. `watch` is called with every event.
    Raises ConfigError unless there is one seed per conversation, PromptError for one that is too long.
    """
    if len(conversations) != len(seeds):
        raise ConfigError(f"{len(conversations)} conversations and {len(seeds)} seeds; expected equally many.")
    replies: list[list[list[ReplyPart]]] = []
    for first in range(0, len(conversations), sampler.config.batch):
        chunk = slice(first, first + sampler.config.batch)
        replies += _chunk(sampler, conversations[chunk], seeds[chunk], _ReplyMode(limits, draws, watch))
    return replies


@inference_defaults()
def reply_after(
    sampler: Sampler, pasts: Sequence[Sequence[PastTurn]], questions: Sequence[Sequence[Part]], limits: ReplyLimits
) -> list[list[ReplyPart]]:
    """Parts of the reply to each question after past turns that the model did not make itself.

    Images of the past, those in replies included, enter as uploads do.
    """
    if len(pasts) != len(questions):
        raise ConfigError(f"{len(pasts)} pasts and {len(questions)} questions; expected equally many.")
    replies: list[list[ReplyPart]] = []
    for first in range(0, len(questions), sampler.config.batch):
        decoder = _after(sampler, pasts[first : first + sampler.config.batch])
        rows = list(range(decoder.rows))
        _ask(decoder, {i: questions[first + i] for i in rows})
        by_row = _reply(decoder, rows, [0] * len(rows), _ReplyMode(limits, draws=False, watch=None))
        replies += [by_row[i] for i in rows]
    return replies


def _after(sampler: Sampler, pasts: Sequence[Sequence[PastTurn]]) -> BatchDecoder:
    """A decoder whose rows have read these past turns."""
    decoder = BatchDecoder(sampler, len(pasts))
    end = [sampler.components.cfg.vlm.special.end]
    for turn in range(max(map(len, pasts))):
        turns = {i: past[turn] for i, past in enumerate(pasts) if turn < len(past)}
        _ask(decoder, {i: user for i, (user, _) in turns.items()})
        _append(decoder, {i: assistant for i, (_, assistant) in turns.items()})
        _read(decoder, dict.fromkeys(turns, end))
    return decoder


@dataclass(frozen=True, slots=True)
class _ReplyMode:
    """Limits of every reply, whether it is an image, and a callback for its events."""

    limits: ReplyLimits
    draws: bool
    watch: Watch | None


def _chunk(
    sampler: Sampler, conversations: Sequence[UserTurns], seeds: Sequence[int], mode: _ReplyMode
) -> list[list[list[ReplyPart]]]:
    decoder = BatchDecoder(sampler, len(conversations))
    replies: list[list[list[ReplyPart]]] = [[] for _ in conversations]
    for turn in range(max((len(turns) for turns in conversations), default=0)):
        rows = [i for i, turns in enumerate(conversations) if turn < len(turns)]
        _ask(decoder, {i: conversations[i][turn] for i in rows})
        for i, parts in _reply(decoder, rows, [seeds[i] + turn for i in rows], mode).items():
            replies[i].append(parts)
    return replies


def _ask(decoder: BatchDecoder, turns: dict[int, Sequence[Part]]) -> None:
    """Let rows read a user turn each, part by part, and open the model's turn."""
    tokenizer = decoder.sampler.components.tokenizer
    _read(decoder, {i: tokenizer.opens_user(is_first=not decoder.conditional.cursors[i].step) for i in turns})
    _append(decoder, turns)
    _read(decoder, {i: tokenizer.opens_reply() for i in turns})


def _append(decoder: BatchDecoder, turns: dict[int, Sequence[Part]]) -> None:
    """Let rows read words and images in order. Raises PromptError before a row is longer than the model reads."""
    encoded = {i: [_ids(decoder.sampler, p) if isinstance(p, str) else p for p in turn] for i, turn in turns.items()}
    for row, parts in encoded.items():
        _check_room(decoder, row, parts)
    for number in range(max(map(len, encoded.values()), default=0)):
        now = {i: parts[number] for i, parts in encoded.items() if number < len(parts)}
        _read(decoder, {i: part for i, part in now.items() if isinstance(part, list)})
        _see(decoder, {i: part for i, part in now.items() if isinstance(part, Tensor)})


def _check_room(decoder: BatchDecoder, row: int, parts: Sequence[list[int] | Tensor]) -> None:
    sampler, per_image = decoder.sampler, decoder.sampler.layout.num_latents + 2
    length, most = int(decoder.conditional.is_real[row].sum()), sampler.components.cfg.max_positions
    wanted = sum(len(part) if isinstance(part, list) else per_image for part in parts)
    if length + wanted + per_image > most:  # a reply needs room, too
        raise PromptError(
            f"conversation {row} has {length} positions, this needs {wanted} more and a reply up to {per_image}; this "
            f"model reads up to {most}: say less."
        )


def _ids(sampler: Sampler, text: str) -> list[int]:
    return sampler.components.tokenizer.encode(text) if text else []


def _read(decoder: BatchDecoder, ids: dict[int, list[int]]) -> None:
    decoder.read([ids.get(i, []) for i in range(decoder.rows)])


def _see(decoder: BatchDecoder, images: dict[int, Tensor]) -> None:
    if not images:
        return
    sampler = decoder.sampler
    levels = torch.full((len(images),), sampler.upload_level)
    decoder.see(list(images), sampler.noisy(torch.stack(list(images.values())), levels), sampler.upload_level)


def _reply(decoder: BatchDecoder, rows: list[int], seeds: list[int], mode: _ReplyMode) -> dict[int, list[ReplyPart]]:
    """Let rows reply; returns their parts, runs of tokens as text, and images."""
    parts: dict[int, list[list[int] | DecodedImage]] = {i: [] for i in rows}
    for event in decoder.reply(seeds, mode.limits, rows, draws=mode.draws):
        if mode.watch is not None:
            mode.watch(event)
        if isinstance(event, Token):
            last = parts[event.row][-1] if parts[event.row] else None
            if not isinstance(last, list):
                last = []
                parts[event.row].append(last)
            last.append(event.id)
        elif isinstance(event, Completed):
            parts[event.row].append(event.picture)
    texts = {i: [p if isinstance(p, DecodedImage) else _text(decoder.sampler, p) for p in r] for i, r in parts.items()}
    return {i: [part for part in row if part != ""] for i, row in texts.items()}


def _text(sampler: Sampler, ids: list[int]) -> str:
    """Tokens as text, without characters at the end that were never finished, as in a session."""
    return sampler.components.tokenizer.decode(ids).rstrip("\ufffd \n")
