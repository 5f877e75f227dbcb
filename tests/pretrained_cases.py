"""Folders as the Hub holds them, with tiny random weights: Qwen2.5-VL with its tokenizer, DINOv2 with SwiGLU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from helpers import wake
from starflow2.models.config import DinoConfig, ModelConfig, PixelConfig, SpecialIds
from starflow2.models.pretrained import Pretrained
from starflow2.models.qwen import QwenStream
from starflow2.models.tokenizer import QwenTokenizer
from starflow2.models.vision import DinoFeatures
from starflow2.training.recipes import CLIP, IMAGENET, paper, smoke
from upstream import theirs

SPECIAL = SpecialIds(pad=0, user=1, assistant=1, end=2, vision_start=3, vision_end=4, image_pad=5)
SIZE = 112  # pixels of pictures, as many as the tower reads
SHARD = "60KB"


def at(pixels: PixelConfig, size: int) -> PixelConfig:
    return replace(pixels, picture_size=size)


def paper_in_miniature(folder: Path, size: int = SIZE) -> ModelConfig:
    """The paper's model in widths of 64 that refers to `folder`/vlm and `folder`/dino; pictures of `size` pixels."""
    small = smoke(paper()).model
    dino = small.features
    assert dino.pixels is not None
    return replace(
        small,
        name="miniature",
        vlm=replace(small.vlm, special=SPECIAL, vocab=400, pixels=at(CLIP, size)),
        vlm_from=Pretrained(source=str(folder / "vlm"), precision="float32"),
        features=replace(dino, pixels=at(IMAGENET, size)),
        features_from=Pretrained(source=str(folder / "dino"), precision="float32"),
        fae=replace(small.fae, image_size=size),
    )


def qwen_tokenizer() -> Tokenizer:
    """Byte-level BPE with Qwen's special tokens, from a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(dict.fromkeys(QwenTokenizer.special_tokens)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["You are a helpful assistant.\n", "system\nuser\nassistant\n", "two red cats"], trainer
    )
    return tokenizer


def write_upstream(folder: Path, cfg: ModelConfig | None = None) -> ModelConfig:
    """Make both folders and return the model that refers to them, by default the miniature, which is in shards."""
    is_miniature, cfg = cfg is None, cfg or paper_in_miniature(folder)
    assert cfg.vlm_from is not None and isinstance(cfg.features, DinoConfig)
    torch.manual_seed(7)
    vlm = wake(QwenStream(cfg.vlm), 0.2).to(getattr(torch, cfg.vlm_from.precision))
    for backbone, name in ((vlm, "vlm"), (wake(DinoFeatures(cfg.features), 0.2), "dino")):
        if is_miniature:
            theirs(backbone).save_pretrained(folder / name, max_shard_size=SHARD)
        else:
            backbone.save(folder / name)
    qwen_tokenizer().save(str(folder / "vlm" / "tokenizer.json"))
    return cfg
