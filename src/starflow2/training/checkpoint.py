"""Checkpoints of a run: weights, their average, optimisers and the step, in one file or in shards.

A run of whole copies writes state-STAGE.safetensors; a sharded run writes a folder state-STAGE with one checkpoint of
torch.distributed.checkpoint (DCP) in it, which any number of processes can read. Both are either complete or absent.
DCP's own index is pickled; `shard_index` reads it without running anything.
Not here: model folders (`models.checkpoint`), what the state is (`state`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.optim import ZeroRedundancyOptimizer

from starflow2.core.files import TEMPORARY, flush_folder, replacing
from starflow2.core.json_reader import parse_json
from starflow2.core.serialize import flatten, read_json, to_dict
from starflow2.errors import ConfigError, OutputError, TrainingError
from starflow2.models.tensor_file import load_signed, read_metadata, save_tensors
from starflow2.training.config import RunConfig, StageConfig
from starflow2.training.parallel import Distributed, FullyShardedDistributed
from starflow2.training.shard_index import IndexReader, index_digest
from starflow2.training.state import TrainState
from starflow2.training.state_check import empty_moments

__all__ = ["CheckpointStore", "FileStore", "ShardStore", "store_for"]

SETTINGS = "settings.json"  # of a sharded checkpoint; written last
STEP = re.compile(r"([0-9]+)(?:\.([0-9]+))?")  # names of complete checkpoints
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
        return _check_settings(self.path, read_metadata(self.path), run, stage) if self.path.is_file() else None

    def load(self, state: TrainState, settings: dict[str, str]) -> None:
        state.load_tensors(load_signed(self.path)[0], settings, self.path)

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
    kill leaves such a folder, which is never read and is removed after the next checkpoint is complete.
    """

    def __init__(self, folder: Path, group: Distributed) -> None:
        self.folder, self.group = folder, group
        # processes of its own: else writing in the background would mix its messages with those of the steps
        self.processes = dist.new_group(backend="gloo")
        self.pending: Future[None] | None = None

    def _complete(self) -> dict[tuple[int, int], Path]:
        """Complete checkpoints by step, and by number where a step was saved again."""
        paths = {STEP.fullmatch(p.name): p for p in self.folder.glob("[0-9]*") if (p / SETTINGS).is_file()}
        return {(int(m[1]), int(m[2] or 0)): p for m, p in paths.items() if m}

    def _last(self) -> Path | None:
        found = self._complete()
        return found[max(found)] if found else None

    def settings(self, run: RunConfig, stage: StageConfig) -> dict[str, str] | None:
        last = self._last()
        if last is None:
            return None
        try:
            settings = read_json(last / SETTINGS)
        except ConfigError as error:
            raise TrainingError(f"{error} Start anew with --resume none.") from error
        if not isinstance(settings, dict) or not all(isinstance(value, str) for value in settings.values()):
            raise TrainingError(f"{last / SETTINGS} does not hold settings by name; start anew with --resume none.")
        settings = _check_settings(last, settings, run, stage)
        if settings.get("index") != index_digest(last):
            raise TrainingError(f"{last} has an index that this run did not write; start anew with --resume none.")
        return settings

    def load(self, state: TrainState, settings: dict[str, str]) -> None:
        last = self._last()
        assert last is not None
        reader = IndexReader(last)
        index = reader.read_metadata().state_dict_metadata
        tensors = state.tensors() | empty_moments(state.optimizers, index, last)
        wrong = sorted(
            k for k, v in tensors.items() if k not in index or getattr(index[k], "size", None) != v.shape
        ) + sorted(set(index) - set(tensors))
        if wrong:
            raise TrainingError(
                f"{last} holds the weights of another model ({wrong[0]}); use another --output, "
                "or the recipe it was made with."
            )
        tensors = {k: v.detach() for k, v in tensors.items()}
        load(tensors, storage_reader=reader, process_group=self.processes)
        state.load_tensors(tensors, settings, last)

    def save(self, state: TrainState, settings: dict[str, str]) -> None:
        self.close()
        new, done = self.folder / f"{TEMPORARY}{state.step}.tmp", self._free_name(state.step)
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

    def _free_name(self, step: int) -> Path:
        """A name for a checkpoint of this step: STEP, or STEP.NUMBER where it was saved before."""
        numbers = [number for found, number in self._complete() if found == step]
        return self.folder / (f"{step}.{max(numbers) + 1}" if numbers else str(step))

    def _replace_last(self, new: Path, done: Path, settings: dict[str, str]) -> None:
        """Let the complete checkpoint `new` take the place of all others, as `done`; files of others stay."""
        with replacing(new / SETTINGS) as temp:
            text = json.dumps({**settings, "index": index_digest(new)}, indent=1) + "\n"
            temp.write_text(text, encoding="utf-8")
        earlier = [*self._complete().values(), *(p for p in self.folder.glob(f"{TEMPORARY}*.tmp") if p != new)]
        new.rename(done)
        flush_folder(self.folder)
        for old in earlier:
            shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            pending.result()
        except Exception as error:
            raise OutputError(f"cannot write a checkpoint to {self.folder}: {error}.") from error


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
    counts = _counts(path, saved_with, stage)
    wanted = flatten(to_dict(stage)) | {"seed": run.seed, "precision": run.precision}
    defaults = flatten(to_dict(StageConfig(name=stage.name, steps=1, batch=1)))  # of settings that did not exist then
    saved = defaults | flatten(_saved_stage(path, saved_with)) | {"precision": saved_with["precision"]}
    saved["seed"] = counts.get("seed", run.seed)
    changeable = [*CHANGEABLE, *(name for name in wanted if name.startswith("shard."))]
    changeable += ["precision"] if run.precision == "auto" else []
    differ = [f"{k} ({saved.get(k)}, now {v})" for k, v in wanted.items() if saved.get(k) != v and k not in changeable]
    if differ:
        raise TrainingError(
            f"{path} was made with another {', '.join(differ)}; resume with the same settings, "
            "or start anew with --resume none."
        )
    return saved_with


