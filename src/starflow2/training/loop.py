"""Training: one loop for every stage. A stage is data; what it trains and its loss is a `Task`.

Every random choice is a pure function of (seed, stage, step), so that a run killed at any moment and
resumed from its last checkpoint repeats the uninterrupted run bit for bit. Not here: scoring (a
callable is passed in), the processes of a run (`parallel`), the form of its checkpoints (`trainstate`), sizes.
Letters: B batch, T positions, N latents.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starflow2.core.files import replacing
from starflow2.core.serialize import to_dict
from starflow2.errors import ConfigError, TrainingError
from starflow2.models.checkpoint import load_components, save_components
from starflow2.models.components import Components
from starflow2.models.config import ModelConfig
from starflow2.models.tokenizer import train_tokenizer
from starflow2.training.checkpoint import TrainState, store_for
from starflow2.training.config import OptimConfig, Precision, RunConfig, StageConfig
from starflow2.training.loader import feed_for
from starflow2.training.parallel import Distributed, check_batch_divides, checkpoint_layers
from starflow2.training.task import Task
from starflow2.training.tasks import TASKS
from starflow2.world.captions import caption_task
from starflow2.world.conversations import understanding_dialogue, understanding_words
from starflow2.world.edit_operations import edit_words
from starflow2.world.edits import edit_task
from starflow2.world.stories import story_dialogue, story_task
from starflow2.world.story_text import story_words

__all__ = ["StepReport", "fit", "fit_task", "is_hidden_matrix", "try_step"]

ADAMW_8BIT = {"8bit": ("torchao", "torchao.optim"), "8bit-bnb": ("bitsandbytes", "bitsandbytes.optim")}
TALKING = ("vlm", "adapter", "joint")  # stages that train on words beside captions


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step told: for progress bars and metric files."""

    stage: str
    step: int
    steps: int
    metrics: dict[str, float]
    images_per_s: float
    eta_s: float


# -- the loop -----------------------------------------------------------------------------------------


def fit(
    run: RunConfig,
    stage_name: str,
    folder: str | Path,
    *,
    resume: bool = True,
    device: str = "cpu",
    report: Callable[[StepReport], None] | None = None,
    evaluate: Callable[[Components, int], dict[str, float]] | None = None,
    workers: int = 0,
) -> Path:
    """Train one stage in `folder` and return the model folder it wrote, folder/model.

    Earlier stages must be in folder/model. With `resume`, goes on from the last checkpoint there. `workers` processes
    draw the data (0: a thread does), which changes nothing but the speed.
    `evaluate` is called with (parts holding averaged weights, step) whenever a checkpoint is written.
    """
    stage, folder = run.stage(stage_name), Path(folder)
    group = Distributed.from_environment(device, stage.shard)
    check_batch_divides(stage, group, evaluates=evaluate is not None)
    store = store_for(folder, stage, group)
    components = _start_components(run, stage_name, folder, device, group.sharded_components(stage))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)  # of what a task makes for itself, such as a head
        task = TASKS[stage_name](components, stage, run.seed)
    saved = store.settings(run, stage) if resume else None
    if saved is None and stage_name not in components.finished_stages:
        task.initialise()
    components.finished_stages = (*(s for s in components.finished_stages if s != stage_name), stage_name)
    components.requires_grad_(False)
    task.trained.requires_grad_(True)
    precision = group.broadcast_choice(saved["precision"] if saved else _pick_precision(run.precision, device))
    checkpoint_layers(task, stage)
    group.prepare(task, precision, device)
    state = _new_state(task, stage, group)
    if saved is not None:
        store.load(state, saved)
    context = StepContext(run.seed, precision, device, group)
    position = saved.get("feed", "") if saved is not None else ""
    feed = feed_for(task, stage, group, step=state.step, saved=position, workers=workers)
    with (
        StopSignal() as stop,
        _Metrics(folder, stage_name, state.step) if group.is_first else contextlib.nullcontext() as metrics,
        feed as batches,
    ):
        for data in batches:
            started = time.perf_counter()
            values, stopping = _step(state, task, stage, data, context, stop)
            done = state.step == stage.steps
            if metrics is not None and (state.step % stage.log_every == 0 or done):
                line = metrics.write(state.step, values, stage, time.perf_counter() - started)
                if report is not None:
                    report(line)
            if state.step % stage.save_every == 0 or done or stopping:
                kept = {"precision": precision, "seed": str(run.seed), **feed.settings()}
                store.save(state, state.settings(stage, kept))
                if metrics is not None and evaluate is not None:
                    with _averaged(state):
                        metrics.extra(state.step, evaluate(components, state.step))
            if stopping and not done:
                store.close()
                raise TrainingError(
                    f"stopped by a signal at step {state.step}; its checkpoint is written, go on with --resume auto."
                )
    store.close()
    with _averaged(state), group.unsharded(components):
        if group.is_first:
            save_components(components, folder / "model")
    group.barrier()
    return folder / "model"


