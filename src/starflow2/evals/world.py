"""W-GenEval of a model: the suite drawn, graded, and set between its floor and its two ceilings.

Stands between `drawing`, which knows bytes and rules, and anything that draws from words. It knows no model class:
a `Drawer` is whatever has these three members, as `StarFlow2` does.
Letters: B images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from starflow2.core.images import to_bytes, to_floats
from starflow2.evals.geneval import SAMPLES, Part, Progress, codec_ceiling, evaluate_geneval
from starflow2.world.scene import Split

__all__ = ["Drawer", "score_geneval"]

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
