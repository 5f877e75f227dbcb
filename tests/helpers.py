"""What several test files share and is not a fixture."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def wake(module: M, scale: float = 0.07, seed: int = 0) -> M:
    """Add N(0, scale) noise to every parameter, in place, the same for the same seed, and hand the module back.

    Our blocks start as the identity (zero-initialised heads, skips, gains). At that point a log-determinant with the
    wrong sign, a mean in place of a sum and a missing causal shift all pass every test. Woken, they fail.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter))
    return module


def script(name: str) -> Any:
    """The module of scripts/`name`.py, which no package holds."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
