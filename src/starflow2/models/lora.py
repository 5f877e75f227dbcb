"""Low-rank adapters of the flow stream (LoRA, Hu et al. 2021): W + scale B A on the linear layers of the deep block.

Torch's parametrizations compute the sum wherever a layer reads its weight, so no other module knows about adapters,
and `merge` leaves plain weights. `save` and `load` store an adapter by itself, with a digest of the weights it belongs
to. Not here: how adapters are trained (`training.finetune`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from starflow2.core.fields import Config, Positive, Size
from starflow2.core.json_reader import parse_json
from starflow2.core.serialize import from_dict, to_dict
from starflow2.errors import CheckpointError, ConfigError, StateError
from starflow2.flow import AffineBlock
from starflow2.models.components import Components
from starflow2.models.tensor_file import Expected, check_tensors, load_signed, read_metadata, save_tensors
from starflow2.nn import raw_bytes

__all__ = ["Lora", "LoraConfig", "attach", "contents", "load", "merge", "save"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Config):
    """Rank and scale of an adapter."""

    rank: Size = 16
    scale: Positive = 1.0  # factor of B A


class Lora(nn.Module):
    """weight -> weight + scale B A, with A random and B zero at first, so that nothing changes before training."""

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
    """Adapted layers by name: the projection of words into the deep block, and all linear layers of its body."""
    layers = {f"body.{name}": m for name, m in block.body.named_modules() if isinstance(m, nn.Linear)}
    return {"context_in": block.context_in, **layers}


def _adapter(layer: nn.Linear) -> tuple[Lora, Tensor] | None:
    """Adapter of a layer and the weight it is added to; None for a layer without one."""
    if not parametrize.is_parametrized(layer):
        return None
    parametrizations: Any = layer.parametrizations
    return parametrizations.weight[0], parametrizations.weight.original


def attach(components: Components, cfg: LoraConfig, seed: int = 0) -> nn.ModuleDict:
    """Attach fresh adapters to the deep block; returns them by name, with "/" for ".".

    Raises StateError if it has adapters.
    """
    generator, added = torch.Generator().manual_seed(seed), nn.ModuleDict()
    for name, layer in _targets(components.flow.deep).items():
        if parametrize.is_parametrized(layer):
            raise StateError("the deep block has adapters; expected none: merge them first.")
        added[name.replace(".", "/")] = lora = Lora(cfg, layer.weight, generator)
        parametrize.register_parametrization(layer, "weight", lora)
    return added


def merge(components: Components) -> None:
    """Add the adapters to their weights and remove them."""
    for layer in _targets(components.flow.deep).values():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def digest(components: Components) -> str:
    """Digest of the adapted layers' weights, without adapters, in 16 hexadecimal digits."""
    weights_digest = hashlib.blake2b(digest_size=8)
    for layer in _targets(components.flow.deep).values():
        adapter = _adapter(layer)
        weights_digest.update(raw_bytes(layer.weight if adapter is None else adapter[1]))
    return weights_digest.hexdigest()


def save(components: Components, cfg: LoraConfig, path: Path) -> None:
    """Write the attached adapters and the model's vocabulary, but no weights of the model.

    Raises StateError if there are no adapters, and OutputError.
    """
    tensors, metadata = contents(components, cfg)
    save_tensors(tensors, path, metadata)


def contents(components: Components, cfg: LoraConfig) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file with the attached adapters. Raises StateError if there are none."""
    tensors: dict[str, Tensor] = {}
    for name, layer in _targets(components.flow.deep).items():
        adapter = _adapter(layer)
        if adapter is not None:
            own = adapter[0].state_dict()
            tensors |= {f"{name}.{key}": value.detach().cpu().contiguous() for key, value in own.items()}
    if not tensors:
        raise StateError("the deep block has no adapters; expected some to save: attach them first.")
    return tensors, {
        "lora": json.dumps(to_dict(cfg)),
        "base": digest(components),
        "words": " ".join(sorted(components.vocabulary)),
    }


def load(components: Components, path: Path) -> None:
    """Attach the adapters of a file to the model they were trained on, and add their words to its vocabulary.

    Raises CheckpointError for adapters of another model and for any other file.
    """
    if {"lora", "base", "words"} - set(read_metadata(path)):
        raise CheckpointError(f"{path} has no metadata lora, base and words; expected a file that `lora.save` wrote.")
    tensors, metadata = load_signed(path)
    if metadata["base"] != digest(components):
        raise CheckpointError(
            f"{path} belongs to weights {metadata['base'][:16]!a}, but this model's are {digest(components)}; "
            "give the model that the adapters were trained on."
        )
    try:
        cfg = from_dict(LoraConfig, parse_json(metadata["lora"], "lora"))
    except ConfigError as error:
        raise CheckpointError(f"{path} holds no usable adapters: {error}") from error
    check_tensors(path, tensors, _expected(components, cfg))
    for name, lora in attach(components, cfg).items():
        lora.load_state_dict({key: tensors[f"{name.replace('/', '.')}.{key}"] for key in ("a", "b")})
    if components.vocabulary:
        components.vocabulary |= frozenset(metadata["words"].split())


def _expected(components: Components, cfg: LoraConfig) -> dict[str, Expected]:
    """The tensors of adapters of a model, by their names in a file."""
    expected: dict[str, Expected] = {}
    for name, layer in _targets(components.flow.deep).items():
        adapter = _adapter(layer)
        weight = layer.weight if adapter is None else adapter[1]
        rows, columns = weight.shape
        expected[f"{name}.a"] = Expected((cfg.rank, columns), weight.dtype)
        expected[f"{name}.b"] = Expected((rows, cfg.rank), weight.dtype)
    return expected
