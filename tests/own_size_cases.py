"""The large recipes in small widths at their own image size, over weights in the key layout of their published folders.

The functions named after recipes are recipes themselves, `own_size_cases:paper`; FOLDER says where `write` has put the
backbones, and the pictures of the mixtures.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from PIL import Image
from transformers import SiglipConfig, SiglipModel

from helpers import wake
from pretrained_cases import SPECIAL, qwen_tokenizer
from starflow2.models.config import DinoConfig, LanguageConfig
from starflow2.models.published import with_backbones
from starflow2.models.qwen import QwenStream
from starflow2.models.vision import DinoFeatures, SiglipFeatures
from starflow2.training import recipes
from starflow2.training.config import CorpusConfig, RunConfig, StageConfig
from upstream import theirs

FOLDER = Path()  # set by the fixture of test_own_size
WORDS = ("two red cats", "a kite over the sea", "a helpful assistant", "one boat")
SHARD = "200KB"


def paper() -> RunConfig:
    return _over_folders(recipes.paper())


def paper_siglip() -> RunConfig:
    return _over_folders(recipes.paper_siglip())


def mini() -> RunConfig:
    return _over_folders(recipes.mini())


def _over_folders(run: RunConfig) -> RunConfig:
    small = recipes.smoke_at_size(run)
    folder = FOLDER / run.model.name
    model = with_backbones(small.model, vlm=str(folder / "vlm"), features=str(folder / "features"))
    return replace(small, model=model, stages=tuple(map(_short, small.stages)), precision="float32")


def _short(stage: StageConfig) -> StageConfig:
    """Two steps on the fixture mixture of the stage."""
    corpus = CorpusConfig(mixture=str(FOLDER / f"{stage.name}.json"), rows=1, width=700)
    return replace(stage, steps=2, save_every=2, whitening_captions=16, corpus=corpus)


# -- weights as they are published --------------------------------------------------------------------------------


def write_backbones(run: RunConfig, folder: Path) -> None:
    """Random weights of the recipe's kinds and conventions in small widths."""
    model = recipes.smoke_at_size(run).model
    torch.manual_seed(7)
    write_qwen(replace(model.vlm, vocab=400, special=SPECIAL), folder / "vlm")
    (folder / "features").mkdir()
    if isinstance(model.features, DinoConfig):
        theirs(wake(DinoFeatures(model.features), 0.2)).save_pretrained(folder / "features", max_shard_size=SHARD)
        return
    assert model.features is not None
    vision = SiglipFeatures(model.features).model.config.to_dict()
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))  # the text tower comes with it
    wake(whole, 0.2).save_pretrained(folder / "features", max_shard_size=SHARD)


def write_qwen(cfg: LanguageConfig, folder: Path) -> None:
    """Qwen2.5-VL with the key names and the flat config.json of its folders on the Hub."""
    state = wake(QwenStream(cfg), 0.2).model.state_dict()
    names = {"model.language_model.": "model.", "model.visual.": "visual."}
    for old, new in names.items():
        state = {key.replace(old, new, 1) if key.startswith(old) else key: value for key, value in state.items()}
    if cfg.ties_embeddings:
        del state["lm_head.weight"]
    folder.mkdir(parents=True)
    save_torch_state_dict({k: v.contiguous() for k, v in state.items()}, folder, max_shard_size=SHARD)
    (folder / "config.json").write_text(json.dumps(flat_config(cfg)))
    qwen_tokenizer().save(str(folder / "tokenizer.json"))


def flat_config(cfg: LanguageConfig) -> dict[str, Any]:
    """config.json in the form of the 7B and the 3B on the Hub, which name sizes of the language model at the top."""
    vision = {
        "depth": cfg.vision_depth,
        "hidden_act": "silu",
        "hidden_size": cfg.vision_width,
        "intermediate_size": cfg.vision_mlp_width,
        "num_heads": cfg.vision_heads,
        "in_chans": 3,
        "out_hidden_size": cfg.width,
        "patch_size": cfg.vision_patch,
        "spatial_merge_size": 2,
        "window_size": cfg.vision_window,
        "fullatt_block_indexes": list(cfg.vision_whole),
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "eos_token_id": cfg.special.end,
        "vision_start_token_id": cfg.special.vision_start,
        "vision_end_token_id": cfg.special.vision_end,
        "image_token_id": cfg.special.image_pad,
        "hidden_act": "silu",
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": cfg.heads,
        "num_hidden_layers": cfg.depth,
        "num_key_value_heads": cfg.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(cfg.mrope_section)},
        "tie_word_embeddings": cfg.ties_embeddings,
        "torch_dtype": "float32",
        "vision_config": vision,
        "vocab_size": cfg.vocab,
    }


# -- mixtures -----------------------------------------------------------------------------------------------------


def write_mixtures(folder: Path) -> None:
    """A folder of captioned pictures, lines of conversations about them, and a mixture file for every stage."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for i, words in enumerate(WORDS):
        noise = np.random.default_rng(i).integers(0, 255, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((70, 50), Image.Resampling.BICUBIC).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(words)
    lines = [_question("0.png"), _question("1.png"), _edit("2.png", "3.png")]
    (folder / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawings = {"corpus": "captions", "url": str(pictures), "weight": 1}
    talks = {"corpus": "dialogue", "url": str(folder / "talks.jsonl"), "pictures": str(pictures), "weight": 1}
    mixtures = {"fae": [drawings], "t2i": [drawings], "adapter": [{**drawings, "task": "describe"}, talks]}
    for stage, sources in {**mixtures, "joint": [drawings, talks]}.items():
        (folder / f"{stage}.json").write_text(json.dumps(sources))


def _question(picture: str) -> dict[str, Any]:
    shown = [{"type": "image", "image": picture}, {"type": "text", "text": "How many cats?"}]
    return {"messages": [{"role": "user", "content": shown}, {"role": "assistant", "content": "two"}]}


def _edit(before: str, after: str) -> dict[str, Any]:
    shown = [{"type": "image"}, {"type": "text", "text": "make it red"}]
    drawn = [{"type": "image"}]
    messages = [{"role": "user", "content": shown}, {"role": "assistant", "content": drawn}]
    return {"messages": messages, "images": [before, after]}
