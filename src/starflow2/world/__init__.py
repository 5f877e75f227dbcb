"""The drawn world: scenes with exact truth, what is said and asked about them, and an eye that reads pictures back."""

from __future__ import annotations

__all__: list[str] = []
