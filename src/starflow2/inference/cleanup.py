"""Clean-up of sampled latents before they become pixels: the flow denoises what it drew, once or in steps (iTARFlow).

For models before stage joint. In a conversation the cache holds the sample, so a cleaned image would be another one.
Letters: B batch, N latents, D latent dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from starflow2.inference.config import DrawConfig
from starflow2.inference.sampler import Sampler
from starflow2.models.context import prompt_context

__all__ = ["cleanup_levels", "denoised"]


@torch.no_grad()
def denoised(sampler: Sampler, prompts: Sequence[str], latents: Tensor) -> Tensor:
    """Latents (B, N, D) without the noise of the sampler's level, each given its prompt.

    From level t to the next lower one s, x becomes x0 + s / t (x - x0) with Tweedie's estimate x0 of the clean latents
    at t; the last s is 0. One level is a single Tweedie step.
    """
    components, flow = sampler.components, sampler.pretzel.flow
    rows = [components.tokenizer.drawing_prompt(prompt) for prompt in prompts]
    context, x = prompt_context(components, rows, sampler.dtype), latents.to(sampler.dtype)
    levels = cleanup_levels(sampler.config, sampler.noise_level, sampler.upload_level)
    for level, lower in pairwise((*levels, 0.0)):
        clean = flow.denoise(x, torch.full((len(x),), level, device=x.device, dtype=x.dtype), context)
        x = clean + lower / level * (x - clean)
    return x


def cleanup_levels(config: DrawConfig, highest: float, lowest: float) -> list[float]:
    """Noise levels at which a clean-up looks at the latents, falling by one factor from `highest` to `lowest`.

    >>> cleanup_levels(DrawConfig(cleanup="iterative", cleanup_steps=3), 0.4, 0.1)
    [0.4, 0.2, 0.1]
    """
    steps = config.cleanup_steps if config.cleanup == "iterative" else 1
    ratio = (lowest / highest) ** (1 / max(1, steps - 1))
    return [highest * ratio**i for i in range(steps)]
