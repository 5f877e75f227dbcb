"""Many conversations side by side, turn by turn: what suites and servers with a queue need.

Row i depends on its own words, pictures and seed alone. Not here: one conversation that goes on (session).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow2.errors import ConfigError, PromptError
from starflow2.inference.decoder import BatchDecoder, ReplyLimits
from starflow2.inference.events import Completed, DecodedImage, RowEvent, Token
from starflow2.inference.sampler import Sampler

__all__ = ["Part", "PastTurn", "ReplyPart", "UserTurns", "generate_replies", "reply_after"]

Part = str | Tensor  # words, or a picture (3, s, s) in [-1, 1]
UserTurns = Sequence[Sequence[Part]]  # what the user says in each turn
PastTurn = tuple[Sequence[Part], Sequence[Part]]  # a turn that is over: what the user said, and what was replied
ReplyPart = str | DecodedImage  # what the model wrote or drew
Watch = Callable[[RowEvent], None]


def generate_replies(
    sampler: Sampler,
    talks: Sequence[UserTurns],
    seeds: Sequence[int],
    replying: ReplyLimits,
    *,
    draws: bool = False,
    watch: Watch | None = None,
) -> list[list[list[ReplyPart]]]:
    """The blocks of every reply to every turn of every talk, in order.

    draws: every reply is a picture; else the model decides, within `replying`. `watch` is called with every event.
    """
    if len(talks) != len(seeds):
        raise ConfigError(f"{len(talks)} talks and {len(seeds)} seeds; expected equally many.")
    told: list[list[list[ReplyPart]]] = []
    for first in range(0, len(talks), sampler.config.batch):
        chunk = slice(first, first + sampler.config.batch)
        told += _chunk(sampler, talks[chunk], seeds[chunk], _Style(replying, draws, watch))
    return told


def reply_after(
    sampler: Sampler, pasts: Sequence[Sequence[PastTurn]], asked: Sequence[Sequence[Part]], replying: ReplyLimits
) -> list[list[ReplyPart]]:
    """What the model replies to `asked` after a past that it did not make itself, row by row.

    Pictures of the past, also those that stand in replies, enter as uploads do.
    """
    if len(pasts) != len(asked):
        raise ConfigError(f"{len(pasts)} pasts and {len(asked)} questions; expected equally many.")
    told: list[list[ReplyPart]] = []
    for first in range(0, len(asked), sampler.config.batch):
        chunk = slice(first, first + sampler.config.batch)
        rows = _recall(sampler, pasts[chunk])
        going = list(range(rows.rows))
        _ask(rows, {i: asked[first + i] for i in going})
        listened = _listen(rows, going, [0] * len(going), _Style(replying, draws=False, watch=None))
        told += [listened[i] for i in going]
    return told


def _recall(sampler: Sampler, pasts: Sequence[Sequence[PastTurn]]) -> BatchDecoder:
    """Rows that hold these pasts."""
    rows = BatchDecoder(sampler, len(pasts))
    end = [sampler.components.cfg.vlm.special.end]
    for turn in range(max(map(len, pasts))):
        here = {i: past[turn] for i, past in enumerate(pasts) if turn < len(past)}
        _ask(rows, {i: said for i, (said, _) in here.items()})
        _take(rows, {i: replied for i, (_, replied) in here.items()})
        _read(rows, dict.fromkeys(here, end))
    return rows


@dataclass(frozen=True, slots=True)
class _Style:
    """How all of them reply."""

    replying: ReplyLimits
    draws: bool
    watch: Watch | None


def _chunk(
    sampler: Sampler, talks: Sequence[UserTurns], seeds: Sequence[int], style: _Style
) -> list[list[list[ReplyPart]]]:
    rows = BatchDecoder(sampler, len(talks))
    told: list[list[list[ReplyPart]]] = [[] for _ in talks]
    for turn in range(max((len(talk) for talk in talks), default=0)):
        going = [i for i, talk in enumerate(talks) if turn < len(talk)]
        _ask(rows, {i: talks[i][turn] for i in going})
        for i, blocks in _listen(rows, going, [seeds[i] + turn for i in going], style).items():
            told[i].append(blocks)
    return told


def _ask(rows: BatchDecoder, asked: dict[int, Sequence[Part]]) -> None:
    """Let rows read a user's turn, part by part, and open the model's."""
    tokenizer = rows.sampler.components.tokenizer
    _read(rows, {i: tokenizer.opens_user(is_first=not rows.conditional.cursors[i].step) for i in asked})
    _take(rows, asked)
    _read(rows, {i: tokenizer.opens_reply() for i in asked})


def _take(rows: BatchDecoder, given: dict[int, Sequence[Part]]) -> None:
    """Let rows read words and see pictures in order. Raises PromptError before a row is longer than the model reads."""
    spelled = {i: [_ids(rows.sampler, p) if isinstance(p, str) else p for p in parts] for i, parts in given.items()}
    for row, parts in spelled.items():
        _check_room(rows, row, parts)
    for at in range(max(map(len, spelled.values()), default=0)):
        here = {i: parts[at] for i, parts in spelled.items() if at < len(parts)}
        _read(rows, {i: part for i, part in here.items() if isinstance(part, list)})
        _see(rows, {i: part for i, part in here.items() if isinstance(part, Tensor)})


def _check_room(rows: BatchDecoder, row: int, parts: Sequence[list[int] | Tensor]) -> None:
    sampler, per_picture = rows.sampler, rows.sampler.layout.num_latents + 2
    held, most = int(rows.conditional.is_real[row].sum()), sampler.components.cfg.max_positions
    wanted = sum(len(part) if isinstance(part, list) else per_picture for part in parts)
    if held + wanted + per_picture > most:  # a reply needs room, too
        raise PromptError(
            f"conversation {row} has {held} positions, this needs {wanted} more and a reply up to {per_picture}; this "
            f"model reads up to {most}: say less."
        )


def _ids(sampler: Sampler, text: str) -> list[int]:
    return sampler.components.tokenizer.encode(text) if text else []


def _read(rows: BatchDecoder, ids: dict[int, list[int]]) -> None:
    rows.read([ids.get(i, []) for i in range(rows.rows)])


def _see(rows: BatchDecoder, images: dict[int, Tensor]) -> None:
    if not images:
        return
    sampler = rows.sampler
    levels = torch.full((len(images),), sampler.upload_level)
    rows.see(list(images), sampler.noisy(torch.stack(list(images.values())), levels), sampler.upload_level)


def _listen(rows: BatchDecoder, going: list[int], seeds: list[int], style: _Style) -> dict[int, list[ReplyPart]]:
    """What each row replies: runs of tokens as text, and pictures."""
    blocks: dict[int, list[list[int] | DecodedImage]] = {i: [] for i in going}
    for event in rows.reply(seeds, style.replying, going, draws=style.draws):
        if style.watch is not None:
            style.watch(event)
        if isinstance(event, Token):
            last = blocks[event.row][-1] if blocks[event.row] else None
            if not isinstance(last, list):
                last = []
                blocks[event.row].append(last)
            last.append(event.id)
        elif isinstance(event, Completed):
            blocks[event.row].append(event.picture)
    told = {i: [b if isinstance(b, DecodedImage) else _text(rows.sampler, b) for b in row] for i, row in blocks.items()}
    return {i: [b for b in row if b != ""] for i, row in told.items()}


def _text(sampler: Sampler, ids: list[int]) -> str:
    """Tokens as text, without characters at the end that were never finished, as a session tells them."""
    return sampler.components.tokenizer.decode(ids).rstrip("\ufffd \n")
