"""The file of a saved session, and the checks that it passes before anything of it is used.

A session file comes from elsewhere as often as not: its settings are read as strictly as a config, its tensors are
compared with those of the model that is to go on with it, and all of it with each other and with its digest. Not here:
what a session does (`session`).
Letters: N latents, D latent dim, T cached positions.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow2.core.fields import Config, Natural, Seed
from starflow2.core.json_reader import parse_json
from starflow2.core.serialize import from_dict, to_dict
from starflow2.errors import CheckpointError, ConfigError
from starflow2.flow.affine import Guidance, Schedule
from starflow2.inference.config import DrawConfig
from starflow2.inference.sampler import Sampler
from starflow2.models.joint_stream import Skip
from starflow2.models.tensor_file import Expected, check_tensors, load_signed, read_metadata, save_tensors

__all__ = ["SavedPiece", "SavedSampling", "SavedSession", "SavedState", "load_session", "save_session"]

KEYS = {"model", "pieces", "sampling", "state"}  # of the metadata
ROUNDING = 1e-3  # by which pixels of an image may be outside [-1, 1]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SavedPiece:
    """One part of a conversation; a part without text is an image, whose tensors stand beside."""

    who: Literal["user", "model"]
    text: str | None
    noise_level: float | None  # of an image
    nats: tuple[float | None, float | None]  # of an image that was drawn: with the conversation before it, without

    def __post_init__(self) -> None:
        if (self.text is None) != (self.noise_level is not None):
            raise ConfigError(f"text is {self.text!r} and noise_level {self.noise_level}; expected one of both.")
        if self.nats != (None, None) and (self.who == "user" or self.text is not None):
            raise ConfigError(f"nats is {self.nats}; expected numbers only of an image that the model drew.")


@dataclass(frozen=True, kw_only=True)
class SavedState(Config):
    """Numbers of a session: positions of its next slot, seed, and what it has counted."""

    mrope: Natural
    step: Natural
    seed: Seed
    replies: Natural
    is_open: bool
    encode_calls: Natural


@dataclass(frozen=True, kw_only=True)
class SavedSampling:
    """Settings of `DrawConfig` that a session keeps."""

    guidance: float
    edit_guidance: float | None
    prior_scale: float
    rule: Guidance
    schedule: Schedule
    skips: tuple[Skip, ...] | None

    @classmethod
    def of(cls, config: DrawConfig) -> SavedSampling:
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})

    def settings(self) -> dict[str, Any]:
        """These settings by their names in `DrawConfig`."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class SavedSession:
    """Everything that a session file holds.

    tensors: h, g, previous (1, N + 1, D), has_previous, vlm.* and flow.* of the caches, picture.NUMBER.x, .u, .image.
    """

    pieces: tuple[SavedPiece, ...]
    sampling: SavedSampling
    state: SavedState
    tensors: Mapping[str, Tensor]


def save_session(saved: SavedSession, fingerprint: str, path: Path) -> None:
    """Write a session file, whole or not at all; `fingerprint`: of its sampler. Raises OutputError."""
    metadata = {
        "model": fingerprint,
        "pieces": json.dumps([to_dict(piece) for piece in saved.pieces]),
        "sampling": json.dumps(to_dict(saved.sampling)),
        "state": json.dumps(to_dict(saved.state)),
    }
    save_tensors({k: v.detach().cpu().contiguous().clone() for k, v in saved.tensors.items()}, path, metadata)


def load_session(path: Path, sampler: Sampler, one_position: Mapping[str, Tensor]) -> SavedSession:
    """Read a session file for a sampler.

    one_position: the tensors of a session of this sampler that has read a single token, which those of the file have
    to match but for their length. Raises CheckpointError for a file that is not whole, was changed, is of another
    model or precision, or holds anything that does not fit.
    """
    try:
        metadata = read_metadata(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a whole session file: {error}") from error
    if KEYS - set(metadata):
        raise CheckpointError(f"{path} is no saved session of starflow2.")
    if metadata["model"] != sampler.fingerprint:
        raise CheckpointError(f"{path} was saved with another model or precision; load it with the one it is of.")
    tensors, metadata = load_signed(path)
    with _refusing(path):
        saved = SavedSession(
            pieces=_parsed(tuple[SavedPiece, ...], metadata["pieces"], "pieces"),
            sampling=_parsed(SavedSampling, metadata["sampling"], "sampling"),
            state=_parsed(SavedState, metadata["state"], "state"),
            tensors=tensors,
        )
    check_tensors(path, tensors, _expected(saved, sampler, one_position))
    with _refusing(path):
        _check_counts(saved, sampler)
        sampler.changed(**saved.sampling.settings())
    return saved


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"{path} is no usable session: {error}") from error


