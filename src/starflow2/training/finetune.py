"""Fine-tune a model on your own images: a folder of image files, each with its caption in a text file beside it.

The language model, the codec and every weight of the flow stay as they are; low-rank adapters on the deep block learn
(`models.lora`). A share of every batch is replayed: it comes from what the model was trained on, the drawn world or a
mixture of corpora, so that the model does not forget that.
Not here: the loop (`loop.fit_task`), how adapters are added.
"""

from __future__ import annotations

import glob
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from starflow2.core.dialogue import Dialogue, Turn, is_lone_drawing, replace_pictures
from starflow2.core.fields import Config, Count, Positive, Range, Seed
from starflow2.core.files import check_writable, named_place
from starflow2.core.images import PICTURE_ENDINGS, checked_pixels, picture_files, read_files, read_picture
from starflow2.core.text import clean, read_text
from starflow2.data.mixture import conversations
from starflow2.errors import ConfigError, DataError, StateError
from starflow2.models import lora
from starflow2.models.checkpoint import load_components, save_components
from starflow2.models.components import Components
from starflow2.models.hub import find_model, pick_device
from starflow2.models.lora import LoraConfig
from starflow2.models.prompts import normalized
from starflow2.models.sequence import Layout, pack
from starflow2.models.tensor_file import save_tensors
from starflow2.models.tokenizer import ChatTokenizer
from starflow2.models.wording import words_of
from starflow2.training.config import CorpusConfig, OptimConfig, StageConfig
from starflow2.training.datasets import corpus_batches, joint_dialogue, to_images
from starflow2.training.loop import Report, fit_task
from starflow2.training.tasks import JointTask, T2iTask
from starflow2.world.captions import caption_task
from starflow2.world.scene import IMAGE_SIZE, SceneDialogue, stream

__all__ = ["Album", "AlbumMixture", "FinetuneConfig", "finetune", "finetune_task", "read_album"]

_ALBUM_STREAM = 31


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Config):
    """Steps, batch, learning rate and size of the adapters.

    With nano on two cores: 14 minutes, after which 50 of 64 images show a colour that it had never seen, where the
    codec leaves 84 % of true ones recognisable (`scripts/teach_word.py`, docs/LOG.md).
    """

    steps: Count = 1000
    batch: Count = 32  # images per step
    lr: Positive = 1e-3
    replay: Annotated[float, Range(least=0, below=1)] = 0.5  # share of every batch from what the model was trained on
    mixture: str = ""  # mixture file that replayed conversations come from; "": the drawn world
    lora: LoraConfig = field(default_factory=LoraConfig)
    seed: Seed = 0

    def stage(self) -> StageConfig:
        """The stage of training with these settings; AdamW alone, since Muon is not made for thin matrices."""
        optim = OptimConfig(lr=self.lr, matrix_lr=0.0, warmup_steps=20, weight_decay=0.0)
        return StageConfig(name="t2i", steps=self.steps, batch=self.batch, optim=optim)


@dataclass(frozen=True, slots=True)
class Album:
    """Images (n, 3, s, s) in [-1, 1] with their captions."""

    images: Tensor
    captions: tuple[str, ...]

    @property
    def words(self) -> frozenset[str]:
        """Every word of the captions in lower case, without punctuation, as vocabularies list them."""
        return frozenset(word for text in self.captions for word in words_of(unicodedata.normalize("NFKC", text)))


def read_album(folder: str | Path, size: int) -> Album:
    """Read the image files of a folder, in the order of their names, each with its caption in a .txt file of its name.

    size: pixels of a side. Raises DataError for a folder without images, an image that cannot be read, a caption that
    is missing or empty.
    """
    folder = named_place(folder, "folder", DataError)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected one with image files and a .txt beside each.")
    files = picture_files(folder)
    if not files:
        raise DataError(
            f"{folder} holds no images; expected image files with a .txt beside each, {', '.join(PICTURE_ENDINGS)}."
        )
    found = read_files(lambda file: (read_picture(file, size), _caption(file)), files)
    return Album(torch.stack([image for image, _ in found]), tuple(caption for _, caption in found))


def _caption(file: Path) -> str:
    """The caption in the text file beside an image, on one line. Raises DataError, PromptError for hidden signs."""
    path = file.with_suffix(".txt")
    if not path.exists():
        path = next((p for p in file.parent.glob(f"{glob.escape(file.stem)}.*") if p.suffix.lower() == ".txt"), path)
    try:
        text = " ".join(clean(read_text(path), str(path)).split())
    except DataError as error:
        raise DataError(f"no caption of {file.name}: {error}") from error
    if not text:
        raise DataError(f"{path} is empty; expected the caption of {file.name}.")
    return text


Replay = Callable[[int, np.random.Generator], Dialogue[Tensor]]  # item number i of what is replayed


