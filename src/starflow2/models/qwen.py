"""The only importer of transformers: Qwen2.5-VL as a causal language stream, DINOv2 or SigLIP as features.

Nano and paper use the same classes with different configs. Position ids are always explicit here:
transformers falls back to one-dimensional positions in silence when they are left out. Weights may be held in half
precision: what goes in is cast to it, states and features come out in float32 or better.
Letters: B batch, T positions, E language width, V vocabulary, N patches, F feature dim.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as hf_logging

from starflow2.errors import CheckpointError, ConfigError
from starflow2.models.sequence import Image, Segment, Text
from starflow2.nn import Cache, at_least_fp32, attention_mask, check

if TYPE_CHECKING:
    from transformers.models.qwen3_vl import Qwen3VLConfig

__all__ = [
    "ChatTokenizer",
    "DinoConfig",
    "DinoFeatures",
    "LanguageConfig",
    "PixelConfig",
    "Qwen3Stream",
    "QwenStream",
    "QwenTokenizer",
    "SiglipConfig",
    "SiglipFeatures",
    "SpecialIds",
    "features_of",
    "load_tokenizer",
    "train_tokenizer",
]


# fused attention: never all scores at once, which at 7B and 4,096 positions would be 0.9 GB a layer and row
FUSED: dict[str, Any] = {"attn_implementation": "sdpa"}


class _Backbone(nn.Module):
    """A transformers model behind one of our seams, read and written in transformers' own layout."""

    model: Any  # a transformers model; its own types do not check
    other_towers: tuple[str, ...] = ()  # how weights begin that stand in upstream files and belong to other models
    unseen: tuple[str, ...] = ()  # settings that no shape betrays, compared with those of a folder

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weights."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        with _quiet():
            self.model.save_pretrained(folder)

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Read them back, strictly: every weight must be there and fit. Whole or sharded, safetensors only.

        Weights that are in `dtype` already stay in the mapped file until they are used or moved: no second copy.
        """
        with _quiet():
            model, told = type(self.model).from_pretrained(
                folder,
                config=self.model.config,  # our sizes rule, not those of whatever stands in the folder
                dtype=dtype,
                **FUSED,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        told["unexpected_keys"] = {k for k in told["unexpected_keys"] if not k.startswith(self.other_towers)}
        wrong = {k: sorted(v) for k, v in told.items() if v and k != "error_msgs"}
        if wrong:
            listed = ", ".join(f"{len(v)} {k.replace('_', ' ')} {v[:3]}" for k, v in wrong.items())
            raise ValueError(f"weights do not fit the model: {listed}")
        self.model = model

    def check_settings(self, folder: Path) -> None:
        """Raise ValueError where config.json of `folder` has other settings than ours, such as the base of rotations.

        Weights of another setting would fit and mislead.
        """
        with _quiet():
            upstream = type(self.model.config).from_pretrained(folder, local_files_only=True)
        theirs, ours = _flat(upstream.to_dict()), _flat(self.model.config.to_dict())
        differ = [f"{k} {theirs.get(k)} there, {ours[k]} here" for k in self.unseen if theirs.get(k) != ours[k]]
        if differ:
            raise ValueError(f"the folder is of another model: {'; '.join(differ)}")


def _flat(config: dict[Any, Any], path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; tuples as lists."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


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


# -- pixels -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PixelConfig:
    """How pictures in [-1, 1] become what a pretrained tower was trained on."""

    picture_size: int  # pixels, square, of the pictures that come; resized to what the tower reads
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of red, green, blue in [0, 1]
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


def to_tower(images: Tensor, size: int, cfg: PixelConfig | None) -> Tensor:
    """Pictures (B, 3, s, s) in [-1, 1] as a tower reads them: (B, 3, size, size). None: they come as they are read."""
    came = size if cfg is None else cfg.picture_size
    check(images, "B C H W", "images", C=3, H=came, W=came)
    if cfg is None:
        return images
    if came != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    mean, std = (images.new_tensor(values)[:, None, None] for values in (cfg.mean, cfg.std))
    return ((images + 1) / 2 - mean) / std


# -- DINOv2, SigLIP ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """Shape of a DINOv2; `image_size` and `patch_size` in pixels."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    swiglu: bool = False
    table_size: int = 0  # pixels that the table of positions covers, interpolated to image_size; 0 = those
    pixels: PixelConfig | None = None  # None: pictures of image_size in [-1, 1]


