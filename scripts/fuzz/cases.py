"""One malformed or odd input with what may become of it, values that mean trouble, and material to spoil."""

from __future__ import annotations

import importlib
import math
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from starflow2.core.images import to_pil
from starflow2.inference.likelihood import Code
from starflow2.models.checkpoint import save_components
from starflow2.models.config import SelfCheckConfig
from starflow2.pipeline import StarFlow2

__all__ = ["ALIENS", "Bench", "Case", "Maker", "anything", "flipped", "is_number", "shortened", "spoiled_number"]


@dataclass(frozen=True, slots=True)
class Case:
    """A call on one input. `judge` looks at what it returned: True if taking it was right; None: it must be refused."""

    what: str  # short and the same for cases of one kind, so that findings can be grouped
    call: Callable[[], object]
    judge: Callable[[Any], bool] | None = None


Maker = Callable[[random.Random, "Bench"], Case]

ALIENS: tuple[object, ...] = (
    None,
    True,
    "",
    "x",
    "3",
    b"3",
    1.5,
    -1,
    0,
    10**11,
    2**63,
    2**64,
    -(2**63) - 1,
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    [],
    {},
    (),
    [1],
    {"a": 1},
    object(),
    np.float32("nan"),
    np.int64(-5),
    np.array([1, 2]),
    torch.tensor(math.nan),
    complex(1, 1),
    "\ud800",
    "\x00",
    "\u202e",
    Path("x"),
    print,
)


def anything(value: object) -> bool:
    """The judge of inputs that may be taken as well as refused, as long as nothing else happens."""
    return True


def is_number(value: object) -> bool:
    """True for a finite real number that is no truth value."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return isinstance(value, int | np.integer) or math.isfinite(value)


def spoiled_number(rng: random.Random) -> object:
    """A value that no count, share or rate can be."""
    return rng.choice([math.nan, math.inf, -math.inf, -1, -0.5, "3", None, [], {}, "x", b"1", complex(1, 1), -(2**70)])


def flipped(data: bytes, rng: random.Random, first: int = 0) -> bytes:
    """One bit of the bytes from `first` on inverted."""
    at = rng.randrange(min(first, len(data) - 1), len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def shortened(data: bytes, rng: random.Random) -> bytes:
    """The bytes without some of the last ones."""
    return data[: rng.randrange(len(data))]


class Bench:
    """Material that cases spoil: a small woken model, its folder, images, a saved session; built when first used."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def close(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)

    @cached_property
    def cases(self) -> Any:
        """`tests/model_cases.py`: the smallest whole model."""
        return importlib.import_module("model_cases")

    @cached_property
    def model(self) -> StarFlow2:
        components = self.cases.tiny_components(self.cases.STAGES)
        components.requires_grad_(False)
        asked = SelfCheckConfig(shows="is there {}?", done="is {} there now?", tries=1)
        components.cfg = replace(components.cfg, self_check=asked)  # so that several tries may be asked for
        return StarFlow2(components)

    @cached_property
    def folder(self) -> Path:
        """The model as a folder; not to be written to."""
        return save_components(self.model.components, self.home / "tiny")

    @property
    def size(self) -> int:
        """Side of the model's images in pixels."""
        return int(self.model.components.cfg.fae.image_size)

    @cached_property
    def image(self) -> Tensor:
        """A right image, (3, s, s) in [-1, 1]; its values are those of bytes."""
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(3, 4, 4, generator=generator)
        fine = torch.nn.functional.interpolate(coarse[None], size=self.size, mode="bilinear")[0]
        return (fine * 255).round() / 127.5 - 1

    @cached_property
    def image_file(self) -> Path:
        path = self.home / "image.png"
        to_pil(self.image).save(path)
        return path

    @cached_property
    def code(self) -> Code:
        """The code of the image."""
        return self.model.invert(self.image, "a red circle")

    @cached_property
    def words(self) -> list[str]:
        """Words that the model knows."""
        return sorted(self.model.components.vocabulary)

    @cached_property
    def session_file(self) -> Path:
        """A conversation of words and images, saved."""
        session = self.model.session(seed=3)
        session.add("a red circle", self.image).draw()
        session.add("what color is the circle?").write(tokens=4)
        path = self.home / "talk.safetensors"
        session.save(path)
        return path

    def copy_of_folder(self) -> Path:
        """A fresh copy of the model folder, to be spoiled; the last one is removed."""
        path = self.home / "spoiled"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.folder, path)
        return path

    def file(self, name: str, data: bytes) -> Path:
        """A file with these bytes in a folder of its own; the last one is overwritten."""
        path = self.home / "files" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path
