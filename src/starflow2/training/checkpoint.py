"""What a run can go on from: weights, their average, optimisers and the step, in one file or in shards.

A run of whole copies writes state-STAGE.safetensors; one of shards a folder state-STAGE with one checkpoint of
torch.distributed.checkpoint (DCP) in it, which any number of processes can read. Both are complete or not there.
DCP's own index is pickled: these folders are read from the run's own folder only, never from elsewhere.
Not here: model folders, which `checkpoint` writes.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.optim import ZeroRedundancyOptimizer

from starflow2.core.files import replacing
from starflow2.core.serialize import to_dict
from starflow2.errors import OutputError, TrainingError
from starflow2.models.checkpoint import load_tensors, save_tensors
from starflow2.training.config import RunConfig, StageConfig
from starflow2.training.parallel import Distributed, FullyShardedDistributed

__all__ = ["CheckpointStore", "TrainState", "store_for"]

NEEDED = {"step", "stage", "precision"}  # of the settings that stand beside the tensors
FREE = (
    "steps",
    "save_every",
    "log_every",
    "accumulate",
    "checkpoint_activations",
    "whitening_captions",  # read before the first step only
)  # what a resume may change, and `shard`


@dataclass(slots=True)
class TrainState:
    """Everything that a checkpoint holds: trained weights, their average, optimisers, the step."""

    trained: nn.ModuleDict
    ema: dict[str, Tensor]
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; of an optimiser: optim/NUMBER/PARAMETER/NAME."""
        tensors = {f"weights/{k}": v for k, v in self.trained.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.items()}
        for i, optimizer in enumerate(self.optimizers):
            for j, values in optimizer.state_dict()["state"].items():
                for k, v in values.items():
                    tensors |= _opened(f"optim/{i}/{j}/{k}", v)
        return tensors

    def fill(self, tensors: dict[str, Tensor], settings: dict[str, str], path: Path) -> None:
        """Take over what `tensors` returned. Raises TrainingError for the weights of another model."""
        try:
            self.trained.load_state_dict(_under(tensors, "weights/"))
        except RuntimeError as error:
            raise TrainingError(
                f"{path} holds the weights of another model; use another --output, or the recipe it was made with."
            ) from error
        self.ema = _under(tensors, "ema/")
        for i, optimizer in enumerate(self.optimizers):
            values: dict[int, dict[str, Any]] = {}
            for key, value in _closed(_under(tensors, f"optim/{i}/")).items():
                j, name = key.split("/")
                values.setdefault(int(j), {})[name] = value
            (group,) = optimizer.param_groups
            same = {**group, "params": list(range(len(group["params"])))}
            optimizer.load_state_dict({"state": values, "param_groups": [same]})
        self.step, self.skipped = int(settings["step"]), int(settings.get("skipped", 0))

    def settings(self, stage: StageConfig, how: dict[str, str]) -> dict[str, str]:
        """What stands beside the tensors."""
        return {"step": str(self.step), "skipped": str(self.skipped), "stage": json.dumps(to_dict(stage)), **how}


class CheckpointStore(Protocol):
    """Where the checkpoints of a stage stand. All processes call each method."""

    def settings(self, run: RunConfig, stage: StageConfig) -> dict[str, str] | None:
        """Of the last checkpoint, None if there is none. Raises TrainingError for others, CheckpointError."""

    def load(self, state: TrainState, settings: dict[str, str]) -> None: ...

    def save(self, state: TrainState, settings: dict[str, str]) -> None:
        """Write a checkpoint, or begin to. Raises OutputError; the last one survives until this one is whole."""

    def close(self) -> None:
        """Wait until all is written."""


