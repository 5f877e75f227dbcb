"""Conversations as tokens in which an image has its slots, as other libraries hand them over, and replies to them.

Not here: one conversation that goes on (`session`). Letters: B conversations, T positions, s pixels a side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from starflow2.core.fields import Config, Count, Natural, Positive, Weight
from starflow2.core.images import PILImage, checked_pixels, to_pil
from starflow2.core.text import shown
from starflow2.core.torch_defaults import inference_defaults
from starflow2.errors import ConfigError, DataError, PromptError, ShapeError, nearest
from starflow2.inference.config import ReplyLimits
from starflow2.inference.engine import Engine
from starflow2.inference.events import Completed, Failed, RowEvent, Token
from starflow2.inference.reading import read_image
from starflow2.inference.sampler import Sampler
from starflow2.inference.session import Said, checked_part
from starflow2.models.components import Components
from starflow2.models.sequence import Layout
from starflow2.nn import check, check_floating

__all__ = [
    "SAVING",
    "TEMPLATE",
    "GenerationSettings",
    "Mode",
    "Reply",
    "check_options",
    "check_tokens",
    "decoded",
    "joined",
    "message_tokens",
    "pictures",
    "replies_to_tokens",
    "split_batch",
    "token_batch",
    "words_and_images",
]

Mode = Literal["text", "image", "interleaved"]
# values of transformers' options that do here what they say; others are refused
SAVING = {"safe_serialization": True, "is_main_process": True, "max_shard_size": "50GB"}
TEMPLATE = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
ROOM = {"text": (1, 0), "image": (0, 1), "interleaved": (1, 1)}  # of a reply, for words and for images
Reply = list[list[int] | Tensor]  # runs of tokens, and images (3, s, s) in [-1, 1], in order


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Config):
    """Options of `generate`, by transformers' names; reply i of the result is drawn with `seed` + i."""

    generation_mode: Mode = "text"
    max_new_tokens: Count = 64
    do_sample: bool = False  # words; images are always sampled
    temperature: Positive = 1.0
    guidance_scale: Weight | None = None  # None: the model's own
    num_return_sequences: Count = 1
    seed: Natural | None = None  # None: from torch's global generator

    @classmethod
    def of(cls, options: dict[str, Any]) -> GenerationSettings:
        """Settings from keyword arguments. Raises ConfigError for a name that is none of these."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option {name!r} of generate; expected {known}.{nearest(name, known)}")
        return cls(**options)

    @property
    def limits(self) -> ReplyLimits:
        """Limits of every reply."""
        words, pictures = ROOM[self.generation_mode]
        warmth = self.temperature if self.do_sample else 0.0
        return ReplyLimits(tokens=words * self.max_new_tokens, pictures=pictures, temperature=warmth)


def check_options(options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise ConfigError for an option with another value than the one known, or with a value where none is known."""
    for name in sorted(options):
        if options[name] != known.get(name):
            raise ConfigError(f"{name} is {shown(options[name])}; expected {known.get(name, 'no such option')}.")


def slots_of_image(layout: Layout) -> list[int]:
    """Tokens that stand for one image."""
    return [layout.begin, *[layout.latent] * layout.num_latents, layout.end]


def message_tokens(words: Components, messages: Sequence[object], pictures: list[Tensor]) -> list[int]:
    """Tokens of messages {"role", "content"} up to the reply to the last one; their images are added to `pictures`.

    content: words, or a list of {"type": "text", "text": words} and {"type": "image", "image": whatever
    `core.images.read_picture` takes}. words: a model's tokenizer, vocabulary and sizes; it needs no weights. Raises
    PromptError for other messages and for words that the model does not know, DataError and ShapeError for pictures.
    """
    tokenizer, ids = words.tokenizer, list[int]()
    if not isinstance(messages, list | tuple):
        raise PromptError(f"a conversation is {shown(messages)}; expected a list of messages.")
    for number, message in enumerate(messages):
        role = ("user", "assistant")[number % 2]
        if not isinstance(message, Mapping) or message.get("role") != role:
            raise PromptError(f"message {number} is {shown(message)}; expected one with the role {role!r}.")
        if role == "user":
            ids += tokenizer.opens_user(is_first=not number)
        for part in _content(message, number):
            ready = checked_part(words, part)
            ids += tokenizer.encode(ready) if isinstance(ready, str) else slots_of_image(words.layout)
            pictures += [] if isinstance(ready, str) else [ready]
        ids += tokenizer.opens_reply() if role == "user" else [words.cfg.vlm.special.end]
    if len(messages) % 2 == 0:
        raise PromptError(f"the conversation has {len(messages)} messages; expected the user to have the last word.")
    return ids


