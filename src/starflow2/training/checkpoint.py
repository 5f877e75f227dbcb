"""Checkpoints of a run: weights, their average, optimisers and the step, in one file or in shards.

A run of whole copies writes state-STAGE.safetensors, and older ones that stay as state-STAGE.STEP.safetensors; a
sharded run writes folders state-STAGE/STEP, each a checkpoint of torch.distributed.checkpoint (DCP), which any number
of processes can read. All are either complete or absent, and both kinds of run read both. DCP's own index is pickled;
`shard_index` reads it without running anything.
Not here: model folders (`models.checkpoint`), what the state is (`state`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor

from starflow2.core.files import flush_folder, replacing
from starflow2.core.json_reader import parse_json
from starflow2.core.serialize import flatten, read_json, to_dict
from starflow2.errors import ConfigError, OutputError, TrainingError
from starflow2.models.tensor_file import load_signed, read_metadata, save_tensors
from starflow2.training.config import RunConfig, StageConfig
from starflow2.training.parallel import Distributed, FullyShardedDistributed
from starflow2.training.shard_index import DigestWriter, IndexReader, first_failure, index_digest, read_errors
from starflow2.training.state import TrainState
from starflow2.training.state_check import empty_moments

__all__ = ["CheckpointStore", "FileStore", "Resume", "Saved", "ShardStore", "store_for"]

SETTINGS = "settings.json"  # of a sharded checkpoint; written last
STEP = re.compile(r"([0-9]+)(?:\.([0-9]+))?")  # names of complete checkpoints: steps, and numbers of repeated ones
REQUIRED = {"step", "stage", "precision"}  # settings that every checkpoint has beside its tensors
CHANGEABLE = (  # settings that may differ when a run is resumed; so may all of `shard`
    "steps",
    "save_every",
    "keep_last",
    "keep_every",
    "log_every",
    "evaluate_every",
    "held_out_batches",
    "max_skipped",
    "accumulate",
    "checkpoint_activations",
    "whitening_captions",  # has an effect before the first step only
    # a mixture is compared by what is in it, when its readers go on (`loader.CorpusFeed`)
    "corpus.mixture",
    "corpus.held_out",
    "corpus.rows",
    "corpus.width",
    "corpus.workers",
    "corpus.broken",
)


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a stage goes on from.

    auto: from a checkpoint, with the same settings; weights: from one with other settings, the data from their start;
    none: from its first step. step: of the checkpoint; None: the last one.
    """

    mode: Literal["auto", "weights", "none"] = "auto"
    step: int | None = None

    @classmethod
    def parse(cls, text: str) -> Resume:
        """Read auto, none, weights, STEP or weights:STEP. Raises ConfigError.

        >>> Resume.parse("weights:2000")
        Resume(mode='weights', step=2000)
        """
        mode, _, step = text.partition(":")
        if text in ("auto", "none", "weights"):
            return cls(text)  # type: ignore[arg-type]
        if text.isdecimal():
            return cls("auto", int(text))
        if mode == "weights" and step.isdecimal():
            return cls("weights", int(step))
        raise ConfigError(
            f"resume is {text!r}; expected auto, none, weights, the STEP of a checkpoint or weights:STEP."
        )


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint on the disk, and the settings that are stored beside its tensors."""

    path: Path
    settings: dict[str, str]


class CheckpointStore(ABC):
    """Reads and writes the checkpoints of a stage. All processes call each method."""

    def __init__(self, folder: Path, stage: StageConfig, group: Distributed) -> None:
        self.folder, self.stage, self.group = folder, stage, group
        self.file, self.shards = folder / f"state-{stage.name}.safetensors", folder / f"state-{stage.name}"

    def find(self, resume: Resume, run: RunConfig) -> Saved | None:
        """The checkpoint to go on from; None to begin anew.

        Raises TrainingError if another run wrote it, or if there is none of that step; CheckpointError if it is
        damaged.
        """
        if resume.mode == "none":
            return None
        found = self.checkpoints()
        if resume.step is not None and resume.step not in found:
            steps = ", ".join(map(str, sorted(found))) or "none"
            raise TrainingError(
                f"there is no checkpoint of step {resume.step} of stage {self.stage.name} in {self.folder}; "
                f"there are: {steps}."
            )
        if not found:
            if resume.mode == "weights":
                raise TrainingError(f"there is no checkpoint of stage {self.stage.name} in {self.folder}.")
            return None
        path = found[max(found) if resume.step is None else resume.step]
        settings = _settings_of(path)
        if REQUIRED - set(settings):
            raise TrainingError(f"{path} is no checkpoint of a training run; move it away.")
        _check_numbers(path, settings, self.stage)
        if resume.mode == "auto":
            _check_settings(path, settings, run, self.stage)
        return Saved(path, settings)

    def load(self, state: TrainState, saved: Saved) -> None:
        """Fill `state` from a checkpoint, of shards or of whole copies."""
        tensors = self._read_shards(state, saved) if saved.path.is_dir() else _read_file(state, saved.path)
        state.load_tensors(tensors, saved.settings, saved.path)

    @abstractmethod
    def save(self, state: TrainState, settings: dict[str, str]) -> None:
        """Write a checkpoint, or begin to; until it is complete the last one stays. Raises OutputError."""

    def close(self) -> None:  # noqa: B027  # most writes end in `save`
        """Wait until all is written."""

    def checkpoints(self) -> dict[int, Path]:
        """All complete checkpoints of the stage by their steps."""
        return {step: path for step, _, path in sorted(self._all())}

    def _all(self) -> list[tuple[int, int, Path]]:
        """All complete checkpoints: step, a number that is higher for one that was written later, and path."""
        folders = ((STEP.fullmatch(p.name), p) for p in self.shards.glob("[0-9]*") if (p / SETTINGS).is_file())
        found = [(int(name[1]), int(name[2] or 0), path) for name, path in folders if name]
        files = ((p.name.split(".")[-2], p) for p in self.folder.glob(f"{self.file.stem}.*.safetensors"))
        found += [(int(step), 0, path) for step, path in files if step.isdecimal()]
        if self.file.is_file():
            step = read_metadata(self.file).get("step", "")
            found.append((int(step) if step.isdecimal() else 0, 1, self.file))
        return found

    def _prune(self, step: int) -> None:
        """Remove the checkpoints that need not stay beside the new one of `step`; later ones are of another course."""
        found, latest = self._all(), self.checkpoints()
        stay = _staying((s for s in latest if s <= step), self.stage)
        for old, _, path in found:
            if old not in stay or latest[old] != path:
                _remove(path)

    def _read_shards(self, state: TrainState, saved: Saved) -> dict[str, Tensor]:
        """The tensors of a DCP checkpoint, in shards like those of `state` or whole."""
        folder = saved.path
        reader = IndexReader(folder, _digests_of(saved))
        index = reader.read_metadata().state_dict_metadata
        tensors = state.model_tensors() | empty_moments(state.optimizers, index, folder)
        wrong = sorted(
            k for k, v in tensors.items() if k not in index or getattr(index[k], "size", None) != v.shape
        ) + sorted(set(index) - set(tensors))
        if wrong:
            raise TrainingError(
                f"{folder} holds the weights of another model ({wrong[0]}); use another --output, "
                "or the recipe it was made with."
            )
        tensors = {k: v.detach() for k, v in tensors.items()}
        with read_errors(folder):
            load(tensors, storage_reader=reader, process_group=self.group.control, no_dist=not dist.is_initialized())
        return tensors


def store_for(folder: Path, stage: StageConfig, group: Distributed) -> CheckpointStore:
    """The store of a stage's checkpoints in the format that the group writes."""
    kind = ShardStore if isinstance(group, FullyShardedDistributed) else FileStore
    return kind(folder, stage, group)


