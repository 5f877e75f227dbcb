"""Text conditioning of the flow: the frozen language model's states of prompts, as a `Context`.

Letters: B rows of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from starflow2.flow import Context
from starflow2.models.components import Components
from starflow2.models.pretzel import text_context
from starflow2.models.sequence import pad_rows, text_mrope

__all__ = ["drawing_context", "prompt_context"]


@torch.no_grad()
def drawing_context(components: Components, rows: Sequence[Sequence[int]]) -> Context:
    """The frozen language model's states of prompts, left-padded, as the flow's context.

    rows: token ids that end with the begin-of-image token, which predicts the first latent.
    """
    text = pad_rows(rows, components.cfg.vlm.special.pad)
    ids = text.ids.to(components.device)
    embeds = components.vlm.embed(ids)
    h = components.vlm.states(embeds, text_mrope(*ids.shape).to(ids.device))
    h = text_context(components.cfg.joints, embeds, h)
    h = text.left_padded(h.float().cpu()).to(components.device)
    return Context(h, text.left_positions.to(h.device), text.left_attend.to(h.device))


def prompt_context(
    components: Components, rows: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> Context:
    """The context of `drawing_context`, with each distinct row read alone: no row depends on the rest of the batch."""
    states = {tuple(row): drawing_context(components, [row]).states[0] for row in rows}
    text = pad_rows(rows, components.cfg.vlm.special.pad)
    padded = torch.zeros(
        len(rows), text.width, components.cfg.flow.deep.context_dim, dtype=dtype, device=components.device
    )
    for target, row in zip(padded, rows, strict=True):
        target[text.width - len(row) :] = states[tuple(row)]
    return Context(padded, text.left_positions.to(padded), text.left_attend.to(components.device))
