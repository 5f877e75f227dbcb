"""Tokenizers that write a conversation as token ids: byte-level BPE with turns as special tokens, and Qwen's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from starflow2.errors import CheckpointError
from starflow2.models.config import SpecialIds
from starflow2.models.sequence import Image, Segment, Text

__all__ = [
    "ChatTokenizer",
    "QwenTokenizer",
    "load_tokenizer",
    "train_tokenizer",
]


SPECIAL_TOKENS = (
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)


class Turn(Protocol):
    """What the user says or shows and what the model replies; a part that is no str is a picture."""

    @property
    def user(self) -> Sequence[object]: ...

    @property
    def assistant(self) -> Sequence[object]: ...


class ChatTokenizer:
    """Byte-level BPE with the turns of a conversation as special tokens."""

    special_tokens = SPECIAL_TOKENS  # in the order of SpecialIds

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # what a user types is text: it never opens or ends a turn
        ids = [tokenizer.token_to_id(t) for t in self.special_tokens]
        if None in ids:
            raise CheckpointError(f"the tokenizer lacks a special token; expected {self.special_tokens}.")
        self.special = SpecialIds(*(int(i) for i in ids if i is not None))

    @classmethod
    def load(cls, path: str | Path) -> ChatTokenizer:
        return cls(Tokenizer.from_file(str(path)))

    def opens_user(self, *, is_first: bool = True) -> list[int]:
        """What stands in front of what the user says, in the first turn of a conversation or in a later one."""
        return [self.special.user]

    def opens_reply(self) -> list[int]:
        """What stands between what the user says and the model's reply. A reply ends with `special.end`."""
        return [self.special.assistant]

    def save(self, path: str | Path) -> None:
        self.tokenizer.save(str(path))

    @property
    def vocab(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(" " + text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    def document(self, turns: Iterable[Turn]) -> list[Segment]:
        """A conversation as a model reads it: what stands in a reply is to be predicted, pictures included."""
        segments = list[Segment]()
        for i, turn in enumerate(turns):
            opened = Text(tuple(self.opens_user(is_first=not i)))
            segments += [opened, *self._segments(turn.user, is_target=False)]
            segments += [Text(tuple(self.opens_reply())), *self._segments(turn.assistant, is_target=True)]
            segments += [Text((self.special.end,), is_target=True)]
        return segments

    def _segments(self, parts: Iterable[object], *, is_target: bool) -> list[Segment]:
        """Words as token ids; anything else is a picture."""
        return [Text(tuple(self.encode(p)), is_target) if isinstance(p, str) else Image(is_target) for p in parts]

    def drawing_prompt(self, text: str) -> list[int]:
        """user: text; assistant: begin of image. The last id is the slot of the first latent."""
        body = self.encode(text) if text else []
        return [*self.opens_user(), *body, *self.opens_reply(), self.special.vision_start]


class QwenTokenizer(ChatTokenizer):
    """The tokenizer of a Qwen2.5-VL folder, with the turns of its own chat template.

    `special.user` and `special.assistant` are the token that opens any turn: what the model must never write.
    """

    special_tokens = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
    )
    system = "You are a helpful assistant."

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def opens_user(self, *, is_first: bool = True) -> list[int]:
        before = [*self._opens("system"), *self.encode(self.system), self.special.end] if is_first else []
        return [*before, *self.encode("\n"), *self._opens("user")]

    def opens_reply(self) -> list[int]:
        return [self.special.end, *self.encode("\n"), *self._opens("assistant")]

    def _opens(self, role: str) -> list[int]:
        return [self.special.user, *self.encode(f"{role}\n")]


def load_tokenizer(path: str | Path) -> ChatTokenizer:
    """The tokenizer of a file tokenizer.json, ours or Qwen's."""
    tokenizer = Tokenizer.from_file(str(path))
    is_qwen = tokenizer.token_to_id(QwenTokenizer.special_tokens[1]) is not None
    return QwenTokenizer(tokenizer) if is_qwen else ChatTokenizer(tokenizer)


def train_tokenizer(corpus: Iterable[str], vocab: int) -> ChatTokenizer:
    """A byte-level BPE of at most `vocab` tokens; every word of the corpus stands behind a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((" " + text for text in corpus), trainer)
    return ChatTokenizer(tokenizer)
