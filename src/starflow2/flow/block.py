"""One autoregressive affine flow block: a causal transformer that predicts each latent's Gaussian.

A *slot* is a position of the body whose output predicts one *target* latent. With a start token or
without context, slot k holds latent k - 1; with a context its last position is the slot of target 0.
Letters: B batch, N latents, D latent dim, C width, T context positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.errors import ConfigError, ShapeError
from starflow2.flow.affine import Affine, Scale, soft_clip, strengths
from starflow2.flow.context import Context, Guide
from starflow2.flow.noise import NoiseEmbedding
from starflow2.flow.solver import SEQUENTIAL, Predict, Progress, Solver, solve
from starflow2.nn import Cache, CausalStack, StackConfig, at_least_fp32, check, zero_linear

__all__ = ["AffineBlock", "BlockConfig", "Direction", "Run", "scan"]

Direction = Literal["l2r", "r2l"]


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Shape and conventions of one block; defaults are ours, `start` and `scale` cover the family."""

    dim: int  # D, channels of a latent
    grid: tuple[int, int]  # rows and columns; N = rows * columns in raster order
    stack: StackConfig
    direction: Direction = "l2r"
    # what predicts target 0: "auto" a learned start unless there is a context, "always" a learned
    # start behind any context (STARFlow), "none" nothing: target 0 passes unchanged (TARFlow)
    start: Literal["auto", "always", "none"] = "auto"
    scale: Scale = "exp"
    clip: float = 4.0  # soft bound of the raw scale, 0 = none
    clips_mean: bool = False  # squash the mean by the same bound (STARFlow)
    context_dim: int = 0  # width of context states, 0 = takes none
    learned_positions: bool = False  # add a learned table over the N latents
    stencil: bool = False  # feed the three latents above the target too (our choice)
    noise: bool = False  # add an embedding of the noise level to every slot
    noise_waves: int = 0  # sines and cosines in that embedding, 0 = as many as the stream is wide

    @property
    def num_latents(self) -> int:
        return self.grid[0] * self.grid[1]


def scan(x: Tensor, direction: Direction) -> Tensor:
    """x in scan order; its own inverse. (B, N, D)."""
    return x.flip(1) if direction == "r2l" else x


@dataclass(slots=True)
class Run:
    """What stays fixed while one batch of latents is predicted, and the cache if there is one."""

    prefix: Tensor  # (B, P, C) embedded context and start; the last one is the slot of target 0
    prefix_positions: Tensor  # (B, P, 3)
    step: Tensor  # (B,)
    attend: Tensor | None  # (B, P) bool
    noise: Tensor | None  # (B, 1, C)
    shift: int  # 1: slots carry their own latent's place; 0: a start token moved them to the target's
    cache: Cache | None = None


