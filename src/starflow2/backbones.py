"""The only importer of transformers: Qwen2.5-VL as a causal language stream, DINOv2 as features.

Nano and paper use the same classes with different configs. Position ids are always explicit here:
transformers falls back to one-dimensional positions in silence when they are left out.
Letters: B batch, T positions, E language width, V vocabulary, N patches, F feature dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as hf_logging

from starflow2.errors import CheckpointError
from starflow2.nn import Cache, attention_mask, check
from starflow2.sequence import Image, Segment, Text

__all__ = [
    "ChatTokenizer",
    "DinoConfig",
    "DinoFeatures",
    "LanguageConfig",
    "QwenStream",
    "SpecialIds",
    "train_tokenizer",
]


# written-out attention: on CPU it is faster than the fused kernel, and masks of any form are allowed
EAGER: dict[str, Any] = {"attn_implementation": "eager"}


class _Backbone(nn.Module):
    """A transformers model behind one of our seams, read and written in transformers' own layout."""

    model: Any  # a transformers model; its own types do not check

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        with _quiet():
            self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Read them back, strictly: every weight must be there and fit."""
        with _quiet():
            model, told = type(self.model).from_pretrained(
                folder,
                config=self.model.config,  # our sizes rule, not those of whatever stands in the folder
                dtype=torch.float32,
                **EAGER,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        wrong = {k: sorted(v) for k, v in told.items() if v and k != "error_msgs"}
        if wrong:
            listed = ", ".join(f"{len(v)} {k.replace('_', ' ')} {v[:3]}" for k, v in wrong.items())
            raise ValueError(f"weights do not fit the model: {listed}")
        self.model = model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without progress bars, which would break into ours, and pages of warnings: what is wrong raises."""
    shown, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if shown:
            hf_logging.enable_progress_bar()


# -- DINOv2 -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """Shape of a DINOv2; `image_size` and `patch_size` in pixels."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    swiglu: bool = False


