"""flow/: every piece is an exact bijection with the exact log-determinant, causal, and blind to its neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flow_cases import BLOCKS, PIECES, STACK, STATES, WIDE, Case, block_config, contexts, gap, rows_of
from helpers import wake
from starflow2.errors import ConfigError, ShapeError
from starflow2.flow import (
    Affine,
    AffineBlock,
    BlockConfig,
    BlockJacobi,
    Context,
    Flow,
    FlowConfig,
    Jacobi,
    NoiseConfig,
    Sequential,
    ShallowFlow,
    Solver,
    StackConfig,
    solve,
    standard_normal_log_prob,
)
from starflow2.flow.block import Run, scan
from starflow2.nn import Cache

F64 = torch.float64
pieces = pytest.mark.parametrize("build", PIECES.values(), ids=PIECES.keys())
blocks = pytest.mark.parametrize("build", BLOCKS.values(), ids=BLOCKS.keys())
Build = Callable[..., Case]


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Derivative of every output by every input, by autograd: output shape + input shape."""
    return torch.autograd.functional.jacobian(function, x, vectorize=True)


def block_of(case: Case) -> AffineBlock:
    assert isinstance(case.piece, AffineBlock)
    return case.piece


def begin(case: Case, *, cached: bool = False) -> tuple[Tensor, Run]:
    """The padded buffer of the case's latents in scan order, and a fresh run."""
    block = block_of(case)
    buffer = F.pad(scan(case.x, block.cfg.direction), (0, 0, 0, 1))
    run = block.begin(len(case.x), case.context, case.noise_level)
    return buffer, replace(run, cache=Cache(block.cfg.stack.depth, capacity=2) if cached else None)


# -- bijection and log-determinant ----------------------------------------------------------------


@pieces
def test_inverse_undoes_forward_to_1e_10_in_float64(build: Build) -> None:
    case = build(dtype=F64)
    z, logdet = case.forward()
    assert z.dtype == logdet.dtype == F64
    assert gap(case.inverse(z), case.x) <= 1e-10
    assert gap(case.forward(case.inverse(case.x))[0], case.x) <= 1e-10  # and forward undoes inverse
    assert gap(z, case.x) > 0.05, "the piece is asleep and would pass with wrong code"


@pieces
def test_logdet_is_the_log_determinant_of_the_true_jacobian(build: Build) -> None:
    case = build(dtype=F64)
    _, logdet = case.forward()
    size = case.x[0].numel()
    jac = jacobian(lambda x: case.forward(x)[0], case.x)  # (B, N, D, B, N, D)
    for row in range(len(case.x)):
        own = jac[row, :, :, row].reshape(size, size)
        assert gap(logdet[row], torch.linalg.slogdet(own).logabsdet) <= 1e-10
        assert not jac[row, :, :, 1 - row].any(), "rows of a batch mix"
    assert logdet.abs().min() > 0.01


@pieces
def test_a_float32_round_trip_stays_within_1e_4(build: Build) -> None:
    case = build()
    z, _ = case.forward()
    assert z.dtype == torch.float32
    assert gap(case.inverse(z), case.x) <= 1e-4


@pieces
def test_a_fresh_piece_is_the_identity_with_logdet_zero(build: Build) -> None:
    case = build()
    for module in case.piece.modules():
        if isinstance(module, AffineBlock):
            torch.nn.init.zeros_(module.head.weight)
            torch.nn.init.zeros_(module.head.bias)
    z, logdet = case.forward()
    assert gap(z, case.x) <= 1e-6 and gap(logdet, torch.zeros(2)) <= 1e-5


def test_a_new_head_is_zero_so_that_training_starts_at_the_identity() -> None:
    block = AffineBlock(block_config())
    assert not block.head.weight.any() and not block.head.bias.any()


@pieces
def test_every_parameter_that_can_act_gets_a_finite_gradient(build: Build) -> None:
    case = build()
    z, logdet = case.forward()
    (standard_normal_log_prob(z) + logdet).sum().backward()
    for name, parameter in case.piece.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
    assert sum(p.grad is not None and bool(p.grad.any()) for p in case.piece.parameters()) > 5