def fit_task(
    task: Task,
    stage: StageConfig,
    seed: int,
    *,
    device: str = "cpu",
    report: Callable[[StepReport], None] | None = None,
    workers: int = 0,
) -> dict[str, float]:
    """Train a task as `fit` does, in this process and without files; its modules end with averaged weights.

    For short runs, comparisons and fine-tuning. Returns the last step's metrics. A run that is lost is begun again.
    """
    group = Distributed()
    task.trained.to(device).requires_grad_(True)
    state = _new_state(task, stage, group)
    context = StepContext(seed, _pick_precision("auto", device), device, group)
    values: dict[str, float] = {}
    started = time.perf_counter()
    with StopSignal() as stop, feed_for(task, stage, group, step=0, workers=workers) as batches:
        for data in batches:
            values, stopping = _step(state, task, stage, data, context, stop)
            if report is not None and (state.step % stage.log_every == 0 or state.step == stage.steps):
                report(_reported(stage, state.step, values, time.perf_counter() - started))
            if stopping:
                raise TrainingError(f"stopped by a signal at step {state.step} of {stage.steps}.")
    task.trained.load_state_dict(state.ema or task.trained.state_dict())
    task.trained.eval().requires_grad_(False)
    return values


def try_step(task: Task, stage: StageConfig, run: RunConfig, group: Distributed, device: str) -> dict[str, float]:
    """The first step of a stage as `fit` takes it, without files; returns its metrics. For rehearsals."""
    check_batch_divides(stage, group)
    task.trained.requires_grad_(True)
    precision = group.broadcast_choice(_pick_precision(run.precision, device))
    checkpoint_layers(task, stage)
    group.prepare(task, precision, device)
    state = _new_state(task, stage, group)
    with StopSignal() as stop, feed_for(task, replace(stage, steps=1), group, step=0) as batches:
        return _step(state, task, stage, next(batches), StepContext(run.seed, precision, device, group), stop)[0]


def _start_components(
    run: RunConfig, stage: str, folder: Path, device: str, waiting: tuple[str, ...] = ()
) -> Components:
    """The parts that earlier stages left, or fresh ones with a new tokenizer at the first stage.

    waiting: parts whose layers stay in their files; see `load_components`.
    """
    names: list[str] = [s.name for s in run.stages]
    if (folder / "model" / "config.json").is_file():
        components = load_components(folder / "model", device, waiting)
        _check_same(components.cfg, run.model)
        missing = [name for name in names[: names.index(stage)] if name not in components.finished_stages]
        if missing:
            raise TrainingError(
                f"stage {stage} starts from stages that {folder}/model has not seen: "
                f"{', '.join(missing)}; run --stage {missing[0]} first."
            )
        if run.stage(stage).corpus.mixture:
            components.vocabulary = frozenset()  # real text: any word may stand in it
        elif stage in TALKING and components.vocabulary:
            components.vocabulary |= _all_words()
        return components
    if stage != names[0]:
        raise TrainingError(
            f"stage {stage} starts from the stage before it, but {folder}/model is not there; "
            f"run --stage {names[0]} first."
        )
    corpus = (words for i in range(2000) for words in _words_of(run.seed, i))
    tokenizer = train_tokenizer(corpus, run.model.vlm.vocab)
    if tokenizer.special != run.model.vlm.special:
        raise ConfigError("vlm.special does not fit the tokenizer's special tokens.")
    torch.manual_seed(run.seed)
    components = Components(run.model, tokenizer).to(device)
    components.vocabulary = _all_words()
    return components


def _all_words() -> frozenset[str]:
    """Every word of every conversation that stages train on."""
    return understanding_words() | edit_words() | story_words()


