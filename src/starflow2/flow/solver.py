"""Fixed-point solvers for the inverse of an autoregressive affine step, u = mu(u) + exp(s(u)) z.

Mean mu and log scale s of a latent depend on the latents before it. One algorithm: chunks of latents in order, each
iterated to its fixed point. Chunks of one latent need one evaluation each (sequential decoding); one chunk of all N is
plain Jacobi iteration. Not here: blocks, caches, guidance; a solver is given a callable that predicts Gaussians.
Letters: B batch, N latents, D latent dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow2.errors import ConfigError
from starflow2.flow.affine import Affine

__all__ = ["SEQUENTIAL", "BlockJacobi", "Jacobi", "Predict", "Progress", "Sequential", "Solution", "Solver", "solve"]

# Gaussians of latents [first, last) from a buffer (B, N + 1, D) of which rows before `last` - 1 are read
Predict = Callable[[Tensor, tuple[int, int]], Affine]
Progress = Callable[[int, int], None]  # called with (latents done, N)


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
    """One latent after the other: exact, N evaluations of one slot each where the callable keeps a cache."""
    return BlockJacobi(chunk=1)


def Jacobi(tolerance: float = 1e-5, max_iterations: int = 0) -> BlockJacobi:
    """All latents at once, iterated to the fixed point."""
    return BlockJacobi(chunk=0, tolerance=tolerance, max_iterations=max_iterations)


Solver = BlockJacobi
SEQUENTIAL = Sequential()


@dataclass(frozen=True, slots=True)
class Solution:
    """x: (B, N, D); how often the callable was evaluated; the largest last change of any value."""

    x: Tensor
    evaluations: int
    residual: float


@torch.no_grad()
def solve(predict: Predict, z: Tensor, solver: Solver = SEQUENTIAL, progress: Progress | None = None) -> Solution:
    """Latents whose normalized values are z: (B, N, D), in the order in which they depend on each other.

    >>> solve(lambda buffer, targets: Affine(torch.ones(1, 1, 1), torch.zeros(1, 1, 1)), torch.zeros(1, 2, 1)).x
    tensor([[[1.],
             [1.]]])
    """
    count = z.shape[1]
    buffer = z.new_zeros(z.shape[0], count + 1, z.shape[2])
    chunk = solver.chunk or count
    evaluations, residual = 0, 0.0
    for first in range(0, count, chunk):
        targets = (first, min(first + chunk, count))
        used, change = _fixed_point(predict, buffer, z, targets, solver)
        evaluations, residual = evaluations + used, max(residual, change)
        if progress is not None:
            progress(targets[1], count)
    return Solution(buffer[:, :-1], evaluations, residual)


def _fixed_point(
    predict: Predict, buffer: Tensor, z: Tensor, targets: tuple[int, int], solver: Solver
) -> tuple[int, float]:
    """Iterate one chunk of `buffer` in place; returns (evaluations, last change)."""
    first, last = targets
    limit = solver.max_iterations or last - first
    change, evaluations = 0.0, 0
    while evaluations < limit:
        evaluations += 1
        new = predict(buffer, targets).denormalize(z[:, first:last])
        if last - first == 1:
            buffer[:, first:last] = new
            return evaluations, 0.0
        change = float((new - buffer[:, first:last]).abs().max())
        buffer[:, first:last] = new
        if change <= solver.tolerance:
            break
    return evaluations, change
