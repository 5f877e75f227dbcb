"""Training: one loop for every stage. A stage is data; what it trains and its loss is a `Task`.

Every random choice is a pure function of (seed, stage, step), so that a run killed at any moment and
resumed from its last checkpoint repeats the uninterrupted run bit for bit. Not here: scoring (a
callable is passed in) and the sizes of recipes. One file in spite of its length: what a step changes,
what a checkpoint holds and what a resume checks have to agree.
Letters: B batch, T positions, N latents.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from starflow2.backbones import train_tokenizer
from starflow2.checkpoint import load_parts, load_tensors, save_parts, save_tensors
from starflow2.config import to_dict
from starflow2.data.edits import edit_task, edit_words
from starflow2.data.stories import story_dialogue, story_task, story_words
from starflow2.data.tasks import draw_task
from starflow2.data.understanding import understanding_dialogue, understanding_words
from starflow2.errors import ConfigError, TrainingError
from starflow2.files import replacing
from starflow2.parts import ModelConfig, Parts
from starflow2.stages import TASKS, Precision, RunConfig, StageConfig, Task

__all__ = ["StepReport", "fit", "fit_task"]

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


# -- processes ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Group:
    """The processes of a run, one or those that torchrun started; each takes its share of a batch."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls, device: str) -> _Group:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo" if device == "cpu" else "nccl")
        return cls(dist.get_rank(), world)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def agreed(self, choice: str) -> str:
        """The first process's choice, for what each would measure for itself."""
        choices = [choice]
        if self.world > 1:
            dist.broadcast_object_list(choices, 0)
        return choices[0]

    @torch.no_grad()
    def equalize(self, trained: nn.Module) -> None:
        """Give every process the first one's weights."""
        if self.world > 1:
            for value in trained.state_dict().values():
                dist.broadcast(value, 0)

    @torch.no_grad()
    def average(self, trained: nn.Module, asked: bool, loss: Tensor) -> tuple[bool, Tensor]:
        """Average gradients and running statistics over processes; was any asked to stop, and their mean loss.

        The loss is shared because all must agree whether it is finite: a step is taken by all or by none.
        """
        if self.world == 1:
            return asked, loss
        values = self._gradients([p for p in trained.parameters() if p.requires_grad])
        values += [b for b in trained.buffers() if b.is_floating_point()]
        flags = torch.stack([torch.full_like(loss, float(asked)), loss]).to(values[0])
        flat = torch.cat([v.flatten() for v in values] + [flags]) / self.world
        dist.all_reduce(flat)
        parts = flat.split([v.numel() for v in values] + [2])
        for value, part in zip(values, parts, strict=False):
            value.copy_(part.view_as(value))
        return bool(parts[-1][0] > 0), parts[-1][1]

    def _gradients(self, params: list[nn.Parameter]) -> list[Tensor]:
        """The gradients to be averaged, the same ones everywhere: zero for what only other processes' data used."""
        used = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
        dist.all_reduce(used)
        for p, count in zip(params, used.tolist(), strict=True):
            if count and p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in params if p.grad is not None]

    def shared(
        self, kind: type[torch.optim.Optimizer], params: list[nn.Parameter], settings: dict[str, Any]
    ) -> torch.optim.Optimizer:
        """An optimiser whose work and state the processes divide among themselves."""
        if self.world == 1:
            return kind(params, **settings)
        return ZeroRedundancyOptimizer(params, optimizer_class=kind, **settings)


# -- the loop -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _State:
    """Everything that a checkpoint holds: trained weights, their average, optimisers, the step."""

    trained: nn.ModuleDict
    ema: dict[str, Tensor]
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite


