"""Pictures from prompts: one cached left-to-right pass, all rows and both guidance branches at once.

Row i of a batch depends on its own prompt and seed alone. Not here: files, prompts checking, names.
Letters: B batch, N latents, D latent dim.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from starflow2.errors import ConfigError, DataError, nearest
from starflow2.flow import Context, Flow, SampleConfig
from starflow2.flow.affine import Guidance, Schedule
from starflow2.flow.solve import SEQUENTIAL, Solver
from starflow2.models.components import Parts
from starflow2.models.context import prompt_context

__all__ = ["DrawConfig", "Drawn", "draw", "sample_latents"]

Progress = Callable[[int, int], None]
Cleanup = Literal["none", "tweedie"]
Precision = Literal["auto", "float32", "float64"]


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How a picture is sampled. Defaults of a model come from its own config, see `for_model`."""

    guidance: float = 2.0  # 0 = off
    edit_guidance: float | None = None  # of a picture that follows another in its conversation; None: as `guidance`
    prior_scale: float = 0.8  # 1 = exact sampling
    rule: Guidance = "starflow"
    schedule: Schedule = "constant"  # linear: guidance rises from 0 at a picture's first latent
    # none: the pixel decoder takes latents at their sampling noise; tweedie: one self-denoising step
    cleanup: Cleanup = "none"
    batch: int = 32  # pictures at once
    # of the flow while sampling; "auto" is float64 on CPU, because a trained flow can magnify float32 rounding, which
    # depends on the batch, by a factor of 10^6 (docs/choices.md#sampling-in-float64), and float32 elsewhere
    precision: Precision = "auto"
    shallow_solver: Solver = SEQUENTIAL

    def __post_init__(self) -> None:
        for name in ("guidance", "edit_guidance"):
            if (strength := getattr(self, name)) is not None and not 0 <= strength < math.inf:
                raise ConfigError(f"{name} is {strength}; expected 0 (off) or more.")
        if not 0 < self.prior_scale < math.inf:
            raise ConfigError(f"prior_scale is {self.prior_scale}; expected more than 0.")
        literals = {"rule": Guidance, "schedule": Schedule, "cleanup": Cleanup, "precision": Precision}
        for name, known in ((name, get_args(literal)) for name, literal in literals.items()):
            if (value := getattr(self, name)) not in known:
                hint = nearest(str(value), known)
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(known)}.{hint}")
        if self.batch < 1:
            raise ConfigError(f"batch is {self.batch}; expected at least 1.")

    def strength(self, *, follows: bool) -> float:
        """Guidance of a picture that does or does not follow another in its conversation."""
        return self.edit_guidance if follows and self.edit_guidance is not None else self.guidance

    def told(self) -> dict[str, float]:
        """What the pictures of a conversation record of it."""
        strengths = {"guidance": self.guidance, "edit_guidance": self.strength(follows=True)}
        return strengths | {"prior_scale": self.prior_scale}

    @classmethod
    def for_model(cls, parts: Parts, **changes: object) -> DrawConfig:
        """The model's own defaults with `changes`; None keeps a default. A guidance that is given guides edits too."""
        known = [f.name for f in fields(cls)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; expected {', '.join(known)}.{nearest(name, known)}")
        cfg = parts.cfg
        given = {k: v for k, v in changes.items() if v is not None}
        edits = None if "guidance" in given else cfg.edit_guidance
        base = cls(
            guidance=cfg.guidance,
            edit_guidance=edits,
            schedule=cfg.guidance_schedule,
            prior_scale=cfg.prior_scale,
        )
        return replace(base, **given)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Drawn:
    """images: (B, 3, height, width) in [-1, 1]; latents: (B, N, D) as sampled, at noise_level."""

    images: Tensor
    latents: Tensor
    noise_level: float


@torch.no_grad()
def draw(
    parts: Parts,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: DrawConfig,
    progress: Progress | None = None,
) -> Drawn:
    """One picture per (prompt, seed). `progress` is called with (latents done, latents in all).

    Raises ConfigError if the model has no trained flow or lengths differ, DataError if a sampled
    latent is not finite.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ConfigError(f"{len(prompts)} prompts and {len(seeds)} seeds; expected equally many.")
    if "t2i" not in parts.stages:
        raise ConfigError(f"this model has finished stages {list(parts.stages)}; drawing needs t2i.")
    flow = _sampling_flow(parts, config)
    done: list[Tensor] = []
    total = len(prompts) * parts.cfg.flow.deep.num_latents
    for first in range(0, len(prompts), config.batch):
        chunk = slice(first, first + config.batch)
        rows = len(prompts[chunk])
        before = first * parts.cfg.flow.deep.num_latents

        def step(count: int, _: int, rows: int = rows, before: int = before) -> None:
            if progress is not None:
                progress(before + count * rows, total)

        done.append(sample_latents(parts, flow, prompts[chunk], seeds[chunk], config, step))
    latents = torch.cat(done)
    return Drawn(_decode(parts, latents), latents, _level(parts))


@torch.no_grad()
def sample_latents(
    parts: Parts,
    flow: Flow,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: DrawConfig,
    progress: Progress | None = None,
) -> Tensor:
    """Latents (B, N, D) float32 of one batch, sampled in the precision of `flow`, cleaned up if asked."""
    tokenizer = parts.tokenizer
    assert tokenizer is not None
    rows = [tokenizer.drawing_prompt(p) for p in prompts]
    empty = [tokenizer.drawing_prompt("")] * len(rows)
    dtype = flow.deep.head.weight.dtype
    context, unconditional = _halves(prompt_context(parts, rows + empty, dtype), len(rows))
    level = torch.full((len(rows),), _level(parts), device=parts.device, dtype=dtype)
    latents = flow.sample(
        flow.prior(list(seeds)).to(dtype),
        context,
        unconditional if config.guidance else None,
        level,
        config=SampleConfig(
            guidance=config.guidance,
            rule=config.rule,
            schedule=config.schedule,
            prior_scale=config.prior_scale,
            shallow_solver=config.shallow_solver,
        ),
        progress=progress,
    )
    if config.cleanup == "tweedie":
        latents = flow.denoise(latents, level, context)
    finite = torch.isfinite(latents).flatten(1).all(1)
    if not bool(finite.all()):
        bad = [seeds[i] for i in (~finite).nonzero().flatten().tolist()]
        raise DataError(f"latents of seeds {bad} are not finite; try a lower guidance.")
    return latents.float()


def _sampling_flow(parts: Parts, config: DrawConfig) -> Flow:
    doubles = parts.device.type == "cpu" if config.precision == "auto" else config.precision == "float64"
    return copy.deepcopy(parts.flow).double() if doubles else parts.flow


def _level(parts: Parts) -> float:
    assert parts.cfg.flow.noise is not None
    return parts.cfg.flow.noise.noise_max


def _halves(both: Context, rows: int) -> tuple[Context, Context]:
    """The first `rows` rows and the rest."""
    assert both.positions is not None and both.attend is not None
    first = Context(both.states[:rows], both.positions[:rows], both.attend[:rows])
    return first, Context(both.states[rows:], both.positions[rows:], both.attend[rows:])


def _decode(parts: Parts, latents: Tensor, batch: int = 64) -> Tensor:
    return torch.cat([parts.codec.decode(chunk) for chunk in latents.split(batch)])
