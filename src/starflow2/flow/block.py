"""One autoregressive affine flow block: a causal transformer that predicts each latent's Gaussian.

A *slot* is a position of the transformer whose output predicts one *target* latent. The slots are those of the prefix
(context states, then a start token), of which the last predicts target 0, and one per latent: latent n - 1 predicts
target n.
Letters: B batch, N latents, D latent dim, C width, T context positions, P prefix slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.core.fields import Config, Range, Size, Weight, of_kind, whole
from starflow2.errors import ConfigError, ShapeError
from starflow2.flow.affine import Affine, Scale, soft_clip, strengths
from starflow2.flow.context import Context, Guide
from starflow2.flow.noise import NoiseEmbedding
from starflow2.flow.solver import SEQUENTIAL, BlockJacobi, Predict, Progress, Solver, differentiable, solve
from starflow2.flow.stepper import Stepper
from starflow2.nn import (
    Cache,
    CausalStack,
    StackConfig,
    at_least_fp32,
    check,
    check_floating,
    is_readable,
    zero_linear,
)

__all__ = ["AffineBlock", "BlockConfig", "Direction", "Prefix", "Reading", "Run", "Start", "scan"]

Direction = Literal["l2r", "r2l"]
Start = Literal["auto", "always", "none"]
Reading = Literal["chunks", "steps", "whole"]
Width = Annotated[int, Range(least=0, most=2**20)]  # 0: none
LATENTS = Range(least=1, most=2**20)


@dataclass(frozen=True, kw_only=True)
class BlockConfig(Config):
    """Sizes and conventions of one block; the defaults are ours, other settings are those of published flows."""

    dim: Size  # D, channels of a latent
    grid: tuple[int, int]  # rows and columns; N = rows * columns in raster order. N or (N,): one row of N latents
    stack: StackConfig
    direction: Direction = "l2r"
    # what predicts target 0: "auto" the last context state, or a learned start token without a context; "always" a
    # start token, after any context (STARFlow); "none" the last context state, or nothing without a context: target 0
    # passes unchanged (TARFlow)
    start: Start = "auto"
    scale: Scale = "exp"
    clip: Weight = 4.0  # soft bound of the raw scale, 0 = none
    clips_mean: bool = False  # squash the mean by the same bound (STARFlow)
    context_dim: Width = 0  # width of context states, 0 = takes none
    learned_positions: bool = False  # add a learned table over the N latents
    stencil: bool = False  # feed the three latents above the target too (our choice)
    noise: bool = False  # add an embedding of the noise level to every slot
    noise_waves: Width = 0  # sines and cosines in that embedding, 0 = as many as the stream is wide

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", _checked_grid(self.grid))
        super().__post_init__()
        waves = self.noise_waves or self.stack.width
        if self.noise and waves % 2:
            raise ConfigError(f"noise_waves is {waves}; expected an even number: half are sines, half cosines.")
        if not self.stack.causal:
            raise ConfigError("stack.causal is False; expected True: a latent may not see those after it.")

    @property
    def num_latents(self) -> int:
        return self.grid[0] * self.grid[1]


def _checked_grid(grid: object) -> tuple[int, int]:
    """Rows and columns of the latents; one number stands for one row. Raises ConfigError."""
    axes = tuple(grid) if isinstance(grid, tuple | list) else (grid,)
    if len(axes) not in (1, 2):
        raise ConfigError(f"grid is {grid!r}; expected rows and columns, or one number of latents in a row.")
    rows, columns = (whole(axis, f"an axis of grid {grid!r}", LATENTS) for axis in (1, *axes)[-2:])
    if rows * columns not in LATENTS:
        raise ConfigError(f"grid is {grid!r}; expected at most {LATENTS.most:,} latents.")
    return rows, columns


def scan(x: Tensor, direction: Direction) -> Tensor:
    """Bring x: (B, N, D) from raster order into scan order, or back: it is its own inverse."""
    return x.flip(1) if direction == "r2l" else x


@dataclass(frozen=True, slots=True)
class Prefix:
    """Slots before the latents: context states, then a start token if there is one. The last predicts target 0."""

    slots: Tensor  # (B, P, C) embedded
    positions: Tensor  # (B, P, 3)
    attend: Tensor | None  # (B, P) bool, None where all are real
    step: Tensor  # (B,) third coordinate of the latents
    has_start: bool  # a start token is the last slot

    @property
    def length(self) -> int:
        return self.slots.shape[1]

    @property
    def first_target(self) -> int:
        """0, or 1 where the prefix is empty: no slot predicts target 0, which passes unchanged."""
        return 0 if self.length else 1

    @property
    def shift(self) -> int:
        """Targets minus positions of slots: with a start token a slot has its target's position, else its latent's."""
        return 0 if self.has_start else 1

    def slot_of(self, target: int) -> int:
        """Index of the slot that predicts a target, counted from the first slot of the prefix."""
        return self.length - 1 + target


@dataclass(frozen=True, slots=True)
class Run:
    """Inputs that stay fixed while one batch of latents is predicted, and the cache if there is one."""

    prefix: Prefix
    noise: Tensor | None  # (B, 1, C) embedded level
    cache: Cache | None = None

    @property
    def past(self) -> int:
        """Number of cached slots."""
        return 0 if self.cache is None else self.cache.length


class AffineBlock(nn.Module):
    """One autoregressive flow block, x <-> z, in either scan direction (paper eq. 2.2).

    x, z: (B, N, D). logdet: (B,) nats, log|dz/dx|. `forward` is one parallel pass, `inverse` N cached steps.
    """

    above: Tensor  # (N + 1, 3)

    def __init__(self, cfg: BlockConfig) -> None:
        super().__init__()
        self.cfg = of_kind(cfg, BlockConfig, "cfg")
        width = cfg.stack.width
        self.proj_in = nn.Linear(cfg.dim * (4 if cfg.stencil else 1), width)
        if cfg.start != "none":
            self.start = nn.Parameter(nn.init.normal_(torch.empty(1, 1, cfg.dim), std=0.02))
        if cfg.context_dim:
            self.context_in = nn.Linear(cfg.context_dim, width)
        if cfg.learned_positions:
            self.position_table = nn.Parameter(nn.init.normal_(torch.empty(cfg.num_latents, width), std=0.01))
        if cfg.noise:
            self.noise_embedding = NoiseEmbedding(width, cfg.noise_waves)
        self.body = CausalStack(cfg.stack)
        self.head = zero_linear(width, 2 * cfg.dim)  # identity map at initialisation
        self._starts_alone, self._starts_after_context = cfg.start != "none", cfg.start == "always"
        self.register_buffer("above", _above(cfg.grid), persistent=False)

    def rebuild_buffers(self) -> None:
        """Compute what no file holds, after a construction on the meta device."""
        self.above = _above(self.cfg.grid)

    # -- the flow and its inverse ------------------------------------------------------------------

    def forward(
        self, x: Tensor, context: Context | None = None, noise_level: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x -> z and logdet, with u = x in scan order: z = (u - mu) exp(-s), logdet = -sum(s) (paper eq. 2.2).

        x: (B, N, D), z: (B, N, D), logdet: (B,) nats. mu and s of every latent at once, each from the latents before
        it. Raises ShapeError.
        """
        check(x, "B N D", N=self.cfg.num_latents, D=self.cfg.dim)
        check_floating(x)
        u = scan(x, self.cfg.direction)
        run = self.begin(len(u), context, noise_level)
        affine = self.predict(F.pad(u, (0, 0, 0, 1)), (0, self.cfg.num_latents), run)
        z, logdet = affine.normalize(u)
        return scan(z, self.cfg.direction), logdet

    def inverse(
        self,
        z: Tensor,
        context: Context | None = None,
        noise_level: Tensor | None = None,
        *,
        solver: Solver = SEQUENTIAL,
        guide: Guide | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """z -> x, with u = x in scan order: u = mu + exp(s) z, solved for u, on which mu and s depend (paper eq. 3.5).

        z: (B, N, D) -> x: (B, N, D), in float32 or better. progress is called with (latents done, N). The solver
        keeps no graph; where gradients are on, one more pass at its solution gives x the gradient by z, the conditions
        and the weights (`solver.differentiable`), so sample under torch.no_grad() where none is wanted. Raises
        ShapeError, and ConfigError for a guide without a context.
        """
        check(z, "B N D", "z", N=self.cfg.num_latents, D=self.cfg.dim)
        check_floating(z, "z")
        z = scan(at_least_fp32(z), self.cfg.direction)
        of_kind(solver, BlockJacobi, "solver", "Sequential(), Jacobi() or BlockJacobi(chunk=...)")
        how: Reading = "steps" if solver.chunk == 1 and Stepper.fits(self) else "chunks"
        with torch.no_grad():
            x = solve(self.predictor(len(z), context, noise_level, guide, how), z, solver, progress).x
        if torch.is_grad_enabled() and self._has_gradient(z, context, noise_level, guide):
            x = differentiable(x, z, self.predictor(len(z), context, noise_level, guide, "whole"))
        return scan(x, self.cfg.direction)

    def _has_gradient(
        self, z: Tensor, context: Context | None, noise_level: Tensor | None, guide: Guide | None
    ) -> bool:
        contexts = (context, None if guide is None else guide.unconditional)
        inputs = (z, noise_level, *(None if c is None else c.states for c in contexts), *self.parameters())
        return any(x is not None and x.requires_grad for x in inputs)

    def predictor(
        self,
        batch: int,
        context: Context | None = None,
        noise_level: Tensor | None = None,
        guide: Guide | None = None,
        how: Reading = "chunks",
    ) -> Predict:
        """Bind `predict` to conditions, for `solve`; a guide runs both branches as one doubled batch.

        how: "chunks" of any size through a cache; "steps", single latents in order, in fewer operations (`Stepper`);
        "whole", from target 0 in every call, without a cache, so that gradients pass.
        """
        if guide is None:
            return self._bound(self.begin(batch, context, noise_level, cached=how != "whole"), how)
        of_kind(guide, Guide, "guide")
        of_kind(guide.unconditional, Context, "unconditional")
        if context is None:
            raise ConfigError("context is None but guide is given; expected the conditional context beside it.")
        level = None if noise_level is None else noise_level.repeat(2)
        doubled = context.joined(guide.unconditional)
        both = self._bound(self.begin(2 * batch, doubled, level, cached=how != "whole"), how)

        def guided(buffer: Tensor, targets: tuple[int, int]) -> Affine:
            conditional, unconditional = both(buffer.repeat(2, 1, 1), targets).chunk(2)
            index = torch.arange(*targets).to(buffer)[:, None]
            strength = strengths(guide.guidance, guide.schedule, index, self.cfg.num_latents)
            return conditional.guide(unconditional, strength, guide.rule)

        return guided

    def _bound(self, run: Run, how: Reading) -> Predict:
        return Stepper(self, run) if how == "steps" else lambda buffer, targets: self.predict(buffer, targets, run)

    # -- prediction --------------------------------------------------------------------------------

    def begin(self, batch: int, context: Context | None, noise_level: Tensor | None, *, cached: bool = False) -> Run:
        """Embed the prefix and the noise level. `cached`: targets are predicted chunk by chunk, through a cache."""
        self._check_conditions(batch, context, noise_level)
        prefix = self._prefix(batch, context)
        noise = None if noise_level is None else self.noise_embedding(noise_level).unsqueeze(1)
        cache = Cache(self.cfg.stack.depth, prefix.length + self.cfg.num_latents) if cached else None
        return Run(prefix, noise, cache)

    def _prefix(self, batch: int, context: Context | None) -> Prefix:
        like = self.proj_in.weight
        slots, positions = [like.new_empty(batch, 0, self.cfg.stack.width)], list[Tensor]()
        step, attend = like.new_zeros(batch), None
        if context is not None:
            slots.append(self.context_in(context.states))
            positions.append(context.resolved_positions())
            step, attend = context.resolved_step(), context.attend
        is_alone = context is None or not context.states.shape[1]
        has_start = self._starts_alone if is_alone else self._starts_after_context
        if has_start:
            slots.append(self._project(self.start.expand(batch, 1, -1), None))
            positions.append(self.slot_positions(step, 0, 1))
            attend = None if attend is None else F.pad(attend, (0, 1), value=True)
        where = torch.cat(positions, 1) if positions else like.new_empty(batch, 0, 3)
        return Prefix(torch.cat(slots, 1), where, attend, step, has_start)

    def predict(self, buffer: Tensor, targets: tuple[int, int], run: Run) -> Affine:
        """Gaussians of targets [first, last), from the latents before them.

        buffer: (B, N + 1, D) in scan order, its last row zero; rows from `last` - 1 on are never
        read. Without a cache in `run`, first is 0. With one, targets before `first` must have been
        predicted; the cache is rewound to them, so that a chunk may be predicted again. Raises
        ShapeError.
        """
        first, _ = targets
        if first and run.cache is None:
            raise ShapeError(f"targets begin at {first}; expected 0 without a cache: begin a run with cached=True.")
        if run.cache is not None:
            run.cache.truncate(run.prefix.slot_of(first) if first else 0)
        affine = self.affine(self._read(buffer, targets, run))
        return affine if first >= run.prefix.first_target else _with_identity_first(affine)

    def _read(self, buffer: Tensor, targets: tuple[int, int], run: Run) -> Tensor:
        """Body outputs (B, n, C) at the n slots of the targets."""
        slots, positions = self.slots(buffer, targets, run)
        count = slots.shape[1]
        if not count:  # target 0 alone, where nothing predicts it
            return slots
        if targets[0] == 0:
            slots = torch.cat([run.prefix.slots[:, :-1].to(slots.dtype), slots], dim=1)
            positions = torch.cat([run.prefix.positions[:, :-1], positions], dim=1)
        attend = run.prefix.attend
        if attend is not None:
            attend = F.pad(attend, (0, run.past + slots.shape[1] - run.prefix.length), value=True)
        return self.body(slots, positions, attend, run.cache)[:, -count:]

    def slots(self, buffer: Tensor, targets: tuple[int, int], run: Run) -> tuple[Tensor, Tensor]:
        """Embedded slots of the targets, (B, n, C), and their positions, (B, n, 3)."""
        prefix, (first, last) = run.prefix, targets
        low = max(first, 1)
        slots = self.embed(buffer, low, last, prefix.shift)
        positions = self.slot_positions(prefix.step, low - prefix.shift, last - prefix.shift)
        if first == prefix.first_target == 0:
            slots = torch.cat([prefix.slots[:, -1:], slots.to(prefix.slots.dtype)], dim=1)
            positions = torch.cat([prefix.positions[:, -1:], positions], dim=1)
        return slots if run.noise is None else slots + run.noise, positions

    def slot_positions(self, step: Tensor, first: int, last: int) -> Tensor:
        """(row, column, step) of the latents [first, last): (B, n, 3)."""
        index = torch.arange(first, last, device=step.device)
        columns = self.cfg.grid[1]
        row, column = (x.to(step.dtype).expand(len(step), -1) for x in (index // columns, index % columns))
        return torch.stack([row, column, step[:, None].expand(-1, len(index))], dim=-1)

    def embed(self, buffer: Tensor, first: int, last: int, shift: int = 1) -> Tensor:
        """Latents before targets [first, last), first >= 1, embedded: (B, n, C).

        `shift` 1: a slot has the learned position of its own latent; 0: that of its target.
        """
        x = buffer[:, first - 1 : last - 1]
        above = buffer[:, self.above[first:last]].flatten(2) if self.cfg.stencil else None
        h = self._project(x, above)
        return h + self.position_table[first - shift : last - shift] if self.cfg.learned_positions else h

    def embed_at(self, buffer: Tensor, targets: Tensor) -> Tensor:
        """Latents before targets that differ from row to row, embedded: (B, n) int64 from 1 to N -> (B, n, C).

        Target N comes after the last latent: its slot holds that latent, has no stencil and predicts nothing.
        """
        rows = torch.arange(len(buffer), device=buffer.device)[:, None]
        above = buffer[rows[..., None], self.above[targets]].flatten(2) if self.cfg.stencil else None
        h = self._project(buffer[rows, targets - 1], above)
        return h + self.position_table[targets - 1] if self.cfg.learned_positions else h

    def affine(self, h: Tensor) -> Affine:
        """Body outputs (B, n, C) -> Gaussians, in float32 or better under any autocast."""
        if h.device.type != "meta" and torch.is_autocast_enabled(h.device.type):  # which knows no meta device
            with torch.autocast(h.device.type, enabled=False):
                return self.affine(h)
        raw_scale, mu = at_least_fp32(self.head(at_least_fp32(h).to(self.head.weight.dtype))).chunk(2, dim=-1)
        mu = soft_clip(mu, self.cfg.clip) if self.cfg.clips_mean else mu
        return Affine.from_halves(soft_clip(raw_scale, self.cfg.clip), mu, self.cfg.scale)

    # -- initialisation ---------------------------------------------------------------------------

    @torch.no_grad()
    def whiten_context(self, states: Tensor, smallest: float = 1e-3) -> None:
        """Set the context projection so that states like these enter with zero mean and unit variance.

        states: (n, E), more than E of them. Directions with less than `smallest` of the largest variance
        are amplified no further. Language models keep most of their variance in a few directions that say
        little about the word (our choice: docs/choices.md#whitened-context).
        """
        x = states.double()
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        scales = values.clamp(min=smallest * float(values[-1])).rsqrt()
        whitening = (vectors * scales) @ vectors.T  # (E, E), symmetric: no free rotation, so no luck in it
        width, dim = self.context_in.weight.shape
        if width != dim:
            turn = torch.empty(width, dim, dtype=torch.float64)
            nn.init.orthogonal_(turn, generator=torch.Generator().manual_seed(0))
            whitening = turn.to(whitening) @ whitening
        self.context_in.weight.copy_(whitening)
        self.context_in.bias.copy_(-(whitening @ mean))

    # -- details -------------------------------------------------------------------------------------

    def _project(self, x: Tensor, above: Tensor | None) -> Tensor:
        if self.cfg.stencil:
            if above is None:
                above = x.new_zeros(*x.shape[:2], 3 * self.cfg.dim)
            x = torch.cat([x, above], dim=-1)
        return self.proj_in(x.to(self.proj_in.weight.dtype))

    def _check_conditions(self, batch: int, context: Context | None, noise_level: Tensor | None) -> None:
        if (context is not None) and not self.cfg.context_dim:
            raise ShapeError("context was given; expected None, because this block has context_dim 0.")
        if context is None and self.cfg.context_dim:
            raise ShapeError(
                f"context is None; expected a Context of width {self.cfg.context_dim}, because this block is "
                f"conditional: pass states of length 0, ({batch}, 0, {self.cfg.context_dim}), for no condition."
            )
        if (noise_level is not None) != self.cfg.noise:
            raise ShapeError(
                f"noise_level is {'given' if noise_level is not None else 'None'}, but this block has "
                f"noise={self.cfg.noise}; expected levels (B,) with True and None with False."
            )
        if context is not None:
            of_kind(context, Context, "context").check(batch, self.cfg.context_dim)
        if noise_level is not None:
            check(noise_level, "B", "noise_level", B=batch)
            if is_readable(noise_level) and not bool((noise_level > 0).all()):
                raise ShapeError(f"noise_level has minimum {float(noise_level.min())}; expected levels above 0.")


def _above(grid: tuple[int, int]) -> Tensor:
    """Indices (N + 1, 3) of the latents above-left, above and above-right of each; N where none, as at N itself."""
    rows, cols = grid
    none = rows * cols

    def at(row: int, col: int) -> int:
        return row * cols + col if row >= 0 and 0 <= col < cols else none

    found = [[at(row - 1, col + offset) for offset in (-1, 0, 1)] for row in range(rows) for col in range(cols)]
    return torch.tensor([*found, [none] * 3])


def _with_identity_first(affine: Affine) -> Affine:
    """Prepend the standard Gaussian of a latent that passes unchanged, mu 0 and log_scale 0."""
    return Affine(F.pad(affine.mu, (0, 0, 1, 0)), F.pad(affine.log_scale, (0, 0, 1, 0)))
