"""Benchmarks of decoding: every variant is compared with the reference before it is timed, and its operations counted.

Ratios come from interleaved rounds in one process, in CPU seconds beside wall seconds. What a rule may depend on is
`check` and the counts, never a time. Behind `starflow2 bench`; the cases are in `bench_cases`.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from starflow2.core.serialize import JsonObject

__all__ = ["Counts", "OperationCounter", "Variant", "measured", "table"]

WAITS = {"aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten._unique2", "aten.equal"}
VIEWS = {"aten._unsafe_view", "aten._reshape_alias", "aten.lift_fresh", "aten.detach", "aten.alias"}


@dataclass(frozen=True, slots=True)
class Counts:
    """Operations that torch dispatched: all, those that compute, those that wait for the device; bytes they made."""

    ops: int
    kernels: int
    syncs: int
    bytes: int

    def per(self, units: int) -> JsonObject:
        """Rounded counts per unit."""
        return {name: round(getattr(self, name) / units, 2) for name in ("ops", "kernels", "syncs", "bytes")}


class OperationCounter(TorchDispatchMode):
    """Counts operations while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ops = self._kernels = self._syncs = self._bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).rsplit(".", 1)[0]
        self._ops += 1
        self._syncs += name in WAITS
        if not func.is_view and name not in VIEWS:
            self._kernels += 1
            self._bytes += sum(t.nbytes for t in (out if isinstance(out, tuple | list) else (out,)) if _is_new(t))
        return out

    @property
    def counts(self) -> Counts:
        return Counts(self._ops, self._kernels, self._syncs, self._bytes)


def _is_new(value: object) -> bool:
    return isinstance(value, Tensor)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of computing one thing.

    run: computes it and returns what it found, for the comparison. units: of the counts, such as latents, in one run.
    tolerance: largest difference from the baseline's result. The first variant of a group is its baseline.
    """

    bench: str
    name: str
    run: Callable[[], Tensor]
    units: int = 1
    tolerance: float = 0.0
    settings: JsonObject = field(default_factory=dict)  # shape, batch, guided, dtype
    exact_group: str = ""  # variants of one group must give the same bits


def measured(variants: Sequence[Variant], rounds: int, *, times: bool = True) -> Iterator[JsonObject]:
    """One row for each variant, in order. rounds: of interleaved timing; times: False: counts and checks only.

    A variant that is not equal to its baseline has no time.
    """
    results = [variant.run() for variant in variants]
    checks = [_check(variants, results, i) for i in range(len(variants))]
    counts = [_counted(variant) for variant in variants]
    clocked: list[list[tuple[float, float]]] = [[] for _ in variants]
    if times:
        for _ in range(rounds):
            for seconds, variant, check in zip(clocked, variants, checks, strict=True):
                if check["ok"]:
                    seconds.append(_clocked(variant.run))
    for variant, check, count, seconds in zip(variants, checks, counts, clocked, strict=True):
        row: JsonObject = {"bench": variant.bench, "variant": variant.name, **variant.settings, **machine()}
        yield row | count.per(variant.units) | _summary(seconds, clocked[0]) | {"check": check}


def _check(variants: Sequence[Variant], results: Sequence[Tensor], index: int) -> JsonObject:
    """How far a result is from the baseline's, and whether its group agrees to the last bit."""
    variant, result = variants[index], results[index]
    gap = float((result.double() - results[0].double()).abs().max()) if result.shape == results[0].shape else math.inf
    same = [
        torch.equal(result, other)
        for other, twin in zip(results, variants, strict=True)
        if variant.exact_group and twin.exact_group == variant.exact_group
    ]
    ok = gap <= variant.tolerance and all(same)
    known = gap if math.isfinite(gap) else None
    return {"kind": "result", "max_abs": known, "bitwise": all(same) if same else None, "ok": ok}


def _counted(variant: Variant) -> Counts:
    with OperationCounter() as counter:
        variant.run()
    return counter.counts


def _clocked(run: Callable[[], Tensor]) -> tuple[float, float]:
    """CPU seconds, those of processes that it started included, and wall seconds."""
    gc.collect()
    start, wall = _cpu_seconds(), time.perf_counter()
    run()
    return _cpu_seconds() - start, time.perf_counter() - wall


def _cpu_seconds() -> float:
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def _summary(seconds: Sequence[tuple[float, float]], baseline: Sequence[tuple[float, float]]) -> JsonObject:
    """Spread of CPU seconds, and how many times faster than the baseline each round was."""
    if not seconds:
        return {"n": 0}
    cpu = sorted(s for s, _ in seconds)
    row: JsonObject = {"n": len(cpu), "unit": "cpu_s", "min": cpu[0], "median": median(cpu), "p90": _share(cpu, 0.9)}
    row["wall_median"] = median(wall for _, wall in seconds)
    ratios = sorted(b / s for (s, _), (b, _) in zip(seconds, baseline, strict=False))
    if ratios:
        row |= {"ratio": median(ratios), "ratio_p10": _share(ratios, 0.1), "ratio_p90": _share(ratios, 0.9)}
    return row


def _share(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def machine() -> JsonObject:
    """Where this runs, and whether it is quiet: no more processes want a core than there are."""
    load = os.getloadavg()[0]
    return {
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "load": round(load, 2),
        "quiet": load <= (os.cpu_count() or 1),
    }


def _commit() -> str | None:
    """The commit of the checkout that this file is in; None outside of one."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


COLUMNS = ("bench", "variant", "shape", "batch", "guided", "ops", "kernels", "syncs", "median", "ratio")


def table(rows: Iterable[JsonObject]) -> str:
    """Rows as a Markdown table, with the check as its last column."""
    lines = [f"| {' | '.join((*COLUMNS, 'check'))} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    for row in rows:
        check = row["check"]
        verdict = "not checked" if check is None else f"{'ok' if check['ok'] else 'differs'} {_cell(check['max_abs'])}"
        lines.append(f"| {' | '.join(_cell(row.get(name)) for name in COLUMNS)} | {verdict} |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
