"""Checkpoints of a run: weights, their average, optimisers and the step, in one file or in shards.

A run of whole copies writes state-STAGE.safetensors; a sharded run writes a folder state-STAGE with one checkpoint of
torch.distributed.checkpoint (DCP) in it, which any number of processes can read. Both are either complete or absent.
DCP's own index is pickled: these folders are read from the run's own folder only, never from elsewhere.
Not here: model folders (`models.checkpoint`), what the state is (`state`).
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.optim import ZeroRedundancyOptimizer

from starflow2.core.files import replacing
from starflow2.core.serialize import flatten, to_dict
from starflow2.errors import OutputError, TrainingError
from starflow2.models.checkpoint import load_tensors, save_tensors
from starflow2.training.config import RunConfig, StageConfig
from starflow2.training.parallel import Distributed, FullyShardedDistributed
from starflow2.training.state import TrainState

__all__ = ["CheckpointStore", "FileStore", "ShardStore", "store_for"]

REQUIRED = {"step", "stage", "precision"}  # settings that every checkpoint has beside its tensors
CHANGEABLE = (  # settings that may differ when a run is resumed; so may all of `shard`
    "steps",
    "save_every",
    "log_every",
    "accumulate",
    "checkpoint_activations",
    "whitening_captions",  # has an effect before the first step only
)


class CheckpointStore(Protocol):
    """Reads and writes the checkpoints of a stage. All processes call each method."""

    def settings(self, run: RunConfig, stage: StageConfig) -> dict[str, str] | None:
        """Metadata of the last checkpoint, or None.

        Raises TrainingError if another run wrote it, CheckpointError if it is damaged.
        """

    def load(self, state: TrainState, settings: dict[str, str]) -> None:
        """Fill `state` from the last checkpoint, whose metadata is `settings`."""

    def save(self, state: TrainState, settings: dict[str, str]) -> None:
        """Write a checkpoint, or begin to; until it is complete the last one stays. Raises OutputError."""

    def close(self) -> None:
        """Wait until all is written."""


def store_for(folder: Path, stage: StageConfig, group: Distributed) -> CheckpointStore:
    """The store of a stage's checkpoints in the format that the group writes.

    Raises TrainingError where the other format is there.
    """
    file, shards = folder / f"state-{stage.name}.safetensors", folder / f"state-{stage.name}"
    wanted, other = (shards, file) if isinstance(group, FullyShardedDistributed) else (file, shards)
    if other.exists() and not wanted.exists():
        raise TrainingError(
            f"{other} was written under another shard.mode than {stage.shard.mode}; continue with that one, "
            "or start anew in another --output."
        )
    return ShardStore(shards, group) if isinstance(group, FullyShardedDistributed) else FileStore(file, group)


class FileStore:
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
            load_tensors(self.path)  # its error says what is wrong
            raise

    def load(self, state: TrainState, settings: dict[str, str]) -> None:
        state.load_tensors(load_tensors(self.path), settings, self.path)

    def save(self, state: TrainState, settings: dict[str, str]) -> None:
        for optimizer in state.optimizers:
            if isinstance(optimizer, ZeroRedundancyOptimizer):
                optimizer.consolidate_state_dict(to=0)
        if self.group.is_first:
            tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.tensors().items()}
            save_tensors(tensors, self.path, settings)

    def close(self) -> None:
        pass


class ShardStore:
    """A folder with the last checkpoint of DCP, in a folder named by its step.

    Every process writes its own shards, so that a checkpoint of any number of processes loads in any other number. A
    new checkpoint is written in the background, under a name that begins with a dot, and then replaces the last one. A
    kill leaves such a folder, which is never read and is removed with the next checkpoint.
    """

    def __init__(self, folder: Path, group: Distributed) -> None:
        self.folder, self.group = folder, group
        # processes of its own: else writing in the background would mix its messages with those of the steps
        self.processes = dist.new_group(backend="gloo")
        self.pending: Future[None] | None = None

    def _last(self) -> Path | None:
        found = [p for p in self.folder.glob("[0-9]*") if (p / "settings.json").is_file()]
        return max(found, key=lambda p: int(p.name), default=None)

    def settings(self, run: RunConfig, stage: StageConfig) -> dict[str, str] | None:
        last = self._last()
        if last is None:
            return None
        return _check_settings(last, json.loads((last / "settings.json").read_text()), run, stage)

    def load(self, state: TrainState, settings: dict[str, str]) -> None:
        last = self.folder / settings["step"]
        index = FileSystemReader(last).read_metadata().state_dict_metadata
        tensors = state.tensors() | _empty_optimizer_states(state, index)
        wrong = sorted(
            k for k, v in tensors.items() if k not in index or getattr(index[k], "size", None) != v.shape
        ) + sorted(set(index) - set(tensors))
        if wrong:
            raise TrainingError(
                f"{last} holds the weights of another model ({wrong[0]}); use another --output, "
                "or the recipe it was made with."
            )
        tensors = {k: v.detach() for k, v in tensors.items()}
        load(tensors, checkpoint_id=last, process_group=self.processes)
        state.load_tensors(tensors, settings, last)

    def save(self, state: TrainState, settings: dict[str, str]) -> None:
        self.close()
        new, done = self.folder / f".{state.step}.new", self.folder / str(state.step)
        if self.group.is_first:
            _make_empty(new)
        dist.barrier(self.processes)
        tensors = {k: v.detach() for k, v in state.tensors().items()}
        try:
            saving = async_save(tensors, checkpoint_id=new, process_group=self.processes)
        except OSError as error:
            raise OutputError(f"cannot write {new}: {error.strerror or error}.") from error
        assert isinstance(saving, Future)
        self.pending = Future()
        pending = self.pending

        def finish(saved: Future[Any]) -> None:
            try:
                saved.result()  # the index, which is on the disk only when every process has written its shards
                if self.group.is_first:
                    self._replace_last(new, done, settings)
                pending.set_result(None)
            except BaseException as error:
                pending.set_exception(error)

        saving.add_done_callback(finish)

    def _replace_last(self, new: Path, done: Path, settings: dict[str, str]) -> None:
        """Let the complete checkpoint `new` take the place of all others, as `done`."""
        with replacing(new / "settings.json") as temp:
            temp.write_text(json.dumps(settings, indent=1) + "\n")
        shutil.rmtree(done, ignore_errors=True)
        new.rename(done)
        for old in self.folder.iterdir():
            if old != done:
                shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            pending.result()
        except Exception as error:
            raise OutputError(f"cannot write a checkpoint to {self.folder}: {error}.") from error


def _empty_optimizer_states(state: TrainState, index: dict[str, Any]) -> dict[str, Tensor]:
    """Zeros for the optimiser states that a DCP checkpoint holds; a moment is sharded as its weight is."""
    tensors: dict[str, Tensor] = {}
    for i, optimizer in enumerate(state.optimizers):
        params = optimizer.param_groups[0]["params"]
        for key in (k for k in index if k.startswith(f"optim/{i}/")):
            saved, like = index[key], params[int(key.split("/")[2])]
            assert isinstance(saved, TensorStorageMetadata)
            dtype = saved.properties.dtype
            is_moment = saved.size == like.shape  # else a step count, which is whole
            tensors[key] = torch.zeros_like(like, dtype=dtype) if is_moment else torch.zeros(saved.size, dtype=dtype)
    return tensors


def _make_empty(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}.") from error


def _check_settings(path: Path, saved_with: dict[str, str], run: RunConfig, stage: StageConfig) -> dict[str, str]:
    """Return `saved_with` if a run with these settings may continue from it.

    Raises TrainingError that names every setting in which the checkpoint differs from the recipe.
    """
    if REQUIRED - set(saved_with):
        raise TrainingError(f"{path} is no checkpoint of a training run; move it away.")
    wanted = flatten(to_dict(stage)) | {"seed": run.seed, "precision": run.precision}
    defaults = flatten(to_dict(StageConfig(name=stage.name, steps=1, batch=1)))  # of settings that did not exist then
    saved = defaults | flatten(json.loads(saved_with["stage"])) | {"precision": saved_with["precision"]}
    saved["seed"] = int(saved_with.get("seed", run.seed))
    changeable = [*CHANGEABLE, *(name for name in wanted if name.startswith("shard."))]
    changeable += ["precision"] if run.precision == "auto" else []
    differ = [f"{k} ({saved.get(k)}, now {v})" for k, v in wanted.items() if saved.get(k) != v and k not in changeable]
    if differ:
        raise TrainingError(
            f"{path} was made with another {', '.join(differ)}; resume with the same settings, "
            "or start anew with --resume none."
        )
    return saved_with
