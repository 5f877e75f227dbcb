"""Starting values that are measured on data: the whitened input of a fresh flow, the scale of a fresh adapter.

A task's `initialise` calls these once, before the first step of a fresh stage. Letters: B captions, P images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from starflow2.models.components import Components
from starflow2.models.context import drawing_context
from starflow2.world.captions import caption_task

WORDS = 4096  # tokens whose embeddings are measured where there is no tower

__all__ = ["match_tower_scale", "whiten_text_states", "world_captions"]


def whiten_text_states(components: Components, captions: Sequence[Sequence[int]], batch: int = 128) -> None:
    """Let the deep flow read text states of zero mean and unit variance (`AffineBlock.whiten_context`).

    captions: token ids of B drawing prompts, more tokens in all than the language model is wide; read `batch` at a
    time. Overwrites `components.flow.deep.context_in`.
    """
    contexts = [drawing_context(components, captions[i : i + batch]) for i in range(0, len(captions), batch)]
    components.flow.deep.whiten_context(torch.cat([c.states[c.attend] for c in contexts]))


def world_captions(components: Components, seed: int, count: int) -> list[list[int]]:
    """Token ids of the first `count` captions of the drawn world, as drawing prompts."""
    return [components.tokenizer.drawing_prompt(caption_task(seed, i).prompt) for i in range(count)]


@torch.no_grad()
def match_tower_scale(components: Components, images: Tensor) -> None:
    """Let the adapter's embeddings start at the root mean square of those of the language model's own vision tower.

    images: (P, 3, s, s), those that are measured. Embeddings of words take the place of the tower's where the class of
    the language model has none. Overwrites the gain of `components.joints.adapter`.
    """
    vlm = components.vlm
    if vlm.has_tower:
        embeddings = vlm.see(images.to(components.device))  # (P, N, E)
    else:
        ids = torch.arange(min(WORDS, components.cfg.vlm.vocab), device=components.device)
        embeddings = vlm.embed(ids[None])  # (1, WORDS, E)
    components.joints.adapter.set_scale(float(embeddings.float().square().mean().sqrt()))
