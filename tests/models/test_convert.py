"""Released flows in our names: a whole STARFlow gives its own numbers, and its deep block starts one of ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flow_keys import load_reference, starflow_config, weights_of
from starflow2.errors import CheckpointError
from starflow2.flow import Context, Flow, FlowConfig
from starflow2.models.convert import adopt, flow_state


@pytest.fixture
def released(shared_dir: Path) -> dict[str, Tensor]:
    path = shared_dir / "fixtures" / "starflow_ref_f32.npz"
    if not path.is_file():
        pytest.skip(f"no reference numbers at {path}")
    return load_reference(path)


def their_config(ref: dict[str, Tensor]) -> FlowConfig:
    """The reference's own shape; it flips every other block, whichever is deep."""
    blocks = [starflow_config(ref, i) for i in range(1 + max(int(n.split(".")[2]) for n in ref if "w.blocks" in n))]
    return FlowConfig(deep=blocks[-1], shallow=tuple(blocks[:-1]))


def test_a_released_flow_loads_whole_and_strictly_into_ours(released):
    flow = Flow(their_config(released))
    flow.load_state_dict(flow_state(weights_of(released)))  # strict: nothing is missing or left over
    deep = max(int(n.split(".")[1]) for n in weights_of(released) if n.startswith("blocks."))
    assert torch.equal(flow.deep.head.weight, released[f"w.blocks.{deep}.proj_out.weight"])
    x = torch.randn(2, flow.deep.cfg.num_latents, flow.deep.cfg.dim)
    context = Context(torch.randn(2, 3, flow.deep.cfg.context_dim))
    with torch.no_grad():
        z, _ = flow(x, context)
        assert (flow.inverse(z, context) - x).abs().max() <= 1e-4


def test_its_deep_body_starts_a_flow_over_other_latents_and_another_language_model(released):
    theirs = their_config(released)
    deep = replace(theirs.deep, dim=32, context_dim=48, start="auto", noise=False)
    flow = Flow(replace(theirs, deep=deep, shallow=()))
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    state = flow_state(weights_of(released))
    copied, fresh = adopt(flow, state)
    after = flow.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in copied)
    assert all(torch.equal(after[name], before[name]) for name in fresh)
    assert {n for n in after if ".body." in n} <= set(copied) and set(copied) | set(fresh) == set(after)
    assert {"deep.proj_in.weight", "deep.head.weight", "deep.context_in.weight", "deep.start"} <= set(fresh)


def test_a_deep_block_of_other_layers_is_refused_by_the_name_of_the_first(released):
    theirs = their_config(released)
    state = flow_state(weights_of(released))
    deeper = replace(theirs.deep.stack, depth=theirs.deep.stack.depth + 1)
    with pytest.raises(CheckpointError, match=rf"deep\.body\.layers\.{deeper.depth - 1}\..*None there"):
        adopt(Flow(replace(theirs, deep=replace(theirs.deep, stack=deeper))), state)
    wider = replace(theirs.deep.stack, width=2 * theirs.deep.stack.width)
    with pytest.raises(CheckpointError, match=r"deep\.body\.layers\.0"):
        adopt(Flow(replace(theirs, deep=replace(theirs.deep, stack=wider))), state)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"model.layers.0.weight": torch.zeros(1)}, {"blocks.1.proj_in.bias": torch.zeros(1)}, {"var": torch.zeros(1)}],
    ids=["nothing", "another model", "a block is missing", "buffers alone"],
)
def test_what_is_no_released_flow_is_refused(tensors):
    with pytest.raises(CheckpointError, match="not a released STARFlow"):
        flow_state(tensors)
