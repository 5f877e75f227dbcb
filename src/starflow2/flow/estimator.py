"""A density of vectors, rows of vectors or pictures in one call: `density(shape, context=...)`, then fit and log_prob.

It puts together what the other modules of this package offer one by one: standardisation, patches, a flow of
alternating blocks, labels as context, training with an early stop. Not here: noise levels, guidance, solvers; the flow
itself is `Density.flow`.
Letters: B rows, N latents, D latent dim, E width of the context.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.core.fields import SEEDS, Config, Count, Range, Seed, Weight, described, number, of_kind, whole
from starflow2.errors import ConfigError, DataError, ShapeError, TrainingError
from starflow2.flow.block import BlockConfig
from starflow2.flow.context import Context
from starflow2.flow.model import Flow, FlowConfig
from starflow2.flow.standardize import Standardize, as_numbers, as_rows, check_continuous
from starflow2.nn import StackConfig

__all__ = ["Density", "FitConfig", "Fitted", "density"]

T = TypeVar("T")
AXIS = Range(least=1, most=2**20)
HEAD = 16  # channels of an attention head
MOST_NUMBERS, MOST_WEIGHTS = 2**22, 2**32  # of a row; of all blocks, 16 GiB


@dataclass(frozen=True, kw_only=True)
class FitConfig(Config):
    """Settings of `Density.fit`: AdamW, one cycle of the learning rate, the best weights on held-out rows."""

    steps: Count = 1000
    batch: Count = 128  # rows of a step
    lr: Weight = 2e-3  # at its highest
    weight_decay: Weight = 0.05
    held_out: Annotated[float, Range(least=0, most=0.9)] = (
        0.1  # share of the rows that is only measured; 0: the last weights are kept
    )
    checks: Count = 25  # how often the held-out rows are measured
    seed: Seed = 0


@dataclass(frozen=True, slots=True)
class Fitted:
    """Outcome of a fit: nats per row of the data, the constant included (less is better)."""

    train: float  # mean over the last check's steps before the best weights
    held_out: float  # NaN where no rows were held out
    step: int  # at which the weights that were kept are the best


class Density(nn.Module):
    """A probability density over tensors of one shape, given a context if it takes one; made by `density`."""

    def __init__(self, shape: Sequence[int], flow: Flow, patch: int | None, spacing: float | None) -> None:
        """patch: side of the squares of a picture that are its latents, None for vectors and rows of vectors."""
        super().__init__()
        self.shape, self.patch, self.spacing = tuple(shape), patch, spacing
        self.flow = of_kind(flow, Flow, "flow", "density(shape) makes one")
        self.standard = Standardize(self.shape)

    # -- what it is for -----------------------------------------------------------------------------

    def log_prob(self, x: Tensor, context: Tensor | int | None = None) -> Tensor:
        """Log density of the rows x, (B, *shape), in their own units: (B,) nats.

        context: labels (B,), vectors (B, E), states (B, T, E), or one label for all. Raises ShapeError, and DataError
        for values that are not finite.
        """
        rows = as_rows(x, self.shape)
        with self._full_precision():
            z, logdet = self.standard(rows)
            return self.flow.log_prob(self._to_latents(z), self._context(context, len(rows))) + logdet

    @torch.no_grad()
    def sample(
        self, count: int, context: Tensor | int | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Rows (count, *shape) of the density, in the data's units; context as for `log_prob`."""
        return self.rsample(count, context, generator=generator)

    def rsample(
        self, count: int, context: Tensor | int | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """`sample` with gradients by the weights and the context."""
        count = whole(count, "count", Range(least=1, most=2**31))
        _instance(torch.Generator, generator, "generator")
        with self._full_precision():
            latents = self.flow.rsample(count, self._context(context, count), generator=generator)
            return self.standard.inverse(self._from_latents(latents))

    def standardize(self, data: Tensor) -> Density:
        """Take each feature's mean and deviation from `data`, (B, *shape); `fit` does so by itself.

        Raises DataError, naming features or rows, for data that is constant, discrete (see `density`) or not finite.
        """
        data = as_rows(data, self.shape, "data")
        if len(data) < 2:
            raise DataError(f"data has {len(data)} rows; expected at least 2.")
        if self.spacing is None:
            check_continuous(data)
        self.standard.set_from(self._dequantized(data, torch.Generator().manual_seed(0)))
        return self

    def fit(
        self,
        data: Tensor,
        context: Tensor | None = None,
        config: FitConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Fitted:
        """Standardise and train on `data`, (B, *shape), and keep the weights that are best on held-out rows.

        context: one for each row. progress is called with (steps done, steps). Raises DataError as `standardize`
        does, and TrainingError where the loss is no longer finite.
        """
        config = _instance(FitConfig, config, "config") or FitConfig()
        data = as_numbers(data, "data")
        data = data if data.is_floating_point() or data.is_complex() else data.float()
        self.standardize(data)
        rows = self._context(context, len(data))
        if rows is not None and len(rows.states) != len(data):
            raise ShapeError(f"context has {len(rows.states)} rows and data {len(data)}; expected equally many.")
        if progress is not None and not callable(progress):
            raise ConfigError(f"progress is {described(progress)}; expected a function of (steps done, steps).")
        with torch.inference_mode(False), torch.enable_grad(), self._full_precision():
            return _Fit(self, data, None if rows is None else rows.states, config).run(progress)

    # -- details ------------------------------------------------------------------------------------

    def _full_precision(self) -> torch.autocast:
        """Context in which the caller's autocast changes no number."""
        return torch.autocast(self.standard.mean.device.type, enabled=False)

    def _dequantized(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x with uniform noise of the width of the spacing, so that discrete values fill the space between them."""
        if not self.spacing:
            return x
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype) - 0.5
        return x + self.spacing * noise.to(x.device)

    def _to_latents(self, x: Tensor) -> Tensor:
        """Rows (B, *shape) as latents (B, N, D)."""
        cfg = self.flow.cfg.deep
        if self.patch is None:
            return x.reshape(len(x), cfg.num_latents, cfg.dim)
        (rows, columns), side = cfg.grid, self.patch
        x = x.reshape(len(x), -1, rows, side, columns, side)  # (B, channels, rows, side, columns, side)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(len(x), cfg.num_latents, cfg.dim)

    def _from_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, N, D) as rows (B, *shape), the inverse of `_to_latents`."""
        if self.patch is None:
            return latents.reshape(len(latents), *self.shape)
        (rows, columns), side = self.flow.cfg.deep.grid, self.patch
        x = latents.reshape(len(latents), rows, columns, -1, side, side)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), *self.shape)

    def _context(self, context: Tensor | int | None, batch: int) -> Context | None:
        """The context of `batch` rows; labels become unit vectors."""
        width = self.flow.cfg.deep.context_dim
        if context is None:
            return None  # refused by the flow if it is conditional
        if not width:
            raise ShapeError(
                "context was given; expected None: this density was made without, density(..., context=0)."
            )
        states = as_numbers(context, "context").to(self.standard.mean.device)
        states = states.expand(batch) if states.ndim == 0 else states
        if states.is_complex() or not bool(states.isfinite().all()):
            raise DataError(f"context has NaN, infinite or complex values ({states.dtype}); expected finite real ones.")
        if not states.is_floating_point() and states.ndim == 1:
            _check_labels(states, width)
            states = F.one_hot(states.long(), width).to(self.standard.mean)
        states = states.unsqueeze(1) if states.ndim == 2 else states  # (B, T, E)
        return Context(states.to(self.standard.mean.dtype) if states.is_floating_point() else states)


def density(
    shape: int | Sequence[int],
    *,
    context: int = 0,
    patch: int | None = None,
    spacing: float | None = None,
    width: int = 64,
    blocks: int = 4,
    depth: int = 1,
    seed: int = 0,
) -> Density:
    """A density over tensors of a shape, ready for `fit`: an exact one, of a flow with random weights.

    shape: D features; (N, D), a row of N vectors; or, with `patch`, a picture (height, width) or (channels, height,
    width) that is read in squares of patch x patch pixels. context: number of labels, or width of the vectors, that
    are given with each row; 0: none. spacing: the distance between neighbouring values of discrete data, between which
    noise fills the gaps; None: discrete data are refused; 0: they are taken as they are. width, blocks, depth:
    channels, number of blocks, layers of a block. Raises ConfigError.

    >>> numbers = density(2, width=32, blocks=2)
    >>> numbers.log_prob(torch.zeros(3, 2)).shape, numbers.sample(4).shape
    (torch.Size([3]), torch.Size([4, 2]))
    """
    sizes = shape if isinstance(shape, Sequence) and not isinstance(shape, bytes | bytearray | str) else (shape,)
    axes = tuple(whole(axis, "shape", AXIS) for axis in sizes)
    blocks, seed = whole(blocks, "blocks", Range(least=1, most=256)), whole(seed, "seed", SEEDS)
    if spacing is not None:
        spacing = number(spacing, "spacing", Range(least=0))
    width = whole(width, "width", Range(least=HEAD, most=2**20))
    if width % HEAD:
        raise ConfigError(f"width is {width}; expected a multiple of {HEAD}.")
    numbers, weights = math.prod(axes), 12 * width**2 * blocks * max(1, whole(depth, "depth", Range(least=0)))
    if numbers > MOST_NUMBERS or weights > MOST_WEIGHTS:
        raise ConfigError(
            f"shape is {axes}, and width {width} with {blocks} blocks makes {weights:.1e} weights; expected at most "
            f"{MOST_NUMBERS} numbers a row and {MOST_WEIGHTS} weights."
        )
    grid, dim = _layout(axes, patch)
    stack = StackConfig(width=width, depth=depth, head_dim=HEAD, rope=False)
    last = BlockConfig(
        dim=dim, grid=grid, stack=stack, learned_positions=True, stencil=grid[0] > 1, context_dim=context
    )
    with torch.inference_mode(False), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return Density(axes, Flow(_alternating(last, blocks)), patch, spacing)


def _layout(shape: tuple[int, ...], patch: int | None) -> tuple[tuple[int, int], int]:
    """Grid and dim of the latents of a shape. Raises ConfigError."""
    if patch is None:
        if len(shape) not in (1, 2):
            raise ConfigError(f"shape is {shape}; expected (D,) or (N, D), or a picture with patch=.")
        return (1, shape[0]), shape[1] if len(shape) == 2 else 1
    patch = whole(patch, "patch", AXIS)
    if len(shape) not in (2, 3) or shape[-2] % patch or shape[-1] % patch:
        raise ConfigError(
            f"shape is {shape} and patch {patch}; expected a picture (height, width) or (channels, height, width) "
            "whose sides are multiples of patch."
        )
    return (shape[-2] // patch, shape[-1] // patch), math.prod(shape[:-2]) * patch**2


def _alternating(last: BlockConfig, blocks: int) -> FlowConfig:
    """A flow of so many blocks like `last`, in alternating directions; only `last` takes the context."""
    plain = replace(last, context_dim=0)
    before = [replace(plain, direction="r2l" if (blocks - i) % 2 == 0 else "l2r") for i in range(blocks - 1)]
    return FlowConfig(deep=last, shallow=tuple(before))


def _instance(kind: type[T], value: T | None, name: str) -> T | None:
    """The value, if it is of this kind or None. Raises ConfigError."""
    return None if value is None else of_kind(value, kind, name)


def _check_labels(labels: Tensor, count: int) -> None:
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or high >= count:
        raise ConfigError(f"context has labels from {low} to {high}; expected 0 to {count - 1}.")


class _Fit:
    """One fit: its rows, divided into trained and held-out ones, and the best weights so far."""

    def __init__(self, model: Density, data: Tensor, states: Tensor | None, config: FitConfig) -> None:
        self.model, self.data, self.states, self.config = model, data, states, config
        self.generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(data), generator=self.generator)
        held = round(config.held_out * len(data))
        self.held_out, self.trained = order[:held], order[held:]
        if not len(self.trained):
            raise DataError(f"data has {len(data)} rows; expected more than the share held out, {config.held_out}.")

    def run(self, progress: Callable[[int, int], None] | None) -> Fitted:
        """Train, and load the best weights."""
        config, model = self.config, self.model
        optimizer = torch.optim.AdamW(model.flow.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps + 1)
        every, losses = max(1, config.steps // config.checks), list[float]()
        best, kept = Fitted(math.nan, math.inf, 0), model.flow.state_dict()
        for step in range(1, config.steps + 1):
            losses.append(self._update(optimizer))
            rates.step()
            if progress is not None:
                progress(step, config.steps)
            if step % every and step < config.steps:
                continue
            seen = Fitted(sum(losses[-every:]) / len(losses[-every:]), self._held_out_nats(), step)
            if not len(self.held_out) or seen.held_out < best.held_out:
                best, kept = seen, copy.deepcopy(model.flow.state_dict())
        model.flow.load_state_dict(kept)
        return best

    def _update(self, optimizer: torch.optim.Optimizer) -> float:
        """One step on random rows: nats per row."""
        rows = self.trained[torch.randint(len(self.trained), (self.config.batch,), generator=self.generator)]
        loss = self._nats(rows).mean()
        if not bool(loss.isfinite()):
            raise TrainingError(
                f"the loss is {float(loss.detach())}; expected a finite one: lower lr, {self.config.lr}."
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.flow.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    def _nats(self, rows: Tensor) -> Tensor:
        x = self.model._dequantized(self.data[rows], self.generator).to(self.model.standard.mean)
        return -self.model.log_prob(x, None if self.states is None else self.states[rows])

    @torch.no_grad()
    def _held_out_nats(self) -> float:
        """Mean nats of the held-out rows; NaN without any."""
        parts = [self._nats(rows) for rows in self.held_out.split(1024)]
        return float(torch.cat(parts).mean()) if parts and len(parts[0]) else math.nan
