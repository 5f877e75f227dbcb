"""What the suites share: quick shares, bootstrap intervals, and the lock file that freezes their items.

Letters: M rows, G groups of correlated rows, K score columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from starflow2.errors import DataError
from starflow2.world.scene import IMAGE_SIZE

__all__ = [
    "QUICK_SHARE",
    "Grades",
    "Report",
    "bootstrap",
    "check_lock",
    "checked_images",
    "chunks",
    "digest",
    "interval",
    "lock_text",
    "quick_share",
]

QUICK_SHARE = 8  # a quick run takes one item in eight
RESAMPLES = 1000

Grades = NDArray[np.float64]
Images = NDArray[np.uint8]
Report = dict[str, Any]
_Row = TypeVar("_Row")


def checked_images(images: Images, count: int) -> Images:
    """The pictures that a callable returned. Raises DataError unless they are uint8 (count, 64, 64, 3)."""
    images, wanted = np.asarray(images), (count, IMAGE_SIZE, IMAGE_SIZE, 3)
    if images.shape != wanted or images.dtype != np.uint8:
        raise DataError(f"pictures: expected uint8 {wanted}, got {images.dtype} {images.shape}")
    return images


def chunks(rows: Sequence[_Row], size: int) -> Iterator[Sequence[_Row]]:
    """The rows in order, `size` at a time."""
    yield from (rows[at : at + size] for at in range(0, len(rows), size))


def quick_share(rows: Sequence[_Row], rng: np.random.Generator) -> list[_Row]:
    """One row in eight, in order."""
    picks = rng.choice(len(rows), -(-len(rows) // QUICK_SHARE), replace=False)
    return [rows[i] for i in sorted(picks)]


def bootstrap(groups: Sequence[object], grades: Grades, rng: np.random.Generator) -> Grades:
    """(RESAMPLES, K) means of grades (M, K) after resampling whole groups: rows of one group are correlated."""
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    amount = np.bincount(group)  # (G,)
    sums = np.stack([np.bincount(group, column) for column in grades.T], axis=1)  # (G, K)
    draws = rng.integers(len(amount), size=(RESAMPLES, len(amount)))
    means: Grades = sums[draws].sum(axis=1) / amount[draws].sum(axis=1)[:, None]
    return means


def interval(score: float, resamples: Grades) -> Report:
    """A score with its 95 % interval from resampled scores (RESAMPLES,)."""
    low, high = np.percentile(resamples, (2.5, 97.5))
    return {"score": float(score), "low": float(low), "high": float(high)}


# ------------------------------------------------------------------------------------------------------------- the lock


def digest(rows: Iterable[Sequence[object]]) -> Report:
    """Count and hash of items told as words and integers: rendered bytes may differ between library versions."""
    told = [list(row) for row in rows]
    return {"count": len(told), "blake2b": blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()}


def lock_text() -> str:
    """worldbench.lock, which holds one section per suite."""
    return (files("starflow2") / "assets" / "worldbench.lock").read_text()


def check_lock(frozen: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Raises DataError if the sections of `made` are not those of the lock; other suites' sections are theirs."""
    flat, fresh = _flatten({k: v for k, v in frozen.items() if k in made}), _flatten(made)
    changed = sorted(key for key in flat | fresh if flat.get(key) != fresh.get(key))
    if changed:
        raise DataError(f"worldbench.lock: the benchmark is no longer the frozen one; changed: {', '.join(changed)}")


def _flatten(tree: Mapping[str, Any], above: str = "") -> Report:
    flat: Report = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return flat
