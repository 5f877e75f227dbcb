"""Stages, their tasks and data, the training loop, its checkpoints and its processes."""

from __future__ import annotations

__all__: list[str] = []
