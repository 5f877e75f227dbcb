"""What a model is: its sizes, its networks, its tokenizer, and how they are loaded and saved."""

from __future__ import annotations

__all__: list[str] = []
