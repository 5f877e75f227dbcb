"""Facts that the C++ needs of a model, each with the value that it has and the one that is expected.

Shared by the compiled streams and the compiled decoders. Not here: which facts a part has (`backend`, `pixels`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from starflow2.inference.native.build import Unavailable
from starflow2.nn import StackConfig

__all__ = ["HEAD_DIMS", "Fact", "array", "check_facts", "stack_sizes", "whole", "width_facts"]

HEAD_DIMS = (16, 32, 48, 64, 96, 128)  # `attend_for` in layers.h compiles attention for these
MULTIPLE = 16  # of every width: registers hold up to as many floats

Fact = tuple[str, object, object]  # a setting's name, its value, the value that the C++ computes with


def check_facts(facts: Iterable[Fact]) -> None:
    """Raise Unavailable, with the first setting's name, for a model that the C++ does not compute."""
    for name, value, expected in facts:
        if value != expected:
            raise Unavailable(f"{name} is {value}; the compiled form takes {expected}")


def width_facts(name: str, width: int, head_dim: int) -> Iterator[Fact]:
    """Facts about the width of a stack and of its heads."""
    yield whole(f"{name}.width", width)
    known = ", ".join(map(str, HEAD_DIMS))
    yield f"head dim of {name}", head_dim, head_dim if head_dim in HEAD_DIMS else f"one of {known}"


def whole(name: str, width: int) -> Fact:
    """The fact that a width fills whole registers."""
    return name, width, width if width % MULTIPLE == 0 else f"a multiple of {MULTIPLE}"


def stack_sizes(cfg: StackConfig) -> tuple[int, ...]:
    """Sizes of a stack of the flow's layers, as `stack_of` in layers.h takes them."""
    return cfg.width, cfg.depth, cfg.heads, cfg.heads, cfg.head_dim, cfg.mlp_ratio * cfg.width


def array(kind: Any, values: Sequence[int]) -> Any:
    """Numbers in memory that C++ can read."""
    return (kind * len(values))(*values)