def _counts(path: Path, saved_with: Mapping[str, str], stage: StageConfig) -> dict[str, int]:
    """The numbers among the settings. Raises TrainingError for what is none, and for more steps than the stage has."""
    counts: dict[str, int] = {}
    for name in ("step", "skipped", "seed"):
        if name not in saved_with:
            continue
        if not re.fullmatch(r"-?[0-9]{1,20}", saved_with[name]):
            raise TrainingError(f"{path}: {name} is {saved_with[name]!a}; expected a whole number.")
        counts[name] = int(saved_with[name])
    if not 0 <= counts.get("skipped", 0) <= counts["step"]:
        raise TrainingError(f"{path}: step is {counts['step']} and skipped {counts.get('skipped', 0)}.")
    if counts["step"] > stage.steps:
        raise TrainingError(
            f"{path} was written after {counts['step']} steps, and the stage has {stage.steps}; give more --steps, or "
            "start anew with --resume none."
        )
    if saved_with["precision"] not in ("float32", "bfloat16"):
        raise TrainingError(f"{path}: precision is {saved_with['precision']!a}; expected float32 or bfloat16.")
    return counts


def _saved_stage(path: Path, saved_with: Mapping[str, str]) -> dict[str, Any]:
    """Settings of the stage that wrote a checkpoint. Raises TrainingError for what is no JSON object."""
    try:
        stage = parse_json(saved_with["stage"], f"{path}: stage")
    except ConfigError as error:
        raise TrainingError(f"{error} Start anew with --resume none.") from error
    if not isinstance(stage, dict):
        raise TrainingError(f"{path}: stage is {type(stage).__name__}; expected its settings by name.")
    return stage