class DinoFeatures(_Backbone):
    """Patch features of a DINOv2 without its class token; pictures in [-1, 1]."""

    unseen = ("num_attention_heads", "layer_norm_eps", "hidden_act", "patch_size")

    def __init__(self, cfg: DinoConfig) -> None:
        super().__init__()
        self.cfg = cfg
        side = cfg.image_size // cfg.patch_size
        self.grid, self.feature_dim = (side, side), cfg.width
        self.model = Dinov2Model(
            Dinov2Config(
                image_size=cfg.table_size or cfg.image_size,
                patch_size=cfg.patch_size,
                hidden_size=cfg.width,
                num_hidden_layers=cfg.depth,
                num_attention_heads=cfg.heads,
                use_swiglu_ffn=cfg.swiglu,
                **FUSED,
            )
        )

    def features(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """images: (B, 3, height, width) -> (B, N, F); `masked`: (B, N) bool hides patches."""
        pixels = to_tower(images, self.cfg.image_size, self.cfg.pixels)
        out = self.model(pixel_values=pixels.to(self.dtype), bool_masked_pos=masked)
        return at_least_fp32(out.last_hidden_state[:, 1:])


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """Shape of the vision half of a SigLIP; `image_size` and `patch_size` in pixels."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    pixels: PixelConfig | None = None  # None: pictures of image_size in [-1, 1]


class SiglipFeatures(_Backbone):
    """Patch features of a SigLIP, behind its last norm; pictures in [-1, 1]. Its pooling head is loaded, and idle."""

    other_towers = ("text_model.", "logit_scale", "logit_bias")  # a folder may hold the whole SigLIP
    unseen = ("num_attention_heads", "layer_norm_eps", "hidden_act", "patch_size")

    def __init__(self, cfg: SiglipConfig) -> None:
        super().__init__()
        self.cfg = cfg
        from transformers import SiglipVisionConfig, SiglipVisionModel  # only here: most models do without

        side = cfg.image_size // cfg.patch_size
        self.grid, self.feature_dim = (side, side), cfg.width
        self.model = SiglipVisionModel(
            SiglipVisionConfig(
                image_size=cfg.image_size,
                patch_size=cfg.patch_size,
                hidden_size=cfg.width,
                num_hidden_layers=cfg.depth,
                num_attention_heads=cfg.heads,
                intermediate_size=cfg.mlp_width,
                **FUSED,
            )
        )

    def features(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """images: (B, 3, height, width) -> (B, N, F). It knows no hidden patches: `masked` must be None."""
        if masked is not None:
            raise ConfigError("SigLIP was trained without hidden patches; train stage features on a DINOv2.")
        pixels = to_tower(images, self.cfg.image_size, self.cfg.pixels)
        return at_least_fp32(self.model(pixel_values=pixels.to(self.dtype)).last_hidden_state)


def features_of(cfg: DinoConfig | SiglipConfig) -> DinoFeatures | SiglipFeatures:
    """The extractor of that config."""
    return DinoFeatures(cfg) if isinstance(cfg, DinoConfig) else SiglipFeatures(cfg)


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


@dataclass(frozen=True)
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
            segments += [opened, *self._segments(turn.asked, is_target=False)]
            segments += [Text(tuple(self.opens_reply())), *self._segments(turn.told, is_target=True)]
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
    vision_window: int = 0  # pixels a windowed layer of the tower sees at once; 0 = the picture
    vision_whole: tuple[int, ...] = ()  # layers of the tower that see the whole picture; () = all
    pixels: PixelConfig | None = None  # None: pictures of image_size in [-1, 1]

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
            "window_size": self.vision_window or self.image_size,
            "out_hidden_size": self.width,
            "fullatt_block_indexes": self.vision_whole or tuple(range(self.vision_depth)),
        }
        return Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=self.special.image_pad,
            vision_start_token_id=self.special.vision_start,
            vision_end_token_id=self.special.vision_end,
            tie_word_embeddings=self.ties_embeddings,
            **FUSED,
        )


class QwenStream(_Backbone):
    """Qwen2.5-VL seen as embed -> states -> logits, with its own vision tower beside it."""

    unseen = (
        "text_config.num_attention_heads",
        "text_config.rms_norm_eps",
        "text_config.hidden_act",
        "text_config.rope_parameters.rope_theta",
        "text_config.rope_parameters.mrope_section",
        "vision_config.num_heads",
        "vision_config.patch_size",
        "vision_config.window_size",
        "vision_config.fullatt_block_indexes",
        "vision_config.hidden_act",
    )

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = Qwen2_5_VLForConditionalGeneration(cfg.to_transformers())

    @property
    def width(self) -> int:
        return self.cfg.width

    @property
    def layers(self) -> list[nn.Module]:
        """The language model's transformer layers, which run whatever a batch holds; not those of the tower."""
        return list(self.model.model.language_model.layers)

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
        embeds = embeds.to(self.dtype)
        mask = attention_mask(embeds, 0 if cache is None else cache.length, attend)
        out = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask={"full_attention": mask},
            past_key_values=None if cache is None else _HfCache(cache),
            use_cache=cache is not None,
        )
        if cache is not None:
            cache.advance(embeds.shape[1])
        return at_least_fp32(out.last_hidden_state)

    def new_cache(self) -> Cache:
        """An empty cache for `states`."""
        return Cache(self.cfg.depth)

    def logits(self, h: Tensor) -> Tensor:
        """(..., E) -> (..., V)."""
        out: Tensor = self.model.lm_head(h.to(self.dtype))
        return out

    def language_weights(self) -> dict[str, Tensor]:
        """Weights of the language model alone, by Qwen's names: embed_tokens, layers.0..., norm, lm_head."""
        inner: dict[str, Tensor] = self.model.model.language_model.state_dict()
        return {**inner, "lm_head.weight": self.model.lm_head.weight.detach()}

    def see(self, images: Tensor) -> Tensor:
        """The model's own vision tower: images (B, 3, s, s) in [-1, 1] -> (B, rows * columns, E)."""
        if not len(images):  # a share of a batch may hold words only; the tower cannot take none
            return images.new_zeros(0, math.prod(self.cfg.image_grid), self.cfg.width)
        size, side = self.cfg.image_size, self.cfg.image_size // self.cfg.vision_patch
        patches = patchify(to_tower(images, size, self.cfg.pixels), self.cfg.vision_patch).to(self.dtype)
        grid = torch.tensor([[1, side, side]], device=images.device).expand(len(images), -1)
        out = self.model.model.visual(patches, grid_thw=grid)
        tokens: Tensor = out if isinstance(out, Tensor) else out.pooler_output
        return at_least_fp32(rearrange(tokens, "(b n) e -> b n e", b=len(images)))


