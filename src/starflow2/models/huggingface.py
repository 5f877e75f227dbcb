"""Base class of the frozen backbones: how they are loaded, saved and checked, those of transformers by transformers.

Weights are loaded strictly (none missing, none left over), and settings that do not show in any tensor shape, such as
the number of heads, are compared with those of the folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from starflow2.core.files import read_regular
from starflow2.core.imports import find_object
from starflow2.core.json_reader import LARGEST, JsonObject, parse_record
from starflow2.errors import ConfigError
from starflow2.models.config import LanguageConfig

__all__ = [
    "FUSED",
    "Backbone",
    "flatten_config",
    "quiet",
    "stream_class",
]


# fused attention: the full score matrix would take 0.9 GB per layer and row for 7B at 4,096 positions
FUSED: dict[str, Any] = {"attn_implementation": "sdpa"}


class Backbone(nn.Module):
    """A model behind one of the protocols of `protocols`, read and written in transformers' own layout.

    Here `model` is one of transformers; `own_backbone` has the base class of those of our own layers.
    """

    model: Any  # transformers' annotations do not pass strict checks
    other_towers: tuple[str, ...] = ()  # prefixes of weights in upstream files that belong to other models
    unseen: tuple[str, ...] = ()  # settings that show in no tensor shape; compared with those of the folder
    kinds: tuple[str, ...]  # values of model_type in config.json that it loads
    hint: str = ""  # what else to say of others
    system: str = ""  # of a language model: the system prompt that its chat template puts first; "": none
    attends_by_document: bool = False  # of a language model: whether `states` takes `nn.ByDocument`
    has_tower: bool = True  # of a language model: whether `see` gives its own tower's tokens of an image

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def tower(self) -> tuple[nn.Module, ...]:
        """The vision tower of a language model, for counts; () where transformers gives it none."""
        visual = getattr(getattr(self.model, "model", None), "visual", None)
        return () if visual is None else (visual,)

    def settings(self) -> JsonObject:
        """config.json of a folder with these sizes."""
        settings: JsonObject = self.model.config.to_dict()
        return settings

    def config_class(self) -> Any:
        """The class of transformers that reads config.json, whatever form it has."""
        return type(self.model.config)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        with quiet():
            self.model.save_pretrained(folder)

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Load weights from safetensors, in one file or in shards. Raises ValueError if one is missing or does not fit.

        Weights already stored as `dtype` stay memory-mapped until they are used or moved.
        """
        with quiet():
            model, report = type(self.model).from_pretrained(
                folder,
                config=self.model.config,  # our sizes, not those of the folder's config
                dtype=dtype,
                **FUSED,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        unexpected = {k for k in report["unexpected_keys"] if not k.startswith(self.other_towers)}
        report["unexpected_keys"] = unexpected
        wrong = {k: sorted(v) for k, v in report.items() if v and k != "error_msgs"}
        if wrong:
            listed = ", ".join(f"{len(v)} {k.replace('_', ' ')} {v[:3]}" for k, v in wrong.items())
            raise ValueError(f"weights do not fit the model: {listed}")
        self.model = model

    def check_settings(self, folder: Path) -> None:
        """Raise ValueError if config.json of `folder` is of another kind or differs from ours in an `unseen` setting,
        such as the RoPE base. Such weights would load without an error and give wrong results.
        """
        kind = parse_record(read_regular(folder / "config.json", LARGEST)).get("model_type")
        if kind not in self.kinds:
            raise ValueError(f"config.json is of a {kind}; expected {' or '.join(self.kinds)}{self.hint}")
        with quiet():
            upstream = self.config_class().from_pretrained(folder, local_files_only=True)
        theirs, ours = flatten_config(upstream.to_dict()), flatten_config(self.settings())
        differ = [f"{k} is {theirs.get(k)}, expected {ours[k]}" for k in self.unseen if theirs.get(k) != ours[k]]
        if differ:
            raise ValueError(f"config.json is of another model: {'; '.join(differ)}")


def stream_class(cfg: LanguageConfig) -> type[Backbone]:
    """The class that a language model's sizes name, also one of a module in the current folder.

    Raises ConfigError for anything but a Backbone, so that the config of a model folder cannot call other code.

    >>> from starflow2.training.recipes import nano
    >>> stream_class(nano().model.vlm).__name__
    'QwenStream'
    """
    found = find_object(cfg.stream, "vlm.stream")
    if not (isinstance(found, type) and issubclass(found, Backbone)):
        raise ConfigError(f"vlm.stream is {cfg.stream!r}; expected a class that derives from huggingface.Backbone.")
    return found


def flatten_config(config: dict[Any, Any], path: str = "") -> dict[str, object]:
    """Nested dicts with dotted keys: {"a": {"b": 1}} -> {"a.b": 1}; tuples become lists."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten_config(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and warnings of transformers; errors still raise."""
    from transformers.utils import logging as hf_logging  # imported here: nano's own layers do without

    shown, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if shown:
            hf_logging.enable_progress_bar()
