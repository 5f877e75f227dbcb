"""Settings of sampling: guidance, prior scale, precision, open skips, with a model's own defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from starflow2.core.fields import Config, Count, Natural, Positive, Weight
from starflow2.errors import ConfigError, nearest
from starflow2.flow.affine import Guidance, Schedule
from starflow2.flow.solver import SEQUENTIAL, Solver
from starflow2.models.components import Components
from starflow2.models.joint_stream import Skip

__all__ = [
    "Cleanup",
    "DrawConfig",
    "Precision",
    "ReplyLimits",
]


Cleanup = Literal["none", "tweedie", "iterative"]
Precision = Literal["auto", "float32", "float64"]


@dataclass(frozen=True, kw_only=True)
class ReplyLimits(Config):
    """Limits of a reply: tokens and images. `pictures` 0: words only; temperature 0: the likeliest token."""

    tokens: Natural = 64
    pictures: Natural = 1
    temperature: Weight = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokens + self.pictures:
            raise ConfigError(f"{self}: expected room for a token or a picture.")


@dataclass(frozen=True, kw_only=True)
class DrawConfig(Config):
    """Settings of sampling. Defaults of a model come from its own config, see `for_model`."""

    guidance: Weight = 2.0  # 0 = off
    edit_guidance: Weight | None = None  # of an image that follows another in its conversation; None: as `guidance`
    prior_scale: Positive = 0.8  # 1 = exact sampling
    rule: Guidance = "starflow"
    schedule: Schedule = "constant"  # linear: guidance rises from 0 at an image's first latent
    # none: the pixel decoder takes latents at their sampling noise; tweedie: one self-denoising step; iterative: more
    cleanup: Cleanup = "none"
    cleanup_steps: Count = 8  # of an iterative clean-up
    batch: Count = 32  # images at once
    # of both streams while sampling; "auto" is that of the weights, "float64" a check of it that takes longer
    # (docs/choices.md#sampling-in-float64)
    precision: Precision = "auto"
    shallow_solver: Solver = SEQUENTIAL
    # open skips between the streams: () closes both (paper table 4); None: both after stage joint, none before it
    skips: tuple[Skip, ...] | None = None

    def strength(self, *, follows: bool) -> float:
        """Guidance of an image that does or does not follow another in its conversation."""
        return self.edit_guidance if follows and self.edit_guidance is not None else self.guidance

    def recorded(self) -> dict[str, float]:
        """Settings written into the metadata of images drawn in a conversation."""
        strengths = {"guidance": self.guidance, "edit_guidance": self.strength(follows=True)}
        return strengths | {"prior_scale": self.prior_scale}

    @classmethod
    def for_model(cls, components: Components, **changes: object) -> DrawConfig:
        """A model's own defaults with `changes`; None keeps a default. Guidance that is given applies to edits too."""
        known = [f.name for f in fields(cls)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; expected {', '.join(known)}.{nearest(name, known)}")
        cfg = components.cfg
        given = {k: v for k, v in changes.items() if v is not None}
        edits = None if "guidance" in given else cfg.edit_guidance
        base = cls(
            guidance=cfg.guidance,
            edit_guidance=edits,
            schedule=cfg.guidance_schedule,
            prior_scale=cfg.prior_scale,
        )
        return replace(base, **given)  # type: ignore[arg-type]
