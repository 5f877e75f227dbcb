"""Benchmarks of decoding: an image's latents, whole images, shallow blocks, prompts and words.

Each function yields groups of variants; the first of a group is the reference that the others are compared with. Models
are nano, or one of another shape with random weights. Many rows and many turns are in `bench_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from starflow2.core.serialize import JsonObject
from starflow2.flow.block import Reading
from starflow2.flow.context import Context, Guide
from starflow2.flow.solver import SEQUENTIAL, BlockJacobi, Jacobi, Solution, Solver, solve
from starflow2.inference.backend import Backend, Begin, Chunk, NewImage, Pair
from starflow2.inference.config import DrawConfig, Precision, ReplyLimits
from starflow2.inference.engine import Engine
from starflow2.inference.events import Completed
from starflow2.inference.lean import LeanBackend
from starflow2.inference.packed import pack
from starflow2.inference.sampler import Sampler
from starflow2.inference.streams import StreamBackend
from starflow2.models.components import Components
from starflow2.models.config import ModelConfig
from starflow2.models.pretzel import text_context
from starflow2.models.sequence import Cursor
from starflow2.research.bench import Variant

__all__ = ["LATENT", "PROMPTS", "Drawing", "deep", "forms", "latent", "picture", "shallow", "text"]

LATENT = 2e-3  # largest difference of a latent in float32 from the float64 reference (issue 6, D4)
PROMPTS = ("two red hearts", "a blue star left of a green ring", "a small black diamond", "a red circle")


# -- one latent ---------------------------------------------------------------------------------------------------


class Drawing:
    """An image that a backend draws, guided or not, by numbers that need no tokenizer.

    count: of latents, None: all of them and then their shallow inverse. words: positions of the prompt.
    """

    def __init__(
        self, backend: Backend, cfg: ModelConfig, *, guided: bool, count: int | None = None, words: int = 13
    ) -> None:
        self.backend, self.cfg, self.guided, self.words = backend, cfg, guided, words
        self.count = count or cfg.flow.deep.num_latents
        self.is_whole = count is None
        self.pair: Pair | None = None

    def restart(self) -> Pair:
        """Read the prompt in fresh lanes."""
        if self.pair is not None:
            for lane in (self.pair.lane, self.pair.blank):
                if lane is not None:
                    self.backend.close(lane)
        main = self._lane([1, *range(10, 7 + self.words), 2, 4])
        blank = self._lane([1, 2, 4]) if self.guided else None
        self.pair = Pair(main, blank, self.cfg.draw_level)
        self.backend.arrange([self.pair], [])
        return self.pair

    def _lane(self, ids: Sequence[int]) -> int:
        deep, lane, cursor = self.cfg.flow.deep, self.backend.open(), Cursor(self.cfg.flow.deep.grid)
        self.backend.reserve(lane, len(ids) + deep.num_latents)
        chunk = Chunk(ids, *cursor.text(len(ids)), begin=Begin(len(ids) - 1, self.cfg.draw_level, None))
        self.backend.append(lane, chunk)
        z = self.cfg.prior_scale * torch.randn(deep.num_latents, deep.dim, generator=torch.Generator().manual_seed(0))
        strength = torch.full((deep.num_latents,), self.cfg.guidance)
        self.backend.start(lane, NewImage(z, self.cfg.draw_level, strength, *cursor.latents(), None))
        return lane

    def draw(self) -> Tensor:
        """Latents u (n, D) after `restart`; of a whole image x below them, (2 N, D)."""
        assert self.pair is not None
        self.backend.draw([self.pair], self.count)
        u = self.backend.drawn(self.pair).u[: self.count]
        if not self.is_whole:
            return u
        return torch.cat([u, self.backend.unshallow(u[None], self.cfg.draw_level, SEQUENTIAL)[0]])

    def whole(self) -> Tensor:
        """Read the prompt and draw; returns what `draw` does."""
        self.restart()
        return self.draw()

    def step(self) -> Callable[[], None]:
        """The next latent, as a compiler would take it, from a new image on."""
        pair = self.restart()
        assert isinstance(self.backend, LeanBackend)
        return self.backend.latent_step([pair])


def forms(components: Components) -> dict[str, Backend]:
    """Every code that runs this model, by name; the first is the reference in float64."""
    stream = components.pretzel
    found: dict[str, Backend] = {
        "reference": StreamBackend(stream.in_float64(), torch.float64),
        "lean float64": LeanBackend(pack(stream, torch.float64)),
        "lean": LeanBackend(pack(stream)),
    }
    fastest = Sampler(components, DrawConfig.for_model(components)).backend()
    return found | ({fastest.name: fastest} if fastest.name not in found else {})


def latent(components: Components) -> Iterator[list[Variant]]:
    """The latents of an image and their share of the shallow blocks, after its prompt."""
    cfg = components.cfg
    for guided in (True, False):
        group = []
        for name, backend in forms(components).items():
            drawing = Drawing(backend, cfg, guided=guided)
            settings: JsonObject = {"shape": cfg.name, "batch": 1, "guided": guided, "dtype": str(backend.dtype)}
            group.append(
                Variant(
                    bench="latent",
                    name=name,
                    run=drawing.draw,
                    before=drawing.restart,
                    units=cfg.flow.deep.num_latents,
                    tolerance=LATENT,
                    settings=settings,
                )
            )
        yield group


# -- whole images, many rows ------------------------------------------------------------------------------------------


def _drawn(sampler: Sampler, count: int, backend: Callable[[], Backend]) -> Callable[[], Tensor]:
    """Draws `count` images side by side, and returns the pixels of the first."""

    def run() -> Tensor:
        engine = Engine(sampler, backend())
        for seed in range(count):
            row = engine.open()
            engine.feed(row, sampler.components.tokenizer.drawing_prompt(PROMPTS[seed % len(PROMPTS)])[:-1])
            engine.begin(row, ReplyLimits(tokens=0, pictures=1), seed, draws=True)
        pictures = {event.row: event.picture.image for event in engine.run() if isinstance(event, Completed)}
        return pictures[0]

    return run


def picture(components: Components) -> Iterator[list[Variant]]:
    """Whole images, prompt and pixels included: batches of 1, 2, 8 and 32 whose first image must stay what it is.

    Then what guidance costs: images without it, and the same ones with it.
    """
    fast = {strength: _sampler(components, strength) for strength in (components.cfg.guidance, 0.0)}
    name = fast[0.0].backend().name
    for guidance, sampler in fast.items():
        exact, shape = _sampler(components, guidance, "float64"), components.cfg.name
        settings: JsonObject = {"shape": shape, "guided": guidance > 0, "batch": 1}
        plain = partial(StreamBackend, exact.pretzel, torch.float64)
        lean = partial(LeanBackend, pack(sampler.pretzel))
        group = [Variant(bench="picture", name="reference", run=_drawn(exact, 1, plain), settings=settings)]
        group += _batches(sampler, (1, 8), lean, "lean", settings) if name != "lean" else []
        yield group + _batches(sampler, (1, 2, 8, 32), sampler.backend, name, settings)
    for batch in (1, 8):
        yield [_guided(sampler, batch, guidance > 0) for guidance, sampler in sorted(fast.items())]


def _sampler(components: Components, guidance: float, precision: Precision = "auto") -> Sampler:
    return Sampler(components, DrawConfig.for_model(components, guidance=guidance, precision=precision))


def _batches(
    sampler: Sampler, batches: Sequence[int], backend: Callable[[], Backend], name: str, settings: JsonObject
) -> list[Variant]:
    """Images side by side, of which the first is compared."""
    return [
        Variant(
            bench="picture",
            name=name,
            run=_drawn(sampler, batch, backend),
            units=batch,
            tolerance=1e-3,
            settings=settings | {"batch": batch},
            exact_group=name if name.startswith("native") else "",
        )
        for batch in batches
    ]


def _guided(sampler: Sampler, batch: int, guided: bool) -> Variant:
    """Images that are compared with themselves: with guidance they are others."""
    run = _drawn(sampler, batch, sampler.backend)
    settings: JsonObject = {"shape": sampler.components.cfg.name, "guided": guided, "batch": batch}
    name = sampler.backend().name
    return Variant(bench="guidance", name=name, run=run, units=batch, expected=run(), tolerance=1e-3, settings=settings)


def shallow(components: Components) -> Iterator[list[Variant]]:
    """The shallow blocks' inverse of 1, 8 and 32 images: one latent after the other, and by Jacobi iteration."""
    deep, level = components.cfg.flow.deep, components.cfg.draw_level
    backends = forms(components)
    for batch in (1, 8, 32):
        u = torch.randn(batch, deep.num_latents, deep.dim, generator=torch.Generator().manual_seed(0))
        runs: dict[str, Callable[[], Tensor]] = {
            name: lambda u=u, of=backend: of.unshallow(u.to(of.dtype), level, SEQUENTIAL)  # type: ignore[misc]
            for name, backend in backends.items()
            if name != "lean float64"
        }
        runs["Jacobi"] = lambda u=u: backends["lean"].unshallow(u, level, Jacobi(tolerance=1e-5))  # type: ignore[misc]
        settings: JsonObject = {"shape": components.cfg.name, "batch": batch}
        yield [
            Variant(bench="shallow", name=name, run=run, units=batch, tolerance=LATENT, settings=settings)
            for name, run in runs.items()
        ]


