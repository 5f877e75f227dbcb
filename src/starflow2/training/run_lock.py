"""One run per folder: the first process of a run holds the folder's lock, and a second run is told who holds it.

Two runs in one folder would write each other's checkpoints, curves and model. Not here: the lock itself (`core.locks`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from starflow2.core.locks import folder_lock
from starflow2.errors import OutputError, TrainingError
from starflow2.training.parallel import Distributed

__all__ = ["run_lock"]


@contextlib.contextmanager
def run_lock(folder: Path, group: Distributed, doing: str) -> Iterator[None]:
    """Inside the block no other run trains in `folder`; all processes of the run must enter.

    Raises TrainingError, naming the holder, in every process if another run does; OutputError where nothing can be
    written.
    """
    with contextlib.ExitStack() as held:
        refusal: TrainingError | OutputError | None = None
        if group.is_first:
            try:
                held.enter_context(folder_lock(folder, TrainingError, doing))
            except (TrainingError, OutputError) as error:
                refusal = error
        message = group.broadcast_choice("" if refusal is None else str(refusal))
        if refusal is not None:
            raise refusal
        if message:
            raise TrainingError(message)
        yield