@dataclass(frozen=True, slots=True)
class AlbumMixture:
    """Batches of items from an album and of replayed ones, in the input format of the model's own task."""

    album: Album
    tokenizer: ChatTokenizer
    layout: Layout | None  # of conversations; None: the task reads prompts
    stage: StageConfig
    config: FinetuneConfig
    replay: Replay

    def __call__(self, indices: range) -> tuple[Tensor, Any]:
        dialogues = [self.dialogue(i) for i in indices]
        images = [image for dialogue in dialogues for image in dialogue.pictures]
        stacked = torch.stack(images) if images else self.album.images[:0]
        if self.layout is not None:
            return stacked, pack([self.tokenizer.document(d.turns) for d in dialogues], self.layout)
        prompts = [next((part for part in d.turns[0].user if isinstance(part, str)), "") for d in dialogues]
        return stacked, [self.tokenizer.drawing_prompt(prompt) for prompt in prompts]

    def dialogue(self, index: int) -> Dialogue[Tensor]:
        """Conversation number `index` with its images (3, s, s): one of the album, or a replayed one."""
        rng = stream(self.config.seed, index, _ALBUM_STREAM)
        if rng.random() < self.config.replay:
            return self.replay(index, rng)
        number = int(rng.integers(len(self.album.captions)))
        words = () if rng.random() < self.stage.caption_drop else (self.album.captions[number],)
        return Dialogue((Turn(words, (self.album.images[number],)),), "album")


@dataclass(frozen=True, slots=True)
class WorldReplay:
    """Conversations of the drawn world by index, as the model's last stage drew them."""

    stage: StageConfig
    seed: int
    is_joint: bool

    def __call__(self, index: int, rng: np.random.Generator) -> Dialogue[Tensor]:
        scenes = joint_dialogue(self.stage, self.seed, index) if self.is_joint else self._drawing(index, rng)
        return replace_pictures(scenes, to_images(scenes.pictures) if scenes.pictures else ())

    def _drawing(self, index: int, rng: np.random.Generator) -> SceneDialogue:
        drawing = caption_task(self.seed, index)
        words = () if rng.random() < self.stage.caption_drop else (drawing.prompt,)
        return Dialogue((Turn(words, (drawing.scene,)),), "draw")


@dataclass(frozen=True, slots=True)
class MixtureReplay:
    """Conversations of a mixture in its own order, whatever the index.

    Raises DataError for one that the model's stage does not take: before stage joint a model only draws from words.
    """

    conversations: Iterator[Dialogue[Tensor]]
    is_joint: bool

    def __call__(self, index: int, rng: np.random.Generator) -> Dialogue[Tensor]:
        found = next(self.conversations)
        if not self.is_joint and not is_lone_drawing(found):
            raise DataError(
                f"the mixture holds a document of kind {found.kind}, but this model has not finished stage joint and "
                "takes words followed by one drawn image; leave other sources out."
            )
        return found


def finetune(
    album: Album,
    model: str | Path,
    output: Path,
    config: FinetuneConfig,
    *,
    device: str = "cpu",
    report: Report | None = None,
) -> Path:
    """Train adapters of a model, by name, folder or Hub id, on an album and write the whole adapted model to `output`.

    The adapters alone are written to output/adapter.safetensors; `lora.load` puts them back on the model they came
    from. Raises StateError for a model that does not draw yet, DataError for captions it cannot read, CheckpointError,
    OutputError.
    """
    pick_device(device)
    check_writable(output / "config.json")
    components = load_components(find_model(model), device)
    task = finetune_task(components, album, config)
    fit_task(task, device=device, report=report)
    tensors, metadata = lora.contents(components, config.lora)
    lora.merge(components)
    save_components(components, output)
    save_tensors(tensors, output / "adapter.safetensors", metadata)
    return output


def finetune_task(components: Components, album: Album, config: FinetuneConfig) -> T2iTask | JointTask:
    """The task by which this model learnt to draw, with fresh adapters to train and the album to learn from.

    Raises StateError for a model that has not finished stage t2i, DataError for captions that it cannot read.
    """
    if "t2i" not in components.finished_stages:
        raise StateError(
            f"this model has finished stages {', '.join(components.finished_stages) or 'none'}; it needs t2i to draw."
        )
    if config.mixture:
        components.vocabulary = frozenset()  # real text may hold any word
    elif components.vocabulary:  # first: a word of the album is not replaced by one that the model knows
        components.vocabulary |= album.words
    images = checked_pixels(album.images, "the album's images")
    album = Album(images, tuple(normalized(components, text) for text in album.captions))
    longest = max(len(components.tokenizer.drawing_prompt(text)) for text in album.captions)
    if longest > components.cfg.max_prompt_tokens:
        raise DataError(f"a caption has {longest} tokens; this model reads up to {components.cfg.max_prompt_tokens}.")
    is_joint, stage = "joint" in components.finished_stages, config.stage()
    layout = components.layout if is_joint else None
    replay = _replay(components, stage, config, is_joint=is_joint)
    dataset = AlbumMixture(album, components.tokenizer, layout, stage, config, replay)
    components.requires_grad_(False)
    adapters = lora.attach(components, config.lora, config.seed)
    kind = JointTask if is_joint else T2iTask
    return kind(components, stage, config.seed, dataset=dataset, trained=adapters)


def _replay(components: Components, stage: StageConfig, config: FinetuneConfig, *, is_joint: bool) -> Replay:
    """Replayed documents. Raises ConfigError for a model that was not trained on the drawn world and has no mixture."""
    if config.mixture:
        corpus = CorpusConfig(mixture=config.mixture, rows=1, width=components.cfg.max_positions)
        return MixtureReplay(conversations(corpus_batches(components, replace(stage, corpus=corpus))), is_joint)
    size = components.cfg.fae.image_size
    if config.replay and size != IMAGE_SIZE:
        raise ConfigError(
            f"replay is {config.replay} of the drawn world, whose images have {IMAGE_SIZE} pixels a side, this model's "
            f"{size}; replay what it was trained on with --mixture FILE, or nothing with --replay 0."
        )
    return WorldReplay(stage, config.seed, is_joint)
