"""The paper's claims and comparisons, measured on our models."""

from __future__ import annotations

__all__: list[str] = []
