"""Measurements for the paper's claims: ablations, the baseline, skip analysis, plots and verdicts."""

from __future__ import annotations

__all__: list[str] = []
