"""Benchmarks: every variant is compared with the reference before it is timed, and its operations are counted.

Ratios come from interleaved rounds in one process, in CPU seconds beside wall seconds. What a rule may depend on is
`check` and the counts, never a time. Behind `starflow2 bench`; what is measured is in `bench_suite`.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from starflow2.core.serialize import JsonObject
from starflow2.research.bench_goals import goals

__all__ = ["Counts", "OperationCounter", "Variant", "commit_of", "graph_breaks", "measured", "report", "table"]

WAITS = {"aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten._unique2", "aten.equal"}
VIEWS = {"aten._unsafe_view", "aten._reshape_alias", "aten.lift_fresh", "aten.detach", "aten.alias"}
COPIES = {"aten._to_copy", "aten.copy_"}
PRODUCTS = {"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.mv", "aten.linear"}


# -- counts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counts:
    """Operations that torch dispatched, and bytes that they made and read.

    kernels: operations that compute; syncs: those after which the host waits for the device; weights: bytes of the
    matrices that products read, passes: how many times each of these was read, on average.
    """

    ops: int
    kernels: int
    syncs: int
    bytes: int
    weights: int = 0
    passes: float = 0.0

    def per(self, units: int) -> JsonObject:
        """Rounded numbers per unit."""
        names = ("ops", "kernels", "syncs", "bytes", "weights", "passes")
        return {name: round(getattr(self, name) / units, 2) for name in names}


class OperationCounter(TorchDispatchMode):
    """Counts operations while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ops = self._kernels = self._syncs = self._bytes = self._read = 0
        self._matrices: dict[int, int] = {}  # bytes by storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).rsplit(".", 1)[0]
        self._ops += 1
        self._syncs += name in WAITS or (name in COPIES and _comes_to_the_host(name, args, out))
        if not func.is_view and name not in VIEWS:
            self._kernels += 1
            self._bytes += sum(t.nbytes for t in (out if isinstance(out, tuple | list) else (out,)) if _is_tensor(t))
        if name in PRODUCTS:
            matrix = max((x for x in args if isinstance(x, Tensor)), key=Tensor.numel)
            self._read += matrix.nbytes
            self._matrices[matrix.untyped_storage()._cdata] = matrix.nbytes
        return out

    @property
    def counts(self) -> Counts:
        passes = self._read / max(1, sum(self._matrices.values()))
        return Counts(self._ops, self._kernels, self._syncs, self._bytes, self._read, passes)


def _comes_to_the_host(name: str, args: tuple[Any, ...], out: object) -> bool:
    """True for a copy from an accelerator to the CPU."""
    source = args[1] if name == "aten.copy_" else args[0]
    return isinstance(out, Tensor) and out.device.type == "cpu" != source.device.type


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def graph_breaks(step: Callable[[], object]) -> int:
    """How often torch.compile would leave the graph of `step`; the step is run."""
    torch._dynamo.reset()
    try:
        return int(torch._dynamo.explain(step)().graph_break_count)
    finally:
        torch._dynamo.reset()


