"""Inverse of a flow block: latents from prior draws, exact and sequential or by Jacobi iteration.

One algorithm: chunks of targets in order, each iterated to its fixed point. Chunks of one latent
need one evaluation each (sequential decoding with a cache); one chunk of all N is plain Jacobi.
Letters: B batch, N latents, D latent dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow2.errors import ConfigError
from starflow2.flow.affine import Affine, Guidance, Schedule, strengths
from starflow2.flow.block import AffineBlock, Context, scan
from starflow2.nn import Cache, at_least_fp32, check

__all__ = ["SEQUENTIAL", "BlockJacobi", "Guide", "Jacobi", "Sequential", "Solution", "Solver", "solve"]


@dataclass(frozen=True, kw_only=True)
class BlockJacobi:
    """Chunks of `chunk` latents (0 = all), each iterated until no value moves by `tolerance`.

    The stopping rule is on the largest absolute change, because a mean over the chunk hides
    single bad latents. After as many iterations as the chunk has latents a chunk is exact.
    """

    chunk: int = 16
    tolerance: float = 1e-5
    max_iterations: int = 0  # 0 = up to the chunk length

    def __post_init__(self) -> None:
        if self.chunk < 0 or self.tolerance < 0 or self.max_iterations < 0:
            raise ConfigError(f"{self}: expected chunk, tolerance and max_iterations >= 0.")


def Sequential() -> BlockJacobi:
    """One latent after the other through the cache: exact, N evaluations of one slot."""
    return BlockJacobi(chunk=1)


def Jacobi(tolerance: float = 1e-5, max_iterations: int = 0) -> BlockJacobi:
    """All latents at once, iterated to the fixed point."""
    return BlockJacobi(chunk=0, tolerance=tolerance, max_iterations=max_iterations)


Solver = BlockJacobi
SEQUENTIAL = Sequential()


@dataclass(frozen=True, slots=True)
class Solution:
    """x: (B, N, D); evaluations of the body in total; the last change of any value."""

    x: Tensor
    evaluations: int
    residual: float


@dataclass(frozen=True, slots=True)
class Guide:
    """Classifier-free guidance inside the inverse: the unconditional context, strength, its course, and rule."""

    unconditional: Context
    guidance: float
    rule: Guidance = "starflow"
    schedule: Schedule = "constant"


@torch.no_grad()
def solve(
    block: AffineBlock,
    z: Tensor,
    context: Context | None = None,
    noise_level: Tensor | None = None,
    *,
    solver: Solver | None = None,
    guide: Guide | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Solution:
    """Invert `block`: z: (B, N, D) -> x in raster order, affine maths in float32 or better.

    With `guide` both branches run as one doubled batch and both read the guided latents.
    `progress` is called with (latents done, N).
    """
    check(z, "B N D", "z", N=block.cfg.num_latents, D=block.cfg.dim)
    solver = solver or SEQUENTIAL
    z = scan(at_least_fp32(z), block.cfg.direction)
    doubled = 1
    if guide is not None:
        if context is None:
            raise ConfigError("guide is given but context is None; guidance needs both branches.")
        context, doubled = context.joined(guide.unconditional), 2
        noise_level = None if noise_level is None else noise_level.repeat(2)
    run = block.begin(doubled * len(z), context, noise_level)
    run.cache = Cache(block.cfg.stack.depth, run.prefix.shape[1] + z.shape[1])
    buffer = z.new_zeros(doubled * len(z), z.shape[1] + 1, z.shape[2])

    def gaussians(targets: tuple[int, int]) -> Affine:
        affine = block.predict(buffer, targets, run)
        return affine if guide is None else _guided(affine, guide, torch.arange(*targets).to(z), z.shape[1])

    chunk = solver.chunk or z.shape[1]
    evaluations, residual = 0, 0.0
    for first in range(0, z.shape[1], chunk):
        targets = (first, min(first + chunk, z.shape[1]))
        count, moved = _fixed_point(gaussians, buffer, z, targets, (run.cache, solver))
        evaluations, residual = evaluations + count, max(residual, moved)
        if progress is not None:
            progress(targets[1], z.shape[1])
    return Solution(scan(buffer[: len(z), :-1], block.cfg.direction), evaluations, residual)


def _fixed_point(
    gaussians: Callable[[tuple[int, int]], Affine],
    buffer: Tensor,
    z: Tensor,
    targets: tuple[int, int],
    state: tuple[Cache, Solver],
) -> tuple[int, float]:
    """Iterate one chunk of `buffer` in place; returns (evaluations, last change)."""
    cache, solver = state
    first, last = targets
    mark, limit = cache.length, solver.max_iterations or last - first
    moved, evaluations = 0.0, 0
    while evaluations < limit:
        evaluations += 1
        cache.truncate(mark)
        new = gaussians(targets).denormalize(z[:, first:last])
        if last - first == 1:
            buffer[:, first:last] = _doubled(new, buffer)
            return evaluations, 0.0
        moved = float((new - buffer[: len(z), first:last]).abs().max())
        buffer[:, first:last] = _doubled(new, buffer)
        if moved <= solver.tolerance:
            break
    return evaluations, moved


def _doubled(x: Tensor, buffer: Tensor) -> Tensor:
    return x if len(x) == len(buffer) else x.repeat(2, 1, 1)


def _guided(both: Affine, guide: Guide, at: Tensor, count: int) -> Affine:
    (mu_c, mu_u), (log_c, log_u) = both.mu.chunk(2), both.log_scale.chunk(2)
    strength = strengths(guide.guidance, guide.schedule, at[:, None], count)
    return Affine(mu_c, log_c).guide(Affine(mu_u, log_u), strength, guide.rule)
