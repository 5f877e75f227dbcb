"""Every invertible piece of the flow library as one table, woken, in any dtype: the rows of the exactness tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from helpers import wake
from starflow2.flow import (
    AffineBlock,
    BlockConfig,
    Context,
    Flow,
    FlowConfig,
    NoiseConfig,
    SampleConfig,
    Sequential,
    ShallowFlow,
    Solver,
    StackConfig,
)

BATCH, STATES, WIDE = 2, 4, 5  # rows, context length, context width
STACK = StackConfig(width=40, depth=2, head_dim=20)


@dataclass(frozen=True)
class Case:
    """A woken piece with data to run it on: `forward`, `inverse` and a way to look at some rows only."""

    piece: AffineBlock | ShallowFlow | Flow
    x: Tensor  # (B, N, D)
    context: Context | None
    noise_level: Tensor | None

    def forward(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.x if x is None else x
        if isinstance(self.piece, ShallowFlow):
            return self.piece(x, self.noise_level)
        return self.piece(x, self.context, self.noise_level)

    def inverse(self, z: Tensor, solver: Solver | None = None) -> Tensor:
        solver = solver or Sequential()
        if isinstance(self.piece, AffineBlock):
            return self.piece.inverse(z, self.context, self.noise_level, solver=solver)
        if isinstance(self.piece, ShallowFlow):
            return self.piece.inverse(z, self.noise_level, solver)
        config = SampleConfig(deep_solver=solver, shallow_solver=solver)
        return self.piece.sample(z, self.context, None, self.noise_level, config=config)

    def row(self, index: int) -> Case:
        """This piece on one row of the batch."""
        only = slice(index, index + 1)
        level = None if self.noise_level is None else self.noise_level[only]
        return replace(self, x=self.x[only], context=rows_of(self.context, only), noise_level=level)


def rows_of(context: Context | None, rows: slice) -> Context | None:
    if context is None:
        return None
    parts = (context.states, context.positions, context.attend, context.step)
    return Context(*(None if part is None else part[rows] for part in parts))


def contexts(
    kind: Literal["plain", "padded", "placed", "empty"], dtype: torch.dtype = torch.float32, seed: int = 1
) -> Context:
    """A context batch: all real, the first row left-padded by two, with positions and step of its own, or no state."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(BATCH, STATES, WIDE, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "plain":
        return Context(states)
    if kind == "empty":
        return Context(states[:, :0])
    if kind == "padded":
        attend = torch.ones(BATCH, STATES, dtype=torch.bool)
        attend[0, :2] = False
        return Context(states, attend=attend)
    positions = torch.zeros(BATCH, STATES, 3, dtype=dtype)
    positions[..., 2] = torch.arange(STATES) / STATES
    return Context(states, positions, step=torch.zeros(BATCH, dtype=dtype))


def block_config(**changes: Any) -> BlockConfig:
    """A small block, 2 x 3 latents of 3 channels; any field may differ."""
    return BlockConfig(**{"dim": 3, "grid": (2, 3), "stack": STACK} | changes)


def _case(
    blocks: tuple[BlockConfig, ...],
    kind: Literal["block", "shallow", "flow"],
    context: Literal["plain", "padded", "placed", "empty"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Case:
    torch.manual_seed(7)
    piece: AffineBlock | ShallowFlow | Flow
    if kind == "block":
        piece = AffineBlock(blocks[0])
    elif kind == "shallow":
        piece = ShallowFlow(blocks)
    else:
        noise = NoiseConfig() if blocks[0].noise else None
        piece = Flow(FlowConfig(deep=blocks[-1], shallow=blocks[:-1], noise=noise))
    wake(piece, scale=0.1)
    generator = torch.Generator().manual_seed(11)
    cfg = blocks[0]
    x = torch.randn(BATCH, cfg.num_latents, cfg.dim, generator=generator, dtype=torch.float64)
    level = torch.tensor([0.05, 0.4], dtype=dtype) if cfg.noise else None
    return Case(piece.to(dtype), x.to(dtype), contexts(context, dtype) if context else None, level)


def _block(context: Literal["plain", "padded", "placed", "empty"] | None = None, **changes: Any) -> Callable[..., Case]:
    changes |= {"context_dim": WIDE} if context else {}
    return partial(_case, (block_config(**changes),), "block", context)


TARFLOW = StackConfig(width=40, depth=1, head_dim=20, rope=False, final_norm=False)
L2R, R2L = block_config(), block_config(direction="r2l")

BLOCKS: dict[str, Callable[..., Case]] = {
    "left to right": _block(),
    "right to left": _block(direction="r2l"),
    "softplus": _block(scale="softplus"),
    "softplus, right to left, clipped mean": _block(scale="softplus", direction="r2l", clips_mean=True),
    "tight clip": _block(clip=0.3),
    "no clip": _block(clip=0.0),
    "always a start": _block(start="always"),
    "no start": _block(start="none"),
    "no start, right to left": _block(start="none", direction="r2l"),
    "tarflow": _block(start="none", direction="r2l", learned_positions=True, clip=0.0, stack=TARFLOW),
    "learned positions behind a start": _block(learned_positions=True),
    "stencil": _block(stencil=True),
    "stencil, right to left": _block(stencil=True, direction="r2l"),
    "stencil, no start": _block(stencil=True, start="none"),
    "stencil, one column": _block(stencil=True, grid=(4, 1)),
    "stencil, one row": _block(stencil=True, grid=(1, 4), direction="r2l"),
    "noise": _block(noise=True),
    "noise, no start, right to left": _block(noise=True, start="none", direction="r2l"),
    "squared relu": _block(stack=replace(STACK, activation="relu2")),
    "context": _block("plain"),
    "context, right to left": _block("plain", direction="r2l"),
    "padded context": _block("padded"),
    "padded context, always a start": _block("padded", start="always"),
    "padded context, no start, right to left": _block("padded", start="none", direction="r2l"),
    "placed context, always a start": _block("placed", start="always", scale="softplus", clips_mean=True),
    "padded context, everything on": _block("padded", stencil=True, noise=True, learned_positions=True),
    "no context where one may come": _block("empty"),
    "no context where one may come, no start": _block("empty", start="none"),
    "one latent": _block(grid=(1, 1)),
}

STACKS: dict[str, Callable[..., Case]] = {
    "shallow": partial(_case, (L2R, R2L), "shallow"),
    "shallow with noise": partial(
        _case, (block_config(noise=True), block_config(noise=True, direction="r2l")), "shallow"
    ),
    "deep only": partial(_case, (L2R,), "flow"),
    "deep-shallow": partial(_case, (L2R, R2L, L2R), "flow"),
    "deep-shallow with context": partial(
        _case,
        (block_config(stencil=True), replace(R2L, scale="softplus"), block_config(stencil=True, context_dim=WIDE)),
        "flow",
        "padded",
    ),
    "deep-shallow with context and noise": partial(
        _case,
        (
            block_config(noise=True),
            block_config(noise=True, direction="r2l"),
            block_config(noise=True, context_dim=WIDE),
        ),
        "flow",
        "padded",
    ),
    "four tarflow blocks": partial(
        _case, tuple(block_config(start="none", direction=d) for d in ("l2r", "r2l", "l2r", "r2l")), "flow"
    ),
}

PIECES = BLOCKS | STACKS


def gap(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where a side is not finite, so that no comparison hides it."""
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ"
    difference = (a.detach().double() - b.detach().double()).abs()
    return float(difference.nan_to_num(nan=torch.inf).max()) if a.numel() else 0.0