# -- causality --------------------------------------------------------------------------------------


@blocks
def test_the_jacobian_is_exactly_zero_above_the_diagonal(build: Build) -> None:
    case = build(dtype=F64)
    block, (buffer, run) = block_of(case), begin(case)
    direction, (count, dim) = block.cfg.direction, case.x.shape[1:]
    affine = block.predict(buffer, (0, count), run)
    jac = jacobian(lambda x: scan(case.forward(scan(x, direction))[0], direction), scan(case.x, direction))
    for row in range(len(case.x)):
        own = jac[row, :, :, row]  # (N, D, N, D) in scan order
        assert not own.reshape(count * dim, count * dim).triu(1).any()
        inside = torch.stack([own[n, :, n] for n in range(count)])  # channels do not see each other, only the past
        assert not (inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))).any()
        assert gap(inside.diagonal(dim1=1, dim2=2), torch.exp(-affine.log_scale[row])) <= 1e-12
        if count > 1:
            below = own.reshape(count * dim, count * dim).tril(-1)
            assert below.abs().max() > 1e-3, "nothing depends on the past, so this test proves nothing"


@blocks
def test_the_gaussian_of_a_latent_never_sees_that_latent_or_a_later_one(build: Build) -> None:
    case = build(dtype=F64)
    block, run = block_of(case), begin(case)[1]
    count = case.x.shape[1]

    def gaussians(x: Tensor) -> Tensor:
        affine = block.predict(F.pad(x, (0, 0, 0, 1)), (0, count), run)
        return torch.cat([affine.mu, affine.log_scale], dim=-1)  # (B, N, 2D)

    jac = jacobian(gaussians, case.x)
    for n in range(count):
        assert not jac[:, n, :, :, n:].any()
    if count > 1 and block.cfg.start == "none" and case.context is None:
        assert not jac[:, 0].any()  # target 0 passes unchanged
    if count > 1:
        assert jac[:, 1, :, :, 0].any() and jac[:, -1, :, :, -2].any()


@pytest.mark.parametrize("start", ["auto", "always", "none"])
@pytest.mark.parametrize("direction", ["l2r", "r2l"])
def test_what_is_predicted_from_the_context_depends_on_the_context_alone_at_target_0(
    start: str, direction: str
) -> None:
    case = BLOCKS["context"](dtype=F64)
    block = wake(AffineBlock(block_config(start=start, direction=direction, context_dim=WIDE))).double()
    case = replace(case, piece=block)
    first, other = case.x, case.x + 1.0
    z, z_other = case.forward(first)[0], case.forward(other)[0]
    first_place = 0 if direction == "l2r" else 5
    affine = block.predict(torch.zeros(2, 7, 3, dtype=F64), (0, 1), begin(case)[1])  # no latent at all
    assert gap(z[:, first_place], affine.normalize(first[:, first_place : first_place + 1])[0][:, 0]) <= 1e-12
    assert gap(z_other[:, first_place] - z[:, first_place], torch.exp(-affine.log_scale[:, 0])) <= 1e-10
    moved = replace(case, context=Context(case.context.states + 1.0))  # type: ignore[union-attr]
    assert gap(moved.forward()[0][:, first_place], z[:, first_place]) > 1e-3


# -- what a slot carries ----------------------------------------------------------------------------


RASTER = torch.tensor([[r, c] for r in range(2) for c in range(3)], dtype=torch.float32)  # (N, 2)


@pytest.mark.parametrize("direction", ["l2r", "r2l"])
def test_a_start_token_moves_slots_to_the_position_of_their_target(direction: str) -> None:
    block = wake(AffineBlock(block_config(direction=direction, learned_positions=True)))
    buffer = F.pad(torch.randn(2, 6, 3), (0, 0, 0, 1))
    slots, positions = block.slots(buffer, (0, 6), block.begin(2, None, None))
    wanted = F.pad(RASTER, (0, 1)).expand(2, -1, -1)  # in scan order, so the same both ways, as STARFlow has it
    assert torch.equal(positions, wanted)
    assert gap(slots[:, 1:], block.proj_in(buffer[:, :5]) + block.position_table[1:]) <= 1e-6
    assert gap(slots[:, 0], block.proj_in(block.start)[0].expand(2, -1)) <= 1e-6