class FileStore(CheckpointStore):
    """Safetensors files, written by the first process."""

    def save(self, state: TrainState, settings: dict[str, str]) -> None:
        for optimizer in state.optimizers:
            if isinstance(optimizer, ZeroRedundancyOptimizer):
                optimizer.consolidate_state_dict(to=0)
        if not self.group.is_first:
            return
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.tensors().items()}
        self._set_last_aside(state.step)
        save_tensors(tensors, self.file, settings)
        self._prune(state.step)

    def _set_last_aside(self, step: int) -> None:
        """Give the last checkpoint a second name, under which it stays when it is replaced."""
        if not self.file.is_file():
            return
        last = next(step for step, _, path in self._all() if path == self.file)
        aside = self.file.with_suffix(f".{last}.safetensors")
        if last >= step or last not in _staying((last, step), self.stage) or aside.exists():
            return
        try:
            os.link(self.file, aside)
        except OSError:  # not every file system has links
            with replacing(aside) as temp:
                shutil.copyfile(self.file, temp)


class ShardStore(CheckpointStore):
    """Folders of DCP checkpoints, named by their steps.

    Every process writes its own shards, so that a checkpoint of any number of processes loads in any other number. A
    new checkpoint is written in the background, under a name that begins with a dot, and then takes its place. A
    kill leaves such a folder, which is never read and is removed after the next checkpoint is complete.
    """

    def __init__(self, folder: Path, stage: StageConfig, group: Distributed) -> None:
        super().__init__(folder, stage, group)
        # processes of its own: else writing in the background would mix its messages with those of the steps
        self.processes = dist.new_group(backend="gloo")
        self.pending: Future[None] | None = None

    def save(self, state: TrainState, settings: dict[str, str]) -> None:
        self.close()
        new, done = self.shards / f".{state.step}.new", self._free_name(state.step)
        if self.group.is_first:
            _make_empty(new)
        dist.barrier(self.processes)
        tensors, writer = {k: v.detach() for k, v in state.tensors().items()}, DigestWriter(new)
        try:
            saving = async_save(tensors, storage_writer=writer, process_group=self.processes)
        except OSError as error:
            raise OutputError(f"cannot write {new}: {error.strerror or error}.") from error
        assert isinstance(saving, Future)
        self.pending = Future()
        pending = self.pending

        def finish(saved: Future[Any]) -> None:
            try:
                saved.result()  # the index, which is on the disk only when every process has written its shards
                if self.group.is_first:
                    self._replace_last(new, done, settings | {"files": json.dumps(writer.digests)})
                pending.set_result(None)
            except BaseException as error:
                pending.set_exception(error)

        saving.add_done_callback(finish)

    def _free_name(self, step: int) -> Path:
        """A name for a checkpoint of this step: STEP, or STEP.NUMBER where it was saved before."""
        numbers = [number for found, number, path in self._all() if found == step and path.is_dir()]
        return self.shards / (f"{step}.{max(numbers) + 1}" if numbers else str(step))

    def _replace_last(self, new: Path, done: Path, settings: dict[str, str]) -> None:
        """Let the complete checkpoint `new` take its place as `done`, and remove those that need not stay."""
        with replacing(new / SETTINGS) as temp:
            text = json.dumps({**settings, "index": index_digest(new)}, indent=1) + "\n"
            temp.write_text(text, encoding="utf-8")
        left = [path for path in self.shards.glob(".[0-9]*.*") if path != new]
        new.rename(done)
        flush_folder(self.shards)
        for path in left:
            _remove(path)
        self._prune(int(settings["step"]))

    def close(self) -> None:
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            pending.result()
        except (Exception, CheckpointException) as error:  # DCP's own, for what fails in any process, is no Exception
            raise OutputError(f"cannot write a checkpoint to {self.shards}: {first_failure(error)}.") from error


