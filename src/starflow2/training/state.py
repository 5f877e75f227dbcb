"""The state of a run: trained weights, their average, optimisers and the step; all that a checkpoint holds.

Not here: where checkpoints are written (`checkpoint`), what a step is (`trainer`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starflow2.core.serialize import to_dict
from starflow2.errors import ConfigError, TrainingError
from starflow2.models.tensor_file import check_tensors
from starflow2.training.config import OptimConfig, StageConfig
from starflow2.training.parallel import Distributed, own_part
from starflow2.training.state_check import expected_moments, expected_weights

__all__ = ["TrainState", "adamw", "is_hidden_matrix"]

ADAMW_8BIT = {"8bit": ("torchao", "torchao.optim"), "8bit-bnb": ("bitsandbytes", "bitsandbytes.optim")}


@dataclass(slots=True)
class TrainState:
    """Trained weights, their exponential average, optimisers and the number of steps taken."""

    trained: nn.ModuleDict
    ema: dict[str, Tensor]  # empty where no average is kept
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite

    @classmethod
    def fresh(cls, trained: nn.ModuleDict, optim: OptimConfig, group: Distributed) -> TrainState:
        """The state before the first step; puts `trained` into training mode."""
        named = {k: p for k, p in trained.named_parameters() if p.requires_grad}
        matrices = {k: p for k, p in named.items() if optim.matrix_lr and is_hidden_matrix(k, p)}
        optimizers = [adamw([p for k, p in named.items() if k not in matrices], optim)]
        if matrices:
            muon = {"lr": optim.matrix_lr, "weight_decay": optim.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            optimizers.append(group.optimizer(torch.optim.Muon, list(matrices.values()), muon))
        ema = {k: v.detach().clone() for k, v in trained.state_dict().items()} if optim.ema else {}
        trained.train()
        return cls(trained, ema, optimizers)

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the averaged weights towards the current ones; at the start of a run the average is shorter."""
        if not self.ema:
            return
        decay = min(decay, (1 + self.step) / (10 + self.step))
        current = self.trained.state_dict()
        floats = [name for name, value in current.items() if value.is_floating_point()]
        averages, values = ([own_part(tensors[name]) for name in floats] for tensors in (self.ema, current))
        torch._foreach_lerp_(averages, values, 1 - decay)
        for name in current.keys() - set(floats):
            self.ema[name].copy_(current[name])

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside the block the trained modules hold their averaged weights and are in eval mode."""
        current = {k: v.detach().clone() for k, v in self.trained.state_dict().items()}
        self.trained.load_state_dict(self.ema or current)
        self.trained.eval()
        try:
            yield
        finally:
            self.trained.load_state_dict(current)
            self.trained.train()

    # -- in checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; of an optimiser: optim/NUMBER/PARAMETER/NAME."""
        tensors = self.model_tensors()
        for i, optimizer in enumerate(self.optimizers):
            for j, values in optimizer.state_dict()["state"].items():
                for k, v in values.items():
                    tensors |= _unpacked(f"optim/{i}/{j}/{k}", v)
        return tensors

    def model_tensors(self) -> dict[str, Tensor]:
        """Weights and averages by name."""
        weights = {f"weights/{k}": v for k, v in self.trained.state_dict().items()}
        return weights | {f"ema/{k}": v for k, v in self.ema.items()}

    def load_tensors(self, tensors: dict[str, Tensor], settings: dict[str, str], path: Path) -> None:
        """Take over the `tensors` of a checkpoint, all of them or none.

        Raises TrainingError for the weights of another model, and for any tensor that is missing, has another shape or
        number format than the state's own, or is not finite.
        """
        step, skipped = int(settings["step"]), int(settings.get("skipped", 0))
        self._check(tensors, step - skipped, path)
        self.trained.load_state_dict(_below(tensors, "weights/"))
        self.ema = _below(tensors, "ema/")
        for i, optimizer in enumerate(self.optimizers):
            values: dict[int, dict[str, Any]] = {}
            for key, value in _packed(_below(tensors, f"optim/{i}/")).items():
                j, name = key.split("/")
                values.setdefault(int(j), {})[name] = value
            (group,) = optimizer.param_groups
            same = {**group, "params": list(range(len(group["params"])))}
            optimizer.load_state_dict({"state": values, "param_groups": [same]})
        self.step, self.skipped = step, skipped

    def _check(self, tensors: dict[str, Tensor], updates: int, path: Path) -> None:
        """Raise TrainingError unless `tensors` are those of this state after `updates` updates of its weights."""
        own = {f"weights/{k}": v.shape for k, v in self.trained.state_dict().items()}
        if own != {k: v.shape for k, v in tensors.items() if k.startswith("weights/")}:
            raise TrainingError(
                f"{path} holds the weights of another model; use another --output, or the recipe it was made with."
            )
        tensors = {k: own_part(v) for k, v in tensors.items()}
        expected = expected_weights(self.trained, has_average=bool(self.ema))
        for i, optimizer in enumerate(self.optimizers):
            moments = expected_moments(i, optimizer, optimizer.param_groups[0]["params"], tensors, updates)
            if updates and not moments:
                raise TrainingError(f"{path} has no state of optimiser {i} after {updates} updates of the weights.")
            expected |= moments
        check_tensors(path, tensors, expected, TrainingError)

    def settings(self, stage: StageConfig, run: dict[str, str]) -> dict[str, str]:
        """The settings that a checkpoint stores beside its tensors; `run`: those of the run."""
        return {"step": str(self.step), "skipped": str(self.skipped), "stage": json.dumps(to_dict(stage)), **run}