def fit(
    run: RunConfig,
    stage_name: str,
    folder: str | Path,
    *,
    resume: bool = True,
    device: str = "cpu",
    report: Callable[[StepReport], None] | None = None,
    evaluate: Callable[[Parts, int], dict[str, float]] | None = None,
    workers: int = 0,
) -> Path:
    """Train one stage in `folder` and return the model folder it wrote, folder/model.

    Earlier stages must be in folder/model. With `resume`, goes on from the last checkpoint there. `workers` processes
    draw the data (0: a thread does), which changes nothing but the speed.
    `evaluate` is called with (parts holding averaged weights, step) whenever a checkpoint is written.
    """
    stage, folder, group = run.stage(stage_name), Path(folder), _Group.from_environment(device)
    if stage.batch % group.world:
        raise TrainingError(f"batch {stage.batch} cannot be shared equally by {group.world} processes.")
    parts = _start_parts(run, stage_name, folder, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)  # of what a task makes for itself, such as a head
        task = TASKS[stage_name](parts, stage, run.seed)
    parts.stages = (*(s for s in parts.stages if s != stage_name), stage_name)
    parts.requires_grad_(False)
    task.trained.to(device).requires_grad_(True)
    group.equalize(task.trained)
    state = _new_state(task, stage, group)
    precision = _restore(state, folder, run, stage) if resume else None
    precision = group.agreed(precision or _pick_precision(run.precision, device))
    how = _Step(run.seed, precision, device, group)
    with (
        _Terminated() as stop,
        _Metrics(folder, stage_name, state.step) if group.is_first else contextlib.nullcontext() as metrics,
        _Prefetch(task, stage, state.step, group, workers) as batches,
    ):
        for data in batches:
            started = time.perf_counter()
            values, stopping = _step(state, task, stage, data, how, stop)
            done = state.step == stage.steps
            if metrics is not None and (state.step % stage.log_every == 0 or done):
                line = metrics.write(state.step, values, stage, time.perf_counter() - started)
                if report is not None:
                    report(line)
            if state.step % stage.save_every == 0 or done or stopping:
                _gather(state)
                if metrics is not None:
                    _save_state(state, folder, stage, {"precision": precision, "seed": str(run.seed)})
                if metrics is not None and evaluate is not None:
                    with _averaged(state):
                        metrics.extra(state.step, evaluate(parts, state.step))
            if stopping and not done:
                raise TrainingError(
                    f"stopped by a signal at step {state.step}; its checkpoint is written, go on with --resume auto."
                )
    if group.is_first:
        with _averaged(state):
            save_parts(parts, folder / "model")
    group.wait()
    return folder / "model"


def fit_task(task: Task, stage: StageConfig, seed: int, *, device: str = "cpu", workers: int = 0) -> dict[str, float]:
    """Train a task as `fit` does, in this process and without files; its modules end with averaged weights.

    For comparisons of short runs. Returns the last step's metrics. A run that is lost is begun again.
    """
    group = _Group()
    task.trained.to(device).requires_grad_(True)
    state = _new_state(task, stage, group)
    how = _Step(seed, _pick_precision("auto", device), device, group)
    values: dict[str, float] = {}
    with _Terminated() as stop, _Prefetch(task, stage, 0, group, workers) as batches:
        for data in batches:
            values, stopping = _step(state, task, stage, data, how, stop)
            if stopping:
                raise TrainingError(f"stopped by a signal at step {state.step} of {stage.steps}.")
    task.trained.load_state_dict(state.ema or task.trained.state_dict())
    task.trained.eval().requires_grad_(False)
    return values


def _start_parts(run: RunConfig, stage: str, folder: Path, device: str) -> Parts:
    """The parts that earlier stages left, or fresh ones with a new tokenizer at the first stage."""
    names: list[str] = [s.name for s in run.stages]
    if (folder / "model" / "config.json").is_file():
        parts = load_parts(folder / "model", device)
        _check_same(parts.cfg, run.model)
        missing = [name for name in names[: names.index(stage)] if name not in parts.stages]
        if missing:
            raise TrainingError(
                f"stage {stage} starts from stages that {folder}/model has not seen: "
                f"{', '.join(missing)}; run --stage {missing[0]} first."
            )
        if stage in TALKING and parts.lexicon:
            parts.lexicon |= _all_words()
        return parts
    if stage != names[0]:
        raise TrainingError(
            f"stage {stage} starts from the stage before it, but {folder}/model is not there; "
            f"run --stage {names[0]} first."
        )
    torch.manual_seed(run.seed)
    parts = Parts(run.model).to(device)
    corpus = (words for i in range(2000) for words in _words_of(run.seed, i))
    parts.tokenizer = train_tokenizer(corpus, run.model.vlm.vocab)
    if parts.tokenizer.special != run.model.vlm.special:
        raise ConfigError("vlm.special does not fit the tokenizer's special tokens.")
    parts.lexicon = _all_words()
    return parts


def _all_words() -> frozenset[str]:
    """Every word of every conversation that stages train on."""
    return understanding_words() | edit_words() | story_words()


def _words_of(seed: int, index: int) -> Iterator[str]:
    """What the tokenizer learns from: captions, conversations, instructions."""
    yield draw_task(seed, index).prompt
    yield edit_task(seed, index).instruction
    for dialogue in (understanding_dialogue(seed, index), story_dialogue(story_task(seed, index))):
        yield from (part for turn in dialogue.turns for part in (*turn.asked, *turn.told) if isinstance(part, str))


