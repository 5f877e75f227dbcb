"""Models of transformers behind our seams: quiet loading, strict weights, settings that no shape betrays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as hf_logging

__all__ = [
    "FUSED",
    "Backbone",
    "flatten_config",
    "quiet",
]


# fused attention: never all scores at once, which at 7B and 4,096 positions would be 0.9 GB a layer and row
FUSED: dict[str, Any] = {"attn_implementation": "sdpa"}


class Backbone(nn.Module):
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
        with quiet():
            self.model.save_pretrained(folder)

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Read them back, strictly: every weight must be there and fit. Whole or sharded, safetensors only.

        Weights that are in `dtype` already stay in the mapped file until they are used or moved: no second copy.
        """
        with quiet():
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
        with quiet():
            upstream = type(self.model.config).from_pretrained(folder, local_files_only=True)
        theirs, ours = flatten_config(upstream.to_dict()), flatten_config(self.model.config.to_dict())
        differ = [f"{k} {theirs.get(k)} there, {ours[k]} here" for k in self.unseen if theirs.get(k) != ours[k]]
        if differ:
            raise ValueError(f"the folder is of another model: {'; '.join(differ)}")


def flatten_config(config: dict[Any, Any], path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; tuples as lists."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten_config(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
