"""Convert weights of released flows (TARFlow, STARFlow, iTARFlow) to our names. Dictionaries of tensors in and out.

Our blocks keep the row order of `qkv` (q, k, v) and of the head (scale, then mean) and rotate the same pairs, so every
tensor is copied, with three exceptions:

- `pos_embed` belongs to raster order, our `position_table` to scan order, so a flipped block gets it flipped;
- `class_embed[y]` is added to every token, which is `proj_in.bias + class_embed[y]`, one block per class;
- `var`, `attn_mask` and `feat_rope` are dead buffers.

These weights have licences of their own; this package neither contains nor downloads any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from starflow2.errors import CheckpointError
from starflow2.flow import Flow

__all__ = ["adopt", "block_state", "flow_state"]

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
DEAD_IN_BLOCK = ("var", "attn_mask")
DEAD = re.compile(r"^(var$|feat_rope\.)")
BLOCK = re.compile(r"^blocks\.(\d+)\.")


def block_state(
    tensors: Mapping[str, Tensor], index: int, *, flipped: bool = False, label: int | None = None
) -> dict[str, Tensor]:
    """State dict of our AffineBlock for `blocks.{index}` of a released flow; label: its class, if it has classes."""
    prefix = f"blocks.{index}."
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    state = {name: value for name, value in state.items() if name not in DEAD_IN_BLOCK}
    if label is not None:
        state["proj_in.bias"] = state["proj_in.bias"] + state.pop("class_embed")[label, 0]
    if flipped and "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"].flip(0)
    return {_renamed(name): value for name, value in state.items()}


def flow_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of our Flow for a released STARFlow: its last block becomes the deep one, the others shallow.

    Raises CheckpointError for tensors of another layout.

    >>> flow_state({"var": torch.ones(1), "blocks.0.sos_embed": torch.ones(1), "blocks.1.proj_out.bias": torch.ones(2)})
    {'shallow.blocks.0.start': tensor([1.]), 'deep.head.bias': tensor([1., 1.])}
    """
    unknown = [name for name in tensors if not BLOCK.match(name) and not DEAD.match(name)]
    indices = {int(m.group(1)) for name in tensors if (m := BLOCK.match(name))}
    if unknown or indices != set(range(len(indices))) or not indices:
        found = f"{len(unknown)} tensors of other names {unknown[:3]}" if unknown else f"blocks {sorted(indices)}"
        raise CheckpointError(f"not a released STARFlow: it has {found}; expected only blocks.0, blocks.1, ...")
    deep = max(indices)
    state: dict[str, Tensor] = {}
    for index in sorted(indices):
        prefix = "deep." if index == deep else f"shallow.blocks.{index}."
        state |= {prefix + name: value for name, value in block_state(tensors, index).items()}
    return state


@torch.no_grad()
def adopt(flow: Flow, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Initialize the deep block from that of another flow; returns the names of copied and of unchanged tensors.

    The body must fit, layer by layer. Tensors that depend on latents and context (projections, head, start) are copied
    where their shapes agree. Shallow blocks stay: they belong to other latents. Raises CheckpointError that names the
    first tensor of the body that is missing or has another shape.
    """
    own = flow.state_dict()
    body = [name for name in (*own, *state) if name.startswith("deep.body.")]
    for name in body:
        ours, theirs = (tuple(d[name].shape) if name in d else None for d in (own, state))
        if ours != theirs:
            raise CheckpointError(
                f"{name} has shape {theirs} there and {ours} here; expected a deep block of the same layers."
            )
    fits = [n for n in own if n.startswith("deep.") and n in state and own[n].shape == state[n].shape]
    for name in fits:
        own[name].copy_(state[name])
    return fits, [name for name in own if name not in fits]


def _renamed(name: str) -> str:
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name