class AffineBlock(nn.Module):
    """One autoregressive flow block, x <-> z, in either scan direction (paper eq. 2.2).

    x, z: (B, N, D). logdet: (B,) nats, log|dz/dx|. `forward` is one parallel pass, `inverse` N cached steps.
    """

    def __init__(self, cfg: BlockConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.stack.width
        self.proj_in = nn.Linear(cfg.dim * (4 if cfg.stencil else 1), width)
        if cfg.start != "none":
            self.start = nn.Parameter(0.02 * torch.randn(1, 1, cfg.dim))
        if cfg.context_dim:
            self.context_in = nn.Linear(cfg.context_dim, width)
        if cfg.learned_positions:
            self.position_table = nn.Parameter(0.01 * torch.randn(cfg.num_latents, width))
        if cfg.noise:
            self.noise_embedding = NoiseEmbedding(width, cfg.noise_waves)
        self.body = CausalStack(cfg.stack)
        self.head = zero_linear(width, 2 * cfg.dim)  # identity map at initialisation
        self.above: Tensor
        self.register_buffer("above", _above(cfg.grid), persistent=False)

    def rebuild_buffers(self) -> None:
        """Compute what the config says and no file holds, behind a construction on the meta device."""
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
        u = scan(x, self.cfg.direction)
        run = self.begin(len(u), context, noise_level)
        affine = self.predict(F.pad(u, (0, 0, 0, 1)), (0, self.cfg.num_latents), run)
        z, logdet = affine.normalize(u)
        return scan(z, self.cfg.direction), logdet

    @torch.no_grad()
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
        """z -> x, with u = x in scan order: u = mu + exp(s) z, solved for u, as mu and s read it (paper eq. 3.5).

        z: (B, N, D) -> x: (B, N, D), in float32 or better. progress is called with (latents done, N). Raises
        ShapeError, and ConfigError for a guide without a context.
        """
        check(z, "B N D", "z", N=self.cfg.num_latents, D=self.cfg.dim)
        z = scan(at_least_fp32(z), self.cfg.direction)
        predict = self.predictor(len(z), context, noise_level, guide)
        return scan(solve(predict, z, solver, progress).x, self.cfg.direction)

    def predictor(
        self,
        batch: int,
        context: Context | None = None,
        noise_level: Tensor | None = None,
        guide: Guide | None = None,
    ) -> Predict:
        """`predict` through a cache, for `solve`; with a guide both branches run as one doubled batch."""
        if guide is None:
            run = self.begin(batch, context, noise_level, cached=True)
            return lambda buffer, targets: self.predict(buffer, targets, run)
        if context is None:
            raise ConfigError("guide is given but context is None; guidance needs both branches.")
        level = None if noise_level is None else noise_level.repeat(2)
        both = self.begin(2 * batch, context.joined(guide.unconditional), level, cached=True)

        def guided(buffer: Tensor, targets: tuple[int, int]) -> Affine:
            conditional, unconditional = self.predict(buffer.repeat(2, 1, 1), targets, both).chunk(2)
            index = torch.arange(*targets).to(buffer)[:, None]
            strength = strengths(guide.guidance, guide.schedule, index, self.cfg.num_latents)
            return conditional.guide(unconditional, strength, guide.rule)

        return guided

    # -- prediction --------------------------------------------------------------------------------

    def begin(self, batch: int, context: Context | None, noise_level: Tensor | None, *, cached: bool = False) -> Run:
        """Embed the noise level and the slots before the latents; `cached`: predict chunk by chunk, through a cache."""
        self._check_conditions(batch, context, noise_level)
        like = self.proj_in.weight
        prefix, positions = [like.new_empty(batch, 0, self.cfg.stack.width)], []
        step = like.new_zeros(batch)
        attend = None
        if context is not None:
            prefix.append(self.context_in(context.states))
            positions.append(context.resolved_positions())
            step, attend = context.resolved_step(), context.attend
        if self._starts(context):
            prefix.append(self._project(self.start.expand(batch, 1, -1), None))
            positions.append(self._positions(step, 0, 1))
            attend = None if attend is None else F.pad(attend, (0, 1), value=True)
        noise = None if noise_level is None else self.noise_embedding(noise_level).unsqueeze(1)
        where = torch.cat(positions, 1) if positions else like.new_zeros(batch, 0, 3)
        shift = 0 if self._starts(context) else 1
        cache = Cache(self.cfg.stack.depth, where.shape[1] + self.cfg.num_latents) if cached else None
        return Run(torch.cat(prefix, 1), where, step, attend, noise, shift, cache)

    def predict(self, buffer: Tensor, targets: tuple[int, int], run: Run) -> Affine:
        """Gaussians of targets [first, last), from the latents before them.

        buffer: (B, N + 1, D) in scan order, its last row zero; rows from `last` - 1 on are never
        read. With a cache in `run`, targets before `first` must have been predicted; the cache is
        rewound to them, so that a chunk may be predicted again from other latents.
        """
        first, last = targets
        if run.cache is not None:
            run.cache.truncate(run.prefix.shape[1] + first - 1 if first else 0)
        slots, positions = self.slots(buffer, targets, run)
        if run.cache is None or run.cache.length == 0:
            slots = torch.cat([run.prefix[:, :-1].to(slots.dtype), slots], dim=1)
            positions = torch.cat([run.prefix_positions[:, :-1], positions], dim=1)
        count = last - max(first, 0 if run.prefix.shape[1] else 1)
        past = 0 if run.cache is None else run.cache.length
        attend = self._attend(run, past + slots.shape[1])
        h = self.body(slots, positions, attend, run.cache) if slots.shape[1] else slots
        affine = self.affine(h[:, slots.shape[1] - count :])
        return affine if count == last - first else _with_identity_first(affine)

    def slots(self, buffer: Tensor, targets: tuple[int, int], run: Run) -> tuple[Tensor, Tensor]:
        """Embedded slots of the targets, (B, n, C), and their positions, (B, n, 3)."""
        first, last = targets
        parts, where = [], []
        if first == 0 and run.prefix.shape[1]:
            parts.append(run.prefix[:, -1:])
            where.append(run.prefix_positions[:, -1:])
        low = max(first, 1)
        if low < last:
            parts.append(self.embed(buffer, low, last, run.shift))
            where.append(self._positions(run.step, low - run.shift, last - run.shift))
        if not parts:
            return buffer.new_empty(len(buffer), 0, self.cfg.stack.width), run.prefix_positions
        slots = torch.cat([p.to(parts[0].dtype) for p in parts], dim=1)
        slots = slots if run.noise is None else slots + run.noise
        return slots, torch.cat(where, dim=1)

    def embed(self, buffer: Tensor, first: int, last: int, shift: int = 1) -> Tensor:
        """Latents in front of targets [first, last), first >= 1, embedded: (B, n, C).

        `shift` 1: a slot carries its own latent's place; 0: that of its target.
        """
        x = buffer[:, first - 1 : last - 1]
        above = None
        if self.cfg.stencil:
            above = buffer[:, self.above[first:last]].flatten(2)
        h = self._project(x, above)
        if self.cfg.learned_positions:
            h = h + self.position_table[first - shift : last - shift]
        return h

    def embed_at(self, buffer: Tensor, targets: Tensor) -> Tensor:
        """As `embed`, with targets of its own for every row: (B, n) int64 from 1 to N -> (B, n, C).

        Target N is behind the last latent: its slot holds that latent, has no stencil and predicts nothing.
        """
        rows = torch.arange(len(buffer), device=buffer.device)[:, None]
        above = buffer[rows[..., None], self.above[targets]].flatten(2) if self.cfg.stencil else None
        h = self._project(buffer[rows, targets - 1], above)
        return h + self.position_table[targets - 1] if self.cfg.learned_positions else h

    def affine(self, h: Tensor) -> Affine:
        """Body outputs (B, n, C) -> Gaussians, in float32 or better under any autocast."""
        with torch.autocast(h.device.type, enabled=False):
            raw = self.head(at_least_fp32(h).to(self.head.weight.dtype))
            if self.cfg.clips_mean:
                return Affine.from_raw(soft_clip(raw, self.cfg.clip), self.cfg.scale)
            raw_scale, mu = raw.chunk(2, dim=-1)
            raw = torch.cat([soft_clip(raw_scale, self.cfg.clip), mu], dim=-1)
            return Affine.from_raw(raw, self.cfg.scale)

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
        h: Tensor = self.proj_in(x.to(self.proj_in.weight.dtype))
        return h

    def _starts(self, context: Context | None) -> bool:
        return self.cfg.start == "always" or (self.cfg.start == "auto" and context is None)

    def _positions(self, step: Tensor, first: int, last: int) -> Tensor:
        """(row, column, step) of the latents [first, last): (B, n, 3)."""
        index = torch.arange(first, last, device=step.device)
        row = (index // self.cfg.grid[1]).to(step.dtype)
        col = (index % self.cfg.grid[1]).to(step.dtype)
        batch = len(step)
        return torch.stack(
            [
                row.expand(batch, -1),
                col.expand(batch, -1),
                step[:, None].expand(-1, len(index)),
            ],
            dim=-1,
        )

    def _attend(self, run: Run, keys: int) -> Tensor | None:
        if run.attend is None:
            return None
        return F.pad(run.attend, (0, keys - run.attend.shape[1]), value=True)

    def _check_conditions(self, batch: int, context: Context | None, noise_level: Tensor | None) -> None:
        if (context is not None) and not self.cfg.context_dim:
            raise ShapeError("context was given, but this block has context_dim 0 and takes none.")
        if context is None and self.cfg.start == "none" and self.cfg.context_dim:
            raise ShapeError("context is None; a block with start='none' needs its context.")
        if (noise_level is not None) != self.cfg.noise:
            raise ShapeError(
                f"noise_level is {'given' if noise_level is not None else 'None'}, but the block's "
                f"config says noise={self.cfg.noise}; give levels (B,) exactly when it is True."
            )
        if context is not None:
            check(context.states, "B T E", "context.states", B=batch, E=self.cfg.context_dim)
        if noise_level is not None:
            check(noise_level, "B", "noise_level", B=batch)


def _above(grid: tuple[int, int]) -> Tensor:
    """Indices (N + 1, 3) of the latents above-left, above and above-right of each; N where none, as at N itself."""
    rows, cols = grid
    if rows < 1 or cols < 1:
        raise ConfigError(f"grid is {grid}; expected at least one row and one column.")
    index = torch.arange(rows * cols)
    row, col = index // cols, index % cols
    out = []
    for offset in (-1, 0, 1):
        inside = (row > 0) & (col + offset >= 0) & (col + offset < cols)
        out.append(torch.where(inside, index - cols + offset, rows * cols))
    return F.pad(torch.stack(out, dim=-1), (0, 0, 0, 1), value=rows * cols)


def _with_identity_first(affine: Affine) -> Affine:
    """The same Gaussians with mu 0 and log_scale 0 put in front."""
    return Affine(F.pad(affine.mu, (0, 0, 1, 0)), F.pad(affine.log_scale, (0, 0, 1, 0)))