def store_for(folder: Path, stage: StageConfig, group: Distributed) -> CheckpointStore:
    """Where the checkpoints of a stage stand, in the form that the group writes."""
    one, many = folder / f"state-{stage.name}.safetensors", folder / f"state-{stage.name}"
    wanted, other = (many, one) if isinstance(group, FullyShardedDistributed) else (one, many)
    if other.exists() and not wanted.exists():
        raise TrainingError(
            f"{other} was written under another shard.mode than {stage.shard.mode}; go on with that one, "
            "or start anew in another --output."
        )
    return _Shards(many, group) if isinstance(group, FullyShardedDistributed) else _File(one, group)


class _File:
    """One safetensors file, written by the first process."""

    def __init__(self, path: Path, group: Distributed) -> None:
        self.path, self.group = path, group

    def settings(self, run: RunConfig, stage: StageConfig) -> dict[str, str] | None:
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                return _check_settings(self.path, file.metadata() or {}, run, stage)
        except (SafetensorError, OSError):
            load_tensors(self.path)  # says what is wrong
            raise

    def load(self, state: TrainState, settings: dict[str, str]) -> None:
        state.fill(load_tensors(self.path), settings, self.path)

    def save(self, state: TrainState, settings: dict[str, str]) -> None:
        for optimizer in state.optimizers:
            if isinstance(optimizer, ZeroRedundancyOptimizer):
                optimizer.consolidate_state_dict(to=0)
        if self.group.is_first:
            tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.tensors().items()}
            save_tensors(tensors, self.path, settings)

    def close(self) -> None:
        pass


class _Shards:
    """A folder with one checkpoint of DCP, STEP; a new one is written beside it in the background, then takes over.

    Every process writes its own shards, so that a checkpoint of any number of processes loads in any other. A kill
    leaves a folder with a dot in front, which is never read and goes with the next checkpoint.
    """

    def __init__(self, folder: Path, group: Distributed) -> None:
        self.folder, self.group = folder, group
        # of its own: the background would otherwise mix its messages with those of the steps
        self.talk = dist.new_group(backend="gloo")
        self.written: Future[None] | None = None

    def _last(self) -> Path | None:
        found = [p for p in self.folder.glob("[0-9]*") if (p / "settings.json").is_file()]
        return max(found, key=lambda p: int(p.name), default=None)

    def settings(self, run: RunConfig, stage: StageConfig) -> dict[str, str] | None:
        last = self._last()
        if last is None:
            return None
        return _check_settings(last, json.loads((last / "settings.json").read_text()), run, stage)

    def load(self, state: TrainState, settings: dict[str, str]) -> None:
        last = self._last()
        assert last is not None
        tensors = state.tensors()
        index = FileSystemReader(last).read_metadata().state_dict_metadata
        for i, optimizer in enumerate(state.optimizers):
            params = optimizer.param_groups[0]["params"]
            for key in (k for k in index if k.startswith(f"optim/{i}/")):
                saved, like = index[key], params[int(key.split("/")[2])]
                assert isinstance(saved, TensorStorageMetadata)
                dtype = saved.properties.dtype
                same = saved.size == like.shape  # a moment is sharded as its weight is; a step count is whole
                tensors[key] = torch.zeros_like(like, dtype=dtype) if same else torch.zeros(saved.size, dtype=dtype)
        wrong = sorted(
            k for k, v in tensors.items() if k not in index or getattr(index[k], "size", None) != v.shape
        ) + sorted(set(index) - set(tensors))
        if wrong:
            raise TrainingError(
                f"{last} holds the weights of another model ({wrong[0]}); use another --output, "
                "or the recipe it was made with."
            )
        tensors = {k: v.detach() for k, v in tensors.items()}
        load(tensors, checkpoint_id=last, process_group=self.talk)
        state.fill(tensors, settings, last)

    def save(self, state: TrainState, settings: dict[str, str]) -> None:
        self.close()
        new, done = self.folder / f".{state.step}.new", self.folder / str(state.step)
        if self.group.is_first:
            _emptied(new)
        dist.barrier(self.talk)
        tensors = {k: v.detach() for k, v in state.tensors().items()}
        try:
            saving = async_save(tensors, checkpoint_id=new, process_group=self.talk)
        except OSError as error:
            raise OutputError(f"cannot write {new}: {error.strerror or error}.") from error
        assert isinstance(saving, Future)
        self.written = Future()
        finished = self.written

        def finish(saved: Future[Any]) -> None:
            try:
                saved.result()  # the index, which stands on the disk only when every process has written its shards
                if self.group.is_first:
                    self._take_over(new, done, settings)
                finished.set_result(None)
            except BaseException as error:
                finished.set_exception(error)

        saving.add_done_callback(finish)

    def _take_over(self, new: Path, done: Path, settings: dict[str, str]) -> None:
        with replacing(new / "settings.json") as temp:
            temp.write_text(json.dumps(settings, indent=1) + "\n")
        shutil.rmtree(done, ignore_errors=True)
        new.rename(done)
        for old in self.folder.iterdir():
            if old != done:
                shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        if self.written is None:
            return
        written, self.written = self.written, None
        try:
            written.result()
        except Exception as error:
            raise OutputError(f"cannot write a checkpoint to {self.folder}: {error}.") from error