# -- comparison and time ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of computing one thing.

    run: computes it and returns what it found, for the comparison. before: called before each run and not measured.
    units: of the counts and ratios, such as latents, in one run. expected: what the result must be, None: what the
    baseline finds, which is the first variant of a group. tolerance: the largest difference. twin: gives the result to
    compare where `run` computes without values. step: gives what torch.compile is to take in one graph.
    """

    bench: str
    name: str
    run: Callable[[], Tensor]
    before: Callable[[], object] | None = None
    units: int = 1
    expected: Tensor | None = None
    tolerance: float = 0.0
    settings: JsonObject = field(default_factory=dict)  # shape, batch, guided, dtype; `run` may add what it finds
    exact_group: str = ""  # variants of one group must give the same bits
    twin: Callable[[], Tensor] | None = None
    work: float = 0.0  # of one run, such as bytes that it moves: a rate is computed with it
    work_unit: str = ""  # of the rate
    step: Callable[[], Callable[[], object]] | None = None
    is_timed: bool = True  # False: run once, and compared
    elsewhere: Callable[[], float] | None = None  # CPU seconds of the last run in a process that is still alive


@dataclass(slots=True)
class _Times:
    """CPU and wall seconds of the rounds of a variant, and the most processes that wanted a core."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def measured(variants: Sequence[Variant], rounds: int, *, times: bool = True) -> Iterator[JsonObject]:
    """One row for each variant, in order. rounds: of interleaved timing; times: False: counts and checks only.

    A variant that is not equal to its baseline has no time.
    """
    firsts = [_first_run(variant) for variant in variants]
    results = [result for result, _ in firsts]
    checks = [_check(variants, results, i) for i in range(len(variants))]
    clocked, busiest = [_Times() for _ in variants], _wanting_a_core()
    for _ in range(rounds if times else 0):
        for seconds, variant, check in zip(clocked, variants, checks, strict=True):
            if check["ok"] and variant.is_timed:
                _clock(variant, seconds)
        busiest = max(busiest, _wanting_a_core())
    for variant, check, (_, count), seconds in zip(variants, checks, firsts, clocked, strict=True):
        row: JsonObject = {"bench": variant.bench, "variant": variant.name, **variant.settings, **machine(busiest)}
        row |= {"units": variant.units} | count.per(variant.units)
        if variant.step is not None:
            row["graph_breaks"] = graph_breaks(variant.step())
        row |= _summary(seconds, variant.units, clocked[0], variants[0].units)
        if variant.work and "median" in row:
            row |= {"rate": variant.work / row["median"], "rate_unit": variant.work_unit}
        yield row | {"check": check}


def _first_run(variant: Variant) -> tuple[Tensor, Counts]:
    """Run a variant once: its result, and the operations that it takes."""
    if variant.before is not None:
        variant.before()
    with OperationCounter() as counter:
        result = variant.run()
    return (result if variant.twin is None else variant.twin()), counter.counts


def _check(variants: Sequence[Variant], results: Sequence[Tensor], index: int) -> JsonObject:
    """How far a result is from what it must be, and whether its group agrees to the last bit."""
    variant, result = variants[index], results[index]
    wanted = results[0] if variant.expected is None else variant.expected
    gap = math.inf
    if result.shape == wanted.shape:
        gap = float((result.double() - wanted.double()).abs().max()) if result.numel() else 0.0
    same = [
        torch.equal(result, other)
        for other, twin in zip(results, variants, strict=True)
        if variant.exact_group and twin.exact_group == variant.exact_group
    ]
    ok = gap <= variant.tolerance and all(same)
    known = gap if math.isfinite(gap) else None
    kind = "result" if variant.twin is None else "result of the same steps in small widths"
    return {"kind": kind, "max_abs": known, "bitwise": all(same) if same else None, "ok": ok}


def _clock(variant: Variant, times: _Times) -> None:
    """Add one run: CPU seconds, those of processes that it started included, and wall seconds."""
    if variant.before is not None:
        variant.before()
    gc.collect()
    start, wall = _cpu_seconds(), time.perf_counter()
    variant.run()
    times.cpu.append(_cpu_seconds() - start + (variant.elsewhere() if variant.elsewhere is not None else 0.0))
    times.wall.append(time.perf_counter() - wall)


def _cpu_seconds() -> float:
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def _summary(times: _Times, units: int, baseline: _Times, baseline_units: int) -> JsonObject:
    """Spread of CPU seconds of a run, and how many times faster than the baseline each round was, unit by unit."""
    if not times.cpu:
        return {"n": 0}
    cpu = sorted(times.cpu)
    row: JsonObject = {"n": len(cpu), "unit": "cpu_s", "min": cpu[0], "median": median(cpu), "p90": _share(cpu, 0.9)}
    row["wall_median"] = median(times.wall)
    ratios = sorted((b / baseline_units) / (s / units) for s, b in zip(times.cpu, baseline.cpu, strict=False))
    if ratios:
        row |= {"ratio": median(ratios), "ratio_p10": _share(ratios, 0.1), "ratio_p90": _share(ratios, 0.9)}
    return row


