"""Models that a run keeps beside folder/model: as a stage left them, or averaged with an earlier one.

The mean of the weights before and after a short stage, as in WiSE-FT (Wortsman et al. 2022), keeps most of what the
stage taught and takes back most of what it made worse; our choice: docs/choices.md#the-mean-of-two-models.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch

from starflow2.errors import TrainingError
from starflow2.models.checkpoint import load_components, save_components
from starflow2.models.components import Components
from starflow2.models.config import ModelConfig
from starflow2.models.config_file import read_config
from starflow2.training.config import StageConfig
from starflow2.training.start import check_same_sizes

__all__ = ["check_kept", "keep_model"]


def check_kept(model: ModelConfig, stage: StageConfig, folder: Path) -> None:
    """Raise TrainingError, before anything is trained, where the model to average with is missing or of other sizes."""
    if not stage.mean_with:
        return
    if not (folder / stage.mean_with / "config.json").is_file():
        raise TrainingError(
            f"stage {stage.name} keeps the mean with {stage.mean_with}, but there is no {folder / stage.mean_with}; "
            "put that model there, or train the stage that keeps it."
        )
    check_same_sizes(replace(read_config(folder / stage.mean_with).model, name=model.name), model)


def keep_model(components: Components, stage: StageConfig, folder: Path) -> None:
    """Save a finished stage's model under the name by which the stage keeps it, if it does."""
    if not stage.keep_as:
        return
    kept = components.named(stage.keep_as)
    if stage.mean_with:
        kept = copy.deepcopy(kept)
        move_to_mean(kept, load_components(folder / stage.mean_with))
    save_components(kept, folder / stage.keep_as)


@torch.no_grad()
def move_to_mean(components: Components, other: Components) -> None:
    """Replace every weight by its mean with the other model's, taken in float64; equal weights stay as they are."""
    theirs = dict(other.named_parameters())
    for name, weight in components.named_parameters():
        both = weight.double(), theirs[name].to(weight.device).double()
        weight.copy_((both[0] + both[1]) / 2)
