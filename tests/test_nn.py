"""nn.py: the parts do what their formulas say, and the cache is bit-equal whatever is done to it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flow_cases import gap
from helpers import wake
from starflow2.core.tiles import tiles_of
from starflow2.errors import ConfigError, ShapeError
from starflow2.nn import (
    Cache,
    CausalStack,
    FiLM,
    FinalNorm,
    RmsNorm,
    StackConfig,
    at_least_fp32,
    attention,
    axial_angles,
    check,
    heads_of,
    num_parameters,
    rotate,
    rotate_halves,
    zero_linear,
)

CFG = StackConfig(width=48, depth=3, head_dim=24)
PLAIN = StackConfig(width=48, depth=1, head_dim=16, rope=False, activation="relu2", final_norm=False)


def stack(cfg: StackConfig = CFG) -> CausalStack:
    torch.manual_seed(3)
    return wake(CausalStack(cfg)).eval()


def places(batch: int, length: int) -> Tensor:
    """Some three-axis positions: (B, T, 3)."""
    index = torch.arange(length)
    return torch.stack([index // 3, index % 3, index], dim=-1).float().expand(batch, -1, -1)


# -- small parts --------------------------------------------------------------------------------------


def test_check_passes_what_fits_and_names_what_does_not() -> None:
    check(torch.zeros(2, 4, 3), "B N D", D=3)
    for shape in ((2, 4), (2, 4, 5), (2, 4, 3, 1)):
        with pytest.raises(ShapeError, match=r"latents has shape .*; expected \(B N D=3\)\."):
            check(torch.zeros(shape), "B N D", "latents", D=3)


def test_half_precision_is_promoted_and_double_is_left_alone() -> None:
    for dtype, wanted in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert at_least_fp32(torch.zeros(1, dtype=dtype)).dtype == wanted


def test_a_zero_linear_answers_zero_to_anything() -> None:
    assert not zero_linear(3, 5)(torch.randn(2, 3)).any()
    assert zero_linear(3, 5, bias=False).bias is None


def test_parameters_shared_by_modules_are_counted_once() -> None:
    one, other = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    assert num_parameters(one, other) == 40
    other.weight = one.weight
    assert num_parameters(one, other) == num_parameters(torch.nn.ModuleList([one, other])) == 25


def test_the_final_norm_is_an_rms_norm_with_gain_one_plus_weight() -> None:
    norm = wake(FinalNorm(6))
    x = torch.randn(2, 4, 6)
    wanted = F.rms_norm(x, (6,), eps=1e-6) * (1 + norm.weight)
    assert gap(norm(x), wanted) <= 1e-6
    assert norm(x.bfloat16()).dtype == torch.float32


def test_film_is_the_identity_until_it_is_woken() -> None:
    film, x, condition = FiLM(6, 4), torch.randn(2, 3, 6), torch.randn(2, 1, 4)
    assert torch.equal(film(x, condition), x)
    wake(film)
    gamma, beta = film.to_film(condition * condition.sigmoid()).chunk(2, -1)
    assert gap(film(x, condition), x * (1 + gamma) + beta) <= 1e-6
    assert gap(film(x, condition), film(x, condition + 1)) > 1e-3


# -- rotary positions ---------------------------------------------------------------------------------


def test_angles_are_position_times_frequency_on_three_axes() -> None:
    angles = axial_angles(torch.tensor([[[2.0, 3.0, 5.0]]], dtype=torch.float64), 32)[0, 0]
    spatial = [10000 ** (-2 * i / 8) for i in range(4)]
    third = [10000 ** (-i / 8) for i in range(8)]
    wanted = [2 * f for f in spatial] + [3 * f for f in spatial] + [5 * f for f in third]
    assert gap(angles, torch.tensor(wanted, dtype=torch.float64)) <= 1e-12


@pytest.mark.parametrize("head_dim", [16, 18, 22, 8])
def test_head_dims_that_three_axes_cannot_share_are_refused(head_dim: int) -> None:
    with pytest.raises(ConfigError, match=f"head_dim is {head_dim}"):
        axial_angles(torch.zeros(1, 1, 3), head_dim)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str
)
def test_rotation_turns_interleaved_pairs_as_a_matrix_does(dtype: torch.dtype, bound: float) -> None:
    x, angles = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(2, 1, 5, 4, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    matrix = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)  # (B, 1, T, K / 2, 2, 2)
    wanted = (matrix @ x.unflatten(-1, (4, 2, 1))).squeeze(-1).flatten(-2)
    exact = dtype if dtype == torch.float64 else torch.float32
    turns = torch.complex(cos.to(exact), sin.to(exact))
    got = rotate(x.to(dtype), turns)
    assert got.dtype == dtype and gap(got, wanted) <= bound
    strided = x.transpose(1, 2).contiguous().transpose(1, 2).to(dtype)  # as attention hands it over
    assert gap(rotate(strided, turns), got) <= bound
    halves = x.unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2).to(dtype)  # pairs as Qwen has them
    turned = rotate_halves(halves, turns)
    assert turned.dtype == dtype and gap(turned.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2), got) <= bound


def test_scores_of_rotated_queries_and_keys_depend_on_distances_only() -> None:
    q, k = torch.randn(2, 1, 1, 6, 32, dtype=torch.float64).unbind()
    where = torch.rand(1, 6, 3, dtype=torch.float64) * 8

    def scores(positions: Tensor) -> Tensor:
        angles = axial_angles(positions, 32).unsqueeze(1)
        turns = torch.complex(angles.cos(), angles.sin())
        return rotate(q, turns) @ rotate(k, turns).transpose(-1, -2)

    moved = where + torch.tensor([3.0, -2.0, 11.0])
    assert gap(scores(where), scores(moved)) <= 1e-10
    assert gap(scores(where), scores(where * 2)) > 1e-2


# -- attention and the stack --------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("mask", ["none", "causal", "of documents"])
def test_attention_in_tiles_equals_the_fused_kernel_also_backward(heads: int, mask: str, monkeypatch) -> None:
    """In bfloat16 against float32; tiles so small that there are many, some of which see few keys."""
    monkeypatch.setattr("starflow2.core.tiles.QUERIES", 8)
    monkeypatch.setattr("starflow2.core.tiles.SCORES", 600)
    q, k, v, grad = (torch.randn(3, n, 21, 8).bfloat16() for n in (4, heads, heads, 4))
    document = torch.randint(0, 3, (3, 21)).sort(1).values
    causal = torch.ones(21, 21, dtype=torch.bool).tril()
    masks = {
        "causal": causal[None, None],
        "of documents": ((document[:, :, None] == document[:, None]) & causal)[:, None],
    }
    attend, found = masks.get(mask), []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, attend)
        assert out.dtype == dtype
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for tiled, fused in zip(*found, strict=True):
        assert gap(tiled, fused) <= 0.05 and gap(tiled.mean(), fused.mean()) <= 0.002
    if attend is not None:
        tiles = tiles_of(attend, q.shape, 21)
        seen = sum((t.queries.stop - t.queries.start) * (t.keys.stop - t.keys.start) for t in tiles)
        assert seen < (0.8 if mask == "causal" else 0.7) * 21 * 21 * len({t.rows.start for t in tiles})
    with pytest.raises(NotImplementedError, match="only once"):
        torch.autograd.grad(attention(q.requires_grad_(), k, v, attend).sum(), q, create_graph=True)


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_that_are_rotated_in_one_go_are_those_of_the_plain_rotation_also_backward(heads: int) -> None:
    qkv, angles = torch.randn(2, 5, heads + 4, 8).bfloat16(), torch.randn(2, 5, 1, 4)
    grads, found = [torch.randn(2, n, 5, 8).bfloat16() for n in (heads, 2, 2)], []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = qkv.to(dtype).requires_grad_()
        parts = heads_of(leaf, heads, torch.polar(torch.ones_like(angles), angles))
        assert [part.shape[1] for part in parts] == [heads, 2, 2] and all(part.dtype == dtype for part in parts)
        found.append([*parts, *torch.autograd.grad(parts, leaf, [g.to(dtype) for g in grads])])
    assert all(gap(one, other) <= 0.03 for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_our_rms_norm_has_the_values_and_gradients_of_torchs(dtype: torch.dtype, bound: float) -> None:
    norm = wake(RmsNorm(24), 0.3)
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    found = []
    for function in (norm.to(dtype), lambda x: F.rms_norm(x, (24,), norm.weight, 1e-6)):
        leaf = x.to(dtype).requires_grad_()
        out = function(leaf)
        found.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), (leaf, norm.weight))])
    assert found[0][0].dtype == dtype
    assert all(gap(a, b) <= bound for a, b in zip(*found, strict=True))


def test_our_rms_norm_refuses_a_second_derivative() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match="only once"):
        torch.autograd.grad(RmsNorm(8)(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("cfg", [CFG, PLAIN], ids=["rope", "no rope"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_stack_continued_from_its_cache_equals_one_full_pass(cfg: StackConfig, padded: bool) -> None:
    body, x, where = stack(cfg), torch.randn(2, 11, 48), places(2, 11)
    attend = torch.ones(2, 11, dtype=torch.bool)
    attend[0, :3] = not padded
    with torch.no_grad():
        whole = body(x, where, attend if padded else None)
        for cuts in ((11,), (4, 1, 1, 5), (1,) * 11):
            cache, parts, start = Cache(cfg.depth, capacity=1), [], 0
            for cut in cuts:
                end = start + cut
                parts.append(body(x[:, start:end], where[:, start:end], attend[:, :end] if padded else None, cache))
                start = end
            assert cache.length == 11
            assert gap(torch.cat(parts, 1), whole) <= 1e-5


def test_a_stack_is_causal_to_the_last_bit() -> None:
    body, x = stack().double(), torch.randn(1, 6, 48, dtype=torch.float64)
    jac = torch.autograd.functional.jacobian(lambda v: body(v, places(1, 6)).sum(-1), x, vectorize=True)
    for t in range(6):
        assert not jac[0, t, 0, t + 1 :].any()
        assert jac[0, t, 0, : t + 1].abs().amax(-1).min() > 0


def test_a_mask_over_all_pairs_replaces_the_causal_one() -> None:
    body, x, where = stack(), torch.randn(2, 5, 48), places(2, 5)
    causal = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    assert gap(body(x, where, causal), body(x, where)) <= 1e-6
    assert gap(body(x, where, torch.ones_like(causal)), body(x, where)) > 1e-3


def test_a_padded_position_sees_itself_so_that_nothing_is_undefined() -> None:
    body, x, where = stack(), torch.randn(2, 5, 48), places(2, 5)
    attend = torch.tensor([[False] * 4 + [True], [True] * 5])
    out = body(x, where, attend)
    assert out.isfinite().all()
    assert gap(out[0, 4:], body(x[:1, 4:], where[:1, 4:])[0]) <= 1e-5


def test_a_stack_that_is_not_causal_sees_everything_but_padding() -> None:
    body, x, where = stack(replace(CFG, causal=False)), torch.randn(2, 5, 48), places(2, 5)
    out = body(x, where)
    assert gap(out, body(x, where, torch.ones(2, 5, 5, dtype=torch.bool))) <= 1e-6
    assert gap(out[:, 0], body(x[:, :1], where[:, :1])[:, 0]) > 1e-3
    attend = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    padded = body(x, where, attend)
    assert gap(padded[0, :3], body(x[:1, :3], where[:1, :3])[0]) <= 1e-5
    assert gap(padded[1], out[1]) <= 1e-5


def test_rope_without_positions_and_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ShapeError, match="positions is None"):
        stack()(torch.randn(1, 2, 48))
    with pytest.raises(ConfigError, match="width is 50"):
        StackConfig(width=50, depth=1, head_dim=24)


def test_mlp_activations_are_exact_gelu_and_squared_relu() -> None:
    for activation in ("gelu", "relu2"):
        mlp = stack(StackConfig(width=48, depth=1, head_dim=24, activation=activation)).layers[0].mlp
        x = torch.randn(1, 2, 48)
        h = mlp.up(mlp.norm(x))
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2))) if activation == "gelu" else h.clamp(min=0) ** 2
        assert gap(mlp(x), mlp.down(h)) <= 1e-5


def test_squared_relu_has_the_right_gradient_and_refuses_a_second_one() -> None:
    mlp = stack(StackConfig(width=48, depth=1, head_dim=24, activation="relu2")).double().layers[0].mlp
    x = torch.randn(1, 2, 48, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(mlp(x).sum(), x)
    plain = mlp.down(F.relu(mlp.up(mlp.norm(x))).square())
    assert gap(grad, torch.autograd.grad(plain.sum(), x)[0]) <= 1e-12
    with pytest.raises(NotImplementedError, match="only once"):
        torch.autograd.grad(mlp(x).sum(), x, create_graph=True)


# -- the cache ----------------------------------------------------------------------------------------


def filled(length: int = 5, capacity: int = 2) -> tuple[Cache, Tensor, Tensor]:
    """A two-layer cache that grew one position at a time, and what went into it: (2, B, H, T, K)."""
    cache, keys, values = Cache(2, capacity), torch.randn(2, 3, 2, length, 4), torch.randn(2, 3, 2, length, 4)
    for t in range(length):
        for layer in range(2):
            k, v = cache.append(layer, keys[layer, :, :, t : t + 1], values[layer, :, :, t : t + 1])
            assert torch.equal(k, keys[layer, :, :, : t + 1]) and torch.equal(v, values[layer, :, :, : t + 1])
        cache.advance(1)
    return cache, keys, values


def contents(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer up to `length`, as the next append would hand them out."""
    empty = torch.zeros(3, 2, 0, 4)
    return [tuple(t.clone() for t in cache.append(layer, empty, empty)) for layer in range(cache.depth)]  # type: ignore[misc]


