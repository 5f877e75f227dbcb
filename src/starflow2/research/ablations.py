"""The paper's comparisons on equal data, steps and seeds: stage 3, its skips, and a mixture of transformers.

Table 4 in two steps: "stage 1" continues with text-to-image data alone, "stage 3, skips closed" adds the other data,
and "stage 3" opens the skips; all continue from the same model of stages 1 and 2. A mixture of transformers shares no
weights with that flow, so the arms of section 5.3 start with fresh weights: "fresh", "mot frozen" and "mot finetuned"
have the same frozen language model and FAE, equally many new parameters, and the same documents. Each arm is scored for
several seeds on a quick share of the suites, and by its losses on documents of no training set, which separate arms
long before they draw well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, cast, get_args

import numpy as np
import torch

from starflow2.core.fields import Config, Count, Positive, Seed, Weight
from starflow2.core.files import named_place, replacing
from starflow2.core.images import to_bytes, to_floats
from starflow2.errors import CheckpointError, ConfigError, OutputError, nearest
from starflow2.evals.geneval import GenevalSuite
from starflow2.evals.mme import MmeSuite
from starflow2.evals.report import KeptRows
from starflow2.evals.suite import evaluate
from starflow2.inference.config import DrawConfig
from starflow2.models.checkpoint import load_components
from starflow2.models.components import Components
from starflow2.models.pretrained import fingerprint
from starflow2.models.pretzel import ALL_SKIPS
from starflow2.nn import num_parameters
from starflow2.pipeline import StarFlow2
from starflow2.research.mot import MotComponents
from starflow2.research.runs import ProgressPrinter, run_parallel
from starflow2.training.config import MixConfig, OptimConfig, StageConfig
from starflow2.training.datasets import Scenes
from starflow2.training.initialise import match_tower_scale, whiten_text_states, world_captions
from starflow2.training.loop import fit_task
from starflow2.training.task import Task
from starflow2.training.tasks import TOWER_IMAGES, JointTask, T2iTask

__all__ = [
    "ARMS",
    "Arm",
    "CompareConfig",
    "Range",
    "Row",
    "Scores",
    "Summary",
    "compare",
    "compare_and_keep",
    "fresh_components",
    "score",
    "summary",
    "unseen_losses",
    "write",
]

Arm = Literal["stage 1", "stage 3", "stage 3, skips closed", "closed in use", "fresh", "mot frozen", "mot finetuned"]
ARMS: tuple[Arm, ...] = get_args(Arm)
FROM_FRESH_WEIGHTS = ("fresh", "mot frozen", "mot finetuned")
NEEDED = ("features", "fae", "vlm", "t2i", "adapter")
UNSEEN_SEED = 77_000  # of the documents whose losses are reported


ScoreName = Literal["geneval", "flow", "mme", "text"]


class Losses(TypedDict):
    """Losses on unseen documents."""

    flow: float  # of drawings: weighted nats per dim, without the constant
    text: float  # of answers: nats per reply


class Scores(Losses):
    """How well an arm draws and answers; suites on dev, ID prompts."""

    geneval: float  # lenient
    mme: float  # of 1,200


class Row(Scores):
    """One arm and seed, as compare.json holds it."""

    arm: Arm
    seed: int
    trained: int  # parameters


class Range(TypedDict):
    """A score over seeds."""

    mean: float
    low: float
    high: float


class Summary(TypedDict):
    """All seeds of an arm."""

    seeds: list[int]
    trained: int
    geneval: Range
    flow: Range
    mme: Range
    text: Range


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    """The budget, the same for all arms."""

    steps: Count = 300
    batch: Count = 32
    seeds: tuple[Seed, ...] = (0, 1, 2)
    lr: Positive = 2e-3
    matrix_lr: Weight = 3e-3
    mix: MixConfig = field(default_factory=lambda: MixConfig(understand=0.3, draw=0.7, edit=0.0, chain=0.0, story=0.0))
    unseen: Count = 128  # documents of each kind whose loss is reported
    quick: bool = True

    def stage(self, name: Literal["t2i", "adapter", "joint"]) -> StageConfig:
        optim = OptimConfig(lr=self.lr, matrix_lr=self.matrix_lr, warmup_steps=min(60, self.steps))
        return StageConfig(name=name, steps=self.steps, batch=self.batch, optim=optim, mix=self.mix)


@dataclass(frozen=True, slots=True)
class _Unit:
    """One training run, and the arms that are scored after it."""

    seed: int
    arms: tuple[Arm, ...]  # the arm that is trained, then those that use the same weights in another way


@dataclass(frozen=True, slots=True)
class _Workplace:
    """The folder of the model that arms start from, and the device and workers they run on."""

    folder: Path
    device: str
    workers: int

    def start(self, arm: Arm, config: CompareConfig, seed: int) -> Components[Any, Any]:
        """Components before an arm's first step. Raises CheckpointError for a model without stages 1 and 2."""
        if arm not in FROM_FRESH_WEIGHTS:
            return self._ready()
        components = fresh_components(self.folder, seed, self.device)
        if arm != "fresh":
            return MotComponents(components, "frozen" if arm == "mot frozen" else "finetuned", seed)
        whiten_text_states(components, world_captions(components, seed, config.stage("t2i").whitening_captions))
        match_tower_scale(components, Scenes(seed)(range(TOWER_IMAGES)))
        return components.requires_grad_(False)

    def _ready(self) -> Components:
        components = load_components(self.folder, self.device)
        if "joint" in components.finished_stages or set(NEEDED) - set(components.finished_stages):
            raise CheckpointError(
                f"{self.folder} has finished {', '.join(components.finished_stages)}; expected a model that has "
                f"finished {', '.join(NEEDED)}, and not joint."
            )
        return components.requires_grad_(False)


