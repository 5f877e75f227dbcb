"""Counts of all that a run has read, taken from the batches themselves: documents, images, text tokens and latents."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor

from starflow2.models.sequence import Batch

__all__ = ["ReadCounts"]


@dataclass(frozen=True, slots=True)
class ReadCounts:
    """Amounts of data, of one microbatch or since the start of a stage."""

    documents: int = 0
    images: int = 0
    text_tokens: int = 0  # slots that hold no latent: words, and the marks of turns and images
    latents: int = 0

    def __add__(self, other: ReadCounts) -> ReadCounts:
        return ReadCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def positions(self) -> int:
        return self.text_tokens + self.latents

    @classmethod
    def of(cls, data: Any, num_latents: int) -> ReadCounts:
        """The amounts in the input of a task's loss; num_latents: slots of an image.

        data: images (B, 3, s, s); images and as many prompts; or images and the packed documents that hold them.
        """
        if isinstance(data, Tensor):
            return cls(len(data), len(data), 0, num_latents * len(data))
        images, words = data
        latents = num_latents * len(images)
        if isinstance(words, Batch):
            slots = int((words.document >= 0).sum())
            return cls(int(words.document.max()) + 1, len(images), slots - latents, latents)
        return cls(len(images), len(images), sum(len(row) for row in words), latents)
