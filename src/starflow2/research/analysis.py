"""Measurements of a trained model: how much the skips contribute, and what a turn of a conversation costs.

Numbers are returned as dataclasses with `to_json`, plots are written as PNG files.
Letters: M positions, N latents, P images, D latent dim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from starflow2.core.images import save_png
from starflow2.errors import ConfigError
from starflow2.inference.config import ReplyLimits
from starflow2.inference.engine import Engine
from starflow2.inference.events import Completed, DecodedImage, Token
from starflow2.inference.sampler import Sampler
from starflow2.inference.session import Session
from starflow2.models.joint_stream import Trace, read_documents
from starflow2.models.prompts import normalized
from starflow2.models.sequence import Document, Image, Text, pack
from starflow2.research.plots import Panel, histogram_outline, plot_panels
from starflow2.world.captions import suite_drawings
from starflow2.world.grammar import FAMILIES
from starflow2.world.questions import DESCRIBE

__all__ = [
    "Contribution",
    "SkipReport",
    "Spread",
    "TurnCost",
    "dev_prompts",
    "median_cost",
    "plot_skips",
    "plot_turn_costs",
    "skip_contributions",
    "turn_costs",
]

PERCENTILES = (5, 25, 50, 75, 95)
BINS = 40
Measure = Literal["contribution_ratio", "cosine", "centred_cosine"]


# -- what the skips carry ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contribution:
    """Contribution of one skip at M positions, where W h is added to a base (eq. 5.1, 5.2); both (M,) float64.

    contribution_ratio: |W h| / (|base| + |W h|), in [0, 1]; cosine: of base and W h, in [-1, 1], 0 where W h is 0.
    centred_cosine: that of what both have beside their means over positions. A constant vector in W h, which says
    nothing about any position, raises the first cosine and not this one.
    """

    contribution_ratio: Tensor
    cosine: Tensor
    centred_cosine: Tensor

    @classmethod
    def of(cls, base: Tensor, injected: Tensor) -> Contribution:
        """base and injected (W h): (M, width)."""
        base, injected = base.double().cpu(), injected.double().cpu()
        sizes = base.norm(dim=-1), injected.norm(dim=-1)
        ratio = sizes[1] / (sizes[0] + sizes[1]).clamp(min=torch.finfo(torch.float64).tiny)
        return cls(ratio, _cosine(base, injected), _cosine(base - base.mean(0), injected - injected.mean(0)))

    @property
    def spreads(self) -> dict[Measure, Spread]:
        """Mean, percentiles and histogram of each."""
        return {
            "contribution_ratio": Spread.of(self.contribution_ratio, 0.0),
            "cosine": Spread.of(self.cosine, -1.0),
            "centred_cosine": Spread.of(self.centred_cosine, -1.0),
        }

    def to_json(self) -> dict[str, object]:
        """The number of positions, and all numbers of `spreads`."""
        return {"positions": len(self.cosine), **{name: spread.to_json() for name, spread in self.spreads.items()}}


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each pair of rows, (M, width) and (M, width) -> (M,); 0 where one of them is 0."""
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=torch.finfo(a.dtype).tiny)


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, percentiles and histogram of M values."""

    mean: float
    percentiles: tuple[float, ...]  # as in PERCENTILES
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Tensor, low: float) -> Spread:
        """values: (M,) in [low, 1], the range of the histogram."""
        counts, edges = torch.histogram(values, BINS, range=(low, 1.0))
        percentiles = values.quantile(torch.tensor([p / 100 for p in PERCENTILES], dtype=values.dtype))
        numbers = tuple(float(v) for v in percentiles), tuple(edges.tolist()), tuple(int(c) for c in counts)
        return cls(float(values.mean()), *numbers)

    def to_json(self) -> dict[str, object]:
        return {
            "mean": self.mean,
            "percentiles": {str(p): v for p, v in zip(PERCENTILES, self.percentiles, strict=True)},
            "histogram": {"edges": list(self.edges), "counts": list(self.counts)},
        }


@dataclass(frozen=True, slots=True)
class SkipReport:
    """Contributions over transcripts of `prompts`: visual skip at latents, text skip where tokens are predicted."""

    visual: Contribution
    text: Contribution
    prompts: tuple[str, ...]
    seed: int
    grid: tuple[int, int]

    def by_place(self) -> Tensor:
        """Mean contribution ratio of the visual skip at each latent of the grid: (rows, columns)."""
        return self.visual.contribution_ratio.view(len(self.prompts), *self.grid).mean(0)

    def to_json(self) -> dict[str, object]:
        """All numbers; `visual_by_place` are the rows of `by_place`."""
        return {
            "seed": self.seed,
            "prompts": list(self.prompts),
            "visual": self.visual.to_json(),
            "text": self.text.to_json(),
            "visual_by_place": self.by_place().tolist(),
        }


@torch.no_grad()
def skip_contributions(sampler: Sampler, prompts: int = 50, seed: int = 0) -> SkipReport:
    """Eq. 5.1 and 5.2 over transcripts in which the model draws each of `prompts` dev prompts and describes the image.

    Transcripts are read in one parallel pass, so that every position counts once. The text skip is measured where it
    acts, at positions of replies. Raises ConfigError for no prompts, or for a model whose skips are closed.
    """
    if prompts < 1:
        raise ConfigError(f"prompts is {prompts}; expected at least 1.")
    if sampler.pretzel.skips != {"visual", "text"}:
        raise ConfigError(
            f"skips are {sorted(sampler.pretzel.skips)}; expected both open, or there is nothing to measure."
        )
    texts = dev_prompts(prompts)
    uses: dict[str, list[tuple[Tensor, Tensor]]] = {"visual": [], "text": []}
    for first in range(0, prompts, sampler.config.batch):
        transcripts = _transcripts(sampler, texts[first : first + sampler.config.batch], seed + first)
        batch = pack([t.document for t in transcripts], sampler.layout).to(sampler.components.device)
        x = torch.stack([t.picture.x for t in transcripts])
        levels = torch.full((len(transcripts),), sampler.noise_level, dtype=sampler.dtype, device=x.device)
        trace: Trace = []
        stream = sampler.pretzel.traced(trace)
        _ = read_documents(stream, batch, x, levels).logits  # the text skip is used where words are predicted
        for name, base, injected in trace:
            uses[name].append((base, injected))
    visual, text = (
        Contribution.of(torch.cat([base for base, _ in uses[name]]), torch.cat([added for _, added in uses[name]]))
        for name in ("visual", "text")
    )
    return SkipReport(visual, text, tuple(texts), seed, sampler.layout.grid)


def dev_prompts(count: int) -> list[str]:
    """The first prompts of the dev suite, the families taking turns."""
    each = math.ceil(count / len(FAMILIES))
    drawings = suite_drawings("geneval", "dev", "id", each)
    return [drawings[family * each + i].prompt for i in range(each) for family in range(len(FAMILIES))][:count]


@dataclass(frozen=True, slots=True)
class _Transcript:
    document: Document
    picture: DecodedImage


def _transcripts(sampler: Sampler, prompts: Sequence[str], seed: int) -> list[_Transcript]:
    """For every prompt, the model's image and the model's description of that image."""
    tokenizer, engine = sampler.components.tokenizer, Engine(sampler)
    rows, seeds = [engine.open() for _ in prompts], range(seed, seed + len(prompts))
    replies = tokenizer.opens_reply()
    requests = [(*tokenizer.opens_user(), *_ids(sampler, prompt), *replies) for prompt in prompts]
    question = (*tokenizer.opens_user(is_first=False), *_ids(sampler, DESCRIBE), *replies)
    for row, ids, own in zip(rows, requests, seeds, strict=True):
        engine.feed(row, ids)
        engine.begin(row, ReplyLimits(tokens=0, pictures=1), own, draws=True)
    pictures = {event.row: event.picture for event in engine.run() if isinstance(event, Completed)}
    for row, own in zip(rows, seeds, strict=True):
        engine.feed(row, question)
        engine.begin(row, ReplyLimits(pictures=0), own)
    words: list[list[int]] = [[] for _ in prompts]
    for event in engine.run():
        if isinstance(event, Token):
            words[rows.index(event.row)].append(event.id)
    ends = tokenizer.special.end
    end = Text((ends,), is_target=True)
    return [
        _Transcript((Text(ids), Image(is_target=True), end, Text(question), Text((*reply, ends), True)), p)
        for ids, reply, p in zip(requests, words, (pictures[row] for row in rows), strict=True)
    ]


def _ids(sampler: Sampler, text: str) -> list[int]:
    return sampler.components.tokenizer.encode(normalized(sampler.components, text))


def plot_skips(report: SkipReport, path: str | Path) -> None:
    """The two panels of figure 7 as a PNG: share of positions by contribution ratio and by cosine, for both skips."""
    axes: tuple[tuple[str, str, Measure], ...] = (
        ("contribution ratio (eq. 5.1, 5.2)", "|Wh| / (|base| + |Wh|)", "contribution_ratio"),
        ("cosine of base and injected", "cosine", "cosine"),
    )
    panels = [
        Panel(title=title, x_label=label, y_label="share of positions", curves=_outlines(report, name))
        for title, label, name in axes
    ]
    save_png(plot_panels(panels), path)


def _outlines(report: SkipReport, name: Measure) -> dict[str, list[tuple[float, float]]]:
    curves = {}
    for label, contribution in (("visual skip", report.visual), ("text skip", report.text)):
        spread, positions = contribution.spreads[name], len(contribution.cosine)
        shares = [count / positions for count in spread.counts]
        curves[f"{label}, mean {spread.mean:.3f}"] = histogram_outline(spread.edges, shares)
    return curves


# -- what a conversation costs -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TurnCost:
    """Seconds of turn number `turn`, a prompt and the image drawn for it, `slots` new positions in all.

    reading, drawing: in a session that keeps its cache. reading_again, drawing_again: in a new session that first reads
    the whole transcript.
    """

    turn: int
    slots: int
    reading: float
    drawing: float
    reading_again: float
    drawing_again: float

    @property
    def per_slot(self) -> float:
        return (self.reading + self.drawing) / self.slots

    @property
    def per_slot_again(self) -> float:
        return (self.reading_again + self.drawing_again) / self.slots

    def to_json(self) -> dict[str, float]:
        """All numbers, and how many times slower a new session is: in all, and until the first new latent."""
        ratios = {
            "slower": self.per_slot_again / self.per_slot,
            "slower_to_start": self.reading_again / self.reading,
        }
        return {**asdict(self), "per_slot": self.per_slot, "per_slot_again": self.per_slot_again, **ratios}


def turn_costs(sampler: Sampler, turns: int = 8, repeats: int = 3, seed: int = 0) -> list[TurnCost]:
    """The cost of each turn of a drawing session, with its cache and with a new session at every turn.

    The new session encodes all earlier images from their pixels and reads the whole transcript. Medians of `repeats`
    whole sessions; CPU seconds on CPU, wall seconds elsewhere.
    """
    if turns < 1 or repeats < 1:
        raise ConfigError(f"turns is {turns} and repeats is {repeats}; expected at least 1 of each.")
    runs = [list(_timed_turns(sampler, dev_prompts(turns), seed)) for _ in range(repeats)]
    return [median_cost(same) for same in zip(*runs, strict=True)]


def _timed_turns(sampler: Sampler, prompts: Sequence[str], seed: int) -> Iterator[TurnCost]:
    session, clock = Session(sampler, seed), _clock(sampler.components.device)
    transcript: list[str | Tensor] = []
    for turn, prompt in enumerate(prompts, 1):
        before = session.length
        transcript.append(prompt)
        start = clock()
        session.add(prompt).read()
        after_reading = clock()
        image = session.draw().picture.image
        after_drawing = clock()
        fresh = Session(sampler, seed).add(*transcript)
        fresh.read()
        after_reading_again = clock()
        fresh.draw()
        end = clock()
        transcript.append(image)
        yield TurnCost(
            turn,
            session.length - before,
            after_reading - start,
            after_drawing - after_reading,
            after_reading_again - after_drawing,
            end - after_reading_again,
        )


def _clock(device: torch.device) -> Callable[[], float]:
    """A clock in seconds: CPU time of this process on CPU, which other load does not change; wall time elsewhere."""
    if device.type == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return synchronised


def median_cost(same: Sequence[TurnCost]) -> TurnCost:
    """The median of each time over repeats of one turn."""
    times = (median(getattr(cost, name) for cost in same) for name in TurnCost.__slots__[2:])
    return TurnCost(same[0].turn, same[0].slots, *times)


def plot_turn_costs(costs: Sequence[TurnCost], path: str | Path) -> None:
    """Two panels as a PNG: milliseconds per new position of a turn, and milliseconds until its first new latent."""
    whole = {
        "one cache": [(c.turn, 1e3 * c.per_slot) for c in costs],
        "all read anew": [(c.turn, 1e3 * c.per_slot_again) for c in costs],
    }
    start = {
        "one cache": [(c.turn, 1e3 * c.reading) for c in costs],
        "all read anew": [(c.turn, 1e3 * c.reading_again) for c in costs],
    }
    panels = [
        Panel(title="a turn of a drawing session", x_label="turn", y_label="ms per new slot", curves=whole),
        Panel(title="reading, before the first new latent", x_label="turn", y_label="ms", curves=start),
    ]
    save_png(plot_panels(panels), path)
