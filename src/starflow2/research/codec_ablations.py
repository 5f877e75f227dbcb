"""Compare codecs, the paper's future work: the default frozen FAE, an FAE that trains with the flow, and no FAE at all.

Every arm gets a fresh flow and equal steps, batches and seeds of stage t2i, over the same frozen language model. Rows
are written one by one, so that a stopped comparison continues. The paper's own comparisons are in `ablations`.
Letters: B images, N latents, D latent dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, cast, get_args

import numpy as np
import torch
from torch import Tensor

from starflow2.core.fields import Config, Count, Seed, Weight
from starflow2.core.files import named_place, replacing
from starflow2.core.images import to_floats
from starflow2.errors import OutputError
from starflow2.evals.codec import codec_pictures, evaluate_codec
from starflow2.evals.geneval import score_geneval
from starflow2.evals.report import KeptRows
from starflow2.evals.suite import Report
from starflow2.flow.noise import add_noise
from starflow2.inference.config import Cleanup, DrawConfig
from starflow2.models.components import Components
from starflow2.models.context import drawing_context
from starflow2.models.pretrained import fingerprint
from starflow2.models.protocols import FeatureExtractor
from starflow2.nn import num_parameters
from starflow2.pipeline import StarFlow2
from starflow2.research.ablations import fresh_components
from starflow2.research.runs import ProgressPrinter, run_parallel
from starflow2.training.config import OptimConfig, StageConfig
from starflow2.training.loop import fit_task
from starflow2.training.recipes import with_patches
from starflow2.training.tasks import T2iTask
from starflow2.world.captions import suite_drawings
from starflow2.world.grammar import FAMILIES
from starflow2.world.scene import render

__all__ = [
    "ARMS",
    "Arm",
    "CodecsConfig",
    "Measures",
    "Row",
    "Scores",
    "compare_codecs",
    "held_out_nats",
    "start",
    "write",
]

Arm = Literal["frozen FAE", "end to end", "patches"]
ARMS: tuple[Arm, ...] = get_args(Arm)
CLEANED = "patches, cleaned"  # the same weights, drawn with Tweedie's step: patches do not remove noise
ROWS = (*ARMS, CLEANED)


class Scores(TypedDict):
    """One arm's numbers: images it draws, true images through its codec, held-out likelihood."""

    id: float  # W-GenEval dev, lenient
    cg: float
    psnr: float  # dB, of clean latents
    psnr_noise: float  # dB, at the noise level of drawing
    recognised: float  # share of true images that the detector still reads right, clean
    recognised_noise: float
    feature_fd: float | None
    nats_per_dim: float  # of held-out latents at the noise level of drawing
    floor: float  # the part of nats_per_dim that the noise alone costs


class Row(Scores):
    """One arm and seed, as codecs.json holds it."""

    arm: str
    seed: int
    trained: int  # parameters


@dataclass(frozen=True, kw_only=True)
class Measures:
    """How arms are scored; the budget does not depend on it."""

    geneval: Callable[..., Report] = score_geneval
    images: int = 128  # for round trips and held-out likelihood


@dataclass(frozen=True, kw_only=True)
class CodecsConfig(Config):
    """The budget, the same for all arms."""

    steps: Count = 1000
    batch: Count = 64
    seeds: tuple[Seed, ...] = (0,)
    codec_weight: Weight = 4.0  # of the FAE's losses where it trains with the flow
    quick: bool = True

    def stage(self, arm: Arm) -> StageConfig:
        """Stage t2i of nano with these steps and batch."""
        weight = self.codec_weight if arm == "end to end" else 0.0
        optim = OptimConfig(lr=3e-3, warmup_steps=min(60, self.steps))
        return StageConfig(name="t2i", steps=self.steps, batch=self.batch, optim=optim, codec_weight=weight)


def start(arm: Arm, folder: str | Path, seed: int, device: str = "cpu") -> Components:
    """Components before an arm's first step: frozen ones from `folder`, and a fresh flow; patches have no FAE."""
    components = fresh_components(folder, seed, device)
    if arm != "patches":
        return components
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = Components(with_patches(components.cfg), components.tokenizer)
    new.vlm, new.vocabulary, new.finished_stages = components.vlm, components.vocabulary, ("vlm",)
    return new.to(device).eval().requires_grad_(False)


def compare_codecs(
    folder: str | Path,
    config: CodecsConfig,
    output: str | Path,
    *,
    device: str = "cpu",
    jobs: int = 1,
    measures: Measures | None = None,
) -> list[Row]:
    """One row per arm and seed; patches have a second one with clean-up.

    folder: a model that has finished features, fae and vlm. jobs: how many arms train at once, each in a process of its
    own if several. Each row is written to output/codecs.json at once and not measured again by a later call. Raises
    ConfigError if that file is of another budget or model.
    """
    table = KeptRows(
        named_place(output, "output", OutputError) / "codecs.json",
        asdict(config) | {"model": fingerprint(Path(folder))},
    )
    rows = cast(list[Row], table.read())
    known = {(row["arm"], row["seed"]) for row in rows}
    units = [(arm, seed) for seed in config.seeds for arm in ARMS if (arm, seed) not in known]
    work = partial(_rows, config=config, folder=folder, device=device, measures=measures or Measures())
    for new in run_parallel(work, units, jobs):
        rows = sorted(rows + new, key=lambda row: (row["seed"], ROWS.index(row["arm"])))
        table.write(rows)
    return rows


