"""The paper's comparisons, each arm on equal data, steps and seeds: skips, stage 3, and a mixture of transformers.

Every arm starts from the same frozen language model and FAE with a flow of its own that knows nothing yet, so that
none profits from what another was trained on. Scores are of a quick share of the suites: small on purpose, for
several seeds. Not here: the figures of the shipped model (evals), plots (analysis).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from starflow2.checkpoint import load_parts
from starflow2.errors import ConfigError, nearest
from starflow2.evals.answering import evaluate_mme
from starflow2.evals.drawing import evaluate_geneval
from starflow2.evals.world import to_bytes, to_floats
from starflow2.files import replacing
from starflow2.model import StarFlow2
from starflow2.mot import MotParts
from starflow2.parts import Parts
from starflow2.stages import AdapterTask, JointTask, MixConfig, OptimConfig, StageConfig, T2iTask
from starflow2.train import fit_task

__all__ = ["ARMS", "Arm", "CompareConfig", "compare", "fresh_parts", "summary", "write"]

Arm = Literal["stage 1", "stage 3", "stage 3, skips closed", "closed in use", "mot frozen", "mot finetuned"]
ARMS: tuple[Arm, ...] = get_args(Arm)
DONE = ("features", "fae", "vlm", "t2i", "adapter", "joint")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """One budget for all arms."""

    steps: int = 300
    batch: int = 32
    adapter_steps: int = 100  # of stage 2 in front of the Pretzel's stage 3
    seeds: tuple[int, ...] = (0, 1, 2)
    mix: MixConfig = field(default_factory=lambda: MixConfig(understand=0.3, draw=0.7, edit=0.0, story=0.0))
    quick: bool = True

    def stage(self, name: Literal["t2i", "adapter", "joint"], steps: int) -> StageConfig:
        optim = OptimConfig(warmup_steps=min(60, steps))
        return StageConfig(name=name, steps=steps, batch=self.batch, optim=optim, mix=self.mix)


@dataclass(frozen=True, slots=True)
class _Workplace:
    """Where arms come from and where they run."""

    folder: Path
    device: str
    workers: int

    def fresh(self, seed: int) -> Parts:
        return fresh_parts(self.folder, seed, self.device)


def fresh_parts(folder: str | Path, seed: int, device: str = "cpu") -> Parts:
    """The frozen parts of the model in `folder` with a flow and joints that were never trained, those of `seed`."""
    parts = load_parts(folder, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = Parts(parts.cfg)
    parts.flow.load_state_dict(new.flow.state_dict())
    parts.joints.load_state_dict(new.joints.state_dict())
    parts.stages = ("features", "fae", "vlm")
    return parts.requires_grad_(False)


def compare(
    folder: str | Path,
    config: CompareConfig,
    *,
    arms: Iterable[str] = ARMS,
    device: str = "cpu",
    workers: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """One row per arm and seed: arm, seed, trained parameters, geneval (ID, lenient), mme (ID, of 1,200).

    folder: a model that has finished features, fae and vlm. "closed in use" is "stage 3" with the skips closed after
    training. Raises ConfigError for an unknown arm.
    """
    arms = list(arms)
    for arm in arms:
        if arm not in ARMS:
            raise ConfigError(f"there is no arm {arm!r}; expected some of {', '.join(ARMS)}.{nearest(arm, ARMS)}")
    place = _Workplace(Path(folder), device, workers)
    rows: list[dict[str, Any]] = []
    for seed in config.seeds:
        for arm in (a for a in arms if a != "closed in use"):
            if progress is not None:
                progress(f"{arm}, seed {seed}")
            rows += _rows(arm, seed, config, place, with_closed="closed in use" in arms)
    return rows


def _rows(
    arm: str, seed: int, config: CompareConfig, place: _Workplace, *, with_closed: bool
) -> Iterator[dict[str, Any]]:
    """Train one arm and score it; "stage 3" is scored once more with its skips closed."""
    parts, closed, trained = _trained(arm, seed, config, place)
    yield {"arm": arm, "seed": seed, "trained": trained} | _scores(parts, closed=closed, config=config)
    if arm == "stage 3" and with_closed:
        yield {"arm": "closed in use", "seed": seed, "trained": trained} | _scores(parts, closed=True, config=config)


def _trained(arm: str, seed: int, config: CompareConfig, place: _Workplace) -> tuple[Parts, bool, int]:
    """The arm's parts after training, whether its skips are closed, and how many parameters were trained."""
    parts = place.fresh(seed)
    if arm.startswith("mot"):
        parts = MotParts(parts, "frozen" if arm == "mot frozen" else "finetuned", seed)
    stage = config.stage("joint", config.steps)
    if arm == "stage 1":
        first = T2iTask(parts, config.stage("t2i", config.steps), seed)
        fit_task(first, config.stage("t2i", config.steps), seed, device=place.device, workers=place.workers)
    else:
        joint = JointTask(parts, stage, seed)
        if arm == "stage 3, skips closed":
            joint.pretzel.skips = frozenset()
        fit_task(joint, stage, seed, device=place.device, workers=place.workers)
    if arm == "stage 1":  # reads pictures through the adapter alone
        adapter = config.stage("adapter", config.adapter_steps)
        fit_task(AdapterTask(parts, adapter, seed), adapter, seed, device=place.device, workers=place.workers)
    parts.stages = DONE
    return parts, arm in ("stage 1", "stage 3, skips closed"), sum(p.numel() for p in parts.joined.parameters())


