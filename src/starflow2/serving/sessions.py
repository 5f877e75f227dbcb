"""Sessions that are kept: the state of a conversation after each reply, in memory and in a folder.

A snapshot is never changed, so that two continuations of one reply are a fork, and asking from an earlier one an undo.
Those that were stored are written when the reply ends, so that a kill loses none; they leave memory when they are idle
or memory is short, and are read back when they are asked for. Names come from clients: only names of our own form ever
become paths. Everything is private to its owner.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from starflow2.errors import CheckpointError, OutputError
from starflow2.inference.engine import RowState
from starflow2.models.sequence import Cursor
from starflow2.models.tensor_file import Expected, check_tensors, load_signed, read_metadata, save_tensors
from starflow2.serving.limits import ServeLimits
from starflow2.serving.refusals import unknown_session

__all__ = ["SessionStore", "Snapshot", "new_id"]

ENDING = ".session"
_NAME = re.compile(r"resp_[0-9a-f]{32}")


def new_id(number: int = 0) -> str:
    """A name that nobody can guess; number: of the replica that keeps it (`routing`), 0 where there is one."""
    return f"resp_{number:04x}{secrets.token_hex(14)}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A conversation after a reply. images: how many are in it."""

    id: str
    owner: str
    state: RowState
    images: int

    @property
    def length(self) -> int:
        """Positions of the conversation."""
        return self.state.lane["flow.0.k"].shape[2] if "flow.0.k" in self.state.lane else 0

    @property
    def nbytes(self) -> int:
        previous = 0 if self.state.previous is None else self.state.previous.nbytes
        return previous + sum(x.nbytes for x in self.state.lane.values())


@dataclass(slots=True)
class _Held:
    """A snapshot in memory."""

    snapshot: Snapshot
    used: float
    is_stored: bool = False
    prefixes: list[tuple[str, bytes]] = field(default_factory=list)  # under which it is found
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = self.snapshot.nbytes