def _share(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


# -- the machine ------------------------------------------------------------------------------------------------------


def machine(busiest: float | None = None) -> JsonObject:
    """Where this runs, and whether it is quiet: no more processes want a core than there are.

    busiest: how many did at most, by default now.
    """
    load = _wanting_a_core() if busiest is None else busiest
    return {
        "cpu": _processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit_of(Path(__file__).parent),
        "load": round(load, 2),
        "quiet": load <= (os.cpu_count() or 1),
    }


def _wanting_a_core() -> float:
    """Processes that run or wait to run, this one included; where the system does not say, its mean over a minute."""
    try:
        return int(Path("/proc/loadavg").read_text("ascii").split()[3].split("/")[0])
    except (OSError, ValueError, IndexError):
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@cache
def commit_of(folder: Path) -> str | None:
    """The commit of the checkout that a folder is in; None outside of one."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return found.stdout.strip() or None


# -- tables -----------------------------------------------------------------------------------------------------------

COLUMNS = {  # of a table: the key of a row, and its heading
    "bench": "bench",
    "variant": "variant",
    "batch": "batch",
    "guided": "guided",
    "ops": "ops",
    "kernels": "kernels",
    "syncs": "syncs",
    "passes": "passes",
    "graph_breaks": "graph breaks",
    "evaluations": "evaluations",
    "residual": "residual",
    "beyond": "positions beyond the longest",
    "kept": "bytes kept",
    "close": "close",
    "median": "CPU s",
    "wall_median": "wall s",
    "ratio": "times faster",
    "rate": "rate",
}


def table(rows: Sequence[JsonObject]) -> str:
    """Rows as a Markdown table with the columns that any of them fills, and the check as its last."""
    used = {key: heading for key, heading in COLUMNS.items() if any(_cell(row, key) for row in rows)}
    lines = [f"| {' | '.join((*used.values(), 'largest difference'))} |", f"|{'---|' * (len(used) + 1)}"]
    for row in rows:
        cells = [_cell(row, key) for key in used]
        lines.append(f"| {' | '.join((*cells, _verdict(row['check'])))} |")
    return "\n".join(lines)


def _verdict(check: JsonObject) -> str:
    gap = "not a number" if check["max_abs"] is None else f"{check['max_abs']:.1e}"
    bits = ", bits" if check["bitwise"] else ""
    return f"{'' if check['ok'] else '**differs** '}{gap}{bits}"


def _cell(row: JsonObject, key: str) -> str:
    value = row.get(key)
    if value is None or value == "":
        return ""
    if key == "rate":
        return f"{value:.3g} {row['rate_unit']}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(rows: Sequence[JsonObject], command: str) -> str:
    """A page of all rows, one table for each bench: what was run where, and whether it was quiet."""
    first, loud = rows[0], sum(not row["quiet"] for row in rows)
    where = f"{first['cpu']}, {first['threads']} thread(s), torch {first['torch']}, commit {first['commit']}"
    quiet = "no more processes wanted a core than there are"
    if loud:
        quiet = f"more processes wanted a core than there are in {loud} of {len(rows)} rows: read ratios, not times"
    lines = [
        "# Benchmarks",
        "",
        f"Written by `{command}` on {where}; {quiet}.",
        "",
        "Counts are per unit: a latent, an image, a token, a document, a sample. CPU s and wall s are medians of whole",
        "runs over interleaved rounds. Times faster: one unit against one of the first row of the group, the median of",
        "the rounds' ratios. A row that differs from its reference by more than it may has no time.",
        "",
        "## What was asked",
        "",
        *goals(rows),
    ]
    for name in dict.fromkeys(row["bench"] for row in rows):
        part = [row for row in rows if row["bench"] == name]
        lines += ["", f"## {name}", "", table(part)]
    return "\n".join(lines) + "\n"