def test_appending_past_the_capacity_keeps_every_bit() -> None:
    cache, keys, values = filled(length=33)
    assert cache.length == 33 and cache.depth == 2
    for layer, (k, v) in enumerate(contents(cache)):
        assert torch.equal(k, keys[layer]) and torch.equal(v, values[layer])
    assert cache.nbytes >= keys.nbytes + values.nbytes


def test_truncating_and_appending_again_keeps_the_front_and_replaces_the_rest() -> None:
    cache, keys, values = filled()
    cache.truncate(2)
    assert cache.length == 2
    k, v = torch.randn(2, 3, 2, 3, 4)
    out_k, out_v = cache.append(1, k, v)
    assert torch.equal(out_k, torch.cat([keys[1, :, :, :2], k], 2))
    assert torch.equal(out_v, torch.cat([values[1, :, :, :2], v], 2))
    cache.truncate(0)
    assert cache.length == 0


@pytest.mark.parametrize("length", [-1, 6])
def test_truncating_to_a_length_that_is_not_there_is_refused(length: int) -> None:
    cache, *_ = filled()
    with pytest.raises(ShapeError, match=f"truncate got length {length}"):
        cache.truncate(length)


@pytest.mark.parametrize("copies", [1, 3])
def test_a_fork_repeats_rows_bit_for_bit_and_shares_no_memory(copies: int) -> None:
    cache, keys, values = filled()
    twin = cache.fork(copies)
    assert twin.length == cache.length == 5
    empty = torch.zeros(3 * copies, 2, 0, 4)
    for layer in range(2):
        k, v = twin.append(layer, empty, empty)
        assert torch.equal(k, keys[layer].repeat_interleave(copies, 0))
        assert torch.equal(v, values[layer].repeat_interleave(copies, 0))
        k.fill_(9)
        v.fill_(9)
    twin.truncate(1)
    assert cache.length == 5
    for layer, (k, v) in enumerate(contents(cache)):
        assert torch.equal(k, keys[layer]) and torch.equal(v, values[layer])


