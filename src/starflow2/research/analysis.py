"""What happens inside a trained model: what the skips carry, where a picture is surprising, what a turn costs.

Numbers go out as dataclasses with `to_json`, plots as PNG files. Not here: benchmarks (evals), scores (scoring).
Letters: M positions, N latents, P pictures, D latent dim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from starflow2.core.images import save_png
from starflow2.core.serialize import JsonObject
from starflow2.errors import ConfigError
from starflow2.inference.decoder import BatchDecoder, ReplyLimits
from starflow2.inference.events import Completed, DecodedImage, Token
from starflow2.inference.sampler import Sampler
from starflow2.inference.session import Session
from starflow2.models.joint_stream import Trace, read_documents
from starflow2.models.prompts import normalized
from starflow2.models.sequence import Document, Image, Text, pack
from starflow2.research.plots import Panel, histogram_outline, plot_panels
from starflow2.world.captions import FAMILIES, suite_drawings
from starflow2.world.questions import DESCRIBE

__all__ = [
    "Contribution",
    "SkipReport",
    "TurnCost",
    "plot_skips",
    "plot_turn_costs",
    "skip_contributions",
    "turn_costs",
]

PERCENTILES = (5, 25, 50, 75, 95)
BINS = 40


# -- what the skips carry ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contribution:
    """One skip at M positions, where W h is added to a base (paper eq. 5.1, 5.2). Both (M,) float64.

    contribution_ratio: |W h| / (|base| + |W h|), in [0, 1]; cosine: of base and W h, in [-1, 1], 0 where W h is 0.
    """

    contribution_ratio: Tensor
    cosine: Tensor

    @classmethod
    def of(cls, base: Tensor, injected: Tensor) -> Contribution:
        """base, injected: (M, width)."""
        base, injected = base.double().cpu(), injected.double().cpu()
        sizes = base.norm(dim=-1), injected.norm(dim=-1)
        tiny = torch.finfo(torch.float64).tiny
        ratio = sizes[1] / (sizes[0] + sizes[1]).clamp(min=tiny)
        return cls(ratio, (base * injected).sum(-1) / (sizes[0] * sizes[1]).clamp(min=tiny))

    def to_json(self) -> JsonObject:
        """Mean, percentiles and histogram of both."""
        told = {"contribution_ratio": _spread(self.contribution_ratio, 0.0), "cosine": _spread(self.cosine, -1.0)}
        return {"positions": len(self.cosine), **told}


def _spread(values: Tensor, low: float) -> JsonObject:
    """Mean, percentiles, and the histogram on [low, 1] of values (M,)."""
    counts, edges = torch.histogram(values, BINS, range=(low, 1.0))
    found = values.quantile(torch.tensor([p / 100 for p in PERCENTILES], dtype=values.dtype))
    return {
        "mean": float(values.mean()),
        "percentiles": {str(p): float(v) for p, v in zip(PERCENTILES, found, strict=True)},
        "histogram": {"edges": edges.tolist(), "counts": [int(c) for c in counts]},
    }


@dataclass(frozen=True, slots=True)
class SkipReport:
    """Both skips over transcripts of `prompts`: visual at every latent, text wherever the model predicts a word."""

    visual: Contribution
    text: Contribution
    prompts: tuple[str, ...]
    seed: int
    grid: tuple[int, int]

    def by_place(self) -> Tensor:
        """The mean visual contribution ratio at every place of a picture: (rows, columns)."""
        return self.visual.contribution_ratio.view(len(self.prompts), *self.grid).mean(0)

    def to_json(self) -> JsonObject:
        """All numbers; `visual_by_place` are the rows of `by_place`."""
        told = {"visual": self.visual.to_json(), "text": self.text.to_json()}
        return {"seed": self.seed, "prompts": list(self.prompts), **told, "visual_by_place": self.by_place().tolist()}


@torch.no_grad()
def skip_contributions(sampler: Sampler, prompts: int = 50, seed: int = 0) -> SkipReport:
    """Eq. 5.1 and 5.2 over transcripts: the model draws each of `prompts` of the dev suite and describes what it drew.

    Transcripts are read in one parallel pass, so that every position counts once. The text skip is measured where it
    acts, at positions of replies. Raises ConfigError for no prompts, or for a model whose skips are closed.
    """
    if prompts < 1:
        raise ConfigError(f"prompts is {prompts}; expected at least 1.")
    if sampler.pretzel.skips != {"visual", "text"}:
        raise ConfigError(f"skips are {sorted(sampler.pretzel.skips)}; expected both open, or there is nothing to see.")
    asked = _dev_prompts(prompts)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"visual": [], "text": []}
    for first in range(0, prompts, sampler.config.batch):
        told = _transcripts(sampler, asked[first : first + sampler.config.batch], seed + first)
        batch = pack([t.document for t in told], sampler.layout).to(sampler.components.device)
        x = torch.stack([t.picture.x for t in told])
        levels = torch.full((len(told),), sampler.noise_level, dtype=sampler.dtype, device=x.device)
        trace: Trace = []
        stream = sampler.pretzel.traced(trace)
        _ = read_documents(stream, batch, x, levels).logits  # the text skip is used where words are predicted
        for name, base, injected in trace:
            found[name].append((base, injected))
    visual, text = (
        Contribution.of(torch.cat([base for base, _ in found[name]]), torch.cat([added for _, added in found[name]]))
        for name in ("visual", "text")
    )
    return SkipReport(visual, text, tuple(asked), seed, sampler.layout.grid)


def _dev_prompts(count: int) -> list[str]:
    """The first prompts of the dev suite, one family after the other in turn."""
    each = math.ceil(count / len(FAMILIES))
    drawings = suite_drawings("geneval", "dev", "id", each)
    return [drawings[family * each + i].prompt for i in range(each) for family in range(len(FAMILIES))][:count]


@dataclass(frozen=True, slots=True)
class _Transcript:
    document: Document
    picture: DecodedImage


def _transcripts(sampler: Sampler, prompts: Sequence[str], seed: int) -> list[_Transcript]:
    """For every prompt: a picture of it by the model, and the model's description of that picture."""
    tokenizer, rows = sampler.components.tokenizer, BatchDecoder(sampler, len(prompts))
    seeds, replies = range(seed, seed + len(prompts)), tokenizer.opens_reply()
    asked = [(*tokenizer.opens_user(), *_ids(sampler, prompt), *replies) for prompt in prompts]
    question = (*tokenizer.opens_user(is_first=False), *_ids(sampler, DESCRIBE), *replies)
    rows.read(asked)
    events = list(rows.reply(seeds, ReplyLimits(tokens=0, pictures=1), draws=True))
    pictures = {event.row: event.picture for event in events if isinstance(event, Completed)}
    rows.read([question] * len(prompts))
    words: list[list[int]] = [[] for _ in prompts]
    for event in rows.reply(seeds, ReplyLimits(pictures=0)):
        if isinstance(event, Token):
            words[event.row].append(event.id)
    ends = tokenizer.special.end
    end = Text((ends,), is_target=True)
    return [
        _Transcript((Text(ids), Image(is_target=True), end, Text(question), Text((*said, ends), True)), p)
        for ids, said, p in zip(asked, words, (pictures[i] for i in range(len(prompts))), strict=True)
    ]


