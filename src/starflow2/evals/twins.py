"""Twins: images that show one shape too often where another one is missing, the commonest fault of small drawers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from starflow2.world.detector import Scan

__all__ = ["is_twin", "twins_of_100"]


def is_twin(asked: Sequence[int], found: Iterable[int]) -> bool:
    """True if one asked shape is there more often than asked for, and another less often. Shapes by number.

    >>> is_twin([0, 3], [3, 3]), is_twin([0, 3], [3]), is_twin([0, 3], [0, 3, 3])
    (True, False, False)
    """
    wanted, there = Counter(asked), Counter(found)
    return any(there[s] > n for s, n in wanted.items()) and any(there[s] < n for s, n in wanted.items())


def twins_of_100(pairs: Iterable[tuple[Sequence[int], Scan]]) -> float | None:
    """Twins per 100 images that should show more than one shape; None where there is no such image.

    pairs: the shapes that an image should show, and what the detector found in it.
    """
    twins = [is_twin(asked, (d.shape for d in scan.detections)) for asked, scan in pairs if len(set(asked)) > 1]
    return 100 * sum(twins) / len(twins) if twins else None
