"""Answers of the language model alone, which sees images through its own vision tower: greedy and cached.

Row i of a batch depends on its own picture and words alone: rows are run together only if they are equally long, so
nothing is padded. Not here: the flow, which this path never touches, and the grading of answers.
Letters: B rows, T positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import Tensor

from starflow2.core.torch_defaults import inference_defaults
from starflow2.errors import ConfigError, StateError
from starflow2.models.components import Components
from starflow2.models.sequence import Batch, Image, Text, pack, text_mrope, with_pictures

__all__ = ["answer"]

_BATCH = 64  # rows at once


@inference_defaults()
def answer(components: Components, images: Tensor, questions: Sequence[str], *, max_tokens: int = 48) -> list[str]:
    """One answer per (image, question), each of at most `max_tokens` tokens; the likeliest token at every step.

    images: (B, 3, s, s) in [-1, 1], s = components.cfg.vlm.image_size.
    Raises ConfigError if lengths differ, StateError if the language model was not trained, ShapeError for other images.
    """
    if len(images) != len(questions):
        raise ConfigError(f"{len(images)} images and {len(questions)} questions; expected equally many.")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; expected at least 1.")
    if "vlm" not in (*components.finished_stages, *components.cfg.references):
        raise StateError(f"this model has finished stages {list(components.finished_stages)}; answering needs vlm.")
    tokenizer = components.tokenizer
    rows = [tokenizer.encode(question) for question in questions]
    answers = [""] * len(rows)
    for group in _equally_long(rows):
        batch = _documents(components, [rows[i] for i in group]).to(components.device)
        replies = _reply(components, images[group].to(components.device), batch, max_tokens)
        for i, reply in zip(group, replies, strict=True):
            answers[i] = tokenizer.decode(reply)
    return answers


def _documents(components: Components, questions: Sequence[list[int]]) -> Batch:
    """Documents of an image and a question up to where the answer begins; questions are equally long."""
    before, after = (
        Text(tuple(ids)) for ids in (components.tokenizer.opens_user(), components.tokenizer.opens_reply())
    )
    return pack([[before, Image(), Text(tuple(q)), after] for q in questions], components.tower_layout)


def _equally_long(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of rows of one length, at most a batch at a time."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        by_length[len(row)].append(i)
    for group in by_length.values():
        yield from (group[at : at + _BATCH] for at in range(0, len(group), _BATCH))


def _reply(components: Components, images: Tensor, batch: Batch, max_tokens: int) -> list[list[int]]:
    """Tokens of each row's answer without the end token; rows that have ended leave the batch."""
    vlm, end = components.vlm, components.cfg.vlm.special.end
    cache = vlm.new_cache()
    h = vlm.states(with_pictures(vlm.embed(batch.ids), vlm.see(images), batch), batch.mrope, cache=cache)
    position = int(batch.mrope[0, 0, -1])
    replies: list[list[int]] = [[] for _ in images]
    rows = list(range(len(images)))  # that have not ended
    while True:
        tokens = vlm.logits(h[:, -1]).argmax(-1)  # (B,)
        active = (tokens != end).nonzero().flatten()
        rows, tokens = [rows[i] for i in active.tolist()], tokens[active]
        for i, token in zip(rows, tokens.tolist(), strict=True):
            replies[i].append(token)
        if not rows or len(replies[rows[0]]) == max_tokens:
            return replies
        if len(active) < len(h):
            cache.select(active)
        position += 1
        h = vlm.states(
            vlm.embed(tokens[:, None]), text_mrope(len(rows), 1, position).to(components.device), cache=cache
        )
