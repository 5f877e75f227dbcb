"""Single parts of the lean form: rotation in each precision, and a language model in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from model_cases import STAGES, tiny_components
from starflow2.inference.backend import Chunk
from starflow2.inference.lean import LeanBackend
from starflow2.inference.lean_layers import Heads, Rotation
from starflow2.inference.packed import pack
from starflow2.models.pretzel import Pretzel
from starflow2.models.sequence import Cursor

HEADS: Heads = (4, 2, 16)
ROWS = 3


def turns() -> Tensor:
    angles = 7 * torch.rand(ROWS, HEADS[2] // 2, generator=torch.Generator().manual_seed(0))
    return torch.polar(torch.ones_like(angles), angles)


def qkv(dtype: torch.dtype) -> Tensor:
    x = torch.randn(ROWS, 8 * HEADS[2], generator=torch.Generator().manual_seed(1))
    return x.bfloat16().to(dtype)


def test_queries_and_keys_are_turned_and_values_are_not():
    before, found = qkv(torch.float32).view(ROWS, 8, -1), Rotation(turns(), HEADS, torch.float32)(qkv(torch.float32))
    cos, sin = turns().real, turns().imag
    for head in range(6):
        x, y = before[:, head, 0::2], before[:, head, 1::2]
        assert torch.allclose(found[:, head, 0::2], x * cos - y * sin, atol=1e-6)
        assert torch.allclose(found[:, head, 1::2], x * sin + y * cos, atol=1e-6)
    assert torch.equal(found[:, 6:], before[:, 6:])


def test_in_half_precision_rotation_rounds_once():
    exact = Rotation(turns(), HEADS, torch.float32)(qkv(torch.float32))
    found = Rotation(turns(), HEADS, torch.bfloat16)(qkv(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert ((found.float() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    assert torch.equal(found[:, 6:], qkv(torch.bfloat16).view(ROWS, 8, -1)[:, 6:])


def test_a_language_model_in_bfloat16_reads_nearly_the_same():
    """In one pass and token by token; the flow above it stays in float32."""
    whole, half = (tiny_components(STAGES, side=3).pretzel for _ in range(2))
    assert isinstance(half, Pretzel)
    half.vlm.to(torch.bfloat16)
    expected, *found = (states(pack(stream), pieces) for stream, pieces in ((whole, 1), (half, 1), (half, 7)))
    for h in found:
        assert h.dtype == torch.float32 and 0 < (h - expected).abs().max() <= 0.05 * expected.abs().max()


def states(weights, pieces: int) -> Tensor:
    """The last language state after seven tokens that are read in so many passes."""
    backend, ids = LeanBackend(weights), [1, 30, 31, 32, 33, 34, 2]
    lane, cursor = backend.open(), Cursor((3, 3))
    backend.reserve(lane, len(ids))
    each = len(ids) // pieces
    for first in range(0, len(ids), each):
        backend.append(lane, Chunk(ids[first : first + each], *cursor.text(each)))
    return backend.mark(lane).h
