"""Reference weights and numbers -> our blocks, through the library's own `convert`.

The files hold numbers only; their names and layouts are those of the released flows.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from starflow2.flow import AffineBlock, BlockConfig, StackConfig
from starflow2.models import convert


def load_reference(path: Path) -> dict[str, Tensor]:
    """Every array of one fixture file; weights carry the prefix `w.`."""
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def block_state(
    reference: dict[str, Tensor], index: int, *, flipped: bool, label: int | None = None
) -> dict[str, Tensor]:
    """The state dict of our block for `blocks.{index}` of a reference."""
    return convert.block_state(weights_of(reference), index, flipped=flipped, label=label)


def weights_of(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a fixture by the names that the release gives them."""
    return {name.removeprefix("w."): value for name, value in reference.items() if name.startswith("w.")}


def depth_of(reference: dict[str, Tensor], index: int) -> int:
    """Layers of `blocks.{index}`."""
    found = re.compile(rf"^w\.blocks\.{index}\.(?:attn|head)_blocks\.(\d+)\.")
    return 1 + max(int(m.group(1)) for name in reference if (m := found.match(name)))


def tarflow_block(reference: dict[str, Tensor], index: int, label: int, *, head_dim: int) -> AffineBlock:
    """A TARFlow or iTARFlow block for one class: learned positions, plain exp, token 0 passes; odd ones are flipped."""
    direction = "r2l" if index % 2 else "l2r"
    stack = StackConfig(width=64, depth=depth_of(reference, index), head_dim=head_dim, rope=False, final_norm=False)
    noise = f"w.blocks.{index}.time_embed.mlp.0.weight" in reference
    cfg = BlockConfig(
        dim=12,
        grid=(4, 4),
        stack=stack,
        direction=direction,
        start="none",
        clip=0.0,
        learned_positions=True,
        noise=noise,
    )
    block = AffineBlock(cfg)
    block.load_state_dict(block_state(reference, index, flipped=direction == "r2l", label=label))
    return block.eval()


def starflow_config(reference: dict[str, Tensor], index: int) -> BlockConfig:
    """A STARFlow block: start token, softplus scale, both heads clipped at 4, rotary positions; deep one takes text."""
    context = reference.get(f"w.blocks.{index}.proj_txt.weight")
    return BlockConfig(
        dim=6,
        grid=(4, 4),
        stack=StackConfig(width=64, depth=depth_of(reference, index), head_dim=32),
        direction="r2l" if index % 2 else "l2r",
        start="always",
        scale="softplus",
        clips_mean=True,
        context_dim=0 if context is None else context.shape[1],
    )