def _staying(steps: Iterable[int], stage: StageConfig) -> set[int]:
    """Which checkpoints stay: the newest `keep_last`, and every one at a multiple of `keep_every`."""
    newest_first = sorted(steps, reverse=True)
    regular = {step for step in newest_first if stage.keep_every and step % stage.keep_every == 0}
    return regular | set(newest_first[: stage.keep_last])


def _remove(path: Path) -> None:
    """Remove a checkpoint; a folder under a name that the next save clears, should a kill come in the middle."""
    if path.is_dir():
        hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.old")
        if hidden != path:
            shutil.rmtree(hidden, ignore_errors=True)
            path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _settings_of(path: Path) -> dict[str, str]:
    """Settings stored beside the tensors of a checkpoint. Raises TrainingError, CheckpointError for a damaged one."""
    if not path.is_dir():
        return read_metadata(path)
    try:
        settings = read_json(path / SETTINGS)
    except ConfigError as error:
        raise TrainingError(f"{error} Start anew with --resume none.") from error
    if not isinstance(settings, dict) or not all(isinstance(value, str) for value in settings.values()):
        raise TrainingError(f"{path / SETTINGS} does not hold settings by name; start anew with --resume none.")
    if settings.get("index") != index_digest(path):
        raise TrainingError(f"{path} has an index that this run did not write; start anew with --resume none.")
    return settings


