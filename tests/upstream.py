"""transformers' own classes with the weights of our backbones, read from the files that these write."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import Dinov2Model
from transformers.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from starflow2.models.own_backbone import OwnBackbone

CLASSES: dict[str, Any] = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "dinov2": Dinov2Model}


def theirs(backbone: OwnBackbone) -> Any:
    """transformers' own model with these weights, to compare ours with."""
    with TemporaryDirectory() as folder:
        backbone.save(Path(folder))
        kind = CLASSES[backbone.settings()["model_type"]]
        return kind.from_pretrained(folder, dtype=backbone.dtype, attn_implementation="sdpa").eval()
