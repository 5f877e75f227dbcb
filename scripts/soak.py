"""Call every public function over and over, and watch resident memory and open files: `make soak`.

    python scripts/soak.py --minutes 15

The model is the smallest whole one of the tests (tests/ is on the path). One round talks, draws, edits, asks, scores,
inverts, rewinds, forks, saves and loads, fits a small density, and runs a command. After the first fifth of the time
nothing should grow: the largest resident memory of the last fifth is compared with that of the second one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from starflow2.cli.app import main as command
from starflow2.core.images import to_tensor
from starflow2.flow import FitConfig, density
from starflow2.inference.session import Session
from starflow2.pipeline import StarFlow2

__all__ = ["Seen", "growth", "main", "rounds"]

ALLOWED = 0.05  # growth of resident memory between the second and the last fifth of the time


@dataclass(frozen=True, slots=True)
class Seen:
    """State of the process after a round."""

    seconds: float
    resident: int  # bytes
    files: int  # open


def _now(start: float) -> Seen:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return Seen(time.monotonic() - start, pages * resource.getpagesize(), len(os.listdir("/proc/self/fd")))


def growth(seen: list[Seen]) -> tuple[float, bool]:
    """Growth of the largest resident memory from the second fifth of the time to the last; True if files are as many.

    >>> growth([Seen(t, 100 + t, 6) for t in range(1, 101)])[1]
    True
    """
    end = seen[-1].seconds
    second = [s for s in seen if end / 5 < s.seconds <= 2 * end / 5] or seen[:1]
    last = [s for s in seen if s.seconds > 4 * end / 5]
    grown = max(s.resident for s in last) / max(s.resident for s in second) - 1
    return grown, {s.files for s in last} == {s.files for s in second}


def _talk(model: StarFlow2, folder: Path, number: int) -> None:
    """A conversation with everything that a session can do."""
    session = model.session(seed=number)
    made = session.add("a red circle").draw()
    mark = session.mark()
    session.add("make the circle blue").draw()
    session.rewind(mark)
    fork = session.fork()
    fork.add("what color is the circle?").write(tokens=3)
    for _ in session.add("two red hearts").run(tokens=3, pictures=1):
        pass
    session.save(folder / "talk.safetensors")
    Session.load(folder / "talk.safetensors", model.sampler()).add(made.image, "what is it?").write(tokens=2)


def _single_calls(model: StarFlow2, folder: Path, number: int) -> None:
    """Calls that are no conversation."""
    drawing = model.generate("two red hearts", seed=number)[0]
    image = to_tensor(drawing.image)
    model.ask(drawing.image, "what color is it?")
    model.edit(image, "make it blue", seed=number)
    model.score(["two red hearts"], [image])
    model.from_code(model.invert(image, "two red hearts"), "two red hearts")
    with contextlib.suppress(Exception):
        model.generate("a zebra")
    model.save_pretrained(folder / "model")
    StarFlow2.from_pretrained(folder / "model")


def _flow(number: int) -> None:
    numbers = density(3, width=32, blocks=2)
    numbers.fit(torch.randn(60, 3), config=FitConfig(steps=5, batch=16, seed=number))
    numbers.log_prob(numbers.rsample(4)).sum().backward()


def rounds(model: StarFlow2, folder: Path) -> Callable[[int], None]:
    """One round of all calls, by its number."""

    def one(number: int) -> None:
        _talk(model, folder, number)
        _single_calls(model, folder, number)
        _flow(number)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            command(["info", "nano"])
            command(["generate", "a zebra", "--model", str(folder / "model"), "-o", str(folder / "out.png")])

    return one


def main() -> int:
    """Run for as long as asked: 0 where memory stayed within 5 % and the number of open files the same."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    minutes = parser.parse_args().minutes
    torch.set_num_threads(1)
    cases = importlib.import_module("model_cases")
    model, seen, start = StarFlow2(cases.tiny_components(cases.STAGES)), list[Seen](), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        one = rounds(model, Path(name))
        while not seen or seen[-1].seconds < 60 * minutes:
            one(len(seen))
            seen.append(_now(start))
    grown, same_files = growth(seen)
    megabytes = [s.resident / 2**20 for s in seen]
    first, most, last = megabytes[0], max(megabytes), megabytes[-1]
    print(f"rounds {len(seen)}, resident MB: first {first:.0f}, most {most:.0f}, last {last:.0f}")
    print(f"growth {100 * grown:+.1f} %, open files {seen[-1].files}{'' if same_files else ', not constant'}")
    return int(grown > ALLOWED or not same_files)


if __name__ == "__main__":
    sys.exit(main())
