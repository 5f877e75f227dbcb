"""The command line: one file for each verb, and what the verbs share."""

from __future__ import annotations

__all__: list[str] = []