class Qwen3Stream(_Backbone):
    """Qwen3-VL's language model behind the same seam, which shows that another family fits.

    Its config is transformers' own. Its tower feeds three layers beside the input and has no place in this seam.
    """

    def __init__(self, cfg: Qwen3VLConfig) -> None:
        from transformers.models.qwen3_vl import Qwen3VLForConditionalGeneration  # only here: nothing else needs it

        super().__init__()
        self.cfg = cfg
        self.text: Any = cfg.text_config
        self.model = Qwen3VLForConditionalGeneration(cfg)
        self.model.set_attn_implementation(FUSED["attn_implementation"])  # `states` hands it a boolean mask

    @property
    def width(self) -> int:
        return int(self.text.hidden_size)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, E)."""
        out: Tensor = self.model.get_input_embeddings()(ids)
        return out

    def states(
        self, embeds: Tensor, positions: Tensor, cache: Cache | None = None, attend: Tensor | None = None
    ) -> Tensor:
        """As `QwenStream.states`; its positions are interleaved over the head instead of split in three."""
        check(positions, "A B T", "positions", A=3)
        embeds = embeds.to(self.dtype)
        past = 0 if cache is None else cache.length
        mask = attention_mask(embeds, past, attend)
        if mask is None:  # it would make one of its own, by asking the cache for more than ours tells
            mask = torch.ones(1, 1, embeds.shape[1], past + embeds.shape[1], dtype=torch.bool, device=embeds.device)
        out = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask.expand(len(embeds), -1, -1, -1),
            past_key_values=None if cache is None else _HfCache(cache),
            use_cache=cache is not None,
        )
        if cache is not None:
            cache.advance(embeds.shape[1])
        return at_least_fp32(out.last_hidden_state)

    def new_cache(self) -> Cache:
        """An empty cache for `states`."""
        return Cache(int(self.text.num_hidden_layers))

    def logits(self, h: Tensor) -> Tensor:
        """(..., E) -> (..., V)."""
        out: Tensor = self.model.lm_head(h.to(self.dtype))
        return out


class _HfCache:
    """Our growing cache in the shape that transformers' attention layers ask for."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.cache.append(layer_idx, k, v)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.length


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
