"""Cross-entropy of tokens in nats, computed in chunks so that logits of a large vocabulary never fill the memory.

Letters: M labels, E width of a state, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from starflow2.nn import at_least_fp32

__all__ = ["LOGITS_AT_ONCE", "Head", "token_nats"]

Head = Callable[..., Tensor]
LOGITS_AT_ONCE = 2**24  # 64 MiB in float32, their gradient as much again


def token_nats(head: Head, states: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Cross-entropy of each label in nats, (M,) float32.

    head: maps states of M positions, (M, E) each, to logits (M, V). labels: (M,). With a vocabulary of 152k, logits
    and their gradient take 1.2 MB per position. At most `LOGITS_AT_ONCE` logits exist at any time; if there are
    more, they are computed in chunks, and again in the backward pass.
    """
    vocab = head(*(s[:0] for s in states)).shape[-1]
    at_once = max(1, LOGITS_AT_ONCE // vocab)
    if len(labels) <= at_once:
        return _nats(head, labels, *states)
    chunks = zip(labels.split(at_once), *(s.split(at_once) for s in states), strict=True)
    return torch.cat([checkpoint(_nats, head, *chunk, use_reentrant=False) for chunk in chunks])


def _nats(head: Head, labels: Tensor, *states: Tensor) -> Tensor:
    return F.cross_entropy(at_least_fp32(head(*states)), labels, reduction="none")
