"""The flow's density of images: nats and bits per latent dimension at named noise levels, beside a Gaussian's.

Densities of latents with noise do not compare with those of pixels, nor between levels, nor between codecs. What
compares is how much better the flow is than a diagonal Gaussian fitted to the same latents. Latents have unit variance
per channel, so a standard normal distribution is at most log(2 pi e) / 2 = 1.419 nats without noise.
Letters: B images, N latents, D latent dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from starflow2.benchmarks.results import Result
from starflow2.errors import DataError
from starflow2.evals.report import commit
from starflow2.evals.statistics import Row, Score, score_rows
from starflow2.inference.likelihood import decode_code, invert, score
from starflow2.inference.sampler import Sampler
from starflow2.models.checkpoint import weights_digest
from starflow2.pipeline import StarFlow2

__all__ = ["gaussian_nats", "score_density"]

ROUND_TRIPS = 4  # images that go to the prior and back


def score_density(
    model: StarFlow2,
    images: Tensor,
    levels: Sequence[float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Nats per dimension of images (B, 3, s, s) in [-1, 1] without words, at each noise level.

    levels: by default the lowest and the one at which images are drawn. Raises DataError for fewer than two images,
    ConfigError for a level that was not trained.
    """
    if len(images) < 2:
        raise DataError(f"images: expected at least two to fit a Gaussian to, got {len(images)}.")
    sampler = model.exact_sampler()
    levels = [sampler.upload_level, sampler.noise_level] if levels is None else levels
    columns, more = dict[str, Score](), dict[str, Score]()
    for i, level in enumerate(levels):
        nats = _nats(sampler, images, level, progress, (i * len(images), len(levels) * len(images)))
        gaussian = gaussian_nats(sampler.noisy(images, torch.full((len(images),), level)))
        columns |= _per_dimension(nats, level)
        more |= {f"diagonal Gaussian, nats at noise {level:g}": Score(gaussian)}
        more |= {f"nats better than the Gaussian at noise {level:g}": Score(gaussian - float(np.mean(nats)))}
    more["largest error of latents through the prior and back"] = Score(_round_trip(sampler, images[:ROUND_TRIPS]))
    deep = model.components.cfg.flow.deep
    return Result(
        benchmark="likelihood",
        model=model.components.cfg.name,
        judge="the model itself",
        columns=columns,
        more=more,
        counts={"images": len(images), "dimensions": deep.num_latents * deep.dim},
        made={"weights": weights_digest(model.components), "commit": commit()},
        notes=("Of latents with unit variance per channel, without words; not comparable with bits of pixels.",),
    )


def _nats(
    sampler: Sampler,
    images: Tensor,
    level: float,
    progress: Callable[[int, int], None] | None,
    place: tuple[int, int],
) -> list[float]:
    """Nats per dimension of each image. place: images that are done before, and in all, for `progress`."""
    found = []
    for i, image in enumerate(images, 1):
        found.append(score(sampler, [], [image], noise_level=level).pictures[0].nats_per_dim)
        if progress is not None:
            progress(place[0] + i, place[1])
    return found


def _per_dimension(nats: Sequence[float], level: float) -> dict[str, Score]:
    rows = [Row("", i, (value, value / math.log(2))) for i, value in enumerate(nats)]
    own = score_rows(rows, ("nats", "bits"), np.random.default_rng(0), "plain").scores
    return {f"{unit} per dimension at noise {level:g}": own[unit] for unit in ("nats", "bits")}


def gaussian_nats(latents: Tensor) -> float:
    """Entropy in nats per dimension of the Gaussian with these latents' variance in each channel: (B, N, D)."""
    variance = latents.double().flatten(0, 1).var(0)  # (D,)
    return float((0.5 * (2 * math.pi * math.e * variance).log()).mean())


def _round_trip(sampler: Sampler, images: Tensor) -> float:
    """Largest difference of latents that went to the prior and back, from the latents that went in."""
    worst = 0.0
    for image in images:
        code = invert(sampler, image, "")
        before = sampler.noisy(image[None], torch.tensor([sampler.noise_level]))[0]
        after = decode_code(sampler, code.z, "").x
        worst = max(worst, float((after.double().cpu() - before.double().cpu()).abs().max()))
    return worst
