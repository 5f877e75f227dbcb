"""flow/: vectors in place of latents, samples by number, gradients through the inverse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from flow_cases import PIECES, WIDE, Case, block_config, contexts, gap
from helpers import wake
from starflow2.errors import ConfigError, ShapeError
from starflow2.flow import AffineBlock, Context, Flow, FlowConfig, Jacobi, NoiseConfig, SampleConfig
from starflow2.flow.solver import solve
from starflow2.flow.stepper import WINDOW

F64 = torch.float64
Build = Callable[..., Case]
pieces = pytest.mark.parametrize("build", PIECES.values(), ids=PIECES.keys())


def flow_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Flow, Case]:
    case = PIECES[name](dtype=dtype)
    assert isinstance(case.piece, Flow)
    return case.piece, case


# -- vectors and counts ---------------------------------------------------------------------------


def test_vectors_are_latents_laid_end_to_end() -> None:
    flow, case = flow_of("deep-shallow")
    vectors = case.x.flatten(1)
    z, logdet = flow(case.x)
    z_vectors, logdet_vectors = flow(vectors)
    assert torch.equal(z_vectors, z.flatten(1)) and torch.equal(logdet_vectors, logdet)
    assert torch.equal(flow.log_prob(vectors), flow.log_prob(case.x))
    assert torch.equal(flow.nats_per_dim(vectors), flow.nats_per_dim(case.x))
    assert torch.equal(flow.inverse(vectors), flow.inverse(case.x).flatten(1))
    assert torch.equal(flow.sample(vectors), flow.sample(case.x).flatten(1))
    level = torch.full((2,), 0.2)
    assert torch.equal(flow.denoise(vectors, level), flow.denoise(case.x, level).flatten(1))
    with pytest.raises(ShapeError, match=r"x has shape \(2, 17\); expected \(B N=6 D=3\) or \(B 18\)"):
        flow.log_prob(vectors[:, 1:])


def test_a_number_of_samples_is_as_many_prior_draws_of_the_generator() -> None:
    flow, _ = flow_of("deep-shallow")
    x = flow.sample(3, generator=torch.Generator().manual_seed(5))
    z = torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(x, flow.sample(z)) and x.shape == (3, 6, 3)
    torch.manual_seed(1)
    first, second = flow.sample(2), flow.sample(2)
    torch.manual_seed(1)
    assert torch.equal(flow.sample(2), first) and not torch.equal(first, second)
    assert flow.double().sample(1).dtype == F64
    for count in (0, -1, True, 1.5):
        with pytest.raises((ConfigError, ShapeError), match="z is"):
            flow.sample(count)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="generator is given beside z"):
        flow.sample(z, generator=torch.Generator())


# -- gradients through the inverse ----------------------------------------------------------------


@pieces
def test_the_inverse_keeps_its_values_and_has_the_gradient_of_the_inverse_function(build: Build) -> None:
    case = build(dtype=F64)
    with torch.no_grad():
        plain = case.inverse(case.x)
    z = case.x.clone().requires_grad_()
    x = (
        case.inverse(z)
        if not isinstance(case.piece, Flow)
        else case.piece.rsample(z, case.context, None, case.noise_level)
    )
    assert torch.equal(x.detach(), plain)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    (gradient,) = torch.autograd.grad(x, z, cotangent)
    # dx/dz is the inverse of dz/dx: pulling the cotangent back through both returns it
    again = x.detach().requires_grad_()
    (back,) = torch.autograd.grad(case.forward(again)[0], again, gradient)
    assert gap(back, cotangent) <= 1e-9 and gap(gradient, cotangent) > 0.01


@pytest.mark.parametrize("name", ["softplus", "stencil, right to left", "padded context, everything on", "no start"])
def test_weights_and_conditions_get_the_gradients_that_differences_give(name: str) -> None:
    case = PIECES[name](dtype=F64)
    block = case.piece
    assert isinstance(block, AffineBlock)

    def loss() -> torch.Tensor:
        return block.inverse(case.x, case.context, case.noise_level).sin().sum()

    inputs = [block.head.weight, block.body.layers[0].mlp.up.weight, *([case.context.states] if case.context else [])]
    for tensor in inputs:
        tensor.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(), tensor)
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
        with torch.no_grad():
            tensor += 1e-6 * direction
            up = loss()
            tensor -= 2e-6 * direction
            down = loss()
            tensor += 1e-6 * direction
        assert float((gradient * direction).sum()) == pytest.approx(float(up - down) / 2e-6, rel=1e-5, abs=1e-7)


def test_guided_samples_have_gradients_too() -> None:
    flow, case = flow_of("deep-shallow with context", F64)
    config, empty = SampleConfig(guidance=1.5), contexts("plain", F64, seed=5)
    z = case.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(flow.rsample(z, case.context, empty, config=config).sum(), z)
    nudge = torch.zeros_like(z)
    nudge[0, 1, 2] = 1e-6
    up, down = (flow.sample(case.x + s * nudge, case.context, empty, config=config).sum() for s in (1, -1))
    assert float(gradient[0, 1, 2]) == pytest.approx(float(up - down) / 2e-6, rel=1e-5)


def test_a_loss_on_samples_moves_a_flow_to_the_density_it_names() -> None:
    torch.manual_seed(0)
    block = block_config(dim=1, grid=2)
    flow = Flow(FlowConfig(deep=block))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(60):  # reverse KL to N(3, 0.5^2) in both numbers
        x = flow.rsample(64)
        energy = 0.5 * ((x - 3) / 0.5).square().sum((1, 2))
        loss = (flow.log_prob(x) + energy).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = flow.sample(2000)
    assert float(x.mean()) == pytest.approx(3, abs=0.15) and float(x.std()) == pytest.approx(0.5, abs=0.15)


def test_nothing_is_recorded_where_no_gradient_is_wanted() -> None:
    flow, case = flow_of("deep-shallow")
    assert flow.rsample(case.x).requires_grad and not flow.sample(case.x).requires_grad
    with torch.no_grad():
        assert not flow.inverse(case.x).requires_grad
    flow.requires_grad_(False)
    assert not flow.inverse(case.x).requires_grad
    assert flow.inverse(case.x.clone().requires_grad_()).requires_grad


def test_a_second_derivative_of_an_inverse_is_refused_not_wrong() -> None:
    flow, case = flow_of("deep-shallow")
    z = case.x.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="only once"):
        torch.autograd.grad(flow.inverse(z).sum(), z, create_graph=True)


def test_every_solver_has_the_same_gradient() -> None:
    case = PIECES["stencil"](dtype=F64)
    block, gradients = case.piece, []
    assert isinstance(block, AffineBlock)
    for solver in (Jacobi(tolerance=0.0), None):
        z = case.x.clone().requires_grad_()
        x = block.inverse(z, solver=solver) if solver else block.inverse(z)
        gradients.append(torch.autograd.grad(x.sin().sum(), z)[0])
    assert gap(*gradients) <= 1e-10


# -- single steps ---------------------------------------------------------------------------------


@pieces
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (F64, 1e-12)], ids=["float32", "float64"])
def test_single_steps_give_what_chunks_through_the_cache_give(build: Build, dtype: torch.dtype, bound: float) -> None:
    case = build(dtype=dtype)
    for block in (m for m in case.piece.modules() if isinstance(m, AffineBlock)):
        context = case.context if block.cfg.context_dim else None
        solved = [
            solve(block.predictor(len(case.x), context, case.noise_level, None, how), case.x).x
            for how in ("steps", "chunks")
        ]
        assert gap(*solved) <= bound and gap(solved[0], case.x) > 0.05


@pytest.mark.parametrize("kind", ["plain", "padded"])
def test_single_steps_go_on_behind_the_keys_of_the_first_window(kind: str) -> None:
    block = wake(AffineBlock(block_config(dim=1, grid=WINDOW + 40, context_dim=WIDE)), scale=0.2)
    context, z = contexts(kind), torch.randn(2, WINDOW + 40, 1, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    steps, chunks = (solve(block.predictor(2, context, None, None, how), z).x for how in ("steps", "chunks"))
    assert gap(steps, chunks) <= 1e-4 and gap(steps[:, WINDOW:], z[:, WINDOW:]) > 0.05


HOOKED: dict[str, Callable[[AffineBlock], torch.nn.Module]] = {
    "projection": lambda block: block.proj_in,
    "queries": lambda block: block.body.layers[0].attention.qkv,
    "values": lambda block: block.body.layers[0].attention.proj,
    "norm": lambda block: block.body.layers[0].mlp.norm,
    "mlp": lambda block: block.body.layers[0].mlp,
    "down": lambda block: block.body.layers[0].mlp.down,
    "last norm": lambda block: block.body.final_norm,
    "head": lambda block: block.head,
}


@pytest.mark.parametrize("place", HOOKED)
def test_single_steps_use_adapters_and_hooks_of_the_modules(place: str) -> None:
    case = PIECES["left to right"]()
    block = case.piece
    assert isinstance(block, AffineBlock)
    plain = case.inverse(case.x)
    HOOKED[place](block).register_forward_hook(lambda module, given, out: 2 * out)
    changed = case.inverse(case.x)
    assert gap(changed, plain) > 1e-3
    assert gap(changed, case.inverse(case.x, Jacobi(tolerance=0.0))) <= 1e-4


def test_a_noisy_flow_draws_by_number_with_its_levels() -> None:
    cfg = block_config(noise=True, context_dim=5)
    flow = wake(Flow(FlowConfig(deep=cfg, noise=NoiseConfig())))
    context = replace(contexts("plain"), step=None)
    assert flow.sample(2, context, noise_level=torch.full((2,), 0.3)).shape == (2, 6, 3)
    with pytest.raises(ShapeError, match=r"context.states has shape \(2, 4, 5\); expected \(B=3 T E=5\)"):
        flow.sample(3, context, noise_level=torch.full((3,), 0.3))
    with pytest.raises(ShapeError, match="context was given"):
        Flow(FlowConfig(deep=block_config())).sample(2, Context(torch.zeros(2, 1, 5)))