def _check_same(saved: ModelConfig, wanted: ModelConfig) -> None:
    old, new = to_dict(saved), to_dict(wanted)
    differ = [k for k in old if old[k] != new.get(k) and k not in ("guidance", "prior_scale")]
    if differ:
        raise TrainingError(
            f"the model in the run folder has another {', '.join(differ)} than the recipe; "
            "use another --output, or the recipe it was made with."
        )


def _new_state(task: Task, stage: StageConfig, group: _Group) -> _State:
    named = {k: p for k, p in task.trained.named_parameters() if p.requires_grad}
    o = stage.optim
    matrices = {k: p for k, p in named.items() if o.matrix_lr and _is_hidden_matrix(k, p)}
    rest = [p for k, p in named.items() if k not in matrices]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=o.lr, betas=(0.9, 0.95), weight_decay=o.weight_decay, fused=True)
    ]
    if matrices:
        muon = {"lr": o.matrix_lr, "weight_decay": o.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(group.shared(torch.optim.Muon, list(matrices.values()), muon))
    ema = {k: v.detach().clone() for k, v in task.trained.state_dict().items()} if o.ema else {}
    task.trained.train()
    return _State(task.trained, ema, optimizers)


def _is_hidden_matrix(name: str, p: Tensor) -> bool:
    outside = ("embed", "head", "proj_in", "position", "context_in", "noise", "patch")
    return p.ndim == 2 and not any(word in name for word in outside)


@dataclass(frozen=True, slots=True)
class _Step:
    seed: int
    precision: str
    device: str
    group: _Group


def _step(
    state: _State, task: Task, stage: StageConfig, data: Any, how: _Step, stop: _Terminated
) -> tuple[dict[str, float], bool]:
    """One optimiser step: its metrics, and whether any process was asked to stop.

    A non-finite loss or gradient skips the update and is counted.
    """
    generator = torch.Generator().manual_seed(_seed(how.seed, f"{stage.name}/{how.group.rank}", state.step))
    rate = stage.optim.rate(state.step, stage.steps)
    buffers = {k: v.clone() for k, v in task.trained.named_buffers()}
    with torch.autocast(how.device, dtype=torch.bfloat16, enabled=how.precision == "bfloat16"):
        loss, extra = task.loss(data, generator)
    loss.backward()
    stopping, loss = how.group.average(task.trained, stop.asked, loss.detach())
    norm = nn.utils.clip_grad_norm_(task.trained.parameters(), stage.optim.clip)
    finite = bool(torch.isfinite(norm)) and bool(torch.isfinite(loss))
    for optimizer, lr in zip(state.optimizers, (stage.optim.lr, stage.optim.matrix_lr), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if finite:
        _update_ema(state, stage.optim.ema)
    else:
        _put_back(task.trained, buffers)
        state.skipped += 1
    state.step += 1
    values = {k: float(v.detach()) for k, v in extra.items()}
    skipped = {"skipped": float(state.skipped)} if state.skipped else {}
    told = {"loss": float(loss), **values, "grad_norm": float(norm), "rate": rate, **skipped}
    return told, stopping


@torch.no_grad()
def _put_back(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Running statistics as they were before a forward pass that went wrong."""
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def _update_ema(state: _State, decay: float) -> None:
    if not state.ema:
        return
    decay = min(decay, (1 + state.step) / (10 + state.step))
    for name, value in state.trained.state_dict().items():
        if value.is_floating_point():
            state.ema[name].lerp_(value, 1 - decay)
        else:
            state.ema[name].copy_(value)


@contextlib.contextmanager
def _averaged(state: _State) -> Iterator[None]:
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


# -- checkpoints, metrics, data ahead of time -----------------------------------------------------------


def _gather(state: _State) -> None:
    """Bring sharded optimiser states to the process that writes the checkpoint."""
    for optimizer in state.optimizers:
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            optimizer.consolidate_state_dict(to=0)


def _state_path(folder: Path, stage: StageConfig) -> Path:
    return folder / f"state-{stage.name}.safetensors"


def _save_state(state: _State, folder: Path, stage: StageConfig, how: dict[str, str]) -> None:
    tensors = {f"weights/{k}": v for k, v in state.trained.state_dict().items()}
    tensors |= {f"ema/{k}": v for k, v in state.ema.items()}
    for i, optimizer in enumerate(state.optimizers):
        for j, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optim/{i}/{j}/{k}": torch.as_tensor(v) for k, v in values.items()}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    meta = {
        "step": str(state.step),
        "skipped": str(state.skipped),
        "stage": json.dumps(to_dict(stage)),
        **how,
    }
    save_tensors(tensors, _state_path(folder, stage), meta)


def _restore(state: _State, folder: Path, run: RunConfig, stage: StageConfig) -> str | None:
    """Load the last checkpoint of this stage into `state`; returns its precision, None if none."""
    path = _state_path(folder, stage)
    if not path.is_file():
        return None
    tensors = load_tensors(path)
    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
    if {"step", "stage", "precision"} - set(meta):
        raise TrainingError(f"{path} is no checkpoint of a training run; move it away.")
    _check_settings(path, meta, run, stage)
    try:
        state.trained.load_state_dict(_under(tensors, "weights/"))
    except RuntimeError as error:
        raise TrainingError(
            f"{path} holds the weights of another model; use another --output, or the recipe it was made with."
        ) from error
    state.ema = _under(tensors, "ema/")
    for i, optimizer in enumerate(state.optimizers):
        values: dict[int, dict[str, Tensor]] = {}
        for key, value in _under(tensors, f"optim/{i}/").items():
            j, name = key.split("/")
            values.setdefault(int(j), {})[name] = value
        (group,) = optimizer.param_groups
        settings = {**group, "params": list(range(len(group["params"])))}
        optimizer.load_state_dict({"state": values, "param_groups": [settings]})
    state.step, state.skipped = int(meta["step"]), int(meta.get("skipped", 0))
    return meta["precision"]


def _check_settings(path: Path, meta: dict[str, str], run: RunConfig, stage: StageConfig) -> None:
    """Raise TrainingError that names every setting in which a checkpoint differs from the recipe."""
    wanted = _flat(to_dict(stage)) | {"seed": run.seed, "precision": run.precision}
    saved = _flat(json.loads(meta["stage"])) | {"precision": meta["precision"]}
    saved["seed"] = int(meta.get("seed", run.seed))
    free = ["steps", "save_every", "log_every"]  # a longer or shorter schedule is a choice, too
    free += ["precision"] if run.precision == "auto" else []
    differ = [f"{k} ({saved.get(k)}, now {v})" for k, v in wanted.items() if saved.get(k) != v and k not in free]
    if differ:
        raise TrainingError(
            f"{path} was made with another {', '.join(differ)}; resume with the same settings, "
            "or start anew with --resume none."
        )


def _flat(config: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A nested config with dotted names: {"optim.lr": 0.002}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{path}{name}.") if nested else {f"{path}{name}": value}
    return flat


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


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
        per_step = (time.perf_counter() - self.clock) / max(1, step - self.started)
        rate, eta = stage.batch / per_step, per_step * (stage.steps - step)
        self.extra(step, {**values, "seconds": seconds, "images_per_s": rate})
        return StepReport(self.stage, step, stage.steps, values, rate, eta)

    def extra(self, step: int, values: dict[str, float]) -> None:
        """Write a line; none where there is nothing to say."""
        if not values:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{self.stage}/{name}", value, step)


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


class _Prefetch:
    """Draws coming batches while the current one trains: one in a thread, or several in `workers` processes."""

    def __init__(self, task: Task, stage: StageConfig, step: int, group: _Group, workers: int) -> None:
        self.draw, self.stage, self.step, self.group = task.draw, stage, step, group
        self.ahead = 1 + 2 * workers
        self.pool: Executor = ThreadPoolExecutor(1)
        if workers:
            self.pool = ProcessPoolExecutor(workers, torch.multiprocessing.get_context("spawn"))

    def __enter__(self) -> Iterator[Any]:
        return self._batches()

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, step: int) -> Future[Any]:
        share = self.stage.batch // self.group.world
        first = step * self.stage.batch + self.group.rank * share
        return self.pool.submit(self.draw, range(first, first + share))

    def _batches(self) -> Iterator[Any]:
        coming: deque[Future[Any]] = deque()
        asked = self.step
        for _ in range(self.step, self.stage.steps):
            while len(coming) <= self.ahead and asked < self.stage.steps:
                coming.append(self._ask(asked))
                asked += 1
            yield coming.popleft().result()


class _Terminated:
    """Turns SIGTERM into a flag, so that a run ends with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Terminated:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            self.previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        self.asked = True

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ValueError, AttributeError):
            signal.signal(signal.SIGTERM, self.previous)
