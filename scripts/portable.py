"""Run the test suite under settings that make other machines: threads, vector instructions, deterministic kernels.

    python scripts/portable.py --jobs 2                       # every setting, about half an hour on two cores
    python scripts/portable.py --jobs 2 -- tests/flow -x      # arguments after -- go to pytest

The output of a setting goes to out/portable/NAME.log. At the end comes one line per setting: its exit status, the
tests passed, failed and skipped, the seconds. The exit status is 1 if any setting failed. `make portable` calls it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SETTINGS", "Outcome", "counts", "main"]

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, dict[str, str]] = {
    "1-thread": {"STARFLOW2_TEST_THREADS": "1", "OMP_NUM_THREADS": "1"},
    "2-threads": {"STARFLOW2_TEST_THREADS": "2", "OMP_NUM_THREADS": "2"},
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},  # torch's own kernels without vector instructions
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},  # matrix products in one order on every processor
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of pytest under one setting. status: its exit status, 0 if every test passed."""

    name: str
    status: int
    passed: int
    failed: int
    skipped: int
    seconds: float

    def __str__(self) -> str:
        verdict = "ok" if self.status == 0 else "FAILED"
        counts = f"{self.passed:5} passed {self.failed:4} failed {self.skipped:4} skipped"
        return f"{self.name:<15} {verdict:<7} exit status {self.status:<3} {counts} {self.seconds:7.0f} s"


def counts(report: Path) -> tuple[int, int, int]:
    """Tests passed, failed (errors included) and skipped, of a JUnit report; zeros if there is none."""
    if not report.is_file():
        return 0, 0, 0
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    return total - failed - errors - skipped, failed + errors, skipped


def run(name: str, jobs: int, folder: Path, arguments: Sequence[str]) -> Outcome:
    """Run pytest under one setting, in a process of its own."""
    report, log = folder / f"{name}.xml", folder / f"{name}.log"
    report.unlink(missing_ok=True)
    workers = ["-n", str(jobs), "--dist", "loadfile"] if jobs > 1 else []
    command = [sys.executable, "-m", "pytest", "-q", *workers, "-m", "not slow and not gpu", f"--junitxml={report}"]
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env=os.environ | SETTINGS[name],
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return Outcome(name, done.returncode, *counts(report), time.perf_counter() - started)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every setting; print one line for each at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="pytest workers (default: 1)")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=[*SETTINGS], help="settings (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "portable", help="folder of the logs")
    parser.add_argument("arguments", nargs="*", help="go to pytest")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in options.only:
        print(f"{name}: {' '.join(f'{k}={v}' for k, v in SETTINGS[name].items())}", file=sys.stderr, flush=True)
        outcomes.append(run(name, options.jobs, options.output, options.arguments))
    print(*outcomes, sep="\n")
    return int(any(outcome.status for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
