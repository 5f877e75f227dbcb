"""Flows made of blocks: the shallow stack (x <-> u) and the deep-shallow flow (x <-> z).

A flow takes and gives latents (B, N, D) or, of the same numbers, vectors (B, N * D).
Letters: B batch, N latents, D latent dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from starflow2.core.fields import Config, Range, Weight, conform, of_kind, whole
from starflow2.errors import ConfigError, ShapeError
from starflow2.flow.affine import Guidance, Schedule, standard_normal_log_prob
from starflow2.flow.block import AffineBlock, BlockConfig
from starflow2.flow.context import Context, Guide
from starflow2.flow.noise import NoiseConfig
from starflow2.flow.solver import SEQUENTIAL, Progress, Solver
from starflow2.nn import check_floating

__all__ = ["Flow", "FlowConfig", "SampleConfig", "ShallowFlow"]


@dataclass(frozen=True, kw_only=True)
class FlowConfig(Config):
    """Shallow blocks in data order, then the deep block, which alone takes a context; directions must alternate."""

    deep: BlockConfig
    shallow: tuple[BlockConfig, ...] = ()
    noise: NoiseConfig | None = None  # levels of multi-noise training; None = no level input
    latent_penalty: Weight = 0.0  # weight of the mean square of u in training (STARFlow: 1e-4)

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = (*self.shallow, self.deep)
        if len({(b.grid, b.dim) for b in blocks}) > 1:
            raise ConfigError(
                f"grid and dim of the blocks are {[(b.grid, b.dim) for b in blocks]}; expected one size for all."
            )
        if any(b.context_dim for b in self.shallow):
            raise ConfigError(
                f"context_dim of the shallow blocks is {[b.context_dim for b in self.shallow]}; "
                "expected 0: only the deep block takes a context."
            )
        for a, b in pairwise(blocks):
            if a.direction == b.direction:
                raise ConfigError(
                    f"two neighbouring blocks have direction {a.direction!r}; expected directions that alternate."
                )
        if any(b.noise != (self.noise is not None) for b in blocks):
            raise ConfigError(
                f"flow.noise is {self.noise} and noise of the blocks is {[b.noise for b in blocks]}; "
                "expected levels in the flow and in all blocks, or in none."
            )


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Config):
    """Settings of sampling. guidance 0 = off; prior_scale 1 = exact sampling."""

    guidance: Weight = 0.0
    rule: Guidance = "starflow"
    schedule: Schedule = "constant"
    prior_scale: Weight = 1.0
    deep_solver: Solver = SEQUENTIAL
    shallow_solver: Solver = SEQUENTIAL


class ShallowFlow(nn.Module):
    """The blocks f_S between latents x and intermediate latents u, without context."""

    def __init__(self, blocks: tuple[BlockConfig, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AffineBlock(b) for b in conform(tuple[BlockConfig, ...], blocks, "blocks"))

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, N, D) -> u: (B, N, D) and log|du/dx|: (B,) nats."""
        logdet = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        for block in self.blocks:
            x, term = block(x, None, noise_level)
            logdet = logdet + term
        return x, logdet

    def inverse(self, u: Tensor, noise_level: Tensor | None = None, solver: Solver = SEQUENTIAL) -> Tensor:
        """u -> x, both (B, N, D), through the blocks in reverse order; noise_level: (B,), as in `forward`."""
        for block in reversed(self.blocks):
            assert isinstance(block, AffineBlock)
            u = block.inverse(u, None, noise_level, solver=solver)
        return u