class SessionStore:
    """Snapshots by id. For any thread.

    folder: where stored ones are written; None: nothing outlives the process. fingerprint and one_position: of the
    model, the latter a row that has read one token; files have to fit both. no_latents: (N + 1, D), zero.
    """

    def __init__(
        self,
        limits: ServeLimits,
        folder: Path | None,
        fingerprint: str,
        one_position: RowState,
        no_latents: Tensor,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.limits, self.folder, self._now = limits, folder, now
        self._fingerprint, self._like, self._none = fingerprint, one_position, no_latents
        self._held: OrderedDict[str, _Held] = OrderedDict()  # the one that was used longest ago comes first
        self._prefixes: dict[tuple[str, bytes], str] = {}
        self._files: dict[str, int] = {}  # bytes of every file
        self._lock = threading.Lock()
        if folder is not None:
            _make_private(folder)
            self._files = {p.stem: p.stat().st_size for p in folder.glob(f"*{ENDING}") if _NAME.fullmatch(p.stem)}

    # -- memory

    def add(self, snapshot: Snapshot, prefixes: Sequence[bytes] = ()) -> None:
        """Keep a snapshot in memory while there is room, to be found by its id and by digests of the turns in it."""
        keys = [(snapshot.owner, digest) for digest in prefixes]
        with self._lock:
            self._held[snapshot.id] = _Held(snapshot, self._now(), prefixes=keys)
            for key in keys:
                self._prefixes[key] = snapshot.id
            self._make_room()

    def get(self, name: str, owner: str, param: str = "previous_response_id") -> Snapshot:
        """A snapshot of an owner, from memory or its file. Raises Refusal where there is none, or it is not theirs."""
        with self._lock:
            held = self._held.get(name)
            if held is not None and held.snapshot.owner == owner:
                held.used = self._now()
                self._held.move_to_end(name)
                return held.snapshot
        path = self._path(name)
        if held is not None or path is None:
            raise unknown_session(name[:64], param)
        try:
            snapshot = self._read(path, owner)
        except CheckpointError as error:
            raise unknown_session(name[:64], param) from error
        with self._lock:
            self._held[name] = _Held(snapshot, self._now(), is_stored=True)
            self._make_room()
        return snapshot

    def recall(self, owner: str, digests: Sequence[bytes]) -> tuple[int, Snapshot | None]:
        """The longest of some beginnings of a conversation that is in memory: its number from 1, and the snapshot."""
        with self._lock:
            for i in range(len(digests), 0, -1):
                held = self._held.get(self._prefixes.get((owner, digests[i - 1]), ""))
                if held is not None:
                    held.used = self._now()
                    self._held.move_to_end(held.snapshot.id)
                    return i, held.snapshot
        return 0, None

    def drop(self, name: str, owner: str, param: str = "response_id") -> None:
        """Delete a snapshot of an owner everywhere. Raises Refusal where there is none."""
        self.get(name, owner, param)
        with self._lock:
            self._forget(name)
            self._delete(name)

    def sweep(self) -> None:
        """Let go of what is idle or too old."""
        now = self._now()
        with self._lock:
            for name, held in list(self._held.items()):
                if now - held.used > self.limits.idle_s:
                    self._forget(name)
            for name in list(self._files):
                if now - self._age_of(name) > self.limits.kept_s:
                    self._delete(name)

    @property
    def in_memory(self) -> tuple[int, int]:
        """How many snapshots are in memory, and their bytes."""
        with self._lock:
            return len(self._held), self._bytes()

    @property
    def on_disk(self) -> tuple[int, int]:
        """How many snapshots are in the folder, and their bytes."""
        with self._lock:
            return len(self._files), sum(self._files.values())

    def _bytes(self) -> int:
        return sum(held.nbytes for held in self._held.values())

    def _make_room(self) -> None:
        """Forget what was used longest ago until the rest fits; the newest stays."""
        total = self._bytes()
        for name in list(self._held)[:-1]:
            if total <= self.limits.memory_bytes:
                return
            total -= self._held[name].nbytes
            self._forget(name)

    def _forget(self, name: str) -> None:
        held = self._held.pop(name, None)
        for key in [] if held is None else held.prefixes:
            if self._prefixes.get(key) == name:
                del self._prefixes[key]

    # -- files

    def store(self, snapshot: Snapshot) -> None:
        """Write a snapshot to the folder, whole or not at all. Raises OutputError, such as for a full disk."""
        path = self._path(snapshot.id, is_new=True)
        if path is None:
            return
        cursor = snapshot.state.cursor
        metadata = {
            "model": self._fingerprint,
            "owner": snapshot.owner,
            "images": str(snapshot.images),
            "cursor": f"{cursor.mrope} {cursor.step}",
        }
        tensors = _tensors(snapshot.state, self._none)
        save_tensors({name: x.cpu().contiguous() for name, x in tensors.items()}, path, metadata)
        with self._lock:
            self._files[snapshot.id] = path.stat().st_size
            if snapshot.id in self._held:
                self._held[snapshot.id].is_stored = True
            self._trim_folder(snapshot.id)

    def _trim_folder(self, newest: str) -> None:
        total = sum(self._files.values())
        if total <= self.limits.disk_bytes:
            return
        for name in sorted(self._files, key=self._age_of):
            if total <= self.limits.disk_bytes or name == newest:
                return
            total -= self._files[name]
            self._delete(name)

    def _age_of(self, name: str) -> float:
        """When a file was last used."""
        path = self._path(name)
        try:
            return 0.0 if path is None else path.stat().st_mtime
        except OSError:
            return 0.0

    def _delete(self, name: str) -> None:
        path = self._path(name)
        if path is not None:
            path.unlink(missing_ok=True)
        self._files.pop(name, None)

    def _path(self, name: str, *, is_new: bool = False) -> Path | None:
        """The file of a snapshot; None for names that are not of our making, and where there is none."""
        if self.folder is None or not _NAME.fullmatch(name):
            return None
        path = self.folder / f"{name}{ENDING}"  # another server may have written it: they may share a folder
        return path if is_new or name in self._files or path.is_file() else None

    def _read(self, path: Path, owner: str) -> Snapshot:
        """Raises CheckpointError for a file that is not whole, was changed, is another owner's or another model's."""
        metadata = read_metadata(path)
        if metadata.get("owner") != owner or metadata.get("model") != self._fingerprint:
            raise CheckpointError(f"{path} is of another owner or another model.")
        tensors, metadata = load_signed(path)
        check_tensors(path, tensors, _expected(tensors, _tensors(self._like, self._none)))
        try:
            mrope, step = map(int, metadata["cursor"].split())
            images = int(metadata["images"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path} does not say where its conversation stands.") from error
        device = self._like.lane["h"].device
        lane = {k: v.to(device) for k, v in tensors.items() if not k.startswith("row.")}
        previous = tensors["row.previous"].to(device) if bool(tensors["row.has_previous"]) else None
        os.utime(path)
        return Snapshot(path.stem, owner, RowState(lane, previous, Cursor(self._like.cursor.grid, mrope, step)), images)


def _make_private(folder: Path) -> None:
    """A folder that only this user may enter. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(f"{folder} is no folder that can be written to")
    except OSError as error:
        raise OutputError(f"cannot keep sessions in {folder}: {error.strerror or error}.") from error


def _tensors(state: RowState, none: Tensor) -> dict[str, Tensor]:
    """Every tensor of a row by its name in a file; `none` stands for the latents of no image."""
    previous = none if state.previous is None else state.previous
    return {**state.lane, "row.previous": previous, "row.has_previous": torch.tensor([state.previous is not None])}


def _expected(found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Expected]:
    """Shape and format of every tensor of a file; caches may have any length, the same for all."""
    length = next((x.shape[2] for k, x in found.items() if _is_cached(k) and x.ndim == 4), 0)
    expected = {}
    for name, tensor in like.items():
        shape = (*tensor.shape[:2], length, *tensor.shape[3:]) if _is_cached(name) else tuple(tensor.shape)
        expected[name] = Expected(shape, tensor.dtype)
    return expected


def _is_cached(name: str) -> bool:
    return name.startswith(("vlm.", "flow."))
