"""Run cases in worker processes, watch over their time, memory and children, and count what became of them.

A worker runs its share of the cases in order and says when one begins and how it ended; the parent ends a worker whose
case takes longer than 20 seconds or grows by more than 2 GB, and starts another one behind that case. A case is known
by category and number: `python -m fuzz --only sessions:12` runs one with its traceback.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import selectors
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch

from fuzz.cases import Bench, Case, Maker
from fuzz.documents import albums, mixtures, records, results, shards
from fuzz.doors import arguments, densities, modules, places
from fuzz.flows import flows
from fuzz.folders import configs, saved_configs, sessions, states, tokenizers, weights
from fuzz.pictures import pictures, tensors
from fuzz.published import benchmarks, drawn_folders
from fuzz.served import auto_classes, kept_replies, requests
from fuzz.words import commands, numbers, prompts
from starflow2.errors import StarFlowError

__all__ = ["MAKERS", "SHARES", "Ended", "case_of", "ended", "plan", "summary", "watch", "work"]

MAKERS: Mapping[str, Maker] = {
    "pictures": pictures,
    "tensors": tensors,
    "prompts": prompts,
    "numbers": numbers,
    "commands": commands,
    "configs": configs,
    "saved configs": saved_configs,
    "weights": weights,
    "tokenizers": tokenizers,
    "sessions": sessions,
    "states": states,
    "mixtures": mixtures,
    "records": records,
    "shards": shards,
    "albums": albums,
    "results": results,
    "flows": flows,
    "densities": densities,
    "arguments": arguments,
    "places": places,
    "modules": modules,
    "benchmarks": benchmarks,
    "drawn folders": drawn_folders,
    "requests": requests,
    "kept replies": kept_replies,
    "auto classes": auto_classes,
}
SHARES = {  # of all cases; what is slow has fewer
    "pictures": 20,
    "tensors": 7,
    "prompts": 12,
    "numbers": 7,
    "commands": 9,
    "configs": 12,
    "saved configs": 5,
    "weights": 3,
    "tokenizers": 4,
    "sessions": 4,
    "states": 1,
    "mixtures": 4,
    "records": 6,
    "shards": 3,
    "albums": 2,
    "results": 4,
    "flows": 6,
    "densities": 4,
    "arguments": 7,
    "places": 3,
    "modules": 2,
    "benchmarks": 6,
    "drawn folders": 2,
    "requests": 7,
    "kept replies": 2,
    "auto classes": 3,
}
SECONDS, GIGABYTE = 20.0, 2**30
CHILDREN = {"subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.spawn"}
OUTCOMES = ("clear", "taken", "other", "silent", "hang", "memory")


@dataclass(frozen=True, slots=True)
class Ended:
    """Outcome of a case: one of OUTCOMES, and of a failure what was seen."""

    category: str
    number: int
    what: str
    outcome: str
    message: str = ""


def plan(count: int, seed: int, categories: Iterable[str] = ()) -> list[tuple[str, int]]:
    """Cases as (category, number), in an order that depends on the seed; at least `count` of them."""
    shares = {name: SHARES[name] for name in (categories or MAKERS)}
    whole = sum(shares.values())
    cases = [(name, i) for name, share in shares.items() for i in range(-(-count * share // whole))]
    random.Random(seed).shuffle(cases)
    return cases


def case_of(category: str, number: int, seed: int, bench: Bench) -> Case:
    """A case that is equal for equal numbers, in any process."""
    return MAKERS[category](random.Random(f"{seed}/{category}/{number}"), bench)


def ended(case: Case, children: Sequence[str] = ()) -> tuple[str, str]:
    """Run a case: its outcome and, of a failure, what was seen. `children`: a list that grows where one is started."""
    before = len(children)
    try:
        with _quietly():
            value = case.call()
    except StarFlowError as error:
        outcome = ("clear", "") if _is_clear(str(error)) else ("other", f"no clear line: {str(error)[:300]!a}")
    except MemoryError as error:
        outcome = "memory", f"{error}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        is_memory = "allocate memory" in str(error) or "not enough memory" in str(error)
        text = f"{type(error).__name__}: {str(error)[:200]!a} at {os.path.basename(place.filename)}:{place.lineno}"
        outcome = "memory" if is_memory else "other", text
    except SystemExit as error:
        outcome = "other", f"SystemExit {error.code!a}"
    else:
        outcome = _taken(case, value)
    if len(children) > before:
        return "other", f"a child was started: {children[before]}"
    return outcome


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Nothing is printed inside, and no warning shown."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _taken(case: Case, value: object) -> tuple[str, str]:
    if case.judge is None:
        return "silent", f"returned {type(value).__name__}"
    return ("taken", "") if case.judge(value) else ("silent", "returned something else than the input says")


def _is_clear(message: str) -> bool:
    """True for one line of printable characters that says something."""
    return bool(message.strip()) and message.isprintable()


# -- a worker -----------------------------------------------------------------------------------------------------


def work(cases: Sequence[tuple[str, int]], seed: int, out: IO[str]) -> None:
    """Run cases one after the other and say of each that it begins and how it ended, in lines of JSON."""
    torch.set_num_threads(1)
    bench, children = Bench(), list[str]()
    os.environ.update(HOME=str(bench.home), HF_HUB_OFFLINE="1", COLUMNS="100")
    os.chdir(bench.home)
    _ = bench.session_file, bench.image_file
    sys.addaudithook(
        lambda event, arguments: children.append(f"{event} {arguments!a}"[:200]) if event in CHILDREN else None
    )
    _limit_memory()
    try:
        for category, number in cases:
            print(json.dumps([category, number]), file=out, flush=True)
            what, outcome, message = "", "other", ""
            try:
                case = case_of(category, number, seed, bench)
                what = case.what
                outcome, message = ended(case, children)
            except Exception as error:  # of a generator, a judge, or the bench: a fault of the fuzzer
                message = f"the fuzzer itself: {type(error).__name__}: {error}"
            print(json.dumps([what, outcome, message]), file=out, flush=True)
    finally:
        bench.close()


def _limit_memory() -> None:
    """Let a single huge allocation fail at once."""
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * GIGABYTE, resource.RLIM_INFINITY))


# -- the watch ----------------------------------------------------------------------------------------------------


class _Worker:
    """A process that runs the cases of one share from a place on."""

    def __init__(self, share: Sequence[tuple[str, int]], arguments: Sequence[str]) -> None:
        self.share, self.arguments, self.place = share, arguments, 0
        self.start()

    def start(self) -> None:
        """Begin, or begin again behind the case that was running."""
        command = [sys.executable, "-m", "fuzz", *self.arguments, "--from", str(self.place)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.buffer, self.begun, self.base = b"", 0.0, 0

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def read(self) -> Iterator[Ended]:
        """Cases that ended since the last call."""
        self.buffer += self.output.read() or b""
        *lines, self.buffer = self.buffer.split(b"\n")
        for line in lines:
            values = json.loads(line)
            if len(values) == 2:
                self.begun, self.base = time.monotonic(), self.base or self.resident()
            else:
                yield Ended(*self.share[self.place], *values)
                self.place, self.begun = self.place + 1, 0.0

    def resident(self) -> int:
        try:
            with open(f"/proc/{self.process.pid}/statm", encoding="ascii") as file:
                return int(file.read().split()[1]) * resource.getpagesize()
        except (OSError, IndexError):
            return 0

    def failure(self) -> tuple[str, str] | None:
        """Fault of the case that is running, if it has one."""
        if self.begun and time.monotonic() - self.begun > SECONDS:
            return "hang", f"more than {SECONDS:.0f} seconds"
        grown = self.resident() - self.base if self.base else 0
        if grown > 2 * GIGABYTE:
            return "memory", f"grew by {grown / GIGABYTE:.1f} GB"
        code = self.process.poll()
        if code is not None and self.place < len(self.share) and not self.buffer:
            return "other", f"the process ended with status {code}"
        return None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.output.close()


def watch(cases: Sequence[tuple[str, int]], jobs: int, arguments: Sequence[str]) -> Iterator[Ended]:
    """Outcomes of the cases, as they become known, in `jobs` processes."""
    shares = [cases[i::jobs] for i in range(jobs)]
    workers = [_Worker(share, [*arguments, "--share", str(i)]) for i, share in enumerate(shares) if share]
    with selectors.DefaultSelector() as ready:
        for worker in workers:
            ready.register(worker.output, selectors.EVENT_READ, worker)
        while workers:
            ready.select(timeout=0.1)
            for worker in list(workers):
                yield from worker.read()
                failure = worker.failure()
                if failure is None and worker.place < len(worker.share):
                    continue
                ready.unregister(worker.output)
                worker.end()
                if failure is not None:
                    yield Ended(*worker.share[worker.place], "", *failure)
                    worker.place += 1
                if worker.place < len(worker.share):
                    worker.start()
                    ready.register(worker.output, selectors.EVENT_READ, worker)
                else:
                    workers.remove(worker)


def summary(found: Sequence[Ended]) -> list[str]:
    """The table of categories, failures grouped by kind with one example each, and the line of totals at the end."""
    lines = [f"{'category':<14} {'inputs':>7} " + " ".join(f"{name:>7}" for name in OUTCOMES)]
    for category in MAKERS:
        counts = Counter(e.outcome for e in found if e.category == category)
        if counts:
            cells = " ".join(f"{counts[name]:>7}" for name in OUTCOMES)
            lines.append(f"{category:<14} {sum(counts.values()):>7} {cells}")
    groups: dict[tuple[Any, ...], list[Ended]] = {}
    for e in found:
        if e.outcome not in ("clear", "taken"):
            groups.setdefault((e.category, e.outcome, e.what, e.message[:60]), []).append(e)
    for (category, outcome, what, _), group in sorted(groups.items(), key=lambda pair: str(pair[0])):
        first = group[0]
        lines.append(f"{outcome}: {what} ({len(group)}, such as {category}:{first.number}): {first.message}")
    total = Counter(e.outcome for e in found)
    lines.append(
        f"fuzz: {len(found)} inputs, {total['clear']} clear, {total['taken']} taken rightly, {total['other']} other, "
        f"{total['silent']} silent, {total['hang']} hang, {total['memory']} memory"
    )
    return lines