class DinoFeatures(_Backbone):
    """Patch features of a DINOv2 without its class token; pictures in [-1, 1]."""

    def __init__(self, cfg: DinoConfig) -> None:
        super().__init__()
        self.cfg = cfg
        side = cfg.image_size // cfg.patch_size
        self.grid, self.feature_dim = (side, side), cfg.width
        self.model = Dinov2Model(
            Dinov2Config(
                image_size=cfg.image_size,
                patch_size=cfg.patch_size,
                hidden_size=cfg.width,
                num_hidden_layers=cfg.depth,
                num_attention_heads=cfg.heads,
                use_swiglu_ffn=cfg.swiglu,
                **EAGER,
            )
        )

    def features(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """images: (B, 3, height, width) -> (B, N, F); `masked`: (B, N) bool hides patches."""
        check(images, "B C H W", "images", C=3)
        out = self.model(pixel_values=images, bool_masked_pos=masked)
        states: Tensor = out.last_hidden_state
        return states[:, 1:]


# -- tokenizer ----------------------------------------------------------------------------------------

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Token ids that the sequence layout needs."""

    pad: int
    user: int
    assistant: int
    end: int
    vision_start: int
    vision_end: int
    image_pad: int


class Turn(Protocol):
    """What the user says or shows and what the model replies; a part that is no str is a picture."""

    @property
    def asked(self) -> Sequence[object]: ...

    @property
    def told(self) -> Sequence[object]: ...


class ChatTokenizer:
    """Byte-level BPE with the turns of a conversation as special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # what a user types is text: it never opens or ends a turn
        ids = [tokenizer.token_to_id(t) for t in SPECIAL_TOKENS]
        names = ("pad", "user", "assistant", "end", "vision_start", "vision_end", "image_pad")
        if None in ids:
            raise CheckpointError(f"the tokenizer lacks a special token; expected {SPECIAL_TOKENS}.")
        self.special = SpecialIds(**{n: int(i) for n, i in zip(names, ids, strict=True) if i is not None})

    @classmethod
    def load(cls, path: str | Path) -> ChatTokenizer:
        return cls(Tokenizer.from_file(str(path)))

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
        s, segments = self.special, list[Segment]()
        for turn in turns:
            segments += [Text((s.user,)), *self._segments(turn.asked, is_target=False)]
            segments += [Text((s.assistant,)), *self._segments(turn.told, is_target=True)]
            segments += [Text((s.end,), is_target=True)]
        return segments

    def _segments(self, parts: Iterable[object], *, is_target: bool) -> list[Segment]:
        """Words as token ids; anything else is a picture."""
        return [Text(tuple(self.encode(p)), is_target) if isinstance(p, str) else Image(is_target) for p in parts]

    def drawing_prompt(self, text: str) -> list[int]:
        """user: text; assistant: begin of image. The last id is the slot of the first latent."""
        s = self.special
        body = self.encode(text) if text else []
        return [s.user, *body, s.assistant, s.vision_start]


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


# -- Qwen2.5-VL -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Shape of a Qwen2.5-VL, language model and vision tower; head dim = width / heads."""

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_width: int
    mrope_section: tuple[int, int, int]
    special: SpecialIds
    vision_width: int
    vision_depth: int
    vision_heads: int
    vision_mlp_width: int
    vision_patch: int  # pixels; two by two patches merge into one token
    image_size: int  # pixels, square, of pictures the tower reads
    rope_theta: float = 1e6
    ties_embeddings: bool = True

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of merged vision tokens."""
        side = self.image_size // (2 * self.vision_patch)
        return side, side

    def to_transformers(self) -> Qwen2_5_VLConfig:
        text: dict[str, Any] = {
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.mlp_width,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "mrope_section": list(self.mrope_section),
            },
            "bos_token_id": None,
            "eos_token_id": self.special.end,
            "pad_token_id": self.special.pad,
            "tie_word_embeddings": self.ties_embeddings,
        }
        vision: dict[str, Any] = {
            "depth": self.vision_depth,
            "hidden_size": self.vision_width,
            "intermediate_size": self.vision_mlp_width,
            "num_heads": self.vision_heads,
            "patch_size": self.vision_patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": self.image_size,
            "out_hidden_size": self.width,
            "fullatt_block_indexes": tuple(range(self.vision_depth)),
        }
        return Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=self.special.image_pad,
            vision_start_token_id=self.special.vision_start,
            vision_end_token_id=self.special.vision_end,
            tie_word_embeddings=self.ties_embeddings,
            **EAGER,
        )


class QwenStream(_Backbone):
    """Qwen2.5-VL seen as embed -> states -> logits, with its own vision tower beside it."""

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = Qwen2_5_VLForConditionalGeneration(cfg.to_transformers())

    @property
    def width(self) -> int:
        return self.cfg.width

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, E)."""
        out: Tensor = self.model.get_input_embeddings()(ids)
        return out

    def states(
        self,
        embeds: Tensor,
        positions: Tensor,
        cache: Cache | None = None,
        attend: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states after the final norm, (B, T, E).

        embeds: (B, T, E); positions: (3, B, T) M-RoPE ids. Causal; attend: (B, Tk) bool marks usable keys, or
        (B, T, Tk) bool says all, Tk counting cached positions too. Rows of unequal length that start together may
        also be padded at the right, where a causal model cannot see.
        """
        check(positions, "A B T", "positions", A=3)
        mask = attention_mask(embeds, 0 if cache is None else cache.length, attend)
        out = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask={"full_attention": None if mask is None else _additive(mask, embeds.dtype)},
            past_key_values=None if cache is None else _HfCache(cache),
            use_cache=cache is not None,
        )
        if cache is not None:
            cache.advance(embeds.shape[1])
        h: Tensor = out.last_hidden_state
        return h

    def new_cache(self) -> Cache:
        """An empty cache for `states`."""
        return Cache(self.cfg.depth)

    def logits(self, h: Tensor) -> Tensor:
        """(..., E) -> (..., V)."""
        out: Tensor = self.model.lm_head(h)
        return out

    def language_weights(self) -> dict[str, Tensor]:
        """Weights of the language model alone, by Qwen's names: embed_tokens, layers.0..., norm, lm_head."""
        inner: dict[str, Tensor] = self.model.model.language_model.state_dict()
        return {**inner, "lm_head.weight": self.model.lm_head.weight.detach()}

    def see(self, images: Tensor) -> Tensor:
        """The model's own vision tower: images (B, 3, s, s) in [-1, 1] -> (B, rows * columns, E)."""
        size = self.cfg.image_size
        check(images, "B C H W", "images", C=3, H=size, W=size)
        patches, side = patchify(images, self.cfg.vision_patch), size // self.cfg.vision_patch
        grid = torch.tensor([[1, side, side]], device=images.device).expand(len(images), -1)
        out = self.model.model.visual(patches, grid_thw=grid)
        tokens: Tensor = out if isinstance(out, Tensor) else out.pooler_output
        return rearrange(tokens, "(b n) e -> b n e", b=len(images))


class _HfCache:
    """Our growing cache in the shape that transformers' attention layers ask for."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.cache.append(layer_idx, k, v)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.length


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as transformers' written-out attention adds it to the scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Flattened patches in the order Qwen's tower expects: 2x2 merge groups, picture doubled in time."""
    x = rearrange(
        images,
        "b c (r mr p) (s ms q) -> (b r s mr ms) c p q",
        mr=2,
        ms=2,
        p=patch,
        q=patch,
    )
    return F.pad(x.unsqueeze(2), (0, 0, 0, 0, 0, 1), mode="replicate").flatten(1)