def fresh_components(folder: str | Path, seed: int, device: str = "cpu") -> Components:
    """The model in `folder` with fresh weights of flow and joints, drawn from `seed`; everything is frozen."""
    components = load_components(folder, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = Components(components.cfg)
    components.flow.load_state_dict(new.flow.state_dict())
    components.joints.load_state_dict(new.joints.state_dict())
    components.finished_stages = ("features", "fae", "vlm")
    return components.requires_grad_(False)


def compare(
    folder: str | Path,
    config: CompareConfig,
    *,
    arms: Iterable[str] = ARMS,
    done: Iterable[Row] = (),
    device: str = "cpu",
    jobs: int = 1,
    workers: int = 0,
    scorer: Scorer | None = None,
) -> Iterator[Row]:
    """One row per arm and seed: those in `done` without training them again, the others as they are finished.

    folder: a model that has finished stages 1 and 2. "closed in use" is "stage 3" with the skips closed after training.
    jobs: how many arms train at once, each in a process of its own if several. workers: processes that draw an arm's
    data. scorer: `score` by default. Raises ConfigError for an unknown arm.
    """
    arms = list(arms)
    for arm in arms:
        if arm not in ARMS:
            raise ConfigError(f"there is no arm {arm!r}; expected some of {', '.join(ARMS)}.{nearest(arm, ARMS)}")
    known: dict[tuple[str, int], Row] = {(row["arm"], row["seed"]): row for row in done}
    missing = []
    for unit in _units(arms, config.seeds):
        keys: list[tuple[str, int]] = [(arm, unit.seed) for arm in unit.arms]
        if known.keys() >= set(keys):
            yield from (known[key] for key in keys)
        else:
            missing.append(unit)
    work = partial(_rows, config=config, place=_Workplace(Path(folder), device, workers), scorer=scorer or score)
    for rows in run_parallel(work, missing, jobs):
        yield from rows


def compare_and_keep(
    folder: str | Path,
    config: CompareConfig,
    output: str | Path,
    *,
    device: str = "cpu",
    jobs: int = 1,
    workers: int = 0,
    scorer: Scorer | None = None,
) -> list[Row]:
    """Run `compare` with all arms, writing each new row to output/compare.json and compare.md at once.

    A later call continues one that was stopped. Raises ConfigError if compare.json is of another budget or model.
    """
    table = KeptRows(
        named_place(output, "output", OutputError) / "compare.json",
        asdict(config) | {"model": fingerprint(Path(folder))},
    )
    rows: list[Row] = []
    done = cast(list[Row], table.read())
    for row in compare(folder, config, done=done, device=device, jobs=jobs, workers=workers, scorer=scorer):
        rows = sorted([*rows, row], key=lambda row: (row["seed"], ARMS.index(row["arm"])))
        table.write(rows, summary=summary(rows))
        write(rows, config, output)
    return rows


def _units(arms: Iterable[str], seeds: Iterable[int]) -> Iterator[_Unit]:
    """Training runs; that of "stage 3" is also scored as "closed in use" if `arms` has it."""
    for seed in seeds:
        for arm in (a for a in ARMS if a in arms and a != "closed in use"):
            yield _Unit(seed, (arm, "closed in use") if arm == "stage 3" and "closed in use" in arms else (arm,))


def _rows(unit: _Unit, config: CompareConfig, place: _Workplace, scorer: Scorer) -> list[Row]:
    """Train one arm and score it."""
    components, task = _trained(unit, config, place)
    trained = num_parameters(task.trained)
    rows: list[Row] = []
    for arm in unit.arms:
        closed = arm in ("stage 1", "stage 3, skips closed", "closed in use")
        rows.append({"arm": arm, "seed": unit.seed, "trained": trained, **scorer(components, closed, config)})
    return rows


def _trained(unit: _Unit, config: CompareConfig, place: _Workplace) -> tuple[Components[Any, Any], Task]:
    """The arm's components after training, and the task that trained them."""
    arm, seed = unit.arms[0], unit.seed
    components = place.start(arm, config, seed)
    stage = config.stage("t2i" if arm == "stage 1" else "joint")
    skips = () if arm == "stage 3, skips closed" else ALL_SKIPS
    task: Task = (
        T2iTask(components, stage, seed) if arm == "stage 1" else JointTask(components, stage, seed, skips=skips)
    )
    fit_task(task, device=place.device, report=ProgressPrinter(arm, seed), workers=place.workers)
    components.finished_stages = (*NEEDED, "joint")
    return components, task


Scorer = Callable[[Components[Any, Any], bool, CompareConfig], Scores]


def score(components: Components, closed: bool, config: CompareConfig) -> Scores:
    """Scores of a trained arm, with its skips closed if `closed`."""
    model = StarFlow2(components, DrawConfig.for_model(components, skips=() if closed else None))

    def draw(prompts: list[str], seeds: list[int]) -> Any:
        return to_bytes(model.draw(prompts, seeds))

    def answer(images: Any, questions: list[str]) -> list[str]:
        return model.answers([[image] for image in to_floats(images)], questions)

    drawing = evaluate(GenevalSuite(samples=1, parts=("id",)), draw, "dev", quick=config.quick)
    answering = evaluate(MmeSuite(), answer, "dev", quick=config.quick)
    return {
        "geneval": drawing.parts["id"].value("lenient"),
        "mme": answering.parts["id"].value("total"),
        **unseen_losses(components, closed=closed, count=config.unseen),
    }


@torch.no_grad()
def unseen_losses(components: Components, *, closed: bool, count: int, batch: int = 32) -> Losses:
    """Losses on `count` drawings and `count` questions of no training set, the same for all arms."""

    def mean_loss(term: str, kind: str) -> float:
        only = MixConfig(**{name: float(name == kind) for name in asdict(MixConfig())})
        stage = StageConfig(name="joint", steps=1, batch=batch, caption_drop=0.0, mix=only)
        task = JointTask(components, stage, UNSEEN_SEED, skips=() if closed else ALL_SKIPS)
        generator = torch.Generator().manual_seed(UNSEEN_SEED)
        chunks = [task.make_batch(range(first, first + batch)) for first in range(0, count, batch)]
        return float(np.mean([float(task.loss(data, generator)[1][term]) for data in chunks]))

    return {"flow": mean_loss("flow", "draw"), "text": mean_loss("text", "understand")}


def summary(rows: Iterable[Row]) -> dict[Arm, Summary]:
    """Mean and range over seeds of all scores, by arm."""
    by_arm: dict[Arm, list[Row]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    return {arm: _summary(same) for arm, same in by_arm.items()}


def _summary(rows: list[Row]) -> Summary:
    return {
        "seeds": [row["seed"] for row in rows],
        "trained": rows[0]["trained"],
        "geneval": _over_seeds([row["geneval"] for row in rows]),
        "flow": _over_seeds([row["flow"] for row in rows]),
        "mme": _over_seeds([row["mme"] for row in rows]),
        "text": _over_seeds([row["text"] for row in rows]),
    }


def _over_seeds(values: list[float]) -> Range:
    return {"mean": float(np.mean(values)), "low": min(values), "high": max(values)}


def write(rows: Iterable[Row], config: CompareConfig, folder: str | Path) -> Path:
    """Write compare.md, a table of all arms, into `folder`. Raises OutputError."""
    titles = " | ".join(title for title, _ in SCORES.values())
    lines = [f"| arm | trained parameters | seeds | {titles} |", "|---|---:|---" + "|---:" * len(SCORES) + "|"]
    for arm, row in summary(rows).items():
        cells = [_cell(row[name], digits) for name, (_, digits) in SCORES.items()]
        seeds = ", ".join(str(seed) for seed in sorted(row["seeds"]))
        lines.append(f"| {arm} | {row['trained']:,} | {seeds} | {' | '.join(cells)} |")
    text = f"{config.steps} steps of {config.batch} documents for every arm: mean [range] over seeds.\n"
    path = Path(folder) / "compare.md"
    with replacing(path) as temp:
        temp.write_text("\n".join(lines) + "\n\n" + text, encoding="utf-8")
    return path


def _cell(score: Range, digits: int) -> str:
    return f"{score['mean']:.{digits}f} [{score['low']:.{digits}f}, {score['high']:.{digits}f}]"


SCORES: dict[ScoreName, tuple[str, int]] = {  # title and digits
    "geneval": ("W-GenEval, dev, ID", 3),
    "flow": ("flow loss, unseen", 4),
    "mme": ("W-MME-p, dev, ID", 0),
    "text": ("nats per reply, unseen", 3),
}