@pytest.mark.parametrize("start", ["auto", "none"])
def test_after_a_context_a_slot_has_the_position_of_its_own_latent_and_the_last_state_keeps_its_own(
    start: str,
) -> None:
    block = wake(AffineBlock(block_config(start=start, context_dim=WIDE, learned_positions=True)))
    context, buffer = contexts("plain"), F.pad(torch.randn(2, 6, 3), (0, 0, 0, 1))
    run = block.begin(2, context, None)
    slots, positions = block.slots(buffer, (0, 6), run)
    last = STATES - 1  # the latents take the step of the last state
    assert torch.equal(positions[:, 0], torch.tensor([[0.0, 0.0, last]] * 2))
    assert torch.equal(positions[:, 1:], F.pad(RASTER[:5], (0, 1), value=last).expand(2, -1, -1))
    assert gap(slots[:, 0], block.context_in(context.states[:, -1])) <= 1e-6
    assert gap(slots[:, 1:], block.proj_in(buffer[:, :5]) + block.position_table[:5]) <= 1e-6
    moved = block.begin(2, replace(context, step=torch.tensor([0.5, 7.0])), None)
    assert torch.equal(block.slots(buffer, (0, 6), moved)[1][:, 1:, 2], torch.tensor([[0.5] * 5, [7.0] * 5]))


def test_the_stencil_feeds_the_three_latents_above_the_target_and_zeros_outside() -> None:
    block = AffineBlock(block_config(stencil=True, dim=1))
    buffer = F.pad(torch.arange(1.0, 7.0).view(1, 6, 1), (0, 0, 0, 1))  # 1 2 3 over 4 5 6
    inputs: list[Tensor] = []
    block.proj_in.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    block.embed(buffer, 1, 6)
    previous_and_above = [[1, 0, 0, 0], [2, 0, 0, 0], [3, 0, 1, 2], [4, 1, 2, 3], [5, 2, 3, 0]]
    assert torch.equal(inputs[0][0], torch.tensor(previous_and_above, dtype=torch.float32))


# -- padding and batches --------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["auto", "always", "none"])
@pytest.mark.parametrize("direction", ["l2r", "r2l"])
def test_padding_gets_exactly_no_gradient_and_real_states_do(start: str, direction: str) -> None:
    block = wake(AffineBlock(block_config(start=start, direction=direction, context_dim=WIDE))).double()
    context = contexts("padded", F64)
    states = context.states.requires_grad_()
    z, logdet = block(torch.randn(2, 6, 3, dtype=F64), context)
    (z.square().sum() + logdet.sum()).backward()
    assert states.grad is not None
    assert not states.grad[0, :2].any()
    assert states.grad[0, 2:].abs().amin() > 0 and states.grad[1].abs().amin() > 0


@pytest.mark.parametrize("placed", [False, True], ids=["default positions", "positions given"])
@pytest.mark.parametrize("start", ["auto", "always", "none"])
def test_a_left_padded_row_equals_the_row_without_padding(start: str, placed: bool) -> None:
    block = wake(AffineBlock(block_config(start=start, context_dim=WIDE)))
    x, long = torch.randn(1, 6, 3), contexts("padded")
    padded = rows_of(long, slice(0, 1))
    assert padded is not None and padded.attend is not None
    if placed:
        positions = torch.zeros(1, STATES, 3)
        positions[..., 2] = torch.tensor([0.0, 0.0, 0.3, 0.7])
        padded = replace(padded, positions=positions, step=torch.tensor([1.5]))
    garbage = replace(padded, states=padded.states.masked_fill(~padded.attend[..., None], 1e4))
    short = replace(
        padded,
        states=padded.states[:, 2:],
        attend=None,
        positions=None if padded.positions is None else padded.positions[:, 2:],
    )
    wanted, wanted_logdet = block(x, short)
    for context in (padded, garbage):
        z, logdet = block(x, context)
        assert gap(z, wanted) <= 1e-5 and gap(logdet, wanted_logdet) <= 1e-5
        assert gap(block.inverse(x, context), block.inverse(x, short)) <= 1e-5
    unmasked, _ = block(x, replace(garbage, attend=None))
    assert gap(unmasked, wanted) > 1e-3  # the mask is what does it


