"""The model that a stage starts from: the one that the stages before it left, or a fresh one with a new tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from starflow2.core.folders import whole
from starflow2.core.imports import find_object
from starflow2.core.serialize import to_dict
from starflow2.data.mixture import read_mixture, words
from starflow2.errors import ConfigError, TrainingError
from starflow2.models.checkpoint import load_components
from starflow2.models.components import Components
from starflow2.models.config import CodecConfig, ExtractorConfig, ModelConfig
from starflow2.models.config_file import read_config
from starflow2.models.huggingface import stream_class
from starflow2.models.tokenizer import train_tokenizer
from starflow2.training.config import RunConfig
from starflow2.world.captions import caption_task
from starflow2.world.conversations import understanding_dialogue, understanding_words
from starflow2.world.edits import edit_task
from starflow2.world.stories import story_dialogue, story_task

__all__ = ["check_same_sizes", "check_start", "start_stage", "unfinished_stages"]

TOKENIZER_ITEMS = 250  # of each kind of the drawn world, that a new tokenizer is trained on; 2000 make no shorter texts
MIXTURE_ITEMS = 20_000  # of a mixture, likewise
# may differ between recipe and model
SAMPLING = ("guidance", "guidance_schedule", "edit_guidance", "prior_scale", "self_check", "far_nats")


def check_start(run: RunConfig, stage: str, folder: Path) -> None:
    """Raise TrainingError, before anything is built or written, where `stage` has no model in `folder` to start from.

    An earlier stage has not been trained, or pretrained weights have not been prepared.
    """
    if _has_model(folder):
        return
    if run.model.references:
        sources = ", ".join(reference.source for reference in run.model.references.values())
        raise TrainingError(
            f"{run.model.name} is trained over pretrained weights ({sources}), and there is no {folder}/model that "
            "refers to them; run `starflow2 prepare` with this recipe and --output first."
        )
    if stage != run.stages[0].name:
        raise TrainingError(
            f"stage {stage} starts from the stage before it, but there is no {folder}/model; "
            f"run --stage {run.stages[0].name} first."
        )


def unfinished_stages(run: RunConfig, folder: Path) -> list[str]:
    """The stages of a recipe, in order, that the model in folder/model has not finished; all without a model there."""
    names: list[str] = [stage.name for stage in run.stages]
    if not (folder / "model" / "config.json").is_file():
        return names
    finished = read_config(folder / "model").finished_stages
    return [name for name in names if name not in finished]


def start_stage(
    run: RunConfig, stage: str, folder: Path, device: str, left_in_files: tuple[str, ...] = ()
) -> Components:
    """Load the model in folder/model, or make a fresh one if `stage` is the recipe's first.

    left_in_files: components whose layers stay in their files; see `load_components`. Raises TrainingError as
    `check_start` does, and where the model has other sizes than the recipe.
    """
    check_start(run, stage, folder)
    if _has_model(folder):
        return _load(run, stage, folder, device, left_in_files)
    return _fresh(run, run.stage(stage).corpus.mixture, device)


def _has_model(folder: Path) -> bool:
    return (whole(folder / "model") / "config.json").is_file()


def _load(run: RunConfig, stage: str, folder: Path, device: str, left_in_files: tuple[str, ...]) -> Components:
    stream_class(run.model.vlm)  # imports the modules that the recipe names; a folder alone may not
    if isinstance(run.model.fae, CodecConfig):
        find_object(run.model.fae.codec, "fae.codec")
    if isinstance(run.model.features, ExtractorConfig):
        find_object(run.model.features.extractor, "features.extractor")
    components = load_components(folder / "model", device, left_in_files)
    check_same_sizes(components.cfg, run.model)
    names: list[str] = [s.name for s in run.stages]
    missing = [name for name in names[: names.index(stage)] if name not in components.finished_stages]
    if missing:
        raise TrainingError(
            f"stage {stage} needs the stages before it, but {folder}/model has not finished {', '.join(missing)}; "
            f"run --stage {missing[0]} first."
        )
    if run.stage(stage).corpus.mixture:
        components.vocabulary = frozenset()  # real text may hold any word
        components.cfg = replace(components.cfg, self_check=None)  # nor has it taught the model to check itself
    elif stage == "vlm" and components.vocabulary:  # the only stage in which the language model learns words
        components.vocabulary |= _world_words()
    return components


def _fresh(run: RunConfig, mixture: str, device: str) -> Components:
    """A fresh model whose tokenizer is trained on the words of the first stage's source."""
    texts = words(read_mixture(mixture), MIXTURE_ITEMS) if mixture else _world_texts(run.seed)
    tokenizer = train_tokenizer(texts, run.model.vlm.vocab)
    if tokenizer.special != run.model.vlm.special:
        raise ConfigError(
            f"vlm.special is {run.model.vlm.special}, but a new tokenizer has {tokenizer.special}; use these."
        )
    torch.manual_seed(run.seed)
    components = Components(run.model, tokenizer).to(device)
    components.vocabulary = frozenset() if mixture else _world_words()  # real text may hold any word
    return components


def _world_words() -> frozenset[str]:
    """Every word of the conversations of the drawn world."""
    return understanding_words()


def _world_texts(seed: int) -> Iterator[str]:
    for index in range(TOKENIZER_ITEMS):
        yield from _tokenizer_texts(seed, index)


def _tokenizer_texts(seed: int, index: int) -> Iterator[str]:
    """Captions, instructions and conversations that a new tokenizer is trained on."""
    yield caption_task(seed, index).prompt
    yield edit_task(seed, index).instruction
    for dialogue in (understanding_dialogue(seed, index), story_dialogue(story_task(seed, index))):
        yield from (part for turn in dialogue.turns for part in (*turn.user, *turn.assistant) if isinstance(part, str))


def check_same_sizes(saved: ModelConfig, wanted: ModelConfig) -> None:
    """Raise TrainingError where a model of a run's folder has other sizes than the recipe."""
    old, new = to_dict(saved), to_dict(wanted)
    differ = [k for k in old if old[k] != new.get(k) and k not in SAMPLING]
    if differ:
        raise TrainingError(
            f"the model in the run folder has another {', '.join(differ)} than the recipe; "
            "use another --output, or the recipe it was made with."
        )
