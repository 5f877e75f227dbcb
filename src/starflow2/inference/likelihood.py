"""Exact log probability of words and images, token by token and patch by patch, and the latent codes of images.

Letters: N latents, D latent dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow2.core.fields import number
from starflow2.core.torch_defaults import inference_defaults
from starflow2.errors import ConfigError, PromptError
from starflow2.flow.affine import standard_normal_log_prob
from starflow2.inference.config import ReplyLimits
from starflow2.inference.conversations import generate_replies
from starflow2.inference.events import DecodedImage
from starflow2.inference.reading import Part
from starflow2.inference.sampler import Sampler
from starflow2.models.joint_stream import Output, read_documents
from starflow2.models.sequence import pack
from starflow2.models.token_loss import token_nats

__all__ = ["Code", "PictureScore", "Score", "TokenScore", "decode_code", "image_nats", "invert", "score"]


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token of a reply and its log probability in nats."""

    text: str
    log_prob: float


@dataclass(frozen=True, slots=True)
class PictureScore:
    """An image at its noise level: log density of its latents, and the share of every patch.

    patches: (rows, columns) nats, log N(u_n; mu_n, sigma_n); they and `shallow_logdet` add up to log_prob.
    """

    log_prob: float
    shallow_logdet: float
    patches: Tensor
    noise_level: float
    dims: int  # N * D

    @property
    def nats_per_dim(self) -> float:
        return -self.log_prob / self.dims


@dataclass(frozen=True, slots=True)
class Score:
    """Score of a whole reply: log_prob is the sum over its tokens and images."""

    tokens: tuple[TokenScore, ...]
    pictures: tuple[PictureScore, ...]

    @property
    def log_prob(self) -> float:
        return sum(t.log_prob for t in self.tokens) + sum(p.log_prob for p in self.pictures)


@dataclass(frozen=True, slots=True)
class _Turn:
    user: Sequence[Part]
    assistant: Sequence[Part]
    learns: bool = True


@inference_defaults()
def score(
    sampler: Sampler, prompt: Sequence[Part], reply: Sequence[Part], *, noise_level: float | None = None
) -> Score:
    """Log probability of `reply` after `prompt`; parts are words, or images (3, s, s) in [-1, 1].

    noise_level: of the images in the reply, whose latents get noise of seed 0; default the lowest. Densities at
    different levels do not compare. Raises ConfigError for an empty reply or a level that was not trained.
    """
    if not reply:
        raise ConfigError("there is nothing to score: the reply is empty.")
    low, high = sampler.upload_level, sampler.noise_level
    if noise_level is not None and not low <= number(noise_level, "noise_level") <= high:
        raise ConfigError(f"noise_level is {noise_level}; expected one that was trained, {low:g} to {high:g}.")
    output, levels = _read(sampler, _Turn(prompt, reply), noise_level)
    tokenizer = sampler.components.tokenizer
    chances = -token_nats(output.head, (output.h, output.g), output.labels)
    tokens = tuple(
        TokenScore(str(tokenizer.tokenizer.id_to_token(int(i))), float(c))
        for i, c in zip(output.labels, chances, strict=True)
    )
    first = sum(isinstance(p, Tensor) for p in prompt)
    return Score(tokens, tuple(_picture_scores(sampler, output, levels, first)))


def _read(sampler: Sampler, turn: _Turn, noise_level: float | None) -> tuple[Output, Tensor]:
    """Read one turn in parallel: the user's images at the upload level, those of the reply at `noise_level`."""
    components = sampler.components
    shown, drawn = ([p for p in side if isinstance(p, Tensor)] for side in (turn.user, turn.assistant))
    lowest = sampler.upload_level if noise_level is None else noise_level
    levels = torch.tensor([sampler.upload_level] * len(shown) + [lowest] * len(drawn), dtype=sampler.dtype)
    levels = levels.to(components.device)
    batch = pack([components.tokenizer.document([turn])], components.layout).to(components.device)
    if batch.ids.shape[1] > components.cfg.max_positions:
        raise PromptError(
            f"prompt and reply take {batch.ids.shape[1]} positions; this model reads {components.cfg.max_positions}."
        )
    return read_documents(sampler.pretzel, batch, _noisy(sampler, shown + drawn, levels), levels), levels


def _noisy(sampler: Sampler, images: Sequence[Tensor], levels: Tensor) -> Tensor:
    """Latents (P, N, D) of images at their levels, with noise from seed 0."""
    deep = sampler.components.cfg.flow.deep
    if not images:
        return torch.zeros(0, deep.num_latents, deep.dim, dtype=sampler.dtype, device=levels.device)
    return sampler.noisy(torch.stack(list(images)), levels)


def _picture_scores(sampler: Sampler, output: Output, levels: Tensor, first: int) -> Iterator[PictureScore]:
    patches = output.affine.log_prob(output.u)  # (P, N)
    for i in range(first, len(levels)):
        yield PictureScore(
            log_prob=float(output.log_prob[i]),
            shallow_logdet=float(output.shallow_logdet[i]),
            patches=patches[i].view(sampler.layout.grid).cpu(),
            noise_level=float(levels[i]),
            dims=math.prod(output.u.shape[1:]),
        )


@inference_defaults()
def image_nats(sampler: Sampler, images: Sequence[Tensor]) -> list[float]:
    """-log density of images (3, s, s) without words, in nats per dim, at the noise level at which images are drawn.

    There, what files do to an image (compression, another size) hardly counts, and what it shows does.
    """
    level = sampler.noise_level
    return [score(sampler, [], [image], noise_level=level).pictures[0].nats_per_dim for image in images]


@dataclass(frozen=True, slots=True)
class Code:
    """Latent code of an image given words: z (N, D) under the prior, and log N(z; 0, I) in nats."""

    z: Tensor
    log_prob: float


@inference_defaults()
def invert(sampler: Sampler, image: Tensor, prompt: str) -> Code:
    """The code from which `prompt` draws this image again: image (3, s, s) in [-1, 1] -> z (N, D).

    At the noise level at which images are drawn, with noise of seed 0.
    """
    output, _ = _read(sampler, _Turn([prompt] if prompt else [], [image]), sampler.noise_level)
    return Code(output.z[0], float(standard_normal_log_prob(output.z)[0]))


@inference_defaults()
def decode_code(sampler: Sampler, z: Tensor, prompt: str) -> DecodedImage:
    """The image that `prompt` draws from a code; the prompt of `invert` gives its image back, another one edits it."""
    turns = [[[prompt] if prompt else []]]
    reply = generate_replies(sampler.with_code(z), turns, [0], ReplyLimits(tokens=0, pictures=1), draws=True)[0][0]
    return next(part for part in reply if isinstance(part, DecodedImage))
