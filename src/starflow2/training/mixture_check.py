"""Check that a mixture holds what its stage learns from, by the first samples of its sources.

`fit` and the command line ask before a model is built: a mixture of drawings alone would train stage adapter for days
on no answer at all. Not here: whether every sample can be used (`data.check`), whether there is data (`datasets`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from starflow2.core.dialogue import Dialogue, is_lone_drawing
from starflow2.data.mixture import Source, read_mixture
from starflow2.data.records import Broken
from starflow2.data.shards import Samples
from starflow2.errors import ConfigError, DataError
from starflow2.training.config import JOINT, StageConfig, StageName

__all__ = ["LOOKED_AT", "check_mixture"]

LOOKED_AT = 32  # samples of every source
Has = Callable[[Dialogue[Any]], bool]


@dataclass(frozen=True, slots=True)
class _Need:
    """Data that a stage learns from: in words, as a property of a conversation, and what to add where none has it."""

    words: str
    has: Has
    remedy: str


def check_mixture(stage: StageConfig) -> None:
    """Raise ConfigError where no source of the stage's mixtures has what the stage learns from; nothing is decoded.

    DataError for a source without any sample. A source whose first samples are all broken may have it further on.
    """
    for path in filter(None, (stage.corpus.mixture, stage.corpus.held_out)):
        sources = read_mixture(path)
        try:
            _check_sources(stage.name, path, sources, [_first_conversations(source) for source in sources])
        except DataError as error:
            raise DataError(
                f"{path}, the data of stage {stage.name}: {error} Give it yours with --corpus.mixture FILE."
            ) from error


def _check_sources(
    stage: StageName, path: str, sources: Sequence[Source], found: Sequence[Sequence[Dialogue[Any]]]
) -> None:
    if stage == "t2i":
        _check_lone_drawings(path, sources, found)
    need = NEEDS[stage]
    if all(found) and not any(need.has(conversation) for first in found for conversation in first):
        names = ", ".join(f"{source.corpus} at {source.url}" for source in sources)
        raise ConfigError(
            f"stage {stage} learns from {need.words}, and {path} has none: none of the first {LOOKED_AT} samples of "
            f"{names} is one; {need.remedy}."
        )


def _check_lone_drawings(path: str, sources: Sequence[Source], found: Sequence[Sequence[Dialogue[Any]]]) -> None:
    """Stage t2i reads nothing else, so that a single other source would end the run at its first document."""
    for source, conversations in zip(sources, found, strict=True):
        if not all(map(is_lone_drawing, conversations)):
            raise ConfigError(
                f"stage t2i takes words followed by one drawn image, and {path} has other documents, in "
                f"{source.corpus} at {source.url}; leave that source to stage joint."
            )


def _first_conversations(source: Source) -> list[Dialogue[Any]]:
    """The usable ones among the first samples. Raises DataError where there is no sample at all."""
    read, found = 0, list[Dialogue[Any]]()
    for sample in islice(Samples(source.url, source.format), LOOKED_AT):
        read += 1
        with suppress(Broken):
            found.append(source.dialogue(sample))
    if not read:
        raise DataError(f"{source.corpus} at {source.url} has no sample.")
    return found


# -- what stages learn from -----------------------------------------------------------------------------------------


def _replies(conversation: Dialogue[Any]) -> Iterator[str]:
    """The words that the model learns to say."""
    for turn in conversation.turns:
        yield from (part for part in turn.assistant if turn.learns and isinstance(part, str))


def _answers(conversation: Dialogue[Any]) -> bool:
    return any(_replies(conversation))


def _answers_about_images(conversation: Dialogue[Any]) -> bool:
    return bool(conversation.pictures) and _answers(conversation)


_IMAGES = _Need("images", lambda conversation: bool(conversation.pictures), "add sources with images")
_DRAWINGS = _Need("images that are drawn", lambda conversation: conversation.draws, "add captions")
_ADDED = 'add questions with answers, or captions with "task": "describe"'
NEEDS: dict[str, _Need] = {
    "features": _IMAGES,
    "fae": _IMAGES,
    "vlm": _Need("answers in words", _answers, _ADDED),
    "t2i": _DRAWINGS,
    "adapter": _Need("answers in words about images", _answers_about_images, _ADDED),
    **dict.fromkeys(JOINT, _DRAWINGS),
}
