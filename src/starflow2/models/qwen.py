"""Qwen2.5-VL as a `LanguageStream` with its own vision tower; transformers' Qwen3-VL as a second family.

Nano and paper use the same classes with different configs. Position ids are always passed explicitly: transformers
falls back to one-dimensional positions without a warning if they are omitted. Weights may be in half precision: inputs
are cast to it, and states are returned in float32 or better. Not here: the layers (`qwen_layers`).
Letters: B batch, T positions, E language width, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from starflow2.core.json_reader import JsonObject
from starflow2.errors import ConfigError
from starflow2.models.config import LanguageConfig
from starflow2.models.huggingface import FUSED, Backbone
from starflow2.models.own_backbone import OwnBackbone
from starflow2.models.qwen_layers import EPS, FRAMES, MERGED, QwenModel
from starflow2.models.vision import normalised, to_tower
from starflow2.nn import ByDocument, Cache, at_least_fp32, attention_mask, check

if TYPE_CHECKING:
    from transformers.models.qwen3_vl import Qwen3VLConfig

__all__ = [
    "Qwen3Stream",
    "QwenStream",
    "qwen_settings",
]


# -- Qwen2.5-VL -------------------------------------------------------------------------------------


def qwen_settings(cfg: LanguageConfig) -> JsonObject:
    """config.json of a Qwen2.5-VL of these sizes, as transformers reads it."""
    text = {
        "model_type": "qwen2_5_vl_text",
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "intermediate_size": cfg.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": EPS,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": cfg.rope_theta,
            "mrope_section": list(cfg.mrope_section),
        },
        "bos_token_id": None,
        "eos_token_id": cfg.special.end,
        "pad_token_id": cfg.special.pad,
        "tie_word_embeddings": cfg.ties_embeddings,
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": text,
        "vision_config": _tower_settings(cfg),
        "image_token_id": cfg.special.image_pad,
        "vision_start_token_id": cfg.special.vision_start,
        "vision_end_token_id": cfg.special.vision_end,
        "tie_word_embeddings": cfg.ties_embeddings,
    }


def _tower_settings(cfg: LanguageConfig) -> JsonObject:
    return {
        "model_type": "qwen2_5_vl_vision",
        "depth": cfg.vision_depth,
        "hidden_size": cfg.vision_width,
        "intermediate_size": cfg.vision_mlp_width,
        "hidden_act": "silu",
        "num_heads": cfg.vision_heads,
        "patch_size": cfg.vision_patch,
        "spatial_merge_size": MERGED,
        "temporal_patch_size": FRAMES,
        "window_size": cfg.vision_window or cfg.image_size,
        "out_hidden_size": cfg.width,
        "fullatt_block_indexes": list(cfg.vision_whole or range(cfg.vision_depth)),
    }


class QwenStream(OwnBackbone):
    """Qwen2.5-VL as embed -> states -> logits, and its vision tower (`see`)."""

    model: QwenModel
    kinds = ("qwen2_5_vl",)
    attends_by_document = True
    prefixes = (  # transformers writes the first two, and reads the others as well
        ("visual.", "model.visual."),
        ("model.language_model.", "model.language_model."),
        ("model.visual.", "model.visual."),
        ("model.", "model.language_model."),
    )
    system = "You are a helpful assistant."
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
        self.model = QwenModel(cfg)

    def settings(self) -> JsonObject:
        return qwen_settings(self.cfg)

    def config_class(self) -> Any:
        from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig  # imported here: only for folders of others

        return Qwen2_5_VLConfig

    @property
    def tied(self) -> frozenset[str]:
        return frozenset({"lm_head.weight"} if self.cfg.ties_embeddings else ())

    def _loaded(self) -> None:
        self.model.tie()

    @property
    def width(self) -> int:
        return self.cfg.width

    @property
    def layers(self) -> list[nn.Module]:
        """Transformer layers of the language model, which run for every batch; without those of the tower."""
        return list(self.model.model.language_model.layers)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, E)."""
        return self.model.model.language_model.embed_tokens(ids)

    def states(
        self,
        embeds: Tensor,
        positions: Tensor,
        cache: Cache | None = None,
        attend: Tensor | ByDocument | None = None,
    ) -> Tensor:
        """Last hidden states after the final norm, (B, T, E).

        embeds: (B, T, E); positions: (3, B, T) M-RoPE ids. Causal by default. attend: (B, Tk) bool
        marks usable keys, (B, T, Tk) bool is the whole mask; Tk counts cached positions too. Documents need no mask.
        Rows of unequal length that start together may also be padded at the right, which a causal model does not see.
        """
        check(positions, "A B T", "positions", A=3)
        embeds = embeds.to(self.dtype)
        mask = attention_mask(embeds, 0 if cache is None else cache.length, attend)
        states = self.model.model.language_model(embeds, positions, mask, cache)
        if cache is not None:
            cache.advance(embeds.shape[1])
        return at_least_fp32(states)

    def new_cache(self) -> Cache:
        """An empty cache for `states`."""
        return Cache(self.cfg.depth)

    def logits(self, h: Tensor) -> Tensor:
        """(..., E) -> (..., V)."""
        return self.model.lm_head(h.to(self.dtype))

    def language_weights(self) -> dict[str, Tensor]:
        """Weights of the language model alone, by Qwen's names: embed_tokens, layers.0..., norm, lm_head."""
        inner: dict[str, Tensor] = self.model.model.language_model.state_dict()
        return {**inner, "lm_head.weight": self.model.lm_head.weight.detach()}

    def see(self, images: Tensor) -> Tensor:
        """Image tokens from the vision tower: images (B, 3, s, s) in [-1, 1] -> (B, rows * columns, E)."""
        if not len(images):  # a microbatch may hold text only, and the tower fails on no image
            return images.new_zeros(0, math.prod(self.cfg.image_grid), self.cfg.width)
        return self._tokens(to_tower(images, self.cfg.image_size, self.cfg.pixels))

    def see_whole(self, image: Tensor) -> Tensor:
        """Image tokens of an image of any shape: (3, h, w) in [-1, 1] -> (1, rows * columns, E).

        Both sides are multiples of two patches, see `tower_size`.
        """
        return self._tokens(normalised(image[None], self.cfg.pixels))

    def _tokens(self, pixels: Tensor) -> Tensor:
        """Image tokens of normalised images (B, 3, h, w)."""
        patch = self.cfg.vision_patch
        rows, columns = (length // patch for length in pixels.shape[2:])
        return at_least_fp32(self.model.model.visual(patchify(pixels, patch).to(self.dtype), (rows, columns)))


# -- Qwen3-VL ---------------------------------------------------------------------------------------


def qwen3_config(cfg: LanguageConfig) -> Qwen3VLConfig:
    """The config of transformers with these sizes."""
    from transformers.models.qwen3_vl import Qwen3VLConfig  # imported here: most models do not need it

    rope = {
        "rope_type": "default",
        "rope_theta": cfg.rope_theta,
        "mrope_section": list(cfg.mrope_section),
        "mrope_interleaved": True,
    }
    text: dict[str, object] = {
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_width,
        "intermediate_size": cfg.mlp_width,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "tie_word_embeddings": cfg.ties_embeddings,
    }
    vision: dict[str, object] = {
        "depth": cfg.vision_depth,
        "hidden_size": cfg.vision_width,
        "intermediate_size": cfg.vision_mlp_width,
        "num_heads": cfg.vision_heads,
        "patch_size": cfg.vision_patch,
        "out_hidden_size": cfg.width,
        "deepstack_visual_indexes": list(cfg.vision_deepstack),
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=cfg.special.image_pad,
        vision_start_token_id=cfg.special.vision_start,
        vision_end_token_id=cfg.special.vision_end,
        tie_word_embeddings=cfg.ties_embeddings,
    )


class Qwen3Stream(Backbone):
    """Qwen3-VL's language model as a `LanguageStream`: another family, `stream` of a LanguageConfig names it.

    Its vision tower, which feeds three inner layers too, is loaded and not used: images come through the adapter alone.
    """

    kinds = ("qwen3_vl",)
    has_tower = False
    unseen = (
        "text_config.num_attention_heads",
        "text_config.rms_norm_eps",
        "text_config.hidden_act",
        "text_config.rope_parameters.rope_theta",
        "text_config.rope_parameters.mrope_section",
    )

    def __init__(self, cfg: LanguageConfig) -> None:
        from transformers.models.qwen3_vl import Qwen3VLForConditionalGeneration  # imported here, as above

        super().__init__()
        self.cfg = cfg
        self.model = Qwen3VLForConditionalGeneration(qwen3_config(cfg))
        self.model.set_attn_implementation(FUSED["attn_implementation"])  # `states` passes a boolean mask

    @property
    def width(self) -> int:
        return self.cfg.width

    @property
    def layers(self) -> list[nn.Module]:
        """Transformer layers of the language model, without those of the tower."""
        return list(self.model.model.language_model.layers)

    def see(self, images: Tensor) -> Tensor:
        """Raises ConfigError: the tower is not supported."""
        raise ConfigError(
            "the vision tower of a Qwen3-VL feeds inner layers and is not supported; images are read through the "
            "adapter: set distill to 0, and ask the joint model."
        )

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, E)."""
        out: Tensor = self.model.get_input_embeddings()(ids)
        return out

    def states(
        self, embeds: Tensor, positions: Tensor, cache: Cache | None = None, attend: Tensor | None = None
    ) -> Tensor:
        """Last hidden states; arguments as in `QwenStream.states`. M-RoPE axes are interleaved over each head."""
        check(positions, "A B T", "positions", A=3)
        embeds = embeds.to(self.dtype)
        past = 0 if cache is None else cache.length
        mask = attention_mask(embeds, past, attend)
        if mask is None:  # Qwen3 would build a mask itself, with cache methods that ours lacks
            mask = torch.ones(1, 1, embeds.shape[1], past + embeds.shape[1], dtype=torch.bool, device=embeds.device)
        out = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask.expand(len(embeds), -1, -1, -1),
            **_cache_arguments(type(self.model.model.language_model), cache),
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


class _HfCache:
    """Our cache with the methods that transformers' attention layers call."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.cache.append(layer_idx, k, v)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.length


def _cache_arguments(stack: Any, cache: Cache | None) -> dict[str, Any]:
    """Keyword arguments that hand a cache to a stack of transformers: `past_key_values`, or `cache` from 5.24 on."""
    if cache is None:
        return {"use_cache": False}
    name = "cache" if "cache" in _parameters(stack) else "past_key_values"
    return {name: _HfCache(cache), "use_cache": True}


@functools.cache
def _parameters(stack: Hashable) -> frozenset[str]:
    return frozenset(inspect.signature(cast(Any, stack).forward).parameters)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Patches (B, M, 3 * 2 * patch^2) in the order that Qwen's tower expects: 2x2 merge groups, the image repeated in
    time."""
    x = rearrange(
        images,
        "b c (r mr p) (s ms q) -> b (r s mr ms) c p q",
        mr=2,
        ms=2,
        p=patch,
        q=patch,
    )
    return x.unsqueeze(3).expand(-1, -1, -1, FRAMES, -1, -1).flatten(2)
