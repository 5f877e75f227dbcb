"""Settings of sampling: guidance, prior scale, precision, open skips, with a model's own defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from starflow2.errors import ConfigError, nearest
from starflow2.flow.affine import Guidance, Schedule
from starflow2.flow.solver import SEQUENTIAL, Solver
from starflow2.models.components import Components
from starflow2.models.joint_stream import Skip
from starflow2.models.pretzel import ALL_SKIPS

__all__ = [
    "Cleanup",
    "DrawConfig",
]


Cleanup = Literal["none", "tweedie"]
Precision = Literal["auto", "float32", "float64"]


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """Settings of sampling. Defaults of a model come from its own config, see `for_model`."""

    guidance: float = 2.0  # 0 = off
    edit_guidance: float | None = None  # of an image that follows another in its conversation; None: as `guidance`
    prior_scale: float = 0.8  # 1 = exact sampling
    rule: Guidance = "starflow"
    schedule: Schedule = "constant"  # linear: guidance rises from 0 at an image's first latent
    # none: the pixel decoder takes latents at their sampling noise; tweedie: one self-denoising step
    cleanup: Cleanup = "none"
    batch: int = 32  # images at once
    # of the flow while sampling; "auto" is float64 on CPU, because a trained flow can magnify float32 rounding, which
    # depends on the batch, by a factor of 10^6 (docs/choices.md#sampling-in-float64), and float32 elsewhere
    precision: Precision = "auto"
    shallow_solver: Solver = SEQUENTIAL
    # open skips between the streams: () closes both (paper table 4); None: both after stage joint, none before it
    skips: tuple[Skip, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("guidance", "edit_guidance"):
            if (strength := getattr(self, name)) is not None and not 0 <= strength < math.inf:
                raise ConfigError(f"{name} is {strength}; expected 0 (off) or more.")
        if not 0 < self.prior_scale < math.inf:
            raise ConfigError(f"prior_scale is {self.prior_scale}; expected more than 0.")
        unknown = [skip for skip in self.skips or () if skip not in ALL_SKIPS]
        if unknown:
            raise ConfigError(f"skips holds {unknown[0]!r}; expected some of {', '.join(sorted(ALL_SKIPS))}.")
        literals = {"rule": Guidance, "schedule": Schedule, "cleanup": Cleanup, "precision": Precision}
        for name, known in ((name, get_args(literal)) for name, literal in literals.items()):
            if (value := getattr(self, name)) not in known:
                hint = nearest(str(value), known)
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(known)}.{hint}")
        if self.batch < 1:
            raise ConfigError(f"batch is {self.batch}; expected at least 1.")

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
