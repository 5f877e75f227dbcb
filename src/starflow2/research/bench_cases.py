"""Benchmarks of `starflow2 bench`: a latent, whole images, many rows, shallow blocks, turns, words, and starting up.

Each function yields groups of variants; the first of a group is the reference that the others are compared with. Models
are nano, or one of another shape with random weights.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from starflow2.core.serialize import JsonObject
from starflow2.errors import UsageError, nearest
from starflow2.flow.solver import SEQUENTIAL, Jacobi
from starflow2.inference.backend import Backend, Begin, Chunk, NewImage, Pair
from starflow2.inference.config import DrawConfig, ReplyLimits
from starflow2.inference.engine import Engine
from starflow2.inference.events import Completed
from starflow2.inference.lean import LeanBackend
from starflow2.inference.packed import pack
from starflow2.inference.sampler import Sampler
from starflow2.inference.streams import StreamBackend
from starflow2.models.components import Components
from starflow2.models.config import ModelConfig
from starflow2.models.sequence import Cursor
from starflow2.research.bench import Variant, measured

__all__ = ["BENCHES", "run_benches"]

LATENT = 2e-3  # largest difference of a latent in float32 from the float64 reference (issue 6, D4)
PROMPTS = ("two red hearts", "a blue star left of a green ring", "a small black diamond", "a red circle")


# -- one latent ---------------------------------------------------------------------------------------------------


class Drawing:
    """An image being drawn by a backend, guided or not, by numbers that need no tokenizer."""

    def __init__(self, backend: Backend, cfg: ModelConfig, *, guided: bool) -> None:
        self.backend, self.cfg = backend, cfg
        lanes = [self._lane([1, *range(10, 20), 2, 4])]
        if guided:
            lanes.append(self._lane([1, 2, 4]))
        self.pair = Pair(lanes[0], lanes[1] if guided else None, cfg.draw_level)
        backend.arrange([self.pair], [])

    def _lane(self, ids: Sequence[int]) -> int:
        deep, lane, cursor = self.cfg.flow.deep, self.backend.open(), Cursor(self.cfg.flow.deep.grid)
        self.backend.reserve(lane, len(ids) + deep.num_latents)
        chunk = Chunk(ids, *cursor.text(len(ids)), begin=Begin(len(ids) - 1, self.cfg.draw_level, None))
        self.backend.append(lane, chunk)
        z = self.cfg.prior_scale * torch.randn(deep.num_latents, deep.dim, generator=torch.Generator().manual_seed(0))
        strength = torch.full((deep.num_latents,), self.cfg.guidance)
        self.backend.start(lane, NewImage(z, self.cfg.draw_level, strength, *cursor.latents(), None))
        return lane

    def draw(self, count: int) -> None:
        self.backend.draw([self.pair], count)


def latent(components: Components) -> Iterator[list[Variant]]:
    """The first latents of an image: the streams by themselves in float64, and the forms on packed weights."""
    stream, cfg, count = components.pretzel, components.cfg, 16
    for guided in (True, False):
        backends: dict[str, Backend] = {
            "reference": StreamBackend(stream.in_float64(), torch.float64),
            "lean float64": LeanBackend(pack(stream, torch.float64)),
            "lean": Sampler(components, DrawConfig.for_model(components)).backend(),
        }
        yield [
            Variant(
                bench="latent",
                name=name if name != "lean" else backend.name,
                run=_first_latents(backend, cfg, guided, count),
                units=count,
                tolerance=LATENT,
                settings={"shape": cfg.name, "batch": 1, "guided": guided, "dtype": str(backend.dtype)},
            )
            for name, backend in backends.items()
        ]


def _first_latents(backend: Backend, cfg: ModelConfig, guided: bool, count: int) -> Callable[[], Tensor]:
    """Draws the first latents of a new image; its prompt is read before."""

    def run() -> Tensor:
        drawing = Drawing(backend, cfg, guided=guided)
        drawing.draw(count)
        found = backend.drawn(drawing.pair).u[:count]
        for lane in (drawing.pair.lane, drawing.pair.blank):
            if lane is not None:
                backend.close(lane)
        return found

    return run


# -- whole images, many rows ------------------------------------------------------------------------------------------


def _drawn(sampler: Sampler, prompts: Sequence[str], backend: Callable[[], Backend]) -> Callable[[], Tensor]:
    """Draws an image of every prompt side by side, and returns the pixels of the first."""

    def run() -> Tensor:
        engine = Engine(sampler, backend())
        for seed, prompt in enumerate(prompts):
            row = engine.open()
            engine.feed(row, sampler.components.tokenizer.drawing_prompt(prompt)[:-1])
            engine.begin(row, ReplyLimits(tokens=0, pictures=1), seed, draws=True)
        pictures = {event.row: event.picture.image for event in engine.run() if isinstance(event, Completed)}
        return pictures[0]

    return run


def picture(components: Components) -> Iterator[list[Variant]]:
    """Whole images, prompt and pixels included: batches of 1, 2, 8 and 32 whose first image must stay what it is."""
    for guidance in (components.cfg.guidance, 0.0):
        config = DrawConfig.for_model(components, guidance=guidance)
        fast, exact = Sampler(components, config), Sampler(components, replace(config, precision="float64"))
        twin = exact.pretzel
        name = fast.backend().name
        settings: JsonObject = {"shape": components.cfg.name, "guided": guidance > 0}
        reference = _drawn(exact, PROMPTS[:1], lambda twin=twin: StreamBackend(twin, torch.float64))  # type: ignore[misc]
        group = [Variant(bench="picture", name="reference", run=reference, settings=settings | {"batch": 1})]
        for batch in (1, 2, 8, 32):
            prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
            group.append(
                Variant(
                    bench="picture",
                    name=name,
                    run=_drawn(fast, prompts, fast.backend),
                    units=batch,
                    tolerance=1e-3,
                    settings=settings | {"batch": batch},
                    exact_group=name if name.startswith("native") else "",
                )
            )
        yield group


def shallow(components: Components) -> Iterator[list[Variant]]:
    """The shallow blocks' inverse of one and of eight images: one latent after the other, and by Jacobi iteration."""
    deep, level = components.cfg.flow.deep, components.cfg.draw_level
    sampler = Sampler(components, DrawConfig.for_model(components))
    backend, exact = sampler.backend(), StreamBackend(components.pretzel.in_float64(), torch.float64)
    for batch in (1, 8):
        u = torch.randn(batch, deep.num_latents, deep.dim, generator=torch.Generator().manual_seed(0))
        runs: dict[str, Callable[[], Tensor]] = {
            "reference": lambda u=u: exact.unshallow(u.double(), level, SEQUENTIAL),  # type: ignore[misc]
            backend.name: lambda u=u: backend.unshallow(u, level, SEQUENTIAL),  # type: ignore[misc]
            "Jacobi": lambda u=u: backend.unshallow(u, level, Jacobi(tolerance=1e-5)),  # type: ignore[misc]
        }
        settings: JsonObject = {"shape": components.cfg.name, "batch": batch}
        yield [
            Variant(bench="shallow", name=name, run=run, units=batch, tolerance=LATENT, settings=settings)
            for name, run in runs.items()
        ]