class Flow(nn.Module):
    """A deep-shallow normalizing flow with an optional context prefix (STARFlow; paper eq. 3.3).

    >>> from starflow2.flow import StackConfig
    >>> block = BlockConfig(dim=2, grid=(1, 1), stack=StackConfig(width=64, depth=1))
    >>> Flow(FlowConfig(deep=block)).log_prob(torch.zeros(3, 1, 2)).shape
    torch.Size([3])
    """

    def __init__(self, cfg: FlowConfig) -> None:
        super().__init__()
        self.cfg = of_kind(cfg, FlowConfig, "cfg")
        self.shallow = ShallowFlow(cfg.shallow)
        self.deep = AffineBlock(cfg.deep)

    def forward(
        self, x: Tensor, context: Context | None = None, noise_level: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x: (B, N, D) or (B, N * D) -> z of the same shape and log|dz/dx|: (B,) nats."""
        u, shallow_logdet = self.shallow(self._latents(x, "x"), noise_level)
        z, deep_logdet = self.deep(u, context, noise_level)
        return z.reshape(x.shape), shallow_logdet + deep_logdet

    def inverse(self, z: Tensor, context: Context | None = None, noise_level: Tensor | None = None) -> Tensor:
        """z -> x of the same shape, one latent after the other, exact up to rounding; see `AffineBlock.inverse`."""
        u = self.deep.inverse(self._latents(z, "z"), context, noise_level)
        return self.shallow.inverse(u, noise_level).reshape(z.shape)

    def log_prob(self, x: Tensor, context: Context | None = None, noise_level: Tensor | None = None) -> Tensor:
        """Exact log density of x at its noise level, (B,) nats, constant included (eq. 2.1, 3.3)."""
        z, logdet = self(x, context, noise_level)
        return standard_normal_log_prob(z) + logdet

    def nats_per_dim(self, x: Tensor, context: Context | None = None, noise_level: Tensor | None = None) -> Tensor:
        """Negative log-likelihood per latent channel: (B,) nats, constant included."""
        return -self.log_prob(x, context, noise_level) / math.prod(x.shape[1:])

    @torch.no_grad()
    def sample(
        self,
        z: Tensor | int,
        context: Context | None = None,
        unconditional: Context | None = None,
        noise_level: Tensor | None = None,
        *,
        config: SampleConfig | None = None,
        progress: Progress | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Latents x: (B, N, D) from a number of samples, drawn by `generator` or by torch's own, or from prior samples
        z: (B, N, D), see `prior`. Guidance acts in the deep block only.

        Raises ConfigError for guidance without `unconditional`.
        """
        return self.rsample(
            z, context, unconditional, noise_level, config=config, progress=progress, generator=generator
        )

    def rsample(
        self,
        z: Tensor | int,
        context: Context | None = None,
        unconditional: Context | None = None,
        noise_level: Tensor | None = None,
        *,
        config: SampleConfig | None = None,
        progress: Progress | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`sample` with gradients by the weights, the conditions and z, for losses on samples (reparametrised)."""
        config = SampleConfig() if config is None else of_kind(config, SampleConfig, "config")
        guide = None
        if config.guidance:
            if unconditional is None:
                raise ConfigError(
                    f"guidance is {config.guidance} but unconditional is None; pass the context "
                    "of the empty prompt, or guidance 0."
                )
            guide = Guide(unconditional, config.guidance, config.rule, config.schedule)
        z = self._prior_samples(z, generator)
        u = self.deep.inverse(
            self._latents(z, "z") * config.prior_scale,
            context,
            noise_level,
            solver=config.deep_solver,
            guide=guide,
            progress=progress,
        )
        return self.shallow.inverse(u, noise_level, config.shallow_solver).reshape(z.shape)

    def prior(self, seeds: list[int]) -> Tensor:
        """Prior samples z: (B, N, D); row i depends on seeds[i] alone and is generated on CPU, whatever the batch."""
        shape = (self.cfg.deep.num_latents, self.cfg.deep.dim)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(rows).to(self.deep.head.weight.device)

    def denoise(self, x: Tensor, noise_level: Tensor, context: Context | None = None) -> Tensor:
        """Tweedie's estimate of the clean latents, x + t^2 grad log p(x; t) (TARFlow)."""
        check_floating(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            level = noise_level if self.cfg.noise is not None else None
            (grad,) = torch.autograd.grad(self.log_prob(x, context, level).sum(), x)
        return (x + noise_level.to(x).view(-1, *[1] * (x.ndim - 1)) ** 2 * grad).detach()

    # -- details ------------------------------------------------------------------------------------

    def _latents(self, x: Tensor, name: str) -> Tensor:
        """Latents (B, N, D) of latents, or of vectors (B, N * D). Raises ShapeError."""
        check_floating(x, name)
        count, dim = self.cfg.deep.num_latents, self.cfg.deep.dim
        if x.ndim == 2 and x.shape[1] == count * dim:
            return x.reshape(len(x), count, dim)
        if x.shape[1:] != (count, dim):
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; expected (B N={count} D={dim}) or (B {count * dim}).")
        return x

    def _prior_samples(self, z: Tensor | int, generator: torch.Generator | None) -> Tensor:
        """z itself, or as many prior samples (B, N, D) as it says."""
        if isinstance(z, Tensor):
            if generator is not None:
                raise ConfigError("generator is given beside z; expected a number of samples with a generator.")
            return z
        count = whole(z, "z", Range(least=1))
        if generator is not None:
            of_kind(generator, torch.Generator, "generator")
        weight = self.deep.head.weight
        shape = (count, self.cfg.deep.num_latents, self.cfg.deep.dim)
        device = weight.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, dtype=weight.dtype, device=device).to(weight.device)
