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
import torch.nn.functional as F
from torch import Tensor

from starflow2.core.fields import Config, Natural, Weight
from starflow2.flow.affine import Affine

__all__ = [
    "SEQUENTIAL",
    "BlockJacobi",
    "Jacobi",
    "Predict",
    "Progress",
    "Sequential",
    "Solution",
    "Solver",
    "differentiable",
    "solve",
]

# Gaussians of latents [first, last) from a buffer (B, N + 1, D) of which rows before `last` - 1 are read
Predict = Callable[[Tensor, tuple[int, int]], Affine]
Progress = Callable[[int, int], None]  # called with (latents done, N)


@dataclass(frozen=True, kw_only=True)
class BlockJacobi(Config):
    """Chunks of `chunk` latents (0 = all), each iterated until no value moves by `tolerance`.

    The stopping rule is on the largest absolute change, because a mean over the chunk hides
    single bad latents. After as many iterations as the chunk has latents a chunk is exact.
    """

    chunk: Natural = 16
    tolerance: Weight = 1e-5
    max_iterations: Natural = 0  # 0 = up to the chunk length


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
        with torch.inference_mode():  # views and versions of what no gradient passes through need not be followed
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
        now = buffer.narrow(1, first, last - first)
        new = predict(buffer, targets).denormalize(z.narrow(1, first, last - first))
        if last - first == 1:
            now.copy_(new)
            return evaluations, 0.0
        change = float((new - now).abs().max())
        now.copy_(new)
        if change <= solver.tolerance:
            break
    return evaluations, change


def differentiable(x: Tensor, z: Tensor, predict: Predict) -> Tensor:
    """The solution x of `solve` to the last bit, with its gradient by z and by all that `predict` reads.

    x = F(x, z) with F = mu(x) + exp(s(x)) z. By the implicit function theorem dx = (1 - dF/dx)^-1 dF at fixed x, and
    dF/dx is strictly triangular, so v = g + (dF/dx)^T v reaches the gradient g (1 - dF/dx)^-1 after at most N rounds.
    x, z: (B, N, D). `predict` has no cache. Raises NotImplementedError where a second derivative is asked for.
    """
    count = x.shape[1]
    fixed = x.detach().requires_grad_()
    right = predict(F.pad(fixed, (0, 0, 0, 1)), (0, count)).denormalize(z)
    outputs = right - right.detach() + x  # x itself: the difference is zero

    def solved(gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # create_graph: what follows keeps no graph
            raise NotImplementedError("an inverse can be differentiated only once; differentiate log_prob for more.")
        v = gradient
        for _ in range(count):
            (through,) = torch.autograd.grad(right, fixed, v, retain_graph=True)
            v, before = gradient + through, v
            if bool((v - before).abs().max() <= torch.finfo(v.dtype).eps * v.abs().max()):
                break
        return v

    if outputs.requires_grad:
        outputs.register_hook(solved)
    return outputs
