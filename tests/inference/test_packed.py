"""Weights packed for decoding: what they give equals what the modules give, and streams they cannot hold are named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model_cases import STAGES, tiny_components
from starflow2.inference.packed import PackedWeights, pack, unpackable
from starflow2.models.pretzel import Pretzel
from starflow2.nn import axial_angles, rotate_halves
from stream_cases import Recording


@pytest.fixture(scope="module")
def stream() -> Pretzel:
    stream = tiny_components(STAGES, side=3).pretzel.in_float64()
    assert isinstance(stream, Pretzel)
    return stream


@pytest.fixture(scope="module")
def weights(stream: Pretzel) -> PackedWeights:
    return pack(stream, torch.float64)


def test_scores_of_packed_queries_and_keys_are_those_of_the_language_model(stream, weights):
    """q k^T after rotation by M-RoPE, with neighbouring pairs and with Qwen's halves."""
    cfg = stream.vlm.cfg
    dim, heads = cfg.width // cfg.heads, cfg.heads + cfg.kv_heads
    model = stream.vlm.model.model.language_model
    attention = model.layers[0].self_attn
    x = torch.randn(5, cfg.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mrope = torch.randint(0, 200, (3, 5), generator=torch.Generator().manual_seed(1))
    layer = weights.language[0]
    packed = F.linear(x, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, dim // 2, 2))[:, :heads]
    turned = torch.view_as_complex(packed) * weights.language_rotation(mrope)[:, None]
    mine = torch.view_as_real(turned).flatten(-2)
    theirs = torch.cat([attention.q_proj(x), attention.k_proj(x)], dim=-1).unflatten(-1, (-1, dim))
    theirs = rotate_halves(theirs, model.turns(mrope[:, None])[0])
    for head in range(cfg.heads):
        expected = theirs[:, head] @ theirs[:, cfg.heads].T
        assert torch.allclose(mine[:, head] @ mine[:, cfg.heads].T, expected, atol=1e-9)


def test_rotations_of_the_flow_are_those_of_its_three_axes(weights):
    places = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) * 50
    angles = axial_angles(places[None], weights.deep.cfg.stack.head_dim)[0]
    assert torch.equal(weights.flow_rotation(places).real.float(), angles.cos())


def test_constants_of_a_level_are_what_the_adapter_and_the_blocks_compute(stream, weights):
    level, adapter = torch.tensor([0.3], dtype=torch.float64), stream.joints.adapter
    u = torch.randn(1, 2, adapter.mlp[0].in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    constants = weights.at(0.3)
    hidden = F.linear(F.silu(F.linear(u, weights.adapter_in, weights.adapter_in_bias)), weights.adapter_out)
    mine = F.layer_norm(
        hidden + weights.adapter_out_bias, hidden.shape[-1:], constants.adapter_norm, constants.adapter_norm_bias
    )
    assert torch.allclose(mine, adapter(u, level), atol=1e-12)
    for block, packed, slots in zip(stream.flow.shallow.blocks, weights.shallow, constants.shallow_slots, strict=True):
        buffer = torch.randn(1, 10, block.cfg.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        buffer[:, -1] = 0
        expected, _ = block.slots(buffer, (0, 9), block.begin(1, None, level))
        inputs = torch.cat([buffer[:, :8, None], buffer[:, block.above[1:9]]], dim=2).flatten(2)
        assert torch.allclose(F.linear(inputs, packed.proj_in) + slots[1:], expected[:, 1:], atol=1e-12)
        assert torch.allclose(slots[0], expected[0, 0], atol=1e-12)


def test_packed_weights_stay_as_they_were_when_the_model_is_trained_on(stream):
    before = pack(stream)
    with torch.no_grad():
        for parameter in (stream.flow.deep.head.weight, stream.joints.adapter.gain):
            parameter.add_(1.0)
    after = pack(stream)
    assert not torch.equal(before.deep.head, after.deep.head)
    with torch.no_grad():
        for parameter in (stream.flow.deep.head.weight, stream.joints.adapter.gain):
            parameter.sub_(1.0)


def test_streams_that_cannot_be_packed_are_named(stream):
    assert unpackable(stream) is None
    assert unpackable(Recording(stream)) == "Recording is not a Pretzel"
    assert unpackable(stream.traced([])) == "its skips are traced"
