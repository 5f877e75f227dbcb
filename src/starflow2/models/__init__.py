"""Sizes, networks and tokenizer of a model, and how they are loaded and saved."""

from __future__ import annotations

__all__: list[str] = []