@pieces
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (F64, 1e-12)], ids=["float32", "float64"])
def test_a_row_does_not_know_its_batch(build: Build, dtype: torch.dtype, bound: float) -> None:
    case = build(dtype=dtype)
    z, logdet = case.forward()
    back = case.inverse(z)
    for index in range(len(case.x)):
        alone = case.row(index)
        z_alone, logdet_alone = alone.forward()
        assert gap(z_alone[0], z[index]) <= bound and gap(logdet_alone[0], logdet[index]) <= bound
        assert gap(alone.inverse(z[index : index + 1])[0], back[index]) <= bound


# -- one inverse, many routes -----------------------------------------------------------------------


SOLVERS: dict[str, Solver] = {
    "sequential": Sequential(),
    "jacobi": Jacobi(),
    "jacobi to the end": Jacobi(tolerance=0.0),
    "chunks of two": BlockJacobi(chunk=2),
    "uneven chunks of four": BlockJacobi(chunk=4, tolerance=1e-6),
    "chunks of five to the end": BlockJacobi(chunk=5, tolerance=0.0),
}


def uncached_inverse(case: Case, z: Tensor) -> Tensor:
    """The definition: for every latent a full pass over everything before it, nothing kept."""
    block = block_of(case)
    z = scan(z, block.cfg.direction)
    run = block.begin(len(z), case.context, case.noise_level)
    buffer = z.new_zeros(len(z), z.shape[1] + 1, z.shape[2])
    with torch.no_grad():
        for n in range(z.shape[1]):
            affine = block.predict(buffer, (0, n + 1), run)
            buffer[:, n] = affine.mu[:, n] + affine.scale[:, n] * z[:, n]
    return scan(buffer[:, :-1], block.cfg.direction)


@blocks
def test_cached_sequential_jacobi_and_block_jacobi_agree_with_the_uncached_definition(build: Build) -> None:
    case = build()
    z = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(3))
    wanted = uncached_inverse(case, z)
    assert gap(wanted, z) > 0.05
    for name, solver in SOLVERS.items():
        assert gap(case.inverse(z, solver), wanted) <= 1e-4, name


@pieces
def test_all_solvers_agree_through_whole_stacks(build: Build) -> None:
    case = build()
    wanted = case.inverse(case.x)
    for name, solver in SOLVERS.items():
        assert gap(case.inverse(case.x, solver), wanted) <= 1e-4, name


def test_all_solvers_agree_on_a_deeper_block_with_64_latents() -> None:
    stack = StackConfig(width=64, depth=3, head_dim=32)
    block = wake(AffineBlock(BlockConfig(dim=4, grid=(8, 8), stack=stack, stencil=True)))
    z = torch.randn(2, 64, 4)
    wanted = solve(block.predictor(2), z)
    assert wanted.evaluations == 64 and wanted.residual == 0.0
    for solver in (Jacobi(), BlockJacobi(chunk=16), BlockJacobi(chunk=24)):
        solution = solve(block.predictor(2), z, solver)
        assert gap(solution.x, wanted.x) <= 1e-4
        assert solution.evaluations < 64 and solution.residual <= solver.tolerance
    assert gap(block(wanted.x)[0], z) <= 1e-4


def test_jacobi_is_exact_after_as_many_iterations_as_there_are_latents() -> None:
    case = BLOCKS["stencil"](dtype=F64)
    predict = block_of(case).predictor(len(case.x))
    solution = solve(predict, case.x, Jacobi(tolerance=0.0))
    assert solution.evaluations <= 6
    assert gap(solution.x, case.inverse(case.x)) <= 1e-12
    stopped = solve(predict, case.x, Jacobi(max_iterations=1))
    assert stopped.evaluations == 1 and stopped.residual > 1e-3  # and says that it did not arrive
    first = slice(0, 1)
    assert gap(stopped.x[:, first], solution.x[:, first]) <= 1e-12  # one iteration settles one latent


