"""Work beside the steps of the engine: drafts of half-drawn images, files of sessions.

One thread does it in order, so that the events of a reply that wait for it come in order, too.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from torch import Tensor

from starflow2.core.images import PILImage, to_pil
from starflow2.core.torch_defaults import inference_defaults
from starflow2.inference.sampler import Sampler

__all__ = ["Aside", "draft_image"]

log = logging.getLogger(__name__)


class Aside:
    """A thread that does one thing after the other."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="starflow2-aside", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return self._tasks.qsize()

    def do(self, task: Callable[[], None]) -> None:
        """Do something after all that was asked for before."""
        self._tasks.put(task)

    def close(self) -> None:
        """Finish what was asked for, and end the thread."""
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:
                log.exception("a task beside the engine failed")


@inference_defaults()
def draft_image(sampler: Sampler, u: Tensor) -> PILImage:
    """An image of latents u (N, D) that are not all drawn; what is missing is zero."""
    level, solver = sampler.noise_level, sampler.config.shallow_solver
    x = sampler.backend().unshallow(u[None], level, solver)
    components = sampler.components
    image = components.codec.decode(x.to(components.flow.deep.head.weight.dtype))[0]
    return to_pil(image.nan_to_num().clamp(-1, 1))
