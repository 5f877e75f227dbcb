"""`python -m fuzz` with scripts/ and tests/ on the path: see `make fuzz`, and `--only` for a single case."""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from fuzz.cases import Bench
from fuzz.harness import MAKERS, case_of, ended, plan, summary, watch, work


def main() -> int:
    """Run the cases that the options name; 1 where one of them failed."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="inputs, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--category", action="append", default=[], choices=MAKERS, help="only this one; may be repeated"
    )
    parser.add_argument("--only", default="", metavar="CATEGORY:NUMBER", help="one case, with its traceback")
    parser.add_argument("--piece", type=_piece, default=(0, 1), metavar="I/N", help="only the I-th of N pieces of it")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--from", type=int, default=0, dest="first", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        return _one(options.only, options.seed)
    first, pieces = options.piece
    cases = plan(options.count, options.seed, options.category)[first::pieces]
    if options.share is not None:
        return _worker(cases[options.share :: options.jobs][options.first :], options.seed)
    arguments = ["--count", str(options.count), "--seed", str(options.seed), "--jobs", str(options.jobs)]
    arguments += ["--piece", f"{first + 1}/{pieces}"]
    arguments += [word for name in options.category for word in ("--category", name)]
    found = list(watch(cases, options.jobs, arguments))
    print("\n".join(summary(found)))
    return int(any(e.outcome not in ("clear", "taken") for e in found))


def _piece(text: str) -> tuple[int, int]:
    """Number from 0 and count of the pieces: "1/4" -> (0, 4)."""
    number, pieces = map(int, text.split("/"))
    if not 1 <= number <= pieces:
        raise argparse.ArgumentTypeError(f"expected 1/{pieces} to {pieces}/{pieces}, got {text}")
    return number - 1, pieces


def _worker(cases: list[tuple[str, int]], seed: int) -> int:
    """Run as a worker: what cases print goes nowhere, what became of them to the parent."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work(cases, seed, out)
    return 0


def _one(name: str, seed: int) -> int:
    category, _, number = name.rpartition(":")
    bench = Bench()
    try:
        case = case_of(category, int(number), seed, bench)
        print(f"{name}: {case.what}: {ended(case)}")
        print("again, as it comes:", case_of(category, int(number), seed, bench).call())
    except Exception:
        traceback.print_exc()
    finally:
        bench.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
