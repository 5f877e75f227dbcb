"""Which stages of training a benchmark needs."""

from __future__ import annotations

from collections.abc import Sequence

from starflow2.errors import StateError

__all__ = ["check_finished"]


def check_finished(who: str, stage: str, model: str, done: Sequence[str]) -> None:
    """Raise StateError, in the name of `who`, for a model that has not finished `stage` but only those in `done`."""
    if stage not in done:
        raise StateError(
            f"{who} needs a model that has finished stage {stage}; {model} has finished {', '.join(done) or 'none'}. "
            "Train it further, or choose another --model."
        )
