"""The paper's future work beside the default: an FAE that trains with the flow, and no FAE at all.

Every arm gets a fresh flow and equal steps, batches and seeds of stage t2i, over the same frozen language model. Rows
are kept as they come, so that a comparison that was cut off goes on. Not here: the paper's own comparisons (compare).
Letters: B pictures, N latents, D latent dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from starflow2.core.files import replacing
from starflow2.core.images import to_floats
from starflow2.core.serialize import JsonObject
from starflow2.evals.codec import codec_pictures, evaluate_codec
from starflow2.evals.geneval import score_geneval
from starflow2.evals.report import KeptRows
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
from starflow2.world.captions import FAMILIES, suite_drawings
from starflow2.world.scene import render

__all__ = ["ARMS", "Arm", "CodecsConfig", "compare_codecs", "held_out_nats", "start", "write"]

Arm = Literal["frozen FAE", "end to end", "patches"]
ARMS: tuple[Arm, ...] = get_args(Arm)
CLEANED = "patches, cleaned"  # the same model, drawn with Tweedie's step: a codec of pixels takes no noise away
ROWS = (*ARMS, CLEANED)
Row = JsonObject
PICTURES = 128  # for round trips and held-out likelihood


@dataclass(frozen=True, kw_only=True)
class CodecsConfig:
    """One budget for all arms."""

    steps: int = 1000
    batch: int = 64
    seeds: tuple[int, ...] = (0,)
    codec_weight: float = 4.0  # of the FAE's losses where it trains with the flow
    quick: bool = True

    def stage(self, arm: Arm) -> StageConfig:
        """Stage t2i as nano has it, but for its length."""
        weight = self.codec_weight if arm == "end to end" else 0.0
        optim = OptimConfig(lr=3e-3, warmup_steps=min(60, self.steps))
        return StageConfig(name="t2i", steps=self.steps, batch=self.batch, optim=optim, codec_weight=weight)


def start(arm: Arm, folder: str | Path, seed: int, device: str = "cpu") -> Components:
    """Where an arm starts: the language model of `folder`, its FAE and features unless of patches, and a fresh flow."""
    components = fresh_components(folder, seed, device)
    if arm != "patches":
        return components
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = Components(with_patches(components.cfg), components.tokenizer)
    new.vlm, new.vocabulary, new.finished_stages = components.vlm, components.vocabulary, ("vlm",)
    return new.to(device).eval().requires_grad_(False)


def compare_codecs(
    folder: str | Path, config: CodecsConfig, output: str | Path, *, device: str = "cpu", jobs: int = 1
) -> list[Row]:
    """One row per arm and seed, those of patches twice; see `_scores` for what is in it.

    folder: a model that has finished features, fae and vlm. jobs: arms at a time, each in a process of its own if
    several. Rows stand in output/codecs.json as soon as they are there, and are not measured again. Raises ConfigError
    where that file is of another budget or model.
    """
    kept = KeptRows(Path(output) / "codecs.json", asdict(config) | {"model": fingerprint(Path(folder))})
    rows = kept.read()
    known = {(row["arm"], row["seed"]) for row in rows}
    units = [(arm, seed) for seed in config.seeds for arm in ARMS if (arm, seed) not in known]
    for new in run_parallel(partial(_rows, config=config, folder=folder, device=device), units, jobs):
        rows = sorted(rows + new, key=lambda row: (row["seed"], ROWS.index(row["arm"])))
        kept.write(rows)
    return rows


def _rows(unit: tuple[Arm, int], config: CodecsConfig, folder: str | Path, device: str) -> list[Row]:
    """Train one arm and score it; patches once more with clean-up."""
    arm, seed = unit
    components, stage = start(arm, folder, seed, device), config.stage(arm)
    judge = fresh_components(folder, seed, device).codec.extractor  # one for all, also for those that have none
    task = T2iTask(components, stage, seed)
    task.initialise()
    fit_task(task, device=device, report=ProgressPrinter(arm, seed))
    components.finished_stages = (*components.finished_stages, "t2i")
    trained = num_parameters(task.trained)
    cleanups: dict[str, Cleanup] = {arm: "none"}
    if arm == "patches":
        cleanups[CLEANED] = "tweedie"
    rows = []
    for name, cleanup in cleanups.items():
        drawer = _Drawer(StarFlow2(components), DrawConfig.for_model(components, cleanup=cleanup))
        rows.append({"arm": name, "seed": seed, "trained": trained} | _scores(drawer, judge, quick=config.quick))
    return rows


@dataclass(frozen=True, slots=True)
class _Drawer:
    """A model that draws with one setting."""

    model: StarFlow2
    config: DrawConfig

    @property
    def sampling_noise(self) -> float:
        return self.model.sampling_noise

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return self.model.draw(prompts, seeds, self.config)

    def roundtrip(self, images: Tensor, noise_level: float = 0.0, seed: int = 0) -> Tensor:
        return self.model.roundtrip(images, noise_level, seed)


def _scores(drawer: _Drawer, judge: FeatureExtractor | None, *, quick: bool) -> dict[str, float | None]:
    """Of pictures drawn: id, cg, lenient. Of true ones through the codec, clean and at the level of drawing: psnr in
    dB, recognised (what the detector says of them), feature_fd. Of held-out latents: nats_per_dim at that level, and
    its floor: what the noise alone costs.
    """
    components, level = drawer.model.components, drawer.sampling_noise
    report = score_geneval(drawer, "dev", quick=quick, samples=1)
    images = codec_pictures(None, components.codec.image_size, "dev", PICTURES).to(components.device)
    clean, noisy = evaluate_codec(components.codec, judge, images, (0.0, level)).rows
    drawn = {part: report.parts[part].value("lenient") for part in ("id", "cg")}
    recognised = {name: report.bounds[name]["id"].value("lenient") for name in ("clean", "noise")}
    return {
        **drawn,
        "psnr": clean.psnr,
        "psnr_noise": noisy.psnr,
        "recognised": recognised["clean"],
        "recognised_noise": recognised["noise"],
        "feature_fd": clean.feature_fd,
        "nats_per_dim": held_out_nats(components, level),
        "floor": 0.5 * math.log(2 * math.pi * math.e) + math.log(level),
    }


@torch.no_grad()
def held_out_nats(components: Components, level: float, pictures: int = PICTURES, batch: int = 32) -> float:
    """Mean nats per latent channel of dev pictures under noise of `level`, given their captions."""
    drawings = suite_drawings("geneval", "dev", "id", -(-pictures // len(FAMILIES)))[:pictures]
    generator, found = torch.Generator().manual_seed(0), []
    for first in range(0, len(drawings), batch):
        some = drawings[first : first + batch]
        images = to_floats(np.stack([render(d.scene) for d in some])).to(components.device)
        levels = torch.full((len(some),), level, device=components.device)
        x = add_noise(components.codec.encode(images).float(), levels, generator)
        context = drawing_context(components, [components.tokenizer.drawing_prompt(d.prompt) for d in some])
        found.append(components.flow.nats_per_dim(x, context, levels))
    return float(torch.cat(found).mean())


def write(rows: Iterable[Mapping[str, Any]], config: CodecsConfig, folder: str | Path) -> Path:
    """codecs.md in `folder`: means over seeds. Raises OutputError."""
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
        temp.write_text("\n".join(lines) + "\n\n" + text)
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
