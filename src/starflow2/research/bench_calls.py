"""Benchmarks of calls about images: answering, scoring, inverting; and how near drawing comes to float64 in all.

An answer's words must be the same in every form, scores and codes nearly those of float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from starflow2.core.images import to_bytes
from starflow2.core.serialize import JsonObject
from starflow2.inference.backend import Backend
from starflow2.inference.config import DrawConfig, Precision, ReplyLimits
from starflow2.inference.conversations import generate_replies
from starflow2.inference.engine import Engine
from starflow2.inference.events import DecodedImage, Token
from starflow2.inference.likelihood import invert, score
from starflow2.inference.reading import read_image
from starflow2.inference.sampler import Sampler
from starflow2.inference.streams import StreamBackend
from starflow2.models.components import Components
from starflow2.research.bench import Variant
from starflow2.research.bench_cases import LATENT, PROMPTS
from starflow2.world.captions import caption_task
from starflow2.world.detector import detect

__all__ = ["calls", "equality"]

QUESTION = "how many hearts are there?"
NATS = 0.05  # largest difference of a score in float32
PIXEL, LOOKS = 1e-3, 0.02  # goal for every image, and what no eye tells apart
TALKS, TURNS = 64, 16  # captions by themselves, and captions with an edit


def calls(components: Components) -> Iterator[list[Variant]]:
    """An answer about an image, the score of an image, and its code; the plain form of each first."""
    exact, fast = (_sampler(components, precision) for precision in ("float64", "float32"))
    image = _images(fast, [[[PROMPTS[0]]]])[0].image
    settings: JsonObject = {"shape": components.cfg.name, "batch": 1}
    plain = StreamBackend(exact.pretzel, torch.float64)
    forms = {
        "reference": partial(_answer, exact, plain, image),
        fast.backend().name: partial(_answer, fast, None, image),
    }
    yield _group("ask", forms, settings, 0.0)
    samplers = {"float64, as called": exact, "float32": fast}
    yield _group("score", {name: partial(_score, by, image) for name, by in samplers.items()}, settings, NATS)
    yield _group("invert", {name: partial(_code, by, image) for name, by in samplers.items()}, settings, LATENT)


def _sampler(components: Components, precision: Precision) -> Sampler:
    return Sampler(components, DrawConfig.for_model(components, precision=precision))


def _group(
    bench: str, runs: Mapping[str, Callable[[], Tensor]], settings: JsonObject, tolerance: float
) -> list[Variant]:
    return [
        Variant(bench=bench, name=name, run=run, tolerance=tolerance, settings=settings) for name, run in runs.items()
    ]


def _answer(sampler: Sampler, backend: Backend | None, image: Tensor) -> Tensor:
    """Tokens of an answer of twelve at most."""
    engine, tokenizer = Engine(sampler, backend), sampler.components.tokenizer
    row = engine.open()
    engine.feed(row, tokenizer.opens_user())
    read_image(engine, row, image)
    engine.feed(row, [*tokenizer.encode(QUESTION), *tokenizer.opens_reply()])
    engine.begin(row, ReplyLimits(tokens=12, pictures=0), 0)
    ids = [event.id for event in engine.run() if isinstance(event, Token)]
    engine.release(row)
    return torch.tensor(ids)


def _score(sampler: Sampler, image: Tensor) -> Tensor:
    return torch.tensor([score(sampler, [PROMPTS[0]], [image]).log_prob], dtype=torch.float64)


def _code(sampler: Sampler, image: Tensor) -> Tensor:
    return invert(sampler, image, PROMPTS[0]).z


# -- all that is drawn, against float64 -------------------------------------------------------------------------------


def equality(components: Components) -> Iterator[list[Variant]]:
    """64 captions and 16 conversations with an edit, in float32 and in float64: pixels, latents, and what is seen.

    `close` counts images within the goals of both, `seen` those in which the detector finds the same things.
    """
    settings: JsonObject = {"shape": components.cfg.name, "batch": TALKS + TURNS}
    talks = [[[caption_task(1, i).prompt]] for i in range(TALKS)]
    talks += [[[turn] for turn in (caption_task(2, i).prompt, "make it blue")] for i in range(TURNS)]
    theirs = _images(_sampler(components, "float64"), talks)
    fast = _sampler(components, "float32")
    expected = torch.stack([drawn.image.float() for drawn in theirs])

    def run() -> Tensor:
        mine = _images(fast, talks)
        settings.update(_nearness(mine, theirs))
        return torch.stack([drawn.image.float() for drawn in mine])

    yield [
        Variant(
            bench="equality",
            name=fast.backend().name,
            run=run,
            units=len(theirs),
            expected=expected,
            tolerance=LOOKS,
            settings=settings,
            is_timed=False,
        )
    ]


def _images(sampler: Sampler, talks: Sequence[Sequence[Sequence[str]]]) -> list[DecodedImage]:
    """An image in reply to every user turn; the seed of a conversation is its number."""
    limits = ReplyLimits(tokens=0, pictures=1)
    replies = generate_replies(sampler, talks, range(len(talks)), limits, draws=True)
    return [part for talk in replies for turn in talk for part in turn if isinstance(part, DecodedImage)]


def _nearness(mine: Sequence[DecodedImage], theirs: Sequence[DecodedImage]) -> JsonObject:
    """Largest differences of any image, and how many are within the goals and look the same to the detector."""
    pairs = list(zip(mine, theirs, strict=True))
    u = torch.tensor([float((a.u - b.u).abs().max()) for a, b in pairs])
    pixels = torch.tensor([float((a.image - b.image).abs().max()) for a, b in pairs])
    seen = sum(_things(a.image) == _things(b.image) for a, b in pairs)
    close = int(((u <= LATENT) & (pixels <= PIXEL)).sum())
    return {"u": float(u.max()), "pixels": float(pixels.max()), "close": f"{close} of {len(pairs)}", "seen": seen}


def _things(image: Tensor) -> list[tuple[int, int | None, int]]:
    """Shapes, colours and sizes that the detector finds, as numbers."""
    return [(found.shape, found.color, found.size) for found in detect(to_bytes(image[None].float()))[0].detections]
