"""Sizes of backbones read from their folders, in the flat form of the Hub and in the nested one of transformers 5."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from own_size_cases import flat_config, write_qwen
from pretrained_cases import SPECIAL, qwen_tokenizer
from starflow2.errors import CheckpointError, ConfigError
from starflow2.models.checkpoint import start_components
from starflow2.models.components import build
from starflow2.models.config import DinoConfig, SiglipConfig
from starflow2.models.hub import NANO
from starflow2.models.published import features_config, language_config, with_backbones
from starflow2.models.qwen import qwen_settings
from starflow2.models.vision import DinoFeatures, SiglipFeatures
from starflow2.training.recipes import CLIP, mini, paper, paper_siglip, smoke_at_size

GRID, SIZE = (16, 16), 256


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("recipe", [paper, mini])
@pytest.mark.parametrize("form", ["flat", "nested"])
def test_the_language_models_of_the_recipes_are_what_their_own_settings_say(recipe, form, tmp_path):
    cfg = replace(recipe().model.vlm, special=SPECIAL)
    write(tmp_path, flat_config(cfg) if form == "flat" else qwen_settings(cfg))
    qwen_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert language_config(tmp_path, GRID, SIZE) == cfg


def test_another_size_is_read_with_its_own_rope_windows_and_colours(tmp_path):
    cfg = replace(
        paper().model.vlm, special=SPECIAL, width=5120, depth=64, heads=40, kv_heads=8, mlp_width=27648,
        vision_mlp_width=3456, rope_theta=5e5, mrope_section=(8, 28, 28), vision_whole=(3, 9), vision_window=56,
        pixels=replace(CLIP, mean=(0.1, 0.2, 0.3)),
    )  # fmt: skip
    write(tmp_path, flat_config(cfg))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    qwen_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert language_config(tmp_path, GRID, SIZE) == cfg


@pytest.mark.parametrize("recipe", [paper, mini, paper_siglip])
def test_the_feature_extractors_of_the_recipes_are_what_their_own_settings_say(recipe, tmp_path):
    cfg = recipe().model.features
    with torch.device("meta"):
        config = (DinoFeatures(cfg) if isinstance(cfg, DinoConfig) else SiglipFeatures(cfg)).settings()
    if isinstance(cfg, SiglipConfig):  # the whole model, as on the Hub
        config = {"model_type": "siglip", "text_config": {}, "vision_config": config}
    assert features_config(write(tmp_path, config), GRID, SIZE) == cfg


def test_a_model_over_other_backbones_fits_together_and_trains_what_it_did(tmp_path):
    cfg = replace(paper().model.vlm, special=SPECIAL, width=1024, heads=8)
    write(tmp_path / "vlm", flat_config(cfg))
    qwen_tokenizer().save(str(tmp_path / "vlm" / "tokenizer.json"))
    dino = {"model_type": "dinov2", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    write(tmp_path / "dino", {**dino, "image_size": 518, "patch_size": 14})
    model = with_backbones(paper().model, vlm=str(tmp_path / "vlm"), features=str(tmp_path / "dino"))
    assert (model.flow.deep.context_dim, model.joints.adapter_width) == (1024, 1024)
    assert model.fae == replace(mini().model.fae, feature_dim=1024, encoder_width=4096, encoder_heads=16,
                                feature_decoder=replace(mini().model.fae.feature_decoder, width=1024),
                                pixel_decoder=paper().model.fae.pixel_decoder)  # fmt: skip
    assert model.vlm_from is not None and model.vlm_from.precision == "bfloat16"
    assert with_backbones(paper().model) == paper().model
    assert build(model, "meta").joints.visual_skip.weight.shape == (3072, 1024)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"model_type": "dinov2_with_registers", "num_register_tokens": 4},
            "type dinov2_with_registers; .*without reg",
        ),
        ({"model_type": "qwen2_5_vl"}, "expected a DINOv2 without registers or a SigLIP"),
        ({}, "type None"),
        ([], "holds list"),
    ],
)
def test_a_folder_of_another_kind_is_refused_by_name(config, says, tmp_path):
    with pytest.raises(CheckpointError, match=says):
        features_config(write(tmp_path, config), GRID, SIZE)


def test_a_siglip_for_another_number_of_patches_is_refused(tmp_path):
    config = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 16}
    with pytest.raises(ConfigError, match="384 pixels in patches of 16; expected 256"):
        features_config(write(tmp_path, config), GRID, SIZE)


def test_a_folder_without_settings_or_with_another_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        language_config(tmp_path, GRID, SIZE)
    write(tmp_path, flat_config(paper().model.vlm))
    (tmp_path / "tokenizer.json").write_bytes((NANO / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match="lacks Qwen's special tokens"):
        language_config(tmp_path, GRID, SIZE)


def test_weights_with_registers_are_refused_by_name_where_they_would_be_loaded(tmp_path):
    small = smoke_at_size(paper()).model
    write_qwen(replace(small.vlm, vocab=400, special=SPECIAL), tmp_path / "vlm")
    assert isinstance(small.features, DinoConfig)
    folder = tmp_path / "features"
    DinoFeatures(small.features).save(folder)
    model = with_backbones(small, vlm=str(tmp_path / "vlm"), features=str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "dinov2_with_registers"}))
    with pytest.raises(
        CheckpointError, match="of a dinov2_with_registers; expected dinov2: a model with register tokens"
    ):
        start_components(model)