def _content(message: Mapping[str, object], number: int) -> list[Said]:
    """Words and pictures of a message. Raises PromptError for anything else."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    parts = list[Said]()
    listed: list[Any] = content if isinstance(content, list) else [content]
    for part in listed:
        kind = str(part.get("type")) if isinstance(part, dict) else ""
        source = part.get(kind) if kind in ("text", "image") else None
        if source is None or (kind == "text" and not isinstance(source, str)):
            wanted = 'words, or a list of {"type": "text", "text": ...} and {"type": "image", "image": ...}'
            raise PromptError(f"the content of message {number} holds {shown(part)}; expected {wanted}.")
        parts.append(Path(source) if kind == "image" and isinstance(source, str) else source)
    return parts


def token_batch(words: Components, conversation: Sequence[Any]) -> dict[str, Tensor]:
    """Tokens and pixels of one conversation, a list of messages, or of a list of them.

    input_ids (B, T), padded on the left, attention_mask, and pixel_values (I, 3, s, s) where there are images.
    """
    if not isinstance(conversation, list | tuple) or not conversation:
        raise PromptError(f"conversation is {shown(conversation)}; expected a list of messages, or several of them.")
    pictures = list[Tensor]()
    talks = [conversation] if isinstance(conversation[0], Mapping) else conversation
    rows = [message_tokens(words, talk, pictures) for talk in talks]
    longest = max(map(len, rows), default=0)
    pads = [longest - len(row) for row in rows]
    batch = {
        "input_ids": torch.tensor([[words.layout.pad] * n + row for n, row in zip(pads, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * n + [1] * (longest - n) for n in pads]),
    }
    return batch | ({"pixel_values": torch.stack(pictures)} if pictures else {})


def decoded(words: Components, ids: Tensor) -> str | list[str]:
    """Words of rows of tokens (B, T), or of one row (T). Raises ShapeError, DataError for what are no tokens."""
    is_row = getattr(ids, "ndim", 2) == 1
    rows = ids[None] if is_row else ids
    check_tokens(words, rows, "outputs")
    texts = [words.tokenizer.decode(row) for row in rows.tolist()]
    return texts[0] if is_row else texts


def pictures(pixels: Tensor) -> list[PILImage]:
    """Pixels (B, 3, height, width) in [-1, 1] as images. Raises ShapeError, DataError where one is not finite."""
    check(pixels, "B 3 height width", "outputs", **{"3": 3})
    check_floating(pixels, "outputs")
    return [to_pil(image) for image in pixels]


def words_and_images(words: Components, ids: Tensor, pixels: Tensor | None) -> list[list[str | PILImage]]:
    """Each row of tokens (B, T) as its words and images in order, of which `pixels` (I, 3, s, s) are those of all rows.

    Raises ShapeError, DataError as `split_batch` does.
    """
    decode = words.tokenizer.decode
    replies = split_batch(words, ids, None, pixels)
    return [[to_pil(part) if isinstance(part, Tensor) else decode(part) for part in reply] for reply in replies]


def split_batch(words: Components, ids: Tensor, mask: Tensor | None, pixels: Tensor | None) -> list[Reply]:
    """Every row of `ids` (B, T) that `mask` keeps as runs of tokens and images, which `pixels` (I, 3, s, s) holds.

    Raises ShapeError for other tensors, DataError for tokens that the model does not have, pixels out of range, and
    slots that do not fit the images.
    """
    layout = words.layout
    check_tokens(words, ids, "input_ids")
    kept = torch.ones_like(ids) if mask is None else mask
    check(kept, "B T", "attention_mask", B=ids.shape[0], T=ids.shape[1])
    pictures = iter(list[Tensor]() if pixels is None else list(_checked_images(words, pixels).cpu()))
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), kept.cpu(), strict=True)]
    prompts = [split_images(row, layout, pictures) for row in rows]
    if next(pictures, None) is not None:
        raise DataError("pixel_values has more images than input_ids has slots for; take both from one processor.")
    return prompts


def check_tokens(words: Components, ids: Tensor, name: str) -> None:
    """Raise ShapeError unless these are rows (B, T) of whole numbers, DataError for numbers that are no tokens."""
    check(ids, "B T", name)
    if ids.dtype not in (torch.int64, torch.int32) or ids.device.type == "meta":
        raise ShapeError(f"{name} holds {ids.dtype} on {ids.device}; expected tokens, int64 with their values.")
    low, high = (int(x) for x in ids.aminmax()) if ids.numel() else (0, 0)
    if low < 0 or high >= words.cfg.vlm.vocab:
        raise DataError(f"{name} has tokens from {low} to {high}; expected 0 to {words.cfg.vlm.vocab - 1}.")


def _checked_images(words: Components, pixels: Tensor) -> Tensor:
    """Images (I, 3, s, s) of the model's size in [-1, 1]. Raises ShapeError, DataError."""
    size = words.cfg.fae.image_size
    check(pixels, "I 3 S S", "pixel_values", **{"3": 3, "S": size})
    return checked_pixels(pixels, "pixel_values")


