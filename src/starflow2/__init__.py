"""StarFlow2: text and images as one causal sequence, drawn and scored by a normalizing flow.

`import starflow2` is cheap: the names below are imported when they are first used, so that `starflow2.flow`, the
standalone flow library, and the command line never pay for what they do not need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from starflow2.errors import StarFlowError

if TYPE_CHECKING:
    from starflow2.inference.events import Drew, Event, Finished, Made, Started, Wrote
    from starflow2.inference.session import Session
    from starflow2.pipeline import StarFlow2

__version__ = "0.1.0"
__all__ = [
    "Drew",
    "Event",
    "Finished",
    "Made",
    "Session",
    "StarFlow2",
    "StarFlowError",
    "Started",
    "Wrote",
    "__version__",
]

_HOMES = {
    "StarFlow2": "starflow2.pipeline",
    "Session": "starflow2.inference.session",
    **dict.fromkeys(("Drew", "Event", "Finished", "Made", "Started", "Wrote"), "starflow2.inference.events"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
