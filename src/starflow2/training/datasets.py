"""The data of a stage: batches of the drawn world by index, or packed documents of a mixture of corpora.

Of the drawn world every random choice is a pure function of (seed, stage, index or step); its images have one size, so
models of another take a mixture. Letters: B documents, P images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from starflow2.core.dialogue import Dialogue, Turn, replace_texts, without_words
from starflow2.core.images import to_floats
from starflow2.data.mixture import BatchConfig, Batches, Spelling, read_mixture
from starflow2.data.shards import WorkerShard
from starflow2.errors import ConfigError, TrainingError
from starflow2.models.components import Components
from starflow2.models.config import ModelConfig
from starflow2.models.sequence import Batch, Layout, pack
from starflow2.models.tokenizer import ChatTokenizer
from starflow2.models.wording import respelled, words_of
from starflow2.training.config import CaptionConfig, StageConfig
from starflow2.world.captions import caption_task
from starflow2.world.checks import check_dialogue
from starflow2.world.conversations import understanding_dialogue
from starflow2.world.edits import edit_chain_dialogue, edit_dialogue, edit_task
from starflow2.world.scene import IMAGE_SIZE, Scene, SceneDialogue, render_batch, stream
from starflow2.world.splits import everything_trains
from starflow2.world.stories import story_beginning, story_dialogue, story_task

__all__ = [
    "Captions",
    "Documents",
    "Scenes",
    "check_source",
    "corpus_batches",
    "drop_words",
    "joint_dialogue",
    "not_by_index",
    "talk_dialogue",
    "to_images",
]


ATTEMPTS, APART = 200, 1 << 40  # conversations tried in place of one with unknown words, and their distance


def check_source(model: ModelConfig, stage: StageConfig) -> None:
    """Raise ConfigError for a stage that would train a model on drawn scenes of another size than the model's images.

    >>> from starflow2.training.recipes import paper
    >>> check_source(paper().model, StageConfig(name="t2i", steps=1, batch=1))
    Traceback (most recent call last):
        ...
    starflow2.errors.ConfigError: stage t2i of paper has no data: ... give it yours with --corpus.mixture FILE.
    """
    if not stage.corpus.mixture and model.fae.image_size != IMAGE_SIZE:
        raise ConfigError(
            f"stage {stage.name} of {model.name} has no data: its images have {model.fae.image_size} pixels a side, "
            f"those of the drawn world {IMAGE_SIZE}; give it yours with --corpus.mixture FILE."
        )


def corpus_batches(
    components: Components, stage: StageConfig, shard: WorkerShard | None = None, *, lists_broken: bool = True
) -> Batches:
    """The packed documents of the stage's mixture, as this model reads them; `shard`: the part of this process.

    lists_broken: whether broken samples are listed where `stage.corpus.broken` says.
    """
    corpus = stage.corpus
    layout = components.tower_layout if stage.name == "vlm" else components.layout
    spelling = Spelling(components.tokenizer, layout, components.cfg.fae.image_size)
    shard = shard or WorkerShard()
    config = BatchConfig(
        rows=corpus.rows,
        width=corpus.width,
        documents=0 if corpus.batch_positions else max(1, stage.batch // shard.world),  # no more than a step has
        caption_drop=stage.caption_drop,
        broken=corpus.broken if lists_broken else "",
    )
    return Batches(read_mixture(corpus.mixture), spelling, config, shard)


def not_by_index(indices: range) -> Any:
    """The dataset of a task whose stage has a mixture, which has no item of an index. Raises TrainingError."""
    raise TrainingError(
        f"make_batch({indices}) asks for items by index, but the stage reads a mixture; use training.loader.feed_for."
    )


def to_images(scenes: Sequence[Scene]) -> Tensor:
    """Rendered scenes (B, 3, 64, 64) in [-1, 1]."""
    return to_floats(render_batch(scenes))


@dataclass(frozen=True, slots=True)
class Scenes:
    """Images (B, 3, 64, 64) of the training scenes."""

    seed: int

    def __call__(self, indices: range) -> Tensor:
        return to_images([caption_task(self.seed, i).scene for i in indices])


@dataclass(frozen=True, slots=True)
class Captions:
    """Images (B, 3, 64, 64) of the training scenes with their prompts as token ids."""

    tokenizer: ChatTokenizer
    seed: int
    drop: float  # share of the prompts that are empty
    shares: CaptionConfig

    def __call__(self, indices: range) -> tuple[Tensor, list[list[int]]]:
        scenes, captions = zip(*self.captioned(indices), strict=True)
        return to_images(scenes), [self.tokenizer.drawing_prompt(caption) for caption in captions]

    def captioned(self, indices: range) -> list[tuple[Scene, str]]:
        """Scenes with their captions, "" where they are dropped."""
        weights = asdict(self.shares)
        drawings = [caption_task(self.seed, i, weights=weights) for i in indices]
        is_dropped = np.random.default_rng([self.seed, indices.start]).random(len(indices)) < self.drop
        return [(d.scene, "" if dropped else d.prompt) for d, dropped in zip(drawings, is_dropped, strict=True)]


@dataclass(frozen=True, slots=True)
class Documents:
    """Images (P, 3, s, s) of conversations in order, and the conversations packed into rows."""

    tokenizer: ChatTokenizer
    layout: Layout
    image_size: int
    dialogue: Callable[[int], SceneDialogue]  # by index
    vocabulary: frozenset[str] = frozenset()  # words that the language model knows; empty: any

    @classmethod
    def of(
        cls, components: Components, dialogue: Callable[[int], SceneDialogue], layout: Layout | None = None
    ) -> Documents:
        """The conversations `dialogue` as this model reads them; `layout`: by default one slot per latent."""
        size, vocabulary = components.cfg.fae.image_size, components.vocabulary
        return cls(components.tokenizer, layout or components.layout, size, dialogue, vocabulary)

    def __call__(self, indices: range) -> tuple[Tensor, Batch]:
        dialogues = [self._known(i) for i in indices]
        scenes = [scene for dialogue in dialogues for scene in dialogue.pictures]
        images = to_images(scenes) if scenes else torch.zeros(0, 3, self.image_size, self.image_size)
        return images, pack([self.tokenizer.document(d.turns) for d in dialogues], self.layout)

    def _known(self, index: int) -> SceneDialogue:
        """The conversation of that number as the model reads words; if it never learnt some, another in its place."""
        for attempt in range(ATTEMPTS):
            found = self.dialogue(index + attempt * APART)
            for dialogue in (found, replace_texts(found, lambda text: respelled(text, self.vocabulary))):
                if not self.vocabulary or self.vocabulary.issuperset(itertools.chain(*map(words_of, dialogue.texts))):
                    return dialogue
        raise TrainingError(
            f"of {ATTEMPTS} conversations in place of number {index}, none has only words that the language model "
            f"learnt ({len(self.vocabulary)} words); train its stage vlm on these conversations first."
        )


def talk_dialogue(stage: StageConfig, seed: int, index: int) -> SceneDialogue:
    """Conversation number `index` about images, of the kinds of `talk`, at first of those of `warmup_talk`."""
    is_early = index < stage.warmup_talk.steps * stage.batch
    return understanding_dialogue(seed, index, weights=asdict(stage.warmup_talk.mix if is_early else stage.talk))


def joint_dialogue(stage: StageConfig, seed: int, index: int) -> SceneDialogue:
    """Document number `index` of stage 3; a share of the drawings without words (`caption_drop`)."""
    with everything_trains() if stage.everything else nullcontext():
        return _joint_dialogue(stage, seed + stage.everything, index)  # other documents than those of the stage before


def _joint_dialogue(stage: StageConfig, seed: int, index: int) -> SceneDialogue:
    rng = stream(seed, index, _JOINT_STREAM)
    mix = stage.warmup_mix.mix if index < stage.warmup_mix.steps * stage.batch else stage.mix
    shares = np.array([getattr(mix, f.name) for f in fields(mix)])
    name = fields(mix)[int(rng.choice(len(shares), p=shares / shares.sum()))].name
    return drop_words(_makers(stage)[name](seed, index), rng, stage.caption_drop)


def _drawing(shares: CaptionConfig, seed: int, index: int) -> SceneDialogue:
    drawing = caption_task(seed, index, weights=asdict(shares))
    return Dialogue((Turn((drawing.prompt,), (drawing.scene,)),), "draw")


_JOINT_STREAM = 21


def _makers(stage: StageConfig) -> dict[str, Callable[[int, int], SceneDialogue]]:
    """Functions from (seed, index) to a document of stage 3, by the names of `MixConfig`."""
    return {
        "understand": partial(talk_dialogue, stage),
        "check": check_dialogue,
        "draw": partial(_drawing, stage.captions),
        "edit": lambda seed, index: edit_dialogue(edit_task(seed, index)),
        "chain": edit_chain_dialogue,
        "beginning": story_beginning,
        "story": lambda seed, index: story_dialogue(story_task(seed, index)),
    }


def drop_words(dialogue: SceneDialogue, rng: np.random.Generator, share: float) -> SceneDialogue:
    """Remove the words from `share` of the dialogues with a drawn image, and from half of those the user's images, too.

    The result is the unconditional branch of guidance (docs/choices.md#guidance).
    """
    if not dialogue.draws or rng.random() >= share:
        return dialogue
    return without_words(dialogue, shows=bool(rng.random() < 0.5))
