"""Basics that every wing uses: configs as JSON, files written whole or not at all, images in and out."""

from __future__ import annotations

__all__: list[str] = []
