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
from starflow2.nn import ByDocument

__all__ = ["prefix_mask", "two_pass_states"]


def prefix_mask(is_latent: Tensor, attend: Tensor | ByDocument | None) -> Tensor:
    """Mask (B, T) of positions that see no latent; is_latent: (B, T) bool, attend: as in `two_pass_states`."""
    if isinstance(attend, ByDocument):
        count = is_latent.cumsum(1)  # up to and including each position
        begin = torch.arange(count.shape[1], device=count.device) - attend.place
        return count == (count - is_latent.long()).gather(1, begin)
    if attend is None:
        return is_latent.cumsum(1) == 0
    return ~(attend & is_latent[:, None]).any(-1)


def two_pass_states(
    vlm: LanguageStream,
    embeds: tuple[Tensor, Tensor],
    mrope: Tensor,
    first: Tensor,
    attend: Tensor | ByDocument | None,
) -> Tensor:
    """States (B, T, E) like those of `vlm.states`, computed in two passes: positions of `first`, then all others.

    embeds: two (B, T, E) tensors: text embeddings without gradient, valid where `first` is True, and the full
    embeddings. mrope: (3, B, T). first: (B, T) bool; its positions attend to positions of `first` only. attend:
    (B, T, T) bool, documents, or None for causal.
    """
    words, whole = embeds
    if attend is None:
        count = whole.shape[1]
        attend = torch.ones(count, count, dtype=torch.bool, device=whole.device).tril().expand(len(whole), -1, -1)
    (early, is_early), (late, is_late) = _positions(first), _positions(~first)
    cache = vlm.new_cache()
    firsts, lasts = (early, is_early), (late, is_late)
    before = vlm.states(_at_positions(words, early), _mrope(mrope, early), cache, _mask(attend, firsts, firsts))
    keys = torch.cat([early, late], 1), torch.cat([is_early, is_late], 1)
    after = vlm.states(_at_positions(whole, late), _mrope(mrope, late), cache, _mask(attend, lasts, keys))
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


def _mask(
    attend: Tensor | ByDocument, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]
) -> Tensor | ByDocument:
    """Which of the keys (B, m) the queries (B, n) attend to, both with those that are real.

    As documents, or as a mask (B, n, m) in which a query that fills up a row sees itself.
    """
    if isinstance(attend, ByDocument):
        return ByDocument.between(_in_documents(attend, *queries), _in_documents(attend, *keys))
    (queries_at, _), (keys_at, is_key) = queries, keys
    rows = torch.arange(len(attend), device=attend.device)[:, None, None]
    allowed = attend[rows, queries_at[:, :, None], keys_at[:, None]] & is_key[:, None]
    own = torch.eye(queries_at.shape[1], dtype=torch.bool, device=attend.device)
    return allowed | F.pad(own, (keys_at.shape[1] - queries_at.shape[1], 0))


def _in_documents(attend: ByDocument, positions: Tensor, is_real: Tensor) -> tuple[Tensor, Tensor]:
    """Documents, -1 where a position only fills up its row, and places of positions (B, n)."""
    return attend.document.gather(1, positions).masked_fill(~is_real, -1), attend.place.gather(1, positions)