def _digests_of(saved: Saved) -> dict[str, str]:
    """Digests of the data files of a sharded checkpoint, by name. Raises TrainingError."""
    try:
        found = parse_json(saved.settings.get("files", ""), f"{saved.path / SETTINGS}: files")
    except ConfigError as error:
        raise TrainingError(f"{error} Start anew with --resume none.") from error
    if not isinstance(found, dict):
        raise TrainingError(f"{saved.path / SETTINGS}: files is {type(found).__name__}; start anew with --resume none.")
    return found


def _read_file(state: TrainState, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint of whole copies, cut as those of `state` are where it is sharded."""
    tensors, current = load_signed(path)[0], state.model_tensors()
    for name, value in tensors.items():
        like = current.get(name, _parameter_of(state, name))
        if isinstance(like, DTensor) and like.shape == value.shape:
            tensors[name] = distribute_tensor(
                value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
            )
    return tensors


def _parameter_of(state: TrainState, name: str) -> nn.Parameter | None:
    """The weight that an optimiser's value optim/NUMBER/PARAMETER/NAME belongs to; None for any other tensor."""
    if not name.startswith("optim/"):
        return None
    try:
        number, parameter = map(int, name.split("/")[1:3])
        return state.optimizers[number].param_groups[0]["params"][parameter]
    except (ValueError, IndexError):  # `load_tensors` refuses it
        return None


def _make_empty(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}.") from error


def _check_settings(path: Path, saved_with: dict[str, str], run: RunConfig, stage: StageConfig) -> None:
    """Raise TrainingError that names every setting in which a checkpoint differs from the recipe."""
    wanted = flatten(to_dict(stage)) | {"seed": run.seed, "precision": run.precision}
    defaults = flatten(to_dict(StageConfig(name=stage.name, steps=1, batch=1)))  # of settings that did not exist then
    saved = defaults | flatten(_saved_stage(path, saved_with)) | {"precision": saved_with["precision"]}
    saved["seed"] = int(saved_with.get("seed", run.seed))
    changeable = [*CHANGEABLE, *(name for name in wanted if name.startswith("shard."))]
    changeable += ["precision"] if run.precision == "auto" else []
    if not saved["corpus.mixture"] or not stage.corpus.mixture:  # from or to the drawn world
        changeable.remove("corpus.mixture")
    differ = [f"{k} ({saved.get(k)}, now {v})" for k, v in wanted.items() if saved.get(k) != v and k not in changeable]
    if differ:
        raise TrainingError(
            f"{path} was made with another {', '.join(differ)}; resume with the same settings, keep what it has learnt "
            "under new ones with --resume weights, or start anew with --resume none."
        )


def _check_numbers(path: Path, saved_with: Mapping[str, str], stage: StageConfig) -> None:
    """Raise TrainingError for a setting that is no number and should be, and for more steps than the stage has."""
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


def _saved_stage(path: Path, saved_with: Mapping[str, str]) -> dict[str, Any]:
    """Settings of the stage that wrote a checkpoint. Raises TrainingError for what is no JSON object."""
    try:
        stage = parse_json(saved_with["stage"], f"{path}: stage")
    except ConfigError as error:
        raise TrainingError(f"{error} Start anew with --resume none.") from error
    if not isinstance(stage, dict):
        raise TrainingError(f"{path}: stage is {type(stage).__name__}; expected its settings by name.")
    return stage
