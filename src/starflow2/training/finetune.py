"""Teach a model pictures of one's own: a folder of picture files with a caption beside each, adapters on the flow.

The language model, the codec and every weight of the flow stay as they are; low-rank adapters on the deep block learn
(`lora`). A share of every batch comes from the drawn world, so that what the model could do is not forgotten.
Not here: the loop (`train.fit_task`), how adapters are added.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from starflow2.core.files import check_writable
from starflow2.core.images import read_picture
from starflow2.data.dialogue import Dialogue, Turn
from starflow2.errors import ConfigError, DataError, StateError
from starflow2.models import lora
from starflow2.models.checkpoint import load_components, save_components
from starflow2.models.components import Components
from starflow2.models.hub import NANO
from starflow2.models.lora import LoraConfig
from starflow2.models.prompts import normalized
from starflow2.models.sequence import Layout, pack
from starflow2.models.tokenizer import ChatTokenizer
from starflow2.training.config import OptimConfig, StageConfig
from starflow2.training.datasets import joint_dialogue, to_images
from starflow2.training.loop import StepReport, fit_task
from starflow2.training.tasks import JointTask, T2iTask
from starflow2.world.captions import caption_task
from starflow2.world.scene import Scene, SceneDialogue, stream

__all__ = ["Album", "FinetuneConfig", "finetune", "read_album"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_ALBUM_STREAM = 31


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How long, how much, how fast, and how large an adapter.

    With nano on two cores: 14 minutes, after which 50 of 64 pictures show a colour that it had never seen, where the
    codec leaves 84 % of true ones recognisable (`scripts/teach_word.py`, docs/LOG.md).
    """

    steps: int = 1000
    batch: int = 32  # pictures per step
    lr: float = 1e-3
    replay: float = 0.5  # share of every batch that comes from the drawn world
    lora: LoraConfig = field(default_factory=LoraConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ConfigError(f"steps is {self.steps} and batch {self.batch}; expected at least 1 each.")
        if not 0 <= self.replay < 1:
            raise ConfigError(f"replay is {self.replay}; expected a share of at least 0 and less than 1.")

    def stage(self) -> StageConfig:
        """As a stage of training, with AdamW alone: an adapter's matrices are thin, which Muon is not made for."""
        optim = OptimConfig(lr=self.lr, matrix_lr=0.0, warmup_steps=20, weight_decay=0.0)
        return StageConfig(name="t2i", steps=self.steps, batch=self.batch, optim=optim)


@dataclass(frozen=True, slots=True)
class Album:
    """Pictures (n, 3, s, s) in [-1, 1] and what they show."""

    pictures: Tensor
    captions: tuple[str, ...]

    @property
    def words(self) -> frozenset[str]:
        """Every word of the captions, as a lexicon lists them."""
        return frozenset(word for text in self.captions for word in re.findall(r"[^\s.,;:!?]+", text.lower()))


def read_album(folder: str | Path, size: int) -> Album:
    """The picture files of a folder, in order of their names, each with its caption in a .txt file of its name.

    Raises DataError for a folder without pictures, a picture that cannot be read, a caption that is not there or empty.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{folder} holds no pictures; expected {', '.join(SUFFIXES)} files with a .txt beside each.")
    captions = []
    for file in files:
        beside = file.with_suffix(".txt")
        try:
            text = " ".join(beside.read_text("utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {beside}, the caption of {file.name}: {error}.") from error
        if not text:
            raise DataError(f"{beside} is empty; expected what {file.name} shows, in words.")
        captions.append(text)
    return Album(torch.stack([read_picture(file, size) for file in files]), tuple(captions))


@dataclass(frozen=True, slots=True)
class _Mixed:
    """Items of the album and of the drawn world in one batch, in the form that the model's own task takes."""

    album: Album
    tokenizer: ChatTokenizer
    layout: Layout | None  # of conversations; None: prompts alone
    stage: StageConfig
    config: FinetuneConfig

    def __call__(self, indices: range) -> tuple[Tensor, Any]:
        items = [self._item(i) for i in indices]
        shown = [p for _, pictures in items for p in pictures]
        pictures = torch.stack(shown) if shown else self.album.pictures[:0]
        turns = [dialogue for dialogue, _ in items]
        if self.layout is not None:
            return pictures, pack([self.tokenizer.document(d.turns) for d in turns], self.layout)
        prompts = [next((p for p in d.turns[0].user if isinstance(p, str)), "") for d in turns]
        return pictures, [self.tokenizer.drawing_prompt(text) for text in prompts]

    def _item(self, index: int) -> tuple[SceneDialogue, list[Tensor]]:
        """A conversation and its pictures. In one of the album a scene stands for the picture, whose place it keeps."""
        rng = stream(self.config.seed, index, _ALBUM_STREAM)
        if rng.random() < self.config.replay:
            dialogue = self._replayed(index, rng)
            return dialogue, list(to_images(list(dialogue.pictures))) if dialogue.pictures else []
        number = int(rng.integers(len(self.album.captions)))
        said = () if rng.random() < self.stage.caption_drop else (self.album.captions[number],)
        return Dialogue((Turn(said, (_PLACE,)),), "album"), [self.album.pictures[number]]

    def _replayed(self, index: int, rng: np.random.Generator) -> SceneDialogue:
        if self.layout is not None:
            return joint_dialogue(self.stage, self.config.seed, index)
        drawing = caption_task(self.config.seed, index)
        said = () if rng.random() < self.stage.caption_drop else (drawing.prompt,)
        return Dialogue((Turn(said, (drawing.scene,)),), "draw")


_PLACE = Scene(objects=(), background=0)


def finetune(
    album: Album,
    model: str | Path,
    output: Path,
    config: FinetuneConfig,
    *,
    device: str = "cpu",
    report: Callable[[StepReport], None] | None = None,
) -> Path:
    """Teach a model, "nano" or a folder, an album; writes a whole model to `output` and the adapter alone into it.

    The adapter is adapter.safetensors; `lora.load` puts it back on the model it came from. Raises StateError for a
    model that does not draw yet, DataError for captions it cannot read, CheckpointError, OutputError.
    """
    check_writable(output / "config.json")
    components = load_components(NANO if str(model) == "nano" else model, device)
    task, stage = _task(components, album, config), config.stage()
    fit_task(task, stage, config.seed, device=device, report=report)
    adapter = output.with_name(f".{output.name}.adapter")
    lora.save(components, config.lora, adapter)
    lora.merge(components)
    save_components(components, output)
    adapter.replace(output / "adapter.safetensors")
    return output


def _task(components: Components, album: Album, config: FinetuneConfig) -> T2iTask | JointTask:
    """The task by which this model learnt to draw, with adapters to train and the album to draw from."""
    if "t2i" not in components.finished_stages:
        raise StateError(
            f"this model has finished stages {', '.join(components.finished_stages) or 'none'}; it needs t2i to draw."
        )
    if components.vocabulary:
        components.vocabulary |= album.words
    assert components.tokenizer is not None
    spoken = Album(album.pictures, tuple(normalized(components, text) for text in album.captions))
    longest = max(len(components.tokenizer.drawing_prompt(text)) for text in spoken.captions)
    if longest > components.cfg.max_prompt_tokens:
        raise DataError(f"a caption has {longest} tokens; this model reads up to {components.cfg.max_prompt_tokens}.")
    is_joint, stage = "joint" in components.finished_stages, config.stage()
    task = (JointTask if is_joint else T2iTask)(components, stage, config.seed)
    components.requires_grad_(False)
    task.trained = lora.attach(components, config.lora, config.seed)
    layout = components.layout if is_joint else None
    task.make_batch = partial(_Mixed.__call__, _Mixed(spoken, components.tokenizer, layout, stage, config))
    return task