def _emptied(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}.") from error


def _check_settings(path: Path, saved_with: dict[str, str], run: RunConfig, stage: StageConfig) -> dict[str, str]:
    """`saved_with`; raises TrainingError that names every setting in which a checkpoint differs from the recipe."""
    if NEEDED - set(saved_with):
        raise TrainingError(f"{path} is no checkpoint of a training run; move it away.")
    wanted = _flat(to_dict(stage)) | {"seed": run.seed, "precision": run.precision}
    usual = _flat(to_dict(StageConfig(name=stage.name, steps=1, batch=1)))  # of settings younger than the checkpoint
    saved = usual | _flat(json.loads(saved_with["stage"])) | {"precision": saved_with["precision"]}
    saved["seed"] = int(saved_with.get("seed", run.seed))
    free = [*FREE, *(name for name in wanted if name.startswith("shard."))]
    free += ["precision"] if run.precision == "auto" else []
    differ = [f"{k} ({saved.get(k)}, now {v})" for k, v in wanted.items() if saved.get(k) != v and k not in free]
    if differ:
        raise TrainingError(
            f"{path} was made with another {', '.join(differ)}; resume with the same settings, "
            "or start anew with --resume none."
        )
    return saved_with


def _flat(config: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A nested config with dotted names: {"optim.lr": 0.002}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{path}{name}.") if nested else {f"{path}{name}": value}
    return flat


def _opened(name: str, value: Any) -> dict[str, Tensor]:
    """A value of an optimiser by name; moments of 8 bits as what they are made of, since no file knows their class."""
    if isinstance(value, dict):  # bitsandbytes keeps them in one of its own
        return {f"{name}/{part}": v for part, v in value.items()}
    if type(value).__name__ != "OptimState8bit":
        return {name: torch.as_tensor(value)}
    return {f"{name}/{part}": getattr(value, part) for part in ("codes", "scale", "qmap")}


def _closed(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The reverse for all of an optimiser's values, by PARAMETER/NAME."""
    whole: dict[str, Any] = {name: value for name, value in tensors.items() if name.count("/") == 1}
    is_bnb = False
    for name in {name.rsplit("/", 1)[0] for name in set(tensors) - set(whole)}:
        parts = _under(tensors, f"{name}/")
        if "codes" not in parts:
            whole[name], is_bnb = parts, True
            continue
        from torchao.optim.subclass_8bit import OptimState8bit

        whole[name] = OptimState8bit(*(parts[k] for k in ("codes", "scale", "qmap")), signed=name.endswith("exp_avg"))
    # its kernels take the step as a number, where torch's own want a tensor
    return {k: int(v) if is_bnb and k.endswith("/step") else v for k, v in whole.items()}


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
