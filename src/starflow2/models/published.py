"""Sizes of pretrained components, read from their folders: any Qwen2.5-VL or Qwen3-VL, DINOv2 or SigLIP.

`with_backbones` puts them into a model, and adapts what reads them. Special tokens come from tokenizer.json,
normalisation of colours from preprocessor_config.json. Not here: weights (`pretrained`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import Dinov2Config, SiglipVisionConfig
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen3_vl import Qwen3VLConfig

from starflow2.core.files import read_regular
from starflow2.core.json_reader import LARGEST, JsonObject, parse_record
from starflow2.errors import CheckpointError, ConfigError
from starflow2.models.config import (
    CLIP_COLOURS,
    HALF_COLOURS,
    IMAGENET_COLOURS,
    Colours,
    DinoConfig,
    FaeConfig,
    LanguageConfig,
    ModelConfig,
    PixelConfig,
    SiglipConfig,
)
from starflow2.models.huggingface import quiet
from starflow2.models.pretrained import Pretrained, locate
from starflow2.models.tokenizer import QwenTokenizer, load_tokenizer

__all__ = ["features_config", "language_config", "with_backbones"]

SETTINGS = ("*.json",)  # what is read, or downloaded, without the weights


def with_backbones(model: ModelConfig, *, vlm: str = "", features: str = "", revision: str = "") -> ModelConfig:
    """The model over another language model or another feature extractor, of any size.

    vlm, features: a folder, or an id on the Hub, of which only the settings are downloaded here; "" keeps the model's
    own. revision: of both, on the Hub. The flow's input from the language model, the adapter and the FAE follow their
    widths; all else stays. Raises CheckpointError for a folder of another kind, ConfigError for sizes that do not fit.
    """
    grid, size = model.flow.deep.grid, model.fae.image_size
    if vlm:
        ref = _reference(model.vlm_from, vlm, revision)
        model = _over_language(model, language_config(locate(ref, SETTINGS), grid, size), ref)
    if features:
        ref = _reference(model.features_from, features, revision)
        model = _over_features(model, features_config(locate(ref, SETTINGS), grid, size), ref)
    return model


def language_config(folder: Path, grid: tuple[int, int], picture_size: int) -> LanguageConfig:
    """Sizes of the Qwen2.5-VL or Qwen3-VL in a folder, by its config.json.

    Its tower reads images of `picture_size` pixels at the size at which it gives `grid` tokens. Raises CheckpointError
    for a folder of another model.
    """
    kind = _check_kind(folder, ("qwen2_5_vl", "qwen3_vl"), "a Qwen2.5-VL or Qwen3-VL")
    family = Qwen3VLConfig if kind == "qwen3_vl" else Qwen2_5_VLConfig
    with quiet():
        found: Any = family.from_pretrained(folder, local_files_only=True)  # its annotations do not pass strict checks
    text, vision = found.text_config, found.vision_config
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if not isinstance(tokenizer, QwenTokenizer):
        raise CheckpointError(
            f"{folder}/tokenizer.json lacks Qwen's special tokens; expected the one beside its weights."
        )
    rope = text.rope_parameters
    return LanguageConfig(
        vocab=text.vocab_size,
        width=text.hidden_size,
        depth=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        mlp_width=text.intermediate_size,
        mrope_section=tuple(rope["mrope_section"]),
        special=tokenizer.special,
        vision_width=vision.hidden_size,
        vision_depth=vision.depth,
        vision_heads=vision.num_heads,
        vision_mlp_width=vision.intermediate_size,
        vision_patch=vision.patch_size,
        image_size=2 * vision.patch_size * grid[0],
        rope_theta=float(rope["rope_theta"]),
        ties_embeddings=bool(found.tie_word_embeddings),
        vision_window=getattr(vision, "window_size", 0),
        vision_whole=tuple(getattr(vision, "fullatt_block_indexes", ())),
        vision_deepstack=tuple(getattr(vision, "deepstack_visual_indexes", ())),
        pixels=_pixels(folder, picture_size, HALF_COLOURS if kind == "qwen3_vl" else CLIP_COLOURS),
        head_dim=text.head_dim if kind == "qwen3_vl" else 0,
        stream=f"starflow2.models.qwen:{'Qwen3Stream' if kind == 'qwen3_vl' else 'QwenStream'}",
    )


def features_config(folder: Path, grid: tuple[int, int], picture_size: int) -> DinoConfig | SiglipConfig:
    """Sizes of the DINOv2 or SigLIP in a folder, which gives `grid` features of an image of `picture_size` pixels.

    Raises CheckpointError for a folder of another model, such as a DINOv2 with registers.
    """
    kind = _check_kind(folder, ("dinov2", "siglip", "siglip_vision_model"), "a DINOv2 without registers or a SigLIP")
    return _dino(folder, grid, picture_size) if kind == "dinov2" else _siglip(folder, grid, picture_size)


def _dino(folder: Path, grid: tuple[int, int], picture_size: int) -> DinoConfig:
    with quiet():
        found: Any = Dinov2Config.from_pretrained(folder, local_files_only=True)
    size = found.patch_size * grid[0]
    return DinoConfig(
        image_size=size,
        patch_size=found.patch_size,
        width=found.hidden_size,
        depth=found.num_hidden_layers,
        heads=found.num_attention_heads,
        swiglu=found.use_swiglu_ffn,
        table_size=0 if found.image_size == size else found.image_size,
        pixels=_pixels(folder, picture_size, IMAGENET_COLOURS),
    )


def _siglip(folder: Path, grid: tuple[int, int], picture_size: int) -> SiglipConfig:
    with quiet():
        found: Any = SiglipVisionConfig.from_pretrained(folder, local_files_only=True)
    size = found.patch_size * grid[0]
    if found.image_size != size:
        raise ConfigError(
            f"{folder} is a SigLIP for images of {found.image_size} pixels in patches of {found.patch_size}; expected "
            f"{size} pixels, one patch for each of {grid[0]}x{grid[1]} latents."
        )
    return SiglipConfig(
        image_size=size,
        patch_size=found.patch_size,
        width=found.hidden_size,
        depth=found.num_hidden_layers,
        heads=found.num_attention_heads,
        mlp_width=found.intermediate_size,
        pixels=None if picture_size == size else _pixels(folder, picture_size, HALF_COLOURS),
    )


def _pixels(folder: Path, picture_size: int, usual: Colours) -> PixelConfig:
    """Resizing and normalisation of images, as preprocessor_config.json says, or the usual ones without it."""
    path = folder / "preprocessor_config.json"
    found = _json(path) if path.is_file() else {}
    mean, std = found.get("image_mean", usual[0]), found.get("image_std", usual[1])
    return PixelConfig(picture_size=picture_size, mean=tuple(mean), std=tuple(std))


def _check_kind(folder: Path, kinds: tuple[str, ...], wanted: str) -> str:
    """The model_type in config.json. Raises CheckpointError for any other than `kinds`, naming what it is."""
    kind = str(_json(folder / "config.json").get("model_type"))
    if kind not in kinds:
        raise CheckpointError(f"{folder} holds a model of type {kind}; expected {wanted}.")
    return kind


def _json(path: Path) -> JsonObject:
    try:
        found = parse_record(read_regular(path, LARGEST))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; expected a folder as transformers writes it.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}; expected an object as transformers writes it.")
    return found


def _reference(known: Pretrained | None, source: str, revision: str) -> Pretrained:
    """The reference to another source, in the number format of the one that it replaces."""
    return (
        Pretrained(source=source, revision=revision)
        if known is None
        else replace(known, source=source, revision=revision, sha256="")
    )


def _over_language(model: ModelConfig, vlm: LanguageConfig, ref: Pretrained) -> ModelConfig:
    flow, joints = model.flow, model.joints
    context = vlm.width * (2 if joints.words else 1)
    flow = replace(flow, deep=replace(flow.deep, context_dim=context))
    joints = joints if vlm.width == model.vlm.width else replace(joints, adapter_width=vlm.width)
    return replace(model, vlm=vlm, vlm_from=ref, flow=flow, joints=joints)


def _over_features(model: ModelConfig, features: DinoConfig | SiglipConfig, ref: Pretrained) -> ModelConfig:
    """The model on other features; an FAE of another width gets the FAE paper's proportions."""
    fae = model.fae
    if isinstance(fae, FaeConfig) and fae.feature_dim != features.width:
        width = features.width
        decoder = replace(fae.feature_decoder, width=width)
        heads = max(1, 4 * width // 256)
        fae = replace(fae, feature_dim=width, encoder_width=4 * width, encoder_heads=heads, feature_decoder=decoder)
    return replace(model, features=features, features_from=ref, fae=fae)