# -- conversations ------------------------------------------------------------------------------------------------


def text(components: Components) -> Iterator[list[Variant]]:
    """Reading a prompt of 64 tokens, and writing sixteen tokens one after the other."""
    ids = [1, *range(10, 72), 2]
    sampler = Sampler(components, DrawConfig.for_model(components))
    exact = StreamBackend(components.pretzel.in_float64(), torch.float64)
    backends: dict[str, Backend] = {"reference": exact, sampler.backend().name: sampler.backend()}
    settings: JsonObject = {"shape": components.cfg.name, "batch": 1}
    for bench, steps in (("prefill", 0), ("text", 16)):
        yield [
            Variant(
                bench=bench,
                name=name,
                run=_read(backend, components.cfg, ids, steps),
                units=steps or len(ids),
                tolerance=LATENT,
                settings=settings,
            )
            for name, backend in backends.items()
        ]


def _read(backend: Backend, cfg: ModelConfig, ids: Sequence[int], steps: int) -> Callable[[], Tensor]:
    """Reads ids and then single tokens; returns the last language state."""

    def run() -> Tensor:
        lane, cursor = backend.open(), Cursor(cfg.flow.deep.grid)
        backend.reserve(lane, len(ids) + steps)
        backend.append(lane, Chunk(ids, *cursor.text(len(ids))))
        for step in range(steps):
            backend.append_each([lane], [Chunk([10 + step], *cursor.text(1))])
        h = backend.mark(lane).h
        backend.close(lane)
        return h

    return run


# -- starting up --------------------------------------------------------------------------------------------------

IMPORTS = {"import torch": "import torch", "import starflow2.pipeline": "import starflow2.pipeline"}


def start(_: Components) -> Iterator[list[Variant]]:
    """CPU seconds of importing the library, against importing torch, each in a process of its own."""

    def importing(code: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            subprocess.run([sys.executable, "-c", code], check=True)
            return torch.zeros(1)

        return run

    yield [Variant(bench="start", name=name, run=importing(code)) for name, code in IMPORTS.items()]


BENCHES: dict[str, Callable[[Components], Iterator[list[Variant]]]] = {
    "latent": latent,
    "picture": picture,
    "shallow": shallow,
    "text": text,
    "start": start,
}


def run_benches(
    components: Callable[[], Components], names: Sequence[str], rounds: int, *, times: bool
) -> Iterator[JsonObject]:
    """Rows of the benches with these names, as soon as each group is measured. Raises UsageError for other names."""
    for name in names:
        if name not in BENCHES:
            raise UsageError(f"there is no benchmark {name!r}; expected {', '.join(BENCHES)}.{nearest(name, BENCHES)}")
    model = components()
    for name in names:
        for group in BENCHES[name](model):
            yield from measured(group, rounds, times=times)
