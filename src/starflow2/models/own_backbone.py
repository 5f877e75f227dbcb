"""Backbones of our own layers, in folders as transformers writes them, without transformers.

Their weights have the names of the files, up to `prefixes`. Only `config_class`, with which settings of pretrained
folders are read, imports transformers. Not here: the layers (`qwen_layers`, `dino_layers`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from starflow2.models.huggingface import Backbone
from starflow2.models.pretrained import SINGLE, weight_files

__all__ = ["OwnBackbone"]


class OwnBackbone(Backbone):
    """A backbone whose model consists of our own layers."""

    model: nn.Module
    prefixes: tuple[tuple[str, str], ...] = ()  # of names in files, and in the model; the first that fits counts

    @property
    def tied(self) -> frozenset[str]:
        """Names of weights that no file holds, since they are others'."""
        return frozenset()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        dtype = str(self.dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps({**self.settings(), "dtype": dtype}, indent=2) + "\n", "utf-8")
        tensors = {self._in_file(k): v for k, v in self.model.state_dict().items() if k not in self.tied}
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, folder / SINGLE, {"format": "pt"})

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        own = self.model.state_dict()
        found = {name: value.to(dtype) for name, value in self._stored(folder) if name not in self.tied}
        wanted = {name: value for name, value in own.items() if name not in self.tied}
        odd = {
            "missing keys": sorted(set(wanted) - set(found)),
            "unexpected keys": sorted(set(found) - set(wanted)),
            "mismatched keys": sorted(k for k in set(found) & set(wanted) if found[k].shape != wanted[k].shape),
        }
        listed = ", ".join(f"{len(names)} {what} {names[:3]}" for what, names in odd.items() if names)
        if listed:
            raise ValueError(f"weights do not fit the model: {listed}")
        self.model.load_state_dict(found, strict=False, assign=True)
        self._loaded()

    def _loaded(self) -> None:
        """Work that is left after weights were put in place."""

    def _stored(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Weights in a folder by the model's names, memory-mapped."""
        for path in weight_files(folder):
            for name, value in load_file(path).items():
                yield self._in_model(name), value

    def _in_model(self, name: str) -> str:
        return _renamed(name, self.prefixes)

    def _in_file(self, name: str) -> str:
        return _renamed(name, tuple((inside, outside) for outside, inside in self.prefixes))


def _renamed(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
