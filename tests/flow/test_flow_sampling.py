"""flow/: guidance, priors, noise levels and the self-denoising step do what their formulas say."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from flow_cases import PIECES, WIDE, block_config, contexts, gap, rows_of
from helpers import wake
from starflow2.errors import ConfigError, ShapeError
from starflow2.flow import (
    Affine,
    AffineBlock,
    BlockConfig,
    Context,
    Flow,
    FlowConfig,
    Guide,
    Jacobi,
    NoiseConfig,
    NoiseEmbedding,
    SampleConfig,
    StackConfig,
)
from starflow2.flow.affine import Schedule, strengths
from starflow2.flow.noise import add_noise

F64 = torch.float64
RULES = ("starflow", "tarflow")


def normal(mu: float, scale: float) -> Affine:
    return Affine(torch.tensor([[[mu]]], dtype=F64), torch.tensor([[[scale]]], dtype=F64).log())


def test_the_divergence_of_two_gaussians_is_that_of_torch():
    mu, log_scale = torch.randn(2, 2, 3, 4, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    one, other = (Affine(m, 0.5 * s) for m, s in zip(mu, log_scale, strict=True))
    p, q = (torch.distributions.Normal(a.mu, a.scale) for a in (one, other))
    torch.testing.assert_close(one.kl(other), torch.distributions.kl_divergence(p, q))
    assert not one.kl(one).any()


def text_flow() -> tuple[Flow, Tensor, Context, Context]:
    """A woken deep-shallow flow with context, prior draws, a context and an unconditional one."""
    case = PIECES["deep-shallow with context"]()
    assert isinstance(case.piece, Flow) and case.context is not None
    return case.piece, case.x, case.context, contexts("plain", seed=5)


# -- the guidance formulas ------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.5, 2.0, 7.5])
@pytest.mark.parametrize(("mu_u", "scale_u"), [(0.4, 1.3), (-1.0, 2.5), (0.9, 0.71)])
def test_starflow_guidance_is_the_normalised_product_of_densities(guidance: float, mu_u: float, scale_u: float) -> None:
    conditional, unconditional = normal(0.3, 0.7), normal(mu_u, scale_u)  # narrower than the unconditional one
    guided = conditional.guide(unconditional, guidance)
    grid = torch.linspace(-20, 20, 400_001, dtype=F64)
    log_density = (1 + guidance) * _log_normal(grid, 0.3, 0.7) - guidance * _log_normal(grid, mu_u, scale_u)
    density = (log_density - log_density.max()).exp()
    density = density / torch.trapezoid(density, grid)
    mean = torch.trapezoid(grid * density, grid)
    deviation = torch.trapezoid((grid - mean) ** 2 * density, grid).sqrt()
    assert float(guided.mu) == pytest.approx(float(mean), abs=1e-6)
    assert float(guided.scale) == pytest.approx(float(deviation), abs=1e-6)
    point = torch.tensor([[[0.123]]], dtype=F64)
    wanted = torch.distributions.Normal(mean, deviation).log_prob(point)
    assert float(guided.log_prob(point)) == pytest.approx(float(wanted), abs=1e-5)


def _log_normal(x: Tensor, mu: float, scale: float) -> Tensor:
    return torch.distributions.Normal(mu, torch.tensor(scale, dtype=F64)).log_prob(x)


@pytest.mark.parametrize("guidance", [0.5, 2.0, 7.5])
def test_starflow_guidance_against_a_narrower_unconditional_moves_the_mean_and_never_widens(guidance: float) -> None:
    conditional, unconditional = normal(0.3, 0.7), normal(-0.2, 0.1)
    guided = conditional.guide(unconditional, guidance)
    assert float(guided.mu) == pytest.approx(0.3 + guidance * 0.5)  # variance ratio clipped to one
    assert float(guided.scale) == pytest.approx(0.7)
    mu, log_scale = torch.randn(2, 4, 6, 3), torch.randn(2, 4, 6, 3)
    many = Affine(mu[0], log_scale[0]).guide(Affine(mu[1], log_scale[1]), guidance)
    assert (many.log_scale <= log_scale[0] + 1e-6).all()


def test_tarflow_guidance_extrapolates_mean_and_log_scale() -> None:
    guided = normal(0.3, 0.7).guide(normal(-0.2, 1.4), 2.0, "tarflow")
    assert float(guided.mu) == pytest.approx(0.3 + 2 * 0.5)
    assert float(guided.log_scale) == pytest.approx(math.log(0.7) + 2 * math.log(0.5))


@pytest.mark.parametrize("rule", RULES)
def test_guidance_zero_and_equal_branches_change_nothing(rule: str) -> None:
    mu, log_scale = torch.randn(2, 2, 6, 3)
    affine, other = Affine(mu, log_scale), Affine(mu + 1, log_scale - 1)
    assert affine.guide(other, 0.0, rule) is affine
    same = affine.guide(Affine(mu.clone(), log_scale.clone()), 3.0, rule)
    assert gap(same.mu, mu) <= 1e-5 and gap(same.log_scale, log_scale) <= 1e-6


def test_negative_guidance_is_refused() -> None:
    with pytest.raises(ConfigError, match="guidance is -1"):
        normal(0, 1).guide(normal(0, 1), -1.0)


# -- guidance in whole samples ----------------------------------------------------------------------


def test_linear_guidance_rises_from_none_at_the_first_latent_to_all_at_the_last() -> None:
    mu, log_scale = torch.randn(2, 2, 6, 3)
    affine, other = Affine(mu, log_scale), Affine(mu + 1, log_scale + 0.3)
    guided = affine.guide(other, strengths(3.0, "linear", torch.arange(6)[:, None], 6))
    assert torch.equal(guided.mu[:, 0], mu[:, 0]) and torch.equal(guided.log_scale[:, 0], log_scale[:, 0])
    for n, guidance in ((1, 0.6), (5, 3.0)):
        wanted = affine.guide(other, guidance)
        assert gap(guided.mu[:, n], wanted.mu[:, n]) <= 1e-6
        assert gap(guided.log_scale[:, n], wanted.log_scale[:, n]) <= 1e-6
    assert strengths(3.0, "constant", torch.arange(6), 6) == 3.0


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("rule", RULES)
def test_guided_samples_equal_two_separate_branches_stepped_by_hand(rule: str, schedule: str) -> None:
    flow, z, context, empty = text_flow()
    block = flow.deep
    runs = [block.begin(2, c, None) for c in (context, empty)]
    buffer = torch.zeros(2, 7, 3)
    with torch.no_grad():
        for n in range(6):  # no cache, no doubled batch; both branches read the guided past
            cond, uncond = (block.predict(buffer, (0, n + 1), run) for run in runs)
            strength = 1.5 if schedule == "constant" else 1.5 * n / 5
            buffer[:, n] = cond.guide(uncond, strength, rule).denormalize(z[:, : n + 1])[:, n]
    guide = Guide(empty, 1.5, rule, schedule)
    got = block.inverse(z, context, guide=guide)
    assert gap(got, buffer[:, :-1]) <= 1e-4
    parallel = block.inverse(z, context, guide=guide, solver=Jacobi())
    assert gap(parallel, got) <= 1e-4
    config = SampleConfig(guidance=1.5, rule=rule, schedule=schedule)
    assert gap(flow.sample(z, context, empty, config=config), flow.shallow.inverse(got)) <= 1e-6
    assert gap(got, block.inverse(z, context)) > 1e-2


@pytest.mark.parametrize("rule", RULES)
def test_guidance_off_and_an_unconditional_equal_to_the_condition_return_the_plain_sample(rule: str) -> None:
    flow, z, context, empty = text_flow()
    plain = flow.sample(z, context)
    assert torch.equal(flow.sample(z, context, empty), plain)
    assert torch.equal(flow.sample(z, context, empty, config=SampleConfig(guidance=0.0, rule=rule)), plain)
    same = flow.sample(z, context, context, config=SampleConfig(guidance=3.0, rule=rule))
    assert gap(same, plain) <= 1e-4
    assert gap(flow.sample(z, context, empty, config=SampleConfig(guidance=3.0, rule=rule)), plain) > 1e-2


def test_guidance_without_what_it_needs_is_refused() -> None:
    flow, z, context, empty = text_flow()
    config = SampleConfig(guidance=1.0)
    with pytest.raises(ConfigError, match="unconditional is None"):
        flow.sample(z, context, config=config)
    with pytest.raises(ConfigError, match="context is None"):
        flow.sample(z, None, empty, config=config)
    with pytest.raises(ShapeError, match=r"^unconditional.states has shape"):
        flow.sample(z, context, Context(empty.states[:, 1:]), config=config)


def test_a_guided_row_does_not_depend_on_its_batch() -> None:
    flow, z, context, empty = text_flow()
    config = SampleConfig(guidance=2.0)
    both = flow.sample(z, context, empty, config=config)
    for row in range(2):
        only = slice(row, row + 1)
        alone = flow.sample(z[only], rows_of(context, only), rows_of(empty, only), config=config)
        assert gap(alone[0], both[row]) <= 1e-4


# -- priors and samples -----------------------------------------------------------------------------


def test_a_prior_row_depends_on_its_own_seed_only() -> None:
    flow, *_ = text_flow()
    rows = flow.prior([3, 5, 7])
    state = torch.get_rng_state()
    assert rows.shape == (3, 6, 3)
    assert torch.equal(flow.prior([5])[0], rows[1])
    assert torch.equal(flow.prior([7, 7, 3])[[2, 0]], rows[[0, 2]])
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


def test_prior_draws_are_standard_normal() -> None:
    flow, *_ = text_flow()
    z = flow.prior(list(range(2000)))
    assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1) < 0.02


def test_sample_is_the_inverse_of_forward_and_prior_scale_scales_the_draw() -> None:
    flow, z, context, _ = text_flow()
    x = flow.sample(z, context)
    assert gap(x, flow.inverse(z, context)) == 0
    assert gap(flow(x, context)[0], z) <= 1e-4
    cool = flow.sample(z, context, config=SampleConfig(prior_scale=0.7))
    assert gap(cool, flow.sample(0.7 * z, context)) <= 1e-6
    assert not x.requires_grad


def test_progress_reports_every_latent_in_order() -> None:
    flow, z, context, _ = text_flow()
    calls: list[tuple[int, int]] = []
    flow.sample(z, context, progress=lambda done, of: calls.append((done, of)))
    assert calls == [(n, 6) for n in range(1, 7)]


def test_samples_of_a_constant_gaussian_flow_have_its_moments() -> None:
    flow = gaussian_flow(mu=1.5, scale=0.4)
    x = flow.sample(flow.prior(list(range(2000))).double())
    assert float(x.mean()) == pytest.approx(1.5, abs=0.02) and float(x.std()) == pytest.approx(0.4, abs=0.02)


# -- noise levels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_drawn_levels_stay_in_bounds_with_the_asked_share_at_the_top(share: float) -> None:
    noise = NoiseConfig(noise_min=0.05, noise_max=0.6, max_share=share)
    level = noise.sample_levels(20_000, torch.Generator().manual_seed(0))
    assert level.shape == (20_000,) and level.dtype == torch.float32
    assert float(level.min()) >= 0.05 and float(level.max()) <= 0.6 + 1e-7
    at_top = level == torch.tensor(0.6)
    assert float(at_top.float().mean()) == pytest.approx(share, abs=0.01)
    if share < 1:
        rest = level[~at_top].double()
        assert float(rest.mean()) == pytest.approx(0.325, abs=0.005)  # uniform: mean and deviation
        assert float(rest.std()) == pytest.approx(0.55 / math.sqrt(12), abs=0.005)
    assert torch.equal(level, noise.sample_levels(20_000, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "noise",
    [
        NoiseConfig(),
        NoiseConfig(noise_min=0.1, noise_max=0.3, max_share=0.25),
        NoiseConfig(noise_min=0.3, noise_max=0.3),
        NoiseConfig(max_share=1.0),
    ],
)
def test_the_mean_log_level_agrees_with_a_monte_carlo_mean(noise: NoiseConfig) -> None:
    logs = noise.sample_levels(400_000, torch.Generator().manual_seed(1)).double().log()
    assert noise.mean_log_level == pytest.approx(float(logs.mean()), abs=5e-3)


def test_loss_weights_are_the_level_or_one() -> None:
    level = torch.tensor([0.1, 0.5])
    assert torch.equal(NoiseConfig().loss_weight(level), level)
    assert torch.equal(NoiseConfig(weight="one").loss_weight(level), torch.ones(2))


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (-0.1, 0.5), (0.5, 0.4)])
def test_noise_bounds_out_of_order_are_refused(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match="noise_min"):
        NoiseConfig(noise_min=low, noise_max=high)


def test_added_noise_has_the_level_of_its_row() -> None:
    x = torch.randn(2, 100, 100)
    noisy = add_noise(x, torch.tensor([0.1, 0.5]), torch.Generator().manual_seed(2))
    difference = noisy - x
    assert float(difference[0].std()) == pytest.approx(0.1, rel=0.03)
    assert float(difference[1].std()) == pytest.approx(0.5, rel=0.03)
    assert torch.equal(noisy, add_noise(x, torch.tensor([0.1, 0.5]), torch.Generator().manual_seed(2)))


def test_the_noise_embedding_is_sines_and_cosines_of_the_log_level() -> None:
    embedding = NoiseEmbedding(8)
    calls: list[Tensor] = []
    embedding.mlp.register_forward_pre_hook(lambda _, given: calls.append(given[0]))
    embedding(torch.tensor([0.2]))
    freqs = [10000.0 ** (-i / 4) for i in range(4)]
    angles = [math.log(0.2) * f for f in freqs]
    wanted = torch.tensor([[*map(math.sin, angles), *map(math.cos, angles)]])
    assert gap(calls[0], wanted) <= 1e-6


# -- the self-denoising step ----------------------------------------------------------------------


def gaussian_flow(mu: float, scale: float) -> Flow:
    """A flow whose density is exactly N(mu, scale^2) in every channel, in float64."""
    flow = Flow(FlowConfig(deep=block_config(clip=0.0))).double()
    with torch.no_grad():
        flow.deep.head.bias[:3], flow.deep.head.bias[3:] = math.log(scale), mu
    return flow


def test_denoising_a_gaussian_gives_its_closed_form_posterior_mean() -> None:
    mu, clean_scale, t = 0.8, 1.3, 0.5
    flow = gaussian_flow(mu, math.hypot(clean_scale, t))  # the density of noisy latents
    x = mu + 2 * torch.randn(2, 6, 3, dtype=F64)
    denoised = flow.denoise(x, torch.full((2,), t))
    assert gap(denoised, (clean_scale**2 * x + t**2 * mu) / (clean_scale**2 + t**2)) <= 1e-10
    assert not denoised.requires_grad


def test_each_row_is_denoised_at_its_own_level() -> None:
    flow = gaussian_flow(0.0, 1.0)
    x = torch.randn(2, 6, 3, dtype=F64)
    denoised = flow.denoise(x, torch.tensor([0.1, 0.6]))
    assert gap(denoised, x * torch.tensor([1 - 0.01, 1 - 0.36], dtype=F64)[:, None, None]) <= 1e-6


@pytest.mark.parametrize("name", ["deep-shallow", "deep-shallow with context and noise"])
def test_denoising_follows_the_gradient_of_log_prob_found_by_differences(name: str) -> None:
    case = PIECES[name](dtype=F64)
    flow, level = case.piece, torch.tensor([0.05, 0.4], dtype=F64)
    assert isinstance(flow, Flow)
    step = 1e-5
    grad = torch.zeros_like(case.x)
    with torch.no_grad():
        for n in range(6):
            for d in range(3):
                nudge = torch.zeros_like(case.x)
                nudge[:, n, d] = step
                up, down = (flow.log_prob(case.x + s * nudge, case.context, case.noise_level) for s in (1, -1))
                grad[:, n, d] = (up - down) / (2 * step)
    wanted = case.x + level[:, None, None] ** 2 * grad
    with torch.no_grad():  # a caller's no_grad must not matter
        assert gap(flow.denoise(case.x, level, case.context), wanted) <= 1e-7


def moons(count: int, generator: torch.Generator) -> Tensor:
    """Two interleaved half circles as two latents of one channel: (count, 2, 1)."""
    angle = math.pi * torch.rand(count, generator=generator)
    side = 2.0 * torch.randint(2, (count,), generator=generator) - 1
    return torch.stack([side * (angle.cos() - 0.5), side * (angle.sin() - 0.25)], dim=1).unsqueeze(-1)


@pytest.fixture(scope="module")
def fitted() -> Flow:
    """A small noise-conditioned flow after 120 steps on two moons, about two seconds."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    stack = StackConfig(width=20, depth=1, head_dim=20)
    configs = [BlockConfig(dim=1, grid=(1, 2), stack=stack, direction=d, noise=True) for d in ("l2r", "r2l", "l2r")]
    noise = NoiseConfig(noise_min=0.1, noise_max=0.5)
    flow = Flow(FlowConfig(deep=configs[2], shallow=tuple(configs[:2]), noise=noise))
    optimizer = torch.optim.Adam(flow.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=120)
    for _ in range(120):
        level = noise.sample_levels(128, generator)
        nats = flow.nats_per_dim(add_noise(moons(128, generator), level, generator), None, level)
        loss = (noise.loss_weight(level) * nats).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return flow.eval()