def _parsed(cls: type[T], text: str, name: str) -> T:
    return from_dict(cls, parse_json(text, name))


def _expected(saved: SavedSession, sampler: Sampler, one_position: Mapping[str, Tensor]) -> dict[str, Expected]:
    """Shape and format of every tensor of the file; caches may have any length up to the model's, the same for all."""
    length = next((t.shape[2] for k, t in saved.tensors.items() if _is_cached(k) and t.ndim == 4), 0)
    expected: dict[str, Expected] = {}
    for name, like in one_position.items():
        shape = tuple(like.shape)
        if not _is_cached(name):
            expected[name] = Expected(shape, like.dtype)
        elif length or any(map(_is_cached, saved.tensors)):
            expected[name] = Expected((*shape[:2], length, *shape[3:]), like.dtype)
    for number, piece in enumerate(saved.pieces):
        if piece.text is None:
            expected |= _of_picture(saved.tensors, f"picture.{number}", sampler)
    return expected


def _is_cached(name: str) -> bool:
    return name.startswith(("vlm.", "flow."))


def _of_picture(tensors: Mapping[str, Tensor], name: str, sampler: Sampler) -> dict[str, Expected]:
    cfg = sampler.components.cfg
    deep, size = cfg.flow.deep, cfg.fae.image_size
    latents = Expected((deep.num_latents, deep.dim), sampler.dtype)
    image = tensors.get(f"{name}.image")
    dtype = torch.float64 if image is not None and image.dtype == torch.float64 else torch.float32
    pixels = Expected((3, size, size), dtype, -1 - ROUNDING, 1 + ROUNDING)
    return {f"{name}.x": latents, f"{name}.u": latents, f"{name}.image": pixels}


def _check_counts(saved: SavedSession, sampler: Sampler) -> None:
    """Raise ConfigError unless positions, images and what the caches hold belong to one conversation."""
    grid, state, tensors = sampler.layout.grid, saved.state, saved.tensors
    pictures = [i for i, piece in enumerate(saved.pieces) if piece.text is None]
    length = tensors["flow.0.k"].shape[2] if "flow.0.k" in tensors else 0
    if length > sampler.components.cfg.max_positions:
        raise ConfigError(f"it has {length} positions; this model reads {sampler.components.cfg.max_positions}.")
    step = length - len(pictures) * math.prod(grid)
    wanted = (step, step + len(pictures) * max(grid))
    if (state.step, state.mrope) != wanted or step < 2 * len(pictures):
        raise ConfigError(f"step and mrope are {(state.step, state.mrope)}, but its cache and images make {wanted}.")
    if saved.pieces and not length:
        raise ConfigError(f"it has {len(saved.pieces)} pieces, but nothing is cached.")
    if state.replies > length or state.encode_calls < sum(saved.pieces[i].who == "user" for i in pictures):
        raise ConfigError(f"replies is {state.replies} and encode_calls {state.encode_calls}, which its pieces deny.")
    _check_images(saved, sampler, pictures)


def _check_images(saved: SavedSession, sampler: Sampler, pictures: list[int]) -> None:
    """Raise ConfigError unless noise levels are the model's and the previous image is the last one."""
    low, high = sampler.components.cfg.noise.noise_min, sampler.components.cfg.noise.noise_max
    for i in pictures:
        level = saved.pieces[i].noise_level
        if level is None or not low <= level <= high:
            raise ConfigError(f"noise_level is {level}; expected {low} to {high}.")
    has_previous, previous = saved.tensors["has_previous"], saved.tensors["previous"]
    if bool(has_previous) != bool(pictures):
        raise ConfigError(f"has_previous is {bool(has_previous)} after {len(pictures)} images.")
    if pictures:
        last = F.pad(saved.tensors[f"picture.{pictures[-1]}.u"], (0, 0, 0, 1))
        if not torch.equal(previous[0], last):
            raise ConfigError("previous holds other latents than its last image.")
