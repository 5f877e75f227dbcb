"""Low-rank adapters of the flow stream (LoRA, Hu et al. 2021): W + scale B A on the linear layers of the deep block.

Torch's parametrizations compute the sum wherever a layer reads its weight, so nothing else knows of adapters, and
`merge` leaves plain weights. `save` and `load` keep an adapter alone, beside a digest of the weights it belongs to.
Not here: how adapters are trained (`finetune`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize

from starflow2.core.serialize import from_dict, to_dict
from starflow2.errors import CheckpointError, ConfigError, StateError
from starflow2.flow import AffineBlock
from starflow2.models.checkpoint import load_tensors, save_tensors
from starflow2.models.components import Components
from starflow2.nn import raw_bytes

__all__ = ["Lora", "LoraConfig", "attach", "load", "merge", "save"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Size of an adapter."""

    rank: int = 16
    scale: float = 1.0  # of B A

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.scale > 0:
            raise ConfigError(f"lora has rank {self.rank} and scale {self.scale}; expected at least 1 and more than 0.")


class Lora(nn.Module):
    """weight -> weight + scale B A; A is random and B zero at the start, so that nothing changes before training."""

    def __init__(self, cfg: LoraConfig, like: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = like.shape
        start = torch.randn(cfg.rank, columns, generator=generator) * columns**-0.5
        self.scale = cfg.scale
        self.a = nn.Parameter(start.to(like))
        self.b = nn.Parameter(torch.zeros(rows, cfg.rank, dtype=like.dtype, device=like.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a)


def _targets(block: AffineBlock) -> dict[str, nn.Linear]:
    """The layers that are adapted: where words enter the deep block, and all of its transformer."""
    found = {f"body.{name}": m for name, m in block.body.named_modules() if isinstance(m, nn.Linear)}
    return {"context_in": block.context_in, **found}


def _adapter(layer: nn.Linear) -> tuple[Lora, Tensor] | None:
    """A layer's adapter and the weight it stands on."""
    if not parametrize.is_parametrized(layer):
        return None
    inside: Any = layer.parametrizations
    return inside.weight[0], inside.weight.original


def attach(components: Components, cfg: LoraConfig, seed: int = 0) -> nn.ModuleDict:
    """Put fresh adapters on the deep block; returns them by name, with "/" for ".".

    Raises StateError if there are some already.
    """
    generator, added = torch.Generator().manual_seed(seed), nn.ModuleDict()
    for name, layer in _targets(components.flow.deep).items():
        if parametrize.is_parametrized(layer):
            raise StateError("the deep block has adapters already; merge them first.")
        added[name.replace(".", "/")] = lora = Lora(cfg, layer.weight, generator)
        parametrize.register_parametrization(layer, "weight", lora)
    return added


def merge(components: Components) -> None:
    """Add the adapters to the weights they stand on and remove them."""
    for layer in _targets(components.flow.deep).values():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def digest(components: Components) -> str:
    """What an adapter belongs to, in 16 hexadecimal digits: the weights of the deep block, without adapters."""
    said = hashlib.blake2b(digest_size=8)
    for layer in _targets(components.flow.deep).values():
        found = _adapter(layer)
        plain = layer.weight if found is None else found[1]
        said.update(raw_bytes(plain))
    return said.hexdigest()


def save(components: Components, cfg: LoraConfig, path: Path) -> None:
    """Write the attached adapters and the model's words, without any weight they stand on. Raises OutputError."""
    tensors: dict[str, Tensor] = {}
    for name, layer in _targets(components.flow.deep).items():
        found = _adapter(layer)
        if found is not None:
            own = found[0].state_dict()
            tensors |= {f"{name}.{key}": value.detach().cpu().contiguous() for key, value in own.items()}
    if not tensors:
        raise StateError("the deep block has no adapters to save; attach some first.")
    about = {
        "lora": json.dumps(to_dict(cfg)),
        "base": digest(components),
        "words": " ".join(sorted(components.vocabulary)),
    }
    save_tensors(tensors, path, about)


def load(components: Components, path: Path) -> None:
    """Attach the adapters of a file to the model they were trained on, and let it know their words.

    Raises CheckpointError for another model's adapters and for anything that is none.
    """
    tensors = load_tensors(path)
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
    if {"lora", "base", "words"} - set(about):
        raise CheckpointError(f"{path} holds no adapters of starflow2.")
    if about["base"] != digest(components):
        raise CheckpointError(f"{path} belongs to weights {about['base']}; this model's are {digest(components)}.")
    added = attach(components, from_dict(LoraConfig, json.loads(about["lora"])))
    wanted = {f"{name.replace('/', '.')}.{key}" for name, m in added.items() for key in m.state_dict()}
    if wanted != set(tensors):
        merge(components)
        raise CheckpointError(f"{path} does not fit: {len(wanted ^ set(tensors))} tensors missing or unknown.")
    for name, lora in added.items():
        lora.load_state_dict({key: tensors[f"{name.replace('/', '.')}.{key}"] for key in ("a", "b")})
    if components.vocabulary:
        components.vocabulary |= frozenset(about["words"].split())