def test_a_cache_made_from_the_state_of_another_is_equal_and_shares_no_memory() -> None:
    cache, keys, values = filled(length=5, capacity=16)
    state = cache.state()
    assert list(state) == ["0.k", "0.v", "1.k", "1.v"] and state["0.k"].shape == (3, 2, 5, 4)
    twin = Cache.from_state(state)
    assert twin.length == 5 and twin.depth == 2
    for name, value in twin.state().items():
        assert torch.equal(value, state[name])
        value.fill_(9)
    for layer, (k, v) in enumerate(contents(cache)):
        assert torch.equal(k, keys[layer]) and torch.equal(v, values[layer])


def test_a_stack_continues_from_a_saved_state_as_from_the_cache_itself() -> None:
    body, x, where = stack(), torch.randn(2, 8, 48), places(2, 8)
    with torch.no_grad():
        cache = Cache(CFG.depth)
        body(x[:, :5], where[:, :5], None, cache)
        again = Cache.from_state({name: value.clone() for name, value in cache.state().items()})
        wanted, got = (body(x[:, 5:], where[:, 5:], None, c) for c in (cache, again))
    assert torch.equal(got, wanted)  # the same values in the same shapes


def test_a_state_that_no_cache_could_have_is_refused() -> None:
    state = filled()[0].state()
    for broken in (
        {},
        {"0.k": state["0.k"]},
        {**state, "2.k": state["0.k"]},
        {f"vlm.{k}": v for k, v in state.items()},
    ):
        with pytest.raises(ShapeError, match="has keys"):
            Cache.from_state(broken)
    with pytest.raises(ShapeError, match="has shapes"):
        Cache.from_state({**state, "1.v": state["1.v"][:, :, :4]})