def _scores(parts: Parts, *, closed: bool, config: CompareConfig) -> dict[str, float]:
    model = StarFlow2(parts)
    if closed:
        model.sampler().pretzel.skips = frozenset()

    def draw(prompts: list[str], seeds: list[int]) -> Any:
        return to_bytes(model.draw(prompts, seeds))

    def answer(images: Any, questions: list[str]) -> list[str]:
        return model.answers([[image] for image in to_floats(images)], questions)

    drawn = evaluate_geneval(draw, "dev", quick=config.quick, samples=1, parts=("id",))
    said = evaluate_mme(answer, "dev", quick=config.quick)
    return {
        "geneval": drawn["parts"]["id"]["overall"]["lenient"]["score"],
        "mme": said["parts"]["id"]["total"]["score"],
    }


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and range over seeds of both scores, by arm."""
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    return {
        arm: {"seeds": [row["seed"] for row in same], "trained": same[0]["trained"]}
        | {name: _over_seeds([row[name] for row in same]) for name in ("geneval", "mme")}
        for arm, same in by_arm.items()
    }


def _over_seeds(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "low": min(values), "high": max(values)}


def write(rows: list[dict[str, Any]], config: CompareConfig, folder: str | Path) -> Path:
    """compare.json and compare.md in `folder`. Raises OutputError."""
    folder = Path(folder)
    found = summary(rows)
    told = config
    with replacing(folder / "compare.json") as temp:
        settings = {"steps": told.steps, "batch": told.batch, "seeds": list(told.seeds)}
        temp.write_text(json.dumps({"config": settings, "rows": rows, "summary": found}, indent=1) + "\n")
    lines = ["| arm | trained parameters | W-GenEval, dev, ID | W-MME-p, dev, ID |", "|---|---:|---:|---:|"]
    for arm, row in found.items():
        cells = [f"{row[n]['mean']:.{d}f} [{row[n]['low']:.{d}f}, {row[n]['high']:.{d}f}]" for n, d in _DIGITS]
        lines.append(f"| {arm} | {row['trained']:,} | {' | '.join(cells)} |")
    text = (
        f"{config.steps} steps of {config.batch} documents for every arm, seeds {list(config.seeds)}: mean [range].\n"
    )
    with replacing(folder / "compare.md") as temp:
        temp.write_text("\n".join(lines) + "\n\n" + text)
    return folder / "compare.md"


_DIGITS = (("geneval", 3), ("mme", 0))