def test_denoising_lowers_the_distance_to_the_clean_points_after_a_short_fit(fitted: Flow) -> None:
    generator = torch.Generator().manual_seed(9)
    clean = moons(1000, generator)
    for t in (0.15, 0.3, 0.5):
        level = torch.full((1000,), t)
        noisy = add_noise(clean, level, generator)
        before = float((noisy - clean).square().mean().sqrt())
        after = float((fitted.denoise(noisy, level) - clean).square().mean().sqrt())
        assert before == pytest.approx(t, rel=0.05)
        assert after < 0.98 * before, f"at level {t}"


def test_held_out_likelihood_never_beats_the_floor_that_the_noise_sets(fitted: Flow) -> None:
    generator = torch.Generator().manual_seed(10)
    noise = fitted.cfg.noise
    assert noise is not None
    level = noise.sample_levels(4000, generator)
    with torch.no_grad():
        nats = fitted.nats_per_dim(add_noise(moons(4000, generator), level, generator), None, level)
    floor = 0.5 * math.log(2 * math.pi * math.e) + noise.mean_log_level
    assert floor < float(nats.mean()) < floor + 1.5


def test_a_fitted_flow_samples_the_moons(fitted: Flow) -> None:
    z = fitted.prior(list(range(400)))
    x = fitted.sample(z, noise_level=torch.full((400,), 0.1), config=SampleConfig(shallow_solver=Jacobi()))
    angle = torch.linspace(0, math.pi, 200)
    moon = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    distance = torch.cdist(x.squeeze(-1), torch.cat([moon, -moon])).amin(1)
    unfitted = torch.cdist(z.squeeze(-1), torch.cat([moon, -moon])).amin(1)
    assert float(distance.median()) < 0.7 * float(unfitted.median())