def split_images(ids: Sequence[int], layout: Layout, pictures: Iterator[Tensor]) -> Reply:
    """Runs of tokens and, in place of the slots of an image, the next of `pictures`. Raises DataError."""
    parts, run, at, slots = Reply(), list[int](), 0, slots_of_image(layout)
    while at < len(ids):
        if ids[at] != layout.begin:
            run.append(ids[at])
            at += 1
            continue
        picture = next(pictures, None)
        if list(ids[at : at + len(slots)]) != slots:
            raise DataError(
                f"position {at} begins an image; expected its {len(slots)} slots, as a processor writes them."
            )
        if picture is None:
            raise DataError(f"position {at} begins an image, but there are no more pixel values; give one per image.")
        parts += [run, picture] if run else [picture]
        run, at = [], at + len(slots)
    return [*parts, run] if run else parts


def joined(replies: Iterable[Reply], layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Tokens of all replies, slots for an image, padded on the right (B, T), and all their images (I, 3, s, s)."""
    replies, slots = list(replies), slots_of_image(layout)
    rows = [[i for part in reply for i in (slots if isinstance(part, Tensor) else part)] for reply in replies]
    images = [part for reply in replies for part in reply if isinstance(part, Tensor)]
    longest = max(map(len, rows), default=0)
    ids = torch.tensor([row + [layout.pad] * (longest - len(row)) for row in rows], dtype=torch.long)
    return ids, torch.stack(images) if images else None


@inference_defaults()
def replies_to_tokens(sampler: Sampler, prompts: Sequence[Reply], settings: GenerationSettings) -> list[Reply]:
    """`num_return_sequences` replies to each prompt, as many side by side as the sampler's batch says.

    Raises PromptError for a prompt that is longer than the model reads, DataError for an image that is not finite.
    """
    first = int(torch.randint(2**31, ())) if settings.seed is None else settings.seed
    waiting, found = [prompt for prompt in prompts for _ in range(settings.num_return_sequences)], list[Reply]()
    while len(found) < len(waiting):
        engine = Engine(sampler)
        replies: dict[int, Reply] = {}
        for prompt in waiting[len(found) : len(found) + sampler.config.batch]:
            row = engine.open()
            _read(engine, row, prompt)
            draws = settings.generation_mode == "image"
            engine.begin(row, settings.limits, first + len(found) + len(replies), draws=draws)
            replies[row] = []
        for event in engine.run():
            _note(replies[event.row], event)
        found += replies.values()
    return found


def _read(engine: Engine, row: int, parts: Reply) -> None:
    """Let a row read a prompt; images enter at the lowest noise level, as uploads do."""
    for part in parts:
        if isinstance(part, Tensor):
            read_image(engine, row, part)
        else:
            engine.feed(row, part)


def _note(reply: Reply, event: RowEvent) -> None:
    """Add what an event tells to its reply. Raises the error of a row that failed."""
    if isinstance(event, Failed):
        raise event.error
    if isinstance(event, Completed):
        reply.append(event.picture.image.cpu())
    elif isinstance(event, Token):
        if not reply or isinstance(reply[-1], Tensor):
            reply.append([])
        last = reply[-1]
        assert isinstance(last, list)
        last.append(event.id)