def _rows(
    unit: tuple[Arm, int], config: CodecsConfig, folder: str | Path, device: str, measures: Measures
) -> list[Row]:
    """Train one arm and score it; patches once more with clean-up."""
    arm, seed = unit
    components, stage = start(arm, folder, seed, device), config.stage(arm)
    judge = fresh_components(folder, seed, device).codec.extractor  # the same for all arms, also those without one
    task = T2iTask(components, stage, seed)
    task.initialise()
    fit_task(task, device=device, report=ProgressPrinter(arm, seed))
    components.finished_stages = (*components.finished_stages, "t2i")
    trained = num_parameters(task.trained)
    cleanups: dict[str, Cleanup] = {arm: "none"}
    if arm == "patches":
        cleanups[CLEANED] = "tweedie"
    rows: list[Row] = []
    for name, cleanup in cleanups.items():
        drawer = _Drawer(StarFlow2(components), DrawConfig.for_model(components, cleanup=cleanup))
        scores = _scores(drawer, judge, measures, quick=config.quick)
        rows.append({"arm": name, "seed": seed, "trained": trained, **scores})
    return rows


@dataclass(frozen=True, slots=True)
class _Drawer:
    """A model with fixed settings of drawing, as `score_geneval` takes it."""

    model: StarFlow2
    config: DrawConfig

    @property
    def sampling_noise(self) -> float:
        return self.model.sampling_noise

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return self.model.draw(prompts, seeds, self.config)

    def roundtrip(self, images: Tensor, noise_level: float = 0.0, seed: int = 0) -> Tensor:
        return self.model.roundtrip(images, noise_level, seed)


def _scores(drawer: _Drawer, judge: FeatureExtractor | None, measures: Measures, *, quick: bool) -> Scores:
    components, level = drawer.model.components, drawer.sampling_noise
    report = measures.geneval(drawer, "dev", quick=quick, samples=1)
    images = codec_pictures(None, components.codec.image_size, "dev", measures.images).to(components.device)
    clean, noisy = evaluate_codec(components.codec, judge, images, (0.0, level)).rows
    recognised = {name: report.bounds[name]["id"].value("lenient") for name in ("clean", "noise")}
    return {
        "id": report.parts["id"].value("lenient"),
        "cg": report.parts["cg"].value("lenient"),
        "psnr": clean.psnr,
        "psnr_noise": noisy.psnr,
        "recognised": recognised["clean"],
        "recognised_noise": recognised["noise"],
        "feature_fd": clean.feature_fd,
        "nats_per_dim": held_out_nats(components, level, measures.images),
        "floor": 0.5 * math.log(2 * math.pi * math.e) + math.log(level),
    }


@torch.no_grad()
def held_out_nats(components: Components, level: float, images: int, batch: int = 32) -> float:
    """Mean nats per latent channel of `images` dev images under noise of `level`, given their captions."""
    drawings = suite_drawings("geneval", "dev", "id", -(-images // len(FAMILIES)))[:images]
    generator, nats = torch.Generator().manual_seed(0), []
    for first in range(0, len(drawings), batch):
        chunk = drawings[first : first + batch]
        pixels = to_floats(np.stack([render(d.scene) for d in chunk])).to(components.device)
        levels = torch.full((len(chunk),), level, device=components.device)
        x = add_noise(components.codec.encode(pixels).float(), levels, generator)
        context = drawing_context(components, [components.tokenizer.drawing_prompt(d.prompt) for d in chunk])
        nats.append(components.flow.nats_per_dim(x, context, levels))
    return float(torch.cat(nats).mean())


def write(rows: Iterable[Mapping[str, Any]], config: CodecsConfig, folder: str | Path) -> Path:
    """Write codecs.md, a table of means over seeds, into `folder`. Raises OutputError."""
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    lines = [f"| arm | {' | '.join(heading for heading, _, _ in _COLUMNS)} |", "|---" * (1 + len(_COLUMNS)) + "|"]
    for arm, same in by_arm.items():
        cells = [f"{np.mean([row[name] for row in same]):{form}}" for _, name, form in _COLUMNS]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    text = (
        f"{config.steps} steps of {config.batch} pictures of stage t2i for every arm, from a fresh flow, seeds "
        f"{list(config.seeds)}: means. Guidance and prior scale are those tuned for the default. Nats are of each "
        "codec's own latents under its own noise: they compare with their floor and between seeds, not between arms.\n"
    )
    path = Path(folder) / "codecs.md"
    with replacing(path) as temp:
        temp.write_text("\n".join(lines) + "\n\n" + text, encoding="utf-8")
    return path


_COLUMNS = (
    ("W-GenEval dev, ID", "id", ".3f"),
    ("CG", "cg", ".3f"),
    ("PSNR dB", "psnr", ".1f"),
    ("at sampling noise", "psnr_noise", ".1f"),
    ("recognised", "recognised", ".3f"),
    ("at sampling noise", "recognised_noise", ".3f"),
    ("nats/dim", "nats_per_dim", ".3f"),
    ("floor", "floor", ".3f"),
    ("trained", "trained", ",.0f"),
)
