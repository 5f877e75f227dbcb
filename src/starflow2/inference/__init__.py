"""A trained model at work: sampling, conversations with one cache, likelihoods."""

from __future__ import annotations

__all__: list[str] = []