def _words_of(seed: int, index: int) -> Iterator[str]:
    """What the tokenizer learns from: captions, conversations, instructions."""
    yield caption_task(seed, index).prompt
    yield edit_task(seed, index).instruction
    for dialogue in (understanding_dialogue(seed, index), story_dialogue(story_task(seed, index))):
        yield from (part for turn in dialogue.turns for part in (*turn.user, *turn.assistant) if isinstance(part, str))


def _check_same(saved: ModelConfig, wanted: ModelConfig) -> None:
    old, new = to_dict(saved), to_dict(wanted)
    sampling = ("guidance", "guidance_schedule", "edit_guidance", "prior_scale")
    differ = [k for k in old if old[k] != new.get(k) and k not in sampling]
    if differ:
        raise TrainingError(
            f"the model in the run folder has another {', '.join(differ)} than the recipe; "
            "use another --output, or the recipe it was made with."
        )


def _new_state(task: Task, stage: StageConfig, group: Distributed) -> TrainState:
    named = {k: p for k, p in task.trained.named_parameters() if p.requires_grad}
    o = stage.optim
    matrices = {k: p for k, p in named.items() if o.matrix_lr and is_hidden_matrix(k, p)}
    rest = [p for k, p in named.items() if k not in matrices]
    optimizers = [adam(rest, o)]
    if matrices:
        muon = {"lr": o.matrix_lr, "weight_decay": o.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(group.optimizer(torch.optim.Muon, list(matrices.values()), muon))
    ema = {k: v.detach().clone() for k, v in task.trained.state_dict().items()} if o.ema else {}
    task.trained.train()
    return TrainState(task.trained, ema, optimizers)


def adam(params: list[nn.Parameter], o: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with moments of the size asked for. Raises ConfigError where 8 bits have no library."""
    settings: dict[str, Any] = {"lr": o.lr, "betas": (0.9, 0.95), "weight_decay": o.weight_decay}
    if o.optimizer_state_dtype == "float32":
        return torch.optim.AdamW(params, **settings, fused=True)
    package, module = ADAMW_8BIT[o.optimizer_state_dtype]
    try:
        kind = import_module(module).AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"optim.optimizer_state_dtype is {o.optimizer_state_dtype}, which {package} provides; "
            f"pip install {package}, or use float32."
        ) from error
    optimizer: torch.optim.Optimizer = kind(params, **settings)
    return optimizer


def _set_rate(group: dict[str, Any], rate: float) -> None:
    """The learning rate of a group; where it is a tensor it stays one, which compiled steps ask for."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def is_hidden_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon moves this weight: matrices inside layers, not those at the ends of a network."""
    outside = ("embed", "head", "proj_in", "position", "context_in", "noise", "patch")
    return p.ndim == 2 and not any(word in name for word in outside)


@dataclass(frozen=True, slots=True)
class StepContext:
    seed: int
    precision: str
    device: str
    group: Distributed


def _step(
    state: TrainState, task: Task, stage: StageConfig, batches: list[Any], context: StepContext, stop: StopSignal
) -> tuple[dict[str, float], bool]:
    """One optimiser step: its metrics, and whether any process was asked to stop.

    A non-finite loss or gradient skips the update and is counted.
    """
    rate = stage.optim.rate(state.step, stage.steps)
    buffers = {k: v.clone() for k, v in task.trained.named_buffers()}
    told = _backward(task, stage, batches, context, state.step)
    stopping, told = context.group.reduce_gradients(task.trained, stop.asked, told)
    norm = context.group.clip(task.trained, stage.optim.clip)
    finite = bool(torch.isfinite(norm)) and bool(torch.isfinite(told["loss"]))
    for optimizer, lr in zip(state.optimizers, (stage.optim.lr, stage.optim.matrix_lr), strict=False):
        for group in optimizer.param_groups:
            _set_rate(group, lr * rate)
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if finite:
        _update_ema(state, stage.optim.ema)
    else:
        _put_back(task.trained, buffers)
        state.skipped += 1
    state.step += 1
    values = {k: float(v) for k, v in told.items()}
    skipped = {"skipped": float(state.skipped)} if state.skipped else {}
    return {**values, "grad_norm": float(norm), "rate": rate, **skipped}, stopping


def _backward(task: Task, stage: StageConfig, batches: list[Any], context: StepContext, step: int) -> dict[str, Tensor]:
    """Gradients of this process's shares of a step; the mean of their losses and of what else they tell."""
    told: dict[str, Tensor] = {}
    shares = context.group.shares(task, batches, context.device)
    for i, (data, share) in enumerate(zip(batches, shares, strict=True)):
        number = context.group.rank * len(batches) + i  # noise belongs to a share, whichever process it falls to
        generator = torch.Generator().manual_seed(_seed(context.seed, f"{stage.name}/{number}", step))
        context.group.set_gradient_sync(is_last=i == len(batches) - 1)
        with torch.autocast(context.device, dtype=torch.bfloat16, enabled=context.precision == "bfloat16"):
            loss, extra = context.group.loss(task, data, generator, share)
        (loss / len(batches)).backward()
        for name, value in {"loss": loss, **extra}.items():
            part = value.detach() / len(batches)
            told[name] = told[name] + part if name in told else part
    return told


@torch.no_grad()
def _put_back(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Running statistics as they were before a forward pass that went wrong."""
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def _update_ema(state: TrainState, decay: float) -> None:
    if not state.ema:
        return
    decay = min(decay, (1 + state.step) / (10 + state.step))
    for name, value in state.trained.state_dict().items():
        if value.is_floating_point():
            state.ema[name].lerp_(value, 1 - decay)
        else:
            state.ema[name].copy_(value)


@contextlib.contextmanager
def _averaged(state: TrainState) -> Iterator[None]:
    """Inside the block the trained modules hold their averaged weights and are in eval mode."""
    kept = {k: v.detach().clone() for k, v in state.trained.state_dict().items()}
    state.trained.load_state_dict(state.ema or kept)
    state.trained.eval()
    try:
        yield
    finally:
        state.trained.load_state_dict(kept)
        state.trained.train()


def _seed(seed: int, stage: str, step: int) -> int:
    return zlib.crc32(f"{seed}/{stage}/{step}".encode())


def _pick_precision(asked: Precision, device: str) -> str:
    """bfloat16 where this machine multiplies it faster than float32; some CPUs do not."""
    if asked != "auto":
        return asked
    if device != "cpu":
        return "bfloat16"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 512, dtype=dtype), torch.randn(512, 512, dtype=dtype)
        runs = []
        for _ in range(10):
            started = time.perf_counter()
            a @ b
            runs.append(time.perf_counter() - started)
        seconds[dtype] = min(runs)
    return "bfloat16" if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else "float32"


# -- metrics --------------------------------------------------------------------------------------------


class _Metrics:
    """metrics-STAGE.jsonl, the truth; TensorBoard beside it where it is installed."""

    def __init__(self, folder: Path, stage: str, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.stage, self.started = folder / f"metrics-{stage}.jsonl", stage, step
        self.clock = time.perf_counter()
        lines = self.path.read_text().splitlines() if self.path.is_file() and step else []
        with replacing(self.path) as temp:
            temp.write_text("".join(line + "\n" for line in lines if _step_of(line) <= step))
        self.board = _tensorboard(folder / "tensorboard" / stage)

    def __enter__(self) -> _Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.close()  # else the last two minutes of curves are lost

    def write(self, step: int, values: dict[str, float], stage: StageConfig, seconds: float) -> StepReport:
        line = _reported(stage, step, values, time.perf_counter() - self.clock, self.started)
        self.extra(step, {**values, "seconds": seconds, "images_per_s": line.images_per_s})
        return line

    def extra(self, step: int, values: dict[str, float]) -> None:
        """Write a line; none where there is nothing to say."""
        if not values:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{self.stage}/{name}", value, step)


def _reported(stage: StageConfig, step: int, values: dict[str, float], seconds: float, started: int = 0) -> StepReport:
    """The report of a step, `seconds` after step `started`."""
    per_step = seconds / max(1, step - started)
    return StepReport(stage.name, step, stage.steps, values, stage.batch / per_step, per_step * (stage.steps - step))


def _step_of(line: str) -> float:
    """Which step a line of metrics is of; one cut short by a power failure belongs to none."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


class StopSignal:
    """Turns SIGTERM into a flag, so that a run ends with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopSignal:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            self.previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        self.asked = True

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ValueError, AttributeError):
            signal.signal(signal.SIGTERM, self.previous)
