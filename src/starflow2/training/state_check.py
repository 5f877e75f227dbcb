"""Checks of the tensors of a training state, which have to be like those of the state that they are loaded into.

The optimisers' kernels do not look at shapes: a moment that is shorter than its weight is read and written past its
end. Not here: files (`checkpoint`), what a state is (`state`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starflow2.errors import TrainingError
from starflow2.models.tensor_file import Expected
from starflow2.training.parallel import own_part

__all__ = ["empty_moments", "expected_moments", "expected_weights"]

BLOCK = 256  # values that share a scale in moments of 8 bits
QUANTIZED = "__bnb_optimizer_quant_state__"  # under which bitsandbytes nests its moments
ADAM = ("step", "exp_avg", "exp_avg_sq")
MUON = ("momentum_buffer",)


def expected_weights(trained: nn.Module, *, has_average: bool) -> dict[str, Expected]:
    """The trained weights, and their average where one is kept, by the names of a state."""
    kinds = ("weights", "ema") if has_average else ("weights",)
    return {f"{kind}/{k}": Expected.like(own_part(v)) for kind in kinds for k, v in trained.state_dict().items()}


def expected_moments(
    number: int, optimizer: torch.optim.Optimizer, params: Sequence[Tensor], found: Mapping[str, Tensor], step: int
) -> dict[str, Expected]:
    """State of optimiser `number` after `step` steps, for those of its parameters that have any in `found`.

    A parameter that no step has reached has none; of the others every moment has to be there.
    """
    expected: dict[str, Expected] = {}
    prefix = f"optim/{number}/"
    present = {name.removeprefix(prefix).split("/")[0] for name in found if name.startswith(prefix)}
    for j, param in enumerate(params):
        if str(j) in present:
            expected |= _of_parameter(f"{prefix}{j}", optimizer, own_part(param), found, step)
    return expected


def empty_moments(
    optimizers: Sequence[torch.optim.Optimizer], index: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """Zeros for the optimiser states that the index of a sharded checkpoint names; a moment is sharded as its weight.

    Raises TrainingError for a name of no parameter.
    """
    tensors: dict[str, Tensor] = {}
    for key in (k for k in index if k.startswith("optim/")):
        try:
            _, i, j, _ = key.split("/")
            like = optimizers[int(i)].param_groups[0]["params"][int(j)]
        except (ValueError, IndexError) as error:
            raise TrainingError(f"{path} holds {key!a}, which is the state of no parameter of this run.") from error
        dtype = index[key].properties.dtype
        is_moment = index[key].size == like.shape  # else a step count, which is whole
        tensors[key] = torch.zeros_like(like, dtype=dtype) if is_moment else torch.zeros(index[key].size, dtype=dtype)
    return tensors


def _of_parameter(
    base: str, optimizer: torch.optim.Optimizer, param: Tensor, found: Mapping[str, Tensor], step: int
) -> dict[str, Expected]:
    kind = type(getattr(optimizer, "optim", optimizer))  # one that is divided among processes wraps its own
    if any(name.startswith(f"{base}/{QUANTIZED}/") for name in found):
        return _of_bitsandbytes(base, param, found)
    expected: dict[str, Expected] = {}
    for name in MUON if kind is torch.optim.Muon else ADAM:
        key = f"{base}/{name}"
        if name == "step":
            expected[key] = _count(key, found, step)
        elif f"{key}/codes" in found:
            expected |= _of_eight_bits(key, param)
        else:
            expected[key] = Expected(tuple(param.shape), param.dtype, 0.0 if name == "exp_avg_sq" else -torch.inf)
    return expected


def _count(key: str, found: Mapping[str, Tensor], step: int) -> Expected:
    """A count of steps: torch keeps it as a float, other libraries as a whole number."""
    is_whole = key in found and found[key].dtype == torch.int64
    return Expected((), torch.int64 if is_whole else torch.float32, 0, step)


def _of_eight_bits(key: str, param: Tensor) -> dict[str, Expected]:
    """A moment of torchao: a code per value, a scale per block, and the values that codes stand for."""
    return {
        f"{key}/codes": Expected(tuple(param.shape), torch.uint8),
        f"{key}/scale": Expected((-(-param.numel() // BLOCK),), torch.float32),
        f"{key}/qmap": Expected((BLOCK,), torch.float32),
    }


def _of_bitsandbytes(base: str, param: Tensor, found: Mapping[str, Tensor]) -> dict[str, Expected]:
    """Both moments of bitsandbytes: codes and their tables, or plain numbers where a parameter is small."""
    sizes = {"state": tuple(param.shape), "qmap": (BLOCK,), "absmax": (-(-param.numel() // BLOCK),)}
    expected = {f"{base}/step": _count(f"{base}/step", found, 1 << 40)}
    parts = {name.rpartition("/")[2] for name in found if name.startswith(f"{base}/{QUANTIZED}/")}
    for part in parts | {"state1", "state2"}:
        is_code = part.startswith("state") and "qmap1" in parts
        shape = sizes.get(part.rstrip("12"), ())
        expected[f"{base}/{QUANTIZED}/{part}"] = Expected(shape, torch.uint8 if is_code else torch.float32)
    return expected