@blocks
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
def test_one_teacher_forced_pass_equals_cached_steps_of_any_size(build: Build, dtype: torch.dtype) -> None:
    case = build(dtype=dtype)
    block, count = block_of(case), case.x.shape[1]
    buffer, run = begin(case)
    with torch.no_grad():
        whole = block.predict(buffer, (0, count), run)
        for step in (1, 2, 4):
            _, cached = begin(case, cached=True)
            parts = [
                block.predict(buffer, (first, min(first + step, count)), cached) for first in range(0, count, step)
            ]
            bound = 1e-10 if dtype == F64 else 1e-5
            assert gap(torch.cat([p.mu for p in parts], 1), whole.mu) <= bound
            assert gap(torch.cat([p.log_scale for p in parts], 1), whole.log_scale) <= bound


def test_a_chunk_predicted_again_through_the_cache_gives_the_same_gaussians_and_needs_those_before_it() -> None:
    case = BLOCKS["context"]()
    block, (buffer, cached) = block_of(case), begin(case, cached=True)
    with torch.no_grad():
        first, again = (block.predict(buffer, (0, 3), cached) for _ in range(2))
        later = block.predict(buffer, (3, 6), cached)
        block.predict(buffer, (0, 3), cached)
        assert torch.equal(first.mu, again.mu)  # the same pass twice
        assert torch.equal(block.predict(buffer, (3, 6), cached).mu, later.mu)
    with pytest.raises(ShapeError, match="truncate"):
        block.predict(buffer, (3, 6), begin(case, cached=True)[1])
    with pytest.raises(ShapeError, match="expected 0 without a cache"):
        block.predict(buffer, (3, 6), begin(case)[1])


# -- densities ----------------------------------------------------------------------------------------


def test_log_prob_is_next_gaussian_prediction_plus_the_shallow_jacobian() -> None:
    case = PIECES["deep-shallow with context and noise"](dtype=F64)
    flow = case.piece
    assert isinstance(flow, Flow)
    u, shallow_logdet = flow.shallow(case.x, case.noise_level)
    run = flow.deep.begin(2, case.context, case.noise_level)
    affine = flow.deep.predict(F.pad(u, (0, 0, 0, 1)), (0, 6), run)
    wanted = torch.distributions.Normal(affine.mu, affine.scale).log_prob(u).sum((1, 2)) + shallow_logdet
    got = flow.log_prob(case.x, case.context, case.noise_level)
    assert gap(got, wanted) <= 1e-10
    assert gap(affine.log_prob(u).sum(1) + shallow_logdet, wanted) <= 1e-10
    assert gap(flow.nats_per_dim(case.x, case.context, case.noise_level), -wanted / 18) <= 1e-12


def test_an_affine_step_normalises_as_torch_distributions_do() -> None:
    mu, log_scale, u = torch.randn(3, 2, 4, 5, dtype=F64).unbind()
    affine = Affine(mu, log_scale)
    normal = torch.distributions.Normal(mu, log_scale.exp())
    z, logdet = affine.normalize(u)
    assert gap(standard_normal_log_prob(z) + logdet, normal.log_prob(u).sum((1, 2))) <= 1e-10
    assert gap(affine.log_prob(u), normal.log_prob(u).sum(2)) <= 1e-10
    assert gap(affine.denormalize(z), u) <= 1e-12


def test_both_scales_are_one_where_the_raw_output_is_zero_and_softplus_is_what_it_says() -> None:
    raw = torch.zeros(1, 1, 4, dtype=F64)
    assert gap(Affine.from_raw(raw, "exp").scale, torch.ones(1, 1, 2)) == 0
    assert gap(Affine.from_raw(raw, "softplus").scale, torch.ones(1, 1, 2)) <= 1e-12
    raw = torch.randn(2, 3, 8, dtype=F64)
    wanted = torch.log1p(torch.exp(raw[..., :4] + math.log(math.e - 1)))
    assert gap(Affine.from_raw(raw, "softplus").scale, wanted) <= 1e-12
    assert gap(Affine.from_raw(raw, "softplus").mu, raw[..., 4:]) == 0  # scale first, then mean


