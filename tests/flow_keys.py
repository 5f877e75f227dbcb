"""Reference weights and numbers -> our blocks: the key maps of TARFlow, STARFlow and iTARFlow.

The files hold numbers only; their names and layouts are those of the released flows. Our blocks keep the row order of
`qkv` (q, k, v) and of the head (scale, then mean), so every entry is copied; three need a word:

- `pos_embed` belongs to raster order, our `position_table` to scan order, so a flipped block gets it flipped;
- `class_embed[y]` is added to every token, which is `proj_in.bias + class_embed[y]`, one block per class;
- `var` and `attn_mask` are dead buffers.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from starflow2.flow import AffineBlock, BlockConfig
from starflow2.nn import StackConfig

RENAMED = (
    (r"^(attn|head)_blocks\.(\d+)\.", r"body.layers.\2."),
    (r"\.mlp\.main\.0\.", ".mlp.up."),
    (r"\.mlp\.main\.2\.", ".mlp.down."),
    (r"^final_norm\.", "body.final_norm."),
    (r"^proj_out\.", "head."),
    (r"^proj_txt\.", "context_in."),
    (r"^sos_embed$", "start"),
    (r"^pos_embed$", "position_table"),
    (r"^time_embed\.", "noise_embedding."),
)
DEAD = ("var", "attn_mask")


def load_reference(path: Path) -> dict[str, Tensor]:
    """Every array of one fixture file; weights carry the prefix `w.`."""
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def block_state(
    reference: dict[str, Tensor], index: int, *, flipped: bool, label: int | None = None
) -> dict[str, Tensor]:
    """The state dict of our block for `blocks.{index}` of a reference."""
    prefix = f"w.blocks.{index}."
    state = {name.removeprefix(prefix): value for name, value in reference.items() if name.startswith(prefix)}
    state = {name: value for name, value in state.items() if name not in DEAD}
    if label is not None:
        state["proj_in.bias"] = state["proj_in.bias"] + state.pop("class_embed")[label, 0]
    if flipped and "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"].flip(0)
    return {_renamed(name): value for name, value in state.items()}


def _renamed(name: str) -> str:
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name


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
