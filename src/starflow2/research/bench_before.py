"""Benchmarks beside an earlier checkout of this project, which runs in a process of its own with nano's weights.

Both make the same calls of `StarFlow2` in rounds that alternate; the other process says how much CPU time each took.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

from starflow2.core.serialize import JsonObject
from starflow2.errors import ConfigError, UsageError
from starflow2.models.components import Components
from starflow2.pipeline import StarFlow2
from starflow2.research.bench import Variant, commit_of
from starflow2.research.bench_cases import PROMPTS

__all__ = ["Earlier", "of_before"]

QUESTION = "how many hearts are there?"
BATCHES = (1, 8, 32)
# One line for each call, its name and what is given, divided by tabs; the reply is a line of numbers, seconds first.
WORKER = """
import sys, time
import torch
torch.set_num_threads(int(sys.argv[1]))
from starflow2 import StarFlow2
model = StarFlow2.from_pretrained("nano", device="cpu")
image = model.draw(["two red hearts"], [0])[0]
calls = {
    "draw": lambda *prompts: model.draw(list(prompts), list(range(len(prompts))))[0].flatten().tolist(),
    "ask": lambda question: list(model.ask(image, question).encode()),
    "score": lambda prompt: [model.score([prompt], [image]).log_prob],
    "invert": lambda prompt: model.invert(image, prompt).z.flatten().tolist(),
}
print("ready", flush=True)
for line in sys.stdin:
    name, *given = line.rstrip("\\n").split("\\t")
    start = time.process_time()
    found = calls[name](*given)
    print(time.process_time() - start, *found, flush=True)
"""


class Earlier:
    """A process that runs the checkout in `folder`. Raises UsageError for no checkout, ConfigError where it stops."""

    def __init__(self, folder: Path) -> None:
        source = folder / "src"
        if not (source / "starflow2" / "__init__.py").is_file():
            raise UsageError(f"--peer before={folder}: there is no src/starflow2; expected a checkout of this project.")
        self.folder, self.seconds = folder, 0.0
        script = f"import sys; sys.path.insert(0, {str(source.resolve())!r})\n{WORKER}"
        command = [sys.executable, "-c", script, str(torch.get_num_threads())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._to, self._from = (cast(IO[str], pipe) for pipe in (self._process.stdin, self._process.stdout))
        self._line()

    def call(self, name: str, given: Sequence[str]) -> Tensor:
        """Result of a call; `seconds` is then the CPU time that it took."""
        print(name, *given, sep="\t", file=self._to, flush=True)
        self.seconds, *found = map(float, self._line().split())
        return torch.tensor(found)

    def last_seconds(self) -> float:
        return self.seconds

    def _line(self) -> str:
        line = self._from.readline()
        if not line:
            raise ConfigError(f"--peer before={self.folder} stopped with status {self._process.wait()}.")
        return line

    def close(self) -> None:
        self._to.close()
        self._process.wait()
        self._from.close()


def of_before(folder: Path) -> Callable[[Components], Iterator[list[Variant]]]:
    """The benchmark against an earlier checkout in `folder`, such as `git worktree add FOLDER 5cfd51d`."""

    def before(components: Components) -> Iterator[list[Variant]]:
        """Images in batches of 1, 8 and 32, an answer, a score and a code, by that checkout and by this one."""
        earlier = Earlier(folder)
        try:
            calls = _calls(StarFlow2(components))
            for batch in BATCHES:
                prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
                yield _pair(earlier, "draw", prompts, calls["draw"], batch)
            yield _pair(earlier, "ask", [QUESTION], calls["ask"])
            for name in ("score", "invert"):
                yield _pair(earlier, name, [PROMPTS[0]], calls[name])
        finally:
            earlier.close()

    return before


def _calls(model: StarFlow2) -> dict[str, Callable[[Sequence[str]], Tensor]]:
    """The calls of `WORKER` on this checkout."""
    image = model.draw([PROMPTS[0]], [0])[0]
    return {
        "draw": lambda prompts: model.draw(prompts, range(len(prompts)))[0].flatten(),
        "ask": lambda given: torch.tensor(list(model.ask(image, given[0]).encode())),
        "score": lambda given: torch.tensor([model.score([given[0]], [image]).log_prob]),
        "invert": lambda given: model.invert(image, given[0]).z.flatten(),
    }


def _pair(
    earlier: Earlier, name: str, given: Sequence[str], call: Callable[[Sequence[str]], Tensor], batch: int = 1
) -> list[Variant]:
    """A call there and here. Each is compared with itself: weights and settings have moved in between."""
    before = commit_of(earlier.folder) or earlier.folder.name
    settings: JsonObject = {"shape": "nano", "batch": batch, "before": before}
    runs: dict[str, Callable[[], Tensor]] = {"before": lambda: earlier.call(name, given), "now": lambda: call(given)}
    return [
        Variant(
            bench="before",
            name=f"{name}, {who}",
            run=run,
            units=batch,
            expected=run(),
            tolerance=1e-3,
            settings=settings,
            elsewhere=earlier.last_seconds if who == "before" else None,
        )
        for who, run in runs.items()
    ]