def test_the_clip_bounds_scales_and_means_where_asked() -> None:
    for clips_mean in (False, True):
        block = wake(AffineBlock(block_config(clip=0.5, clips_mean=clips_mean)), scale=3.0)
        affine = block.affine(100 * torch.randn(2, 6, 40))
        assert affine.log_scale.abs().max() <= 0.5
        assert (affine.mu.abs().max() <= 0.5) == clips_mean


def moons(count: int) -> Tensor:
    """Two interleaved half circles, standard deviation about 0.9 and 0.5: (count, 2, 1)."""
    angle, side = math.pi * torch.rand(count), 2.0 * torch.randint(2, (count,)) - 1
    points = torch.stack([side * (angle.cos() - 0.5), side * (angle.sin() - 0.25)], dim=1)
    return (points + 0.15 * torch.randn(count, 2)).unsqueeze(-1)


def toy_flow(columns: int) -> Flow:
    stack = StackConfig(width=20, depth=1, head_dim=20)
    configs = [BlockConfig(dim=1, grid=(1, columns), stack=stack, direction=d) for d in ("l2r", "r2l", "l2r")]
    return Flow(FlowConfig(deep=configs[2], shallow=tuple(configs[:2])))


def fit(flow: Flow, data: Callable[[int], Tensor], steps: int = 60) -> float:
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = flow.nats_per_dim(data(64)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_a_learned_one_dimensional_density_integrates_to_one() -> None:
    flow = toy_flow(1)
    before = float(flow.nats_per_dim(2 + 0.3 * torch.randn(128, 1, 1)).mean().detach())
    assert fit(flow, lambda n: 2 + 0.3 * torch.randn(n, 1, 1)) < before - 1
    grid = torch.linspace(-6, 10, 4001)
    with torch.no_grad():
        density = flow.log_prob(grid[:, None, None]).double().exp()
    assert float(torch.trapezoid(density, grid.double())) == pytest.approx(1, abs=1e-4)
    assert float(torch.trapezoid(density * grid, grid.double())) == pytest.approx(2, abs=0.3)


def test_a_learned_density_over_two_moons_integrates_to_one() -> None:
    flow = toy_flow(2)
    fit(flow, moons)
    axis = torch.linspace(-4, 4, 141)
    points = torch.cartesian_prod(axis, axis).unsqueeze(-1)
    with torch.no_grad():
        density = flow.log_prob(points).double().exp().view(141, 141)
    assert float(torch.trapezoid(torch.trapezoid(density, axis.double()), axis.double())) == pytest.approx(1, abs=2e-3)
    inside = flow.log_prob(moons(500)).mean().detach()
    assert float(inside) > float(standard_normal_log_prob(moons(500)).mean()) + 0.3  # it learned something


# -- numbers under autocast -----------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["exp", "softplus"])
def test_affine_maths_stays_float32_under_bf16_autocast(scale: str) -> None:
    block = wake(AffineBlock(block_config(scale=scale, context_dim=WIDE, noise=True)))
    x, context, level = torch.randn(2, 6, 3), contexts("padded"), torch.tensor([0.1, 0.3])
    dtypes: list[tuple[torch.dtype, torch.dtype]] = []
    block.head.register_forward_hook(lambda _, given, out: dtypes.append((given[0].dtype, out.dtype)))
    bodies: list[torch.dtype] = []
    block.body.layers[0].mlp.up.register_forward_hook(lambda _, __, out: bodies.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, logdet = block(x, context, level)
        affine = block.predict(F.pad(x, (0, 0, 0, 1)), (0, 6), block.begin(2, context, level))
        again, logdet_again = affine.normalize(x)
        back = block.inverse(z, context, level)
    assert bodies[0] == torch.bfloat16  # autocast was really on
    assert set(dtypes) == {(torch.float32, torch.float32)}
    assert {t.dtype for t in (z, logdet, affine.mu, affine.log_scale, back)} == {torch.float32}
    outside, logdet_outside = affine.normalize(x)
    assert torch.equal(again, outside) and torch.equal(logdet_again, logdet_outside)
    assert not torch.equal(affine.mu, affine.mu.bfloat16().float())
    exact, exact_logdet = block(x, context, level)
    assert gap(z, exact) < 0.1 and gap(logdet, exact_logdet) < 0.3 and gap(back, x) < 0.2


def test_half_precision_data_is_scored_in_float32() -> None:
    affine = Affine(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    u = torch.randn(1, 2, 3).bfloat16()
    assert (
        affine.normalize(u)[0].dtype == affine.log_prob(u).dtype == standard_normal_log_prob(u).dtype == torch.float32
    )


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 3), (2, 6, 4), (2, 6, 3, 1)])
def test_latents_of_a_wrong_shape_raise_a_shape_error_with_their_name(shape: tuple[int, ...]) -> None:
    block = AffineBlock(block_config())
    with pytest.raises(ShapeError, match=r"^x has shape .*expected \(B N=6 D=3\)"):
        block(torch.zeros(shape))
    with pytest.raises(ShapeError, match=r"^z has shape .*expected \(B N=6 D=3\)"):
        block.inverse(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, WIDE + 1), (3, 4, WIDE)])
