"""The prefix rule: positions before a document's first image are read in a pass of their own, without gradients.

The language model is frozen, so only positions after an image's latents depend on anything that trains (the adapter),
and only they need activations for the backward pass. The result is exact: attention is causal within a document, and
the first pass holds just those positions that attend to no latent.
Letters: B rows, T positions, P of them read first, E language width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow2.models.protocols import LanguageStream

__all__ = ["prefix_mask", "two_pass_states"]


def prefix_mask(is_latent: Tensor, attend: Tensor | None) -> Tensor:
    """Mask (B, T) of positions that see no latent. is_latent: (B, T) bool; attend: (B, T, T) bool, None for causal."""
    if attend is None:
        return is_latent.cumsum(1) == 0
    return ~(attend & is_latent[:, None]).any(-1)


def two_pass_states(
    vlm: LanguageStream, embeds: tuple[Tensor, Tensor], mrope: Tensor, first: Tensor, attend: Tensor | None
) -> Tensor:
    """States (B, T, E) like those of `vlm.states`, computed in two passes: positions of `first`, then all others.

    embeds: two (B, T, E) tensors: text embeddings without gradient, valid where `first` is True, and the full
    embeddings. mrope: (3, B, T). first: (B, T) bool; its positions attend to positions of `first` only. attend:
    (B, T, T) bool or None for causal.
    """
    words, whole = embeds
    if attend is None:
        count = whole.shape[1]
        attend = torch.ones(count, count, dtype=torch.bool, device=whole.device).tril().expand(len(whole), -1, -1)
    (early, is_early), (late, is_late) = _positions(first), _positions(~first)
    cache = vlm.new_cache()
    before = vlm.states(_at_positions(words, early), _mrope(mrope, early), cache, _mask(attend, early, early, is_early))
    keys, is_key = torch.cat([early, late], 1), torch.cat([is_early, is_late], 1)
    after = vlm.states(_at_positions(whole, late), _mrope(mrope, late), cache, _mask(attend, late, keys, is_key))
    rows = torch.arange(len(whole), device=whole.device)[:, None]
    states = torch.zeros_like(whole, dtype=after.dtype)
    for positions, is_real, h in ((early, is_early, before), (late, is_late, after)):
        states = states.index_put(((rows.expand_as(positions))[is_real], positions[is_real]), h[is_real])
    return states


def _positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions where `mask` (B, T) is True, in order, and which of them are real; both (B, n).

    n is the largest count of a row; shorter rows are filled up with other positions.
    """
    count = mask.sum(1)
    order = (~mask).int().argsort(dim=1, stable=True)[:, : int(count.max())]
    return order, torch.arange(order.shape[1], device=mask.device) < count[:, None]


def _at_positions(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, T, E) at positions (B, n) -> (B, n, E)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def _mrope(mrope: Tensor, positions: Tensor) -> Tensor:
    """(3, B, T) at positions (B, n) -> (3, B, n)."""
    return mrope.gather(2, positions.expand(len(mrope), -1, -1))


def _mask(attend: Tensor, queries: Tensor, keys: Tensor, is_key: Tensor) -> Tensor:
    """Mask (B, n, m) of the keys (B, m) that queries (B, n) attend to; a query that fills up a row sees itself."""
    rows = torch.arange(len(attend), device=attend.device)[:, None, None]
    allowed = attend[rows, queries[:, :, None], keys[:, None]] & is_key[:, None]
    own = torch.eye(queries.shape[1], dtype=torch.bool, device=attend.device)
    return allowed | F.pad(own, (keys.shape[1] - queries.shape[1], 0))
