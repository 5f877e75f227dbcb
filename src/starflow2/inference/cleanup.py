"""Clean-up of sampled latents before they become pixels: one self-denoising step of the flow (iTARFlow).

For models before stage joint. In a conversation the cache holds the sample, so a cleaned image would be another one.
Letters: B batch, N latents, D latent dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from starflow2.inference.sampler import Sampler
from starflow2.models.context import prompt_context

__all__ = ["denoised"]


@torch.no_grad()
def denoised(sampler: Sampler, prompts: Sequence[str], latents: Tensor) -> Tensor:
    """Latents (B, N, D) without the noise of the sampler's level, each given its prompt."""
    components, flow = sampler.components, sampler.pretzel.flow
    rows = [components.tokenizer.drawing_prompt(prompt) for prompt in prompts]
    context = prompt_context(components, rows, sampler.dtype)
    level = torch.full((len(latents),), sampler.noise_level, device=latents.device, dtype=sampler.dtype)
    return flow.denoise(latents.to(sampler.dtype), level, context)