def test_a_context_of_a_wrong_shape_raises_a_shape_error_with_its_name(shape: tuple[int, ...]) -> None:
    block = AffineBlock(block_config(context_dim=WIDE))
    with pytest.raises(ShapeError, match=r"^context.states has shape"):
        block(torch.zeros(2, 6, 3), Context(torch.zeros(shape), torch.zeros(3, 4, 3), step=torch.zeros(3)))


def test_noise_levels_must_be_one_per_row() -> None:
    block = AffineBlock(block_config(noise=True))
    for level in (torch.tensor(0.1), torch.tensor([0.1]), torch.full((2, 1), 0.1)):
        with pytest.raises(ShapeError, match=r"^noise_level has shape"):
            block(torch.zeros(2, 6, 3), None, level)


def test_a_missing_or_an_extra_noise_level_raises() -> None:
    x, level = torch.zeros(2, 6, 3), torch.full((2,), 0.1)
    for is_noisy, given in ((True, None), (False, level)):
        block = AffineBlock(block_config(noise=is_noisy))
        flow = Flow(FlowConfig(deep=block.cfg, noise=NoiseConfig() if is_noisy else None))
        for call in (block, flow, flow.log_prob):
            with pytest.raises(ShapeError, match="noise_level is"):
                call(x, None, given)
        with pytest.raises(ShapeError, match="noise_level is"):
            block.inverse(x, None, given)
        with pytest.raises(ShapeError, match="noise_level is"):
            ShallowFlow((block.cfg,))(x, given)


def test_a_context_where_none_is_taken_and_none_where_one_is_needed_raise() -> None:
    x = torch.zeros(2, 6, 3)
    with pytest.raises(ShapeError, match="context was given"):
        AffineBlock(block_config())(x, contexts("plain"))
    with pytest.raises(ShapeError, match="context is None"):
        AffineBlock(block_config(start="none", context_dim=WIDE))(x)


def test_configs_that_make_no_flow_are_refused() -> None:
    with pytest.raises(ConfigError, match="alternate"):
        FlowConfig(deep=block_config(), shallow=(block_config(),))
    with pytest.raises(ConfigError, match="noise"):
        FlowConfig(deep=block_config(noise=True))
    with pytest.raises(ConfigError, match="noise"):
        FlowConfig(deep=block_config(), noise=NoiseConfig())
    with pytest.raises(ConfigError, match="grid"):
        AffineBlock(block_config(grid=(0, 3)))
    with pytest.raises(ConfigError, match="head_dim"):
        StackConfig(width=50, depth=1, head_dim=20)
    with pytest.raises(ConfigError, match="chunk"):
        BlockJacobi(chunk=-1)


def test_configs_compare_by_value_and_the_state_dict_holds_parameters_only() -> None:
    assert block_config() == block_config() and STACK.heads == 2
    block = AffineBlock(block_config(stencil=True))
    assert set(block.state_dict()) == {name for name, _ in block.named_parameters()}