def test_a_flow_without_a_level_input_still_denoises_at_a_given_level() -> None:
    case = PIECES["deep-shallow"]()
    flow = case.piece
    assert isinstance(flow, Flow) and flow.cfg.noise is None
    still = flow.denoise(case.x, torch.zeros(2))
    assert torch.equal(still, case.x)


def test_flow_parameters_collect_no_gradient_from_denoising() -> None:
    flow = wake(Flow(FlowConfig(deep=block_config())))
    flow.denoise(torch.randn(2, 6, 3), torch.full((2,), 0.2))
    assert all(p.grad is None for p in flow.parameters())


def test_a_block_with_context_still_runs_without_one_from_its_start() -> None:
    block, empty = wake(AffineBlock(block_config(context_dim=WIDE))), contexts("empty")
    alone = AffineBlock(block_config())
    alone.load_state_dict(block.state_dict(), strict=False)
    x = torch.randn(2, 6, 3)
    assert gap(block.inverse(block(x, empty)[0], empty), x) <= 1e-4
    assert gap(block(x, empty)[0], alone(x)[0]) <= 1e-6  # as if it took no context
    assert gap(block(x, empty)[0], block(x, contexts("plain"))[0]) > 1e-3


def test_whitened_context_enters_with_zero_mean_and_unit_variance() -> None:
    stack = StackConfig(width=40, depth=1, head_dim=20)
    block = AffineBlock(BlockConfig(dim=2, grid=(1, 2), stack=stack, context_dim=12))
    skewed = torch.randn(4000, 12) * torch.logspace(0, -1, 12) + 5.0
    block.whiten_context(skewed)
    entered = block.context_in(skewed)
    assert entered.mean(0).abs().max() < 1e-3
    assert torch.allclose(entered.square().sum(1).mean(), torch.tensor(12.0), rtol=1e-3)