def test_an_empty_cache_holds_nothing_and_forks_into_one() -> None:
    cache = Cache(2)
    assert cache.length == cache.nbytes == 0
    assert cache.fork(2).nbytes == 0 and cache.state() == {}


def test_branches_of_a_fork_continue_as_if_they_had_been_alone() -> None:
    body, x, where = stack(), torch.randn(1, 8, 48), places(1, 8)
    tails = torch.randn(2, 3, 48)
    with torch.no_grad():
        cache = Cache(CFG.depth)
        body(x[:, :5], where[:, :5], None, cache)
        both = body(tails, where[:, 5:].expand(2, -1, -1), None, cache.fork(2))
        assert cache.length == 5
        for row in range(2):
            alone = body(torch.cat([x[:, :5], tails[row : row + 1]], 1), where)
            assert gap(both[row], alone[0, 5:]) <= 1e-5
        before = cache.fork()
        first = body(x[:, 5:], where[:, 5:], None, cache)
        cache.truncate(5)
        body(tails[:1], where[:, 5:], None, cache)
        cache.truncate(5)
        assert torch.equal(body(x[:, 5:], where[:, 5:], None, cache), first)  # a rewind leaves no trace
        assert torch.equal(body(x[:, 5:], where[:, 5:], None, before), first)


def test_a_bias_of_keys_moves_no_output_and_its_gradient_is_rounding_alone():
    """It adds the same to all scores of a query. Runs that sum in another order may differ there, and nowhere else."""
    stack = wake(CausalStack(StackConfig(width=64, depth=1))).double()
    x, positions = torch.randn(2, 7, 64, dtype=torch.float64), torch.zeros(2, 7, 3, dtype=torch.float64)
    before = stack(x, positions)
    before.square().sum().backward()
    bias = stack.layers[0].attention.qkv.bias
    q, k, v = bias.grad.chunk(3)
    assert k.abs().max() < 1e-13 < 1e-6 < min(q.abs().max(), v.abs().max())
    with torch.no_grad():
        bias.chunk(3)[1].add_(1.0)
    assert (stack(x, positions) - before).abs().max() < 1e-12
