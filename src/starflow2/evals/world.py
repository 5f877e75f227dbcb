"""W-GenEval of a model: the suite drawn, graded, and set between its floor and its two ceilings.

Stands between `drawing`, which knows bytes and rules, and anything that draws from words. It knows no model class:
a `Drawer` is whatever has these three members, as `StarFlow2` does.
Letters: B images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from starflow2.data.world import Split
from starflow2.evals.drawing import SAMPLES, Part, Progress, codec_ceiling, evaluate_geneval

__all__ = ["Drawer", "score_geneval", "to_bytes", "to_floats"]

Images = NDArray[np.uint8]
PARTS: tuple[Part, ...] = ("id", "cg")


class Drawer(Protocol):
    """What can be scored: pictures from (prompt, seed) pairs, and its codec's round trip."""

    @property
    def sampling_noise(self) -> float:
        """Noise level of sampled latents, where the second ceiling is measured."""
        ...

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1]."""
        ...

    def roundtrip(self, images: Tensor, noise_level: float = 0.0, seed: int = 0) -> Tensor:
        """(B, 3, 64, 64) through the codec and back, with noise on the latents."""
        ...


def score_geneval(
    model: Drawer,
    split: Split,
    *,
    quick: bool = False,
    samples: int = SAMPLES,
    parts: Sequence[Part] = PARTS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The report of `evaluate_geneval` on what `model` draws, with `ceiling` filled in, clean and at its noise.

    `progress` is called with (pictures done, pictures in all). Raises what `evaluate_geneval` and the model raise.
    """

    def generate(prompts: list[str], seeds: list[int]) -> Images:
        return to_bytes(model.draw(prompts, seeds))

    report = evaluate_geneval(generate, split, quick=quick, samples=samples, parts=parts, progress=progress)
    levels = {"clean": 0.0, "noise": model.sampling_noise}
    report["ceiling"] = {name: _ceiling(model, split, level, quick=quick) for name, level in levels.items()}
    return report


def _ceiling(model: Drawer, split: Split, level: float, *, quick: bool) -> dict[str, Any]:
    chunks = 0  # each chunk of pictures gets noise of its own

    def roundtrip(images: Images) -> Images:
        nonlocal chunks
        chunks += 1
        return to_bytes(model.roundtrip(to_floats(images), level, chunks))

    return codec_ceiling(roundtrip, split, quick=quick)


def to_bytes(images: Tensor) -> Images:
    """(B, 3, height, width) floats -> (B, height, width, 3) bytes, rounded as saved pictures are.

    >>> to_bytes(torch.zeros(1, 3, 2, 2)).shape
    (1, 2, 2, 3)
    """
    pixels = images.detach().float().cpu().permute(0, 2, 3, 1)  # (B, height, width, 3)
    found: Images = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    return found


def to_floats(images: Images) -> Tensor:
    """(B, height, width, 3) bytes -> (B, 3, height, width) float32 in [-1, 1].

    >>> to_floats(np.full((1, 2, 2, 3), 255, np.uint8)).max()
    tensor(1.)
    """
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, height, width)
