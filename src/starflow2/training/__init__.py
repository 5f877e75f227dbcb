"""What a stage trains and on what, the loop, its checkpoints and its processes."""

from __future__ import annotations

__all__: list[str] = []
