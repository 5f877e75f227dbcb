"""Answers from a picture and words: the language model with its own vision tower, greedy and cached.

Row i of a batch depends on its own picture and words alone: rows are run together only if they are equally long, so
nothing is padded. Not here: the flow, which this path never touches, and the grading of answers.
Letters: B rows, T positions, N vision tokens, E language width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from starflow2.errors import ConfigError
from starflow2.parts import Parts
from starflow2.sequence import image_mrope, text_mrope

__all__ = ["answer", "picture_inputs"]

_BATCH = 64  # rows at once
_FIRST = 2  # vision tokens stand behind user and vision_start


@torch.no_grad()
def answer(parts: Parts, images: Tensor, questions: Sequence[str], *, max_tokens: int = 48) -> list[str]:
    """One answer per (picture, question), each of at most `max_tokens` tokens; the likeliest token at every step.

    images: (B, 3, s, s) in [-1, 1], s = parts.cfg.vlm.image_size.
    Raises ConfigError if lengths differ or the model's language part was not trained, ShapeError for other pictures.
    """
    if len(images) != len(questions):
        raise ConfigError(f"{len(images)} images and {len(questions)} questions; expected equally many.")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; expected at least 1.")
    if "vlm" not in parts.stages:
        raise ConfigError(f"this model has finished stages {list(parts.stages)}; answering needs vlm.")
    tokenizer = parts.tokenizer
    assert tokenizer is not None
    rows = [_document(parts, question) for question in questions]
    answers = [""] * len(rows)
    for group in _equally_long(rows):
        ids = torch.tensor([rows[i] for i in group], device=parts.device)  # (B, T)
        replies = _reply(parts, images[group].to(parts.device), ids, max_tokens)
        for i, reply in zip(group, replies, strict=True):
            answers[i] = tokenizer.decode(reply)
    return answers


def _document(parts: Parts, question: str) -> list[int]:
    """Token ids up to where the answer begins, in the layout that the language model was trained on."""
    tokenizer, (rows, cols) = parts.tokenizer, parts.cfg.vlm.image_grid
    assert tokenizer is not None
    s = tokenizer.special
    picture = [s.vision_start, *[s.image_pad] * (rows * cols), s.vision_end]
    return [s.user, *picture, *tokenizer.encode(question), s.assistant]


def _equally_long(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of rows of one length, at most a batch at a time."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        by_length[len(row)].append(i)
    for group in by_length.values():
        yield from (group[at : at + _BATCH] for at in range(0, len(group), _BATCH))


def picture_inputs(parts: Parts, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (B, T, E) and M-RoPE ids (3, B, T) of documents that begin with a picture, seen by the model's tower.

    ids: (B, T), image_pad where the picture's tokens go, right behind user and vision_start.
    """
    seen = parts.vlm.see(images)  # (B, N, E)
    embeds = parts.vlm.embed(ids)  # (B, T, E)
    embeds = torch.cat([embeds[:, :_FIRST], seen.to(embeds), embeds[:, _FIRST + seen.shape[1] :]], 1)
    return embeds, _positions(parts, ids)


def _positions(parts: Parts, ids: Tensor) -> Tensor:
    """M-RoPE ids (3, B, T) of such documents."""
    grid = parts.cfg.vlm.image_grid
    picture, after = image_mrope(grid, _FIRST)
    behind = text_mrope(1, ids.shape[1] - _FIRST - picture.shape[1], after)[:, 0]
    row = torch.cat([text_mrope(1, _FIRST)[:, 0], picture, behind], 1)  # (3, T)
    return row[:, None].expand(-1, len(ids), -1).to(ids.device)


def _reply(parts: Parts, images: Tensor, ids: Tensor, max_tokens: int) -> list[list[int]]:
    """The tokens that follow each row, without the end token; rows that have ended leave the batch."""
    vlm, end = parts.vlm, parts.cfg.vlm.special.end
    embeds, positions = picture_inputs(parts, images, ids)
    cache = vlm.new_cache()
    h = vlm.states(embeds, positions, cache=cache)
    at = int(positions[0, 0, -1])
    replies: list[list[int]] = [[] for _ in ids]
    rows = list(range(len(ids)))  # that have not ended
    while True:
        told = vlm.logits(h[:, -1]).argmax(-1)  # (B,)
        going = (told != end).nonzero().flatten()
        rows, told = [rows[i] for i in going.tolist()], told[going]
        for i, token in zip(rows, told.tolist(), strict=True):
            replies[i].append(token)
        if not rows or len(replies[rows[0]]) == max_tokens:
            return replies
        if len(going) < len(h):
            cache.select(going)
        at += 1
        h = vlm.states(vlm.embed(told[:, None]), text_mrope(len(rows), 1, at).to(ids.device), cache=cache)