# -- optimisers -----------------------------------------------------------------------------------------


def adamw(params: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with states of the configured type. Raises ConfigError where the library for 8-bit states is missing."""
    settings: dict[str, Any] = {"lr": config.lr, "betas": (0.9, 0.95), "weight_decay": config.weight_decay}
    if config.optimizer_state_dtype == "float32":
        return torch.optim.AdamW(params, **settings, fused=True)
    package, module = ADAMW_8BIT[config.optimizer_state_dtype]
    try:
        kind: type[torch.optim.Optimizer] = import_module(module).AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"optim.optimizer_state_dtype is {config.optimizer_state_dtype}, which {package} provides; "
            f"pip install {package}, or use float32."
        ) from error
    return kind(params, **settings)


def is_hidden_matrix(name: str, p: Tensor) -> bool:
    """True if Muon updates this weight: a matrix inside layers, not one at the ends of a network."""
    outside = ("embed", "head", "proj_in", "position", "context_in", "noise", "patch")
    return p.ndim == 2 and not any(word in name for word in outside)


def _unpacked(name: str, value: Any) -> dict[str, Tensor]:
    """A value of an optimiser's state as plain tensors by name; 8-bit moments become the tensors they consist of."""
    if isinstance(value, dict):  # bitsandbytes nests them
        return {f"{name}/{part}": v for part, v in value.items()}
    if type(value).__name__ != "OptimState8bit":
        return {name: torch.as_tensor(value)}
    return {f"{name}/{part}": getattr(value, part) for part in ("codes", "scale", "qmap")}


def _packed(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """An optimiser's state by PARAMETER/NAME from the plain tensors that `_unpacked` made."""
    whole: dict[str, Any] = {name: value for name, value in tensors.items() if name.count("/") == 1}
    is_bnb = False
    for name in {name.rsplit("/", 1)[0] for name in set(tensors) - set(whole)}:
        parts = _below(tensors, f"{name}/")
        if "codes" not in parts:
            whole[name], is_bnb = parts, True
            continue
        from torchao.optim.subclass_8bit import OptimState8bit

        whole[name] = OptimState8bit(*(parts[k] for k in ("codes", "scale", "qmap")), signed=name.endswith("exp_avg"))
    # the kernels of bitsandbytes take the step as a number, torch's own as a tensor
    return {k: int(v) if is_bnb and k.endswith("/step") else v for k, v in whole.items()}


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
