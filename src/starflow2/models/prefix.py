"""The prefix rule: what stands before a document's first picture is read apart, so that nothing is kept for backward.

The language model is frozen, so only positions behind a picture's latents depend on anything that trains (the
adapter). Exact: attention is causal within a document, and the positions read first are those that see no latent.
Letters: B rows, T positions, P of them read first, E language width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow2.models.protocols import LanguageStream

__all__ = ["prefix_mask", "two_pass_states"]


def prefix_mask(is_latent: Tensor, attend: Tensor | None) -> Tensor:
    """Which positions see no latent, (B, T) bool. is_latent: (B, T) bool; attend: (B, T, T) bool or None for causal."""
    if attend is None:
        return is_latent.cumsum(1) == 0
    return ~(attend & is_latent[:, None]).any(-1)


def two_pass_states(
    vlm: LanguageStream, embeds: tuple[Tensor, Tensor], mrope: Tensor, first: Tensor, attend: Tensor | None
) -> Tensor:
    """States (B, T, E) as `vlm.states` gives them, those of `first` from a pass of their own.

    embeds: (B, T, E) twice, first those that are right at `first` and do not train, then those that are right
    everywhere; mrope: (3, B, T); first: (B, T) bool, closed under what its positions attend to; attend: (B, T, T)
    bool or None for causal.
    """
    words, whole = embeds
    if attend is None:
        count = whole.shape[1]
        attend = torch.ones(count, count, dtype=torch.bool, device=whole.device).tril().expand(len(whole), -1, -1)
    (early, is_early), (late, is_late) = _places(first), _places(~first)
    cache = vlm.new_cache()
    before = vlm.states(_take(words, early), _mrope(mrope, early), cache, _mask(attend, early, early, is_early))
    keys, is_key = torch.cat([early, late], 1), torch.cat([is_early, is_late], 1)
    behind = vlm.states(_take(whole, late), _mrope(mrope, late), cache, _mask(attend, late, keys, is_key))
    rows = torch.arange(len(whole), device=whole.device)[:, None]
    states = torch.zeros_like(whole, dtype=behind.dtype)
    for at, is_real, h in ((early, is_early, before), (late, is_late, behind)):
        states = states.index_put(((rows.expand_as(at))[is_real], at[is_real]), h[is_real])
    return states


def _places(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of chosen ones in order, rows filled up with others, and which of them were chosen. Both (B, n)."""
    count = chosen.sum(1)
    order = (~chosen).int().argsort(dim=1, stable=True)[:, : int(count.max())]
    return order, torch.arange(order.shape[1], device=chosen.device) < count[:, None]


def _take(x: Tensor, at: Tensor) -> Tensor:
    """x (B, T, E) at positions (B, n) -> (B, n, E)."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def _mrope(mrope: Tensor, at: Tensor) -> Tensor:
    """(3, B, T) at positions (B, n) -> (3, B, n)."""
    return mrope.gather(2, at.expand(len(mrope), -1, -1))


def _mask(attend: Tensor, queries: Tensor, keys: Tensor, is_key: Tensor) -> Tensor:
    """What queries (B, n) may see of keys (B, m): (B, n, m). One that fills up a row sees itself at least."""
    rows = torch.arange(len(attend), device=attend.device)[:, None, None]
    seen = attend[rows, queries[:, :, None], keys[:, None]] & is_key[:, None]
    own = torch.eye(queries.shape[1], dtype=torch.bool, device=attend.device)
    return seen | F.pad(own, (keys.shape[1] - queries.shape[1], 0))