# -- the deep block by itself ---------------------------------------------------------------------------------------


def deep(components: Components) -> Iterator[list[Variant]]:
    """The deep block's guided inverse after a prompt in float64: latent by latent, in chunks, and all latents at once.

    `evaluations` and `residual` certify what an iteration found; the check is its distance to the sequential result.
    """
    solve_by = _deep_solve(components)
    solvers: dict[str, Solver] = {
        "reference": SEQUENTIAL,
        **{f"Jacobi, chunks of {chunk}": BlockJacobi(chunk=chunk, tolerance=1e-6) for chunk in (4, 8, 16)},
        "Jacobi": Jacobi(tolerance=1e-6),
    }
    group = []
    for name, solver in solvers.items():
        found = solve_by(solver)
        settings: JsonObject = {
            "shape": components.cfg.name,
            "batch": 1,
            "guided": True,
            "evaluations": found.evaluations,
            "residual": found.residual,
        }
        units, run = components.cfg.flow.deep.num_latents, partial(_found, solve_by, solver)
        group.append(Variant(bench="deep", name=name, run=run, units=units, tolerance=1e-3, settings=settings))
    yield group


def _found(solve_by: Callable[[Solver], Solution], solver: Solver) -> Tensor:
    return solve_by(solver).x


def _deep_solve(components: Components) -> Callable[[Solver], Solution]:
    """The deep block's latents of one image, by any solver."""
    stream, cfg = components.pretzel.in_float64(), components.cfg
    prompt, empty = ([1, *words, 2, 4] for words in (range(10, 20), ()))
    ids = torch.tensor([prompt, [0] * (len(prompt) - len(empty)) + empty])
    is_real = torch.arange(len(prompt)).expand(2, -1) >= torch.tensor([[0], [len(prompt) - len(empty)]])
    steps = (is_real.cumsum(1) - 1).clamp(min=0)
    embeds = stream.vlm.embed(ids)
    with torch.no_grad():
        states = stream.vlm.states(embeds, steps.expand(3, -1, -1), None, is_real)
        states = text_context(cfg.joints, embeds, states)
    places = torch.stack([torch.zeros_like(steps), torch.zeros_like(steps), steps], dim=-1).double()
    context, blank = (Context(states[i : i + 1], places[i : i + 1], is_real[i : i + 1]) for i in range(2))
    guide, level = Guide(blank, cfg.guidance), torch.tensor([cfg.draw_level], dtype=torch.float64)
    shape = (1, cfg.flow.deep.num_latents, cfg.flow.deep.dim)
    z = cfg.prior_scale * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = stream.flow.deep

    def solved(solver: Solver) -> Solution:
        with torch.no_grad():
            how: Reading = "steps" if solver == SEQUENTIAL else "chunks"
            return solve(block.predictor(1, context, level, guide, how), z, solver)

    return solved


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
