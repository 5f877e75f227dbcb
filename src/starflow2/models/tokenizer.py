"""Tokenizers: text to token ids and back, and conversations as documents with turns and images.

`ChatTokenizer` is a small byte-level BPE whose special tokens open the turns; `QwenTokenizer` spells conversations in
Qwen2.5-VL's chat template. `load_tokenizer` tells the two apart by the special tokens in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from starflow2.core.files import check_regular
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
    """One turn of a conversation: parts of the user's message and of the reply; a part that is no str is an image."""

    @property
    def user(self) -> Sequence[object]: ...

    @property
    def assistant(self) -> Sequence[object]: ...

    @property
    def learns(self) -> bool:
        """True if the reply is a prediction target."""
        ...


class ChatTokenizer:
    """Byte-level BPE with the turns of a conversation as special tokens."""

    special_tokens = SPECIAL_TOKENS  # in the order of the fields of SpecialIds

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # special tokens in a user's text are plain text: they open no turn
        ids = [tokenizer.token_to_id(token) for token in self.special_tokens]
        missing = [token for token, number in zip(self.special_tokens, ids, strict=True) if number is None]
        if missing:
            raise CheckpointError(f"the tokenizer has no {', '.join(missing)}; expected all of {self.special_tokens}.")
        self.special = SpecialIds(*(number for number in ids if number is not None))

    @classmethod
    def load(cls, path: str | Path) -> ChatTokenizer:
        return cls(Tokenizer.from_file(str(path)))

    def opens_user(self, *, is_first: bool = True) -> list[int]:
        """Token ids before the user's message; the first turn of a conversation may begin with a system prompt."""
        return [self.special.user]

    def opens_reply(self) -> list[int]:
        """Token ids between the user's message and the reply. A reply ends with `special.end`."""
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
        """Segments of a conversation; words and images of replies that it learns are targets."""
        segments = list[Segment]()
        for i, turn in enumerate(turns):
            opening = Text(tuple(self.opens_user(is_first=not i)))
            segments += [opening, *self._segments(turn.user, is_target=False)]
            segments += [Text(tuple(self.opens_reply())), *self._segments(turn.assistant, is_target=turn.learns)]
            segments += [Text((self.special.end,), is_target=turn.learns)]
        return segments

    def _segments(self, parts: Iterable[object], *, is_target: bool) -> list[Segment]:
        """Text segments for strings, image segments for anything else."""
        return [Text(tuple(self.encode(p)), is_target) if isinstance(p, str) else Image(is_target) for p in parts]

    def drawing_prompt(self, text: str) -> list[int]:
        """Token ids of a turn that asks for an image; the last one, begin of image, predicts the first latent."""
        body = self.encode(text) if text else []
        return [*self.opens_user(), *body, *self.opens_reply(), self.special.vision_start]


class QwenTokenizer(ChatTokenizer):
    """The tokenizer of a Qwen2.5-VL or Qwen3-VL folder, with turns in Qwen's chat template.

    `special.user` and `special.assistant` are both <|im_start|>, which opens any turn and which the model never writes.
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
    system = "You are a helpful assistant."  # "": none, as in Qwen3-VL's template

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def opens_user(self, *, is_first: bool = True) -> list[int]:
        if is_first and not self.system:
            return self._opens("user")
        before = [*self._opens("system"), *self.encode(self.system), self.special.end] if is_first else []
        return [*before, *self.encode("\n"), *self._opens("user")]

    def opens_reply(self) -> list[int]:
        return [self.special.end, *self.encode("\n"), *self._opens("assistant")]

    def _opens(self, role: str) -> list[int]:
        return [self.special.user, *self.encode(f"{role}\n")]


def load_tokenizer(path: str | Path) -> ChatTokenizer:
    """Load tokenizer.json as a `QwenTokenizer` if it has Qwen's special tokens, else as a `ChatTokenizer`."""
    check_regular(path)
    tokenizer = Tokenizer.from_file(str(path))
    is_qwen = tokenizer.token_to_id(QwenTokenizer.special_tokens[1]) is not None
    return QwenTokenizer(tokenizer) if is_qwen else ChatTokenizer(tokenizer)


def train_tokenizer(corpus: Iterable[str], vocab: int) -> ChatTokenizer:
    """Train a byte-level BPE of at most `vocab` tokens; each text of the corpus is preceded by a space."""
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
