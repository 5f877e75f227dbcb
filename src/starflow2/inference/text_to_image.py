"""Pictures from prompts: one cached left-to-right pass, all rows and both guidance branches at once.

Row i of a batch depends on its own prompt and seed alone. Not here: files, prompts checking, names.
Letters: B batch, N latents, D latent dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow2.errors import ConfigError, DataError, StateError
from starflow2.flow import Context, Flow, SampleConfig
from starflow2.inference.config import DrawConfig
from starflow2.models.components import Components
from starflow2.models.context import prompt_context

__all__ = [
    "Drawn",
    "draw",
    "sample_latents",
]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Drawn:
    """images: (B, 3, height, width) in [-1, 1]; latents: (B, N, D) as sampled, at noise_level."""

    images: Tensor
    latents: Tensor
    noise_level: float


@torch.no_grad()
def draw(
    components: Components,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: DrawConfig,
    progress: Progress | None = None,
) -> Drawn:
    """One picture per (prompt, seed). `progress` is called with (latents done, latents in all).

    Raises StateError if the model has no trained flow, ConfigError if lengths differ, DataError if a sampled
    latent is not finite.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ConfigError(f"{len(prompts)} prompts and {len(seeds)} seeds; expected equally many.")
    if "t2i" not in components.finished_stages:
        raise StateError(f"this model has finished stages {list(components.finished_stages)}; drawing needs t2i.")
    flow = _sampling_flow(components, config)
    done: list[Tensor] = []
    total = len(prompts) * components.cfg.flow.deep.num_latents
    for first in range(0, len(prompts), config.batch):
        chunk = slice(first, first + config.batch)
        rows = len(prompts[chunk])
        before = first * components.cfg.flow.deep.num_latents

        def step(count: int, _: int, rows: int = rows, before: int = before) -> None:
            if progress is not None:
                progress(before + count * rows, total)

        done.append(sample_latents(components, flow, prompts[chunk], seeds[chunk], config, step))
    latents = torch.cat(done)
    return Drawn(_decode(components, latents), latents, _level(components))


@torch.no_grad()
def sample_latents(
    components: Components,
    flow: Flow,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: DrawConfig,
    progress: Progress | None = None,
) -> Tensor:
    """Latents (B, N, D) float32 of one batch, sampled in the precision of `flow`, cleaned up if asked."""
    tokenizer = components.tokenizer
    assert tokenizer is not None
    rows = [tokenizer.drawing_prompt(p) for p in prompts]
    empty = [tokenizer.drawing_prompt("")] * len(rows)
    dtype = flow.deep.head.weight.dtype
    context, unconditional = _halves(prompt_context(components, rows + empty, dtype), len(rows))
    level = torch.full((len(rows),), _level(components), device=components.device, dtype=dtype)
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


def _sampling_flow(components: Components, config: DrawConfig) -> Flow:
    doubles = components.device.type == "cpu" if config.precision == "auto" else config.precision == "float64"
    return copy.deepcopy(components.flow).double() if doubles else components.flow


def _level(components: Components) -> float:
    assert components.cfg.flow.noise is not None
    return components.cfg.flow.noise.noise_max


def _halves(both: Context, rows: int) -> tuple[Context, Context]:
    """The first `rows` rows and the rest."""
    assert both.positions is not None and both.attend is not None
    first = Context(both.states[:rows], both.positions[:rows], both.attend[:rows])
    return first, Context(both.states[rows:], both.positions[rows:], both.attend[rows:])


def _decode(components: Components, latents: Tensor, batch: int = 64) -> Tensor:
    return torch.cat([components.codec.decode(chunk) for chunk in latents.split(batch)])