def _ids(sampler: Sampler, text: str) -> list[int]:
    return sampler.components.tokenizer.encode(normalized(sampler.components, text))


def plot_skips(report: SkipReport, path: str | Path) -> None:
    """The two panels of figure 7 as a PNG: share of positions by contribution ratio and by cosine, for both skips."""
    panels = [
        Panel(title=title, x_label=label, y_label="share of positions", curves=_outlines(report, name))
        for title, label, name in (
            ("contribution ratio (eq. 5.1, 5.2)", "|Wh| / (|base| + |Wh|)", "contribution_ratio"),
            ("cosine of base and injected", "cosine", "cosine"),
        )
    ]
    save_png(plot_panels(panels), path)


def _outlines(report: SkipReport, name: str) -> dict[str, list[tuple[float, float]]]:
    curves = {}
    for label, contribution in (("visual skip", report.visual), ("text skip", report.text)):
        told = contribution.to_json()
        counts, edges = told[name]["histogram"]["counts"], told[name]["histogram"]["edges"]
        shares = [count / told["positions"] for count in counts]
        curves[f"{label}, mean {told[name]['mean']:.3f}"] = histogram_outline(edges, shares)
    return curves


# -- what a conversation costs -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TurnCost:
    """Seconds of turn `turn`, in which the user says something and the model draws `slots` new slots in all.

    reading, drawing: in a session that keeps its cache; again: both in a new session that reads everything anew.
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

    def to_json(self) -> JsonObject:
        """All numbers, and how many times slower reading everything anew is, in all and before the first new latent."""
        ratios = {
            "slower": self.per_slot_again / self.per_slot,
            "slower_to_start": self.reading_again / self.reading,
        }
        return {**asdict(self), "per_slot": self.per_slot, "per_slot_again": self.per_slot_again, **ratios}


def turn_costs(sampler: Sampler, turns: int = 8, repeats: int = 3, seed: int = 0) -> list[TurnCost]:
    """What every turn of a drawing session costs, against reading the whole transcript anew at every turn.

    The other session is fresh at each turn: it encodes all earlier pictures from their pixels and reads them and all
    words. Medians of `repeats` whole sessions; CPU seconds on CPU, wall seconds elsewhere.
    """
    if turns < 1 or repeats < 1:
        raise ConfigError(f"turns is {turns} and repeats is {repeats}; expected at least 1 of each.")
    runs = [list(_timed_turns(sampler, _dev_prompts(turns), seed)) for _ in range(repeats)]
    return [_middle(same) for same in zip(*runs, strict=True)]


def _timed_turns(sampler: Sampler, prompts: Sequence[str], seed: int) -> Iterator[TurnCost]:
    session, clock = Session(sampler, seed), _clock(sampler.components.device)
    transcript: list[str | Tensor] = []
    for turn, prompt in enumerate(prompts, 1):
        before = session.length
        transcript.append(prompt)
        start = clock()
        session.add(prompt)
        read = clock()
        image = session.draw().picture.image
        drawn = clock()
        fresh = Session(sampler, seed).add(*transcript)
        read_again = clock()
        fresh.draw()
        end = clock()
        transcript.append(image)
        yield TurnCost(turn, session.length - before, read - start, drawn - read, read_again - drawn, end - read_again)


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds: of this process on CPU, which neighbours on the machine do not change; on the wall elsewhere."""
    if device.type == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return synchronised


def _middle(same: Sequence[TurnCost]) -> TurnCost:
    """The median of every time over repeats of one turn."""
    times = (median(getattr(cost, name) for cost in same) for name in TurnCost.__slots__[2:])
    return TurnCost(same[0].turn, same[0].slots, *times)


def plot_turn_costs(costs: Sequence[TurnCost], path: str | Path) -> None:
    """Two panels as a PNG: milliseconds per new slot of a turn, and those before its first new latent."""
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
