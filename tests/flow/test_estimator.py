"""flow/estimator.py: a density in one call is exact in the data's own units, learns, and says what it cannot take."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from flow_cases import gap
from helpers import wake
from starflow2.errors import ConfigError, DataError, ShapeError, TrainingError
from starflow2.flow import Density, FitConfig, Standardize, density

F64 = torch.float64
SHORT = FitConfig(steps=40, batch=64, lr=5e-3, checks=4)


def skewed(rows: int = 400, seed: int = 0) -> torch.Tensor:
    """Rows (n, 2) far from the origin, in units of their own, the second a function of the first."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, rows, generator=generator)
    return torch.stack([1000 + 50 * a, -3 + 0.01 * (a.square() + 0.3 * b)], dim=1)


def woken(*shape: int, **settings: Any) -> Density:
    model = wake(density(shape, width=32, blocks=3, **settings)).double()
    model.standard.mean += 0.3
    model.standard.scale *= 1.7
    return model


# -- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "settings"),
    [((5,), {}), ((3, 2), {}), ((4, 6), {"patch": 2}), ((3, 4, 4), {"patch": 2}), ((4,), {"context": 3})],
)
def test_the_density_is_the_change_of_variables_of_its_own_sampling(shape: tuple[int, ...], settings: Any) -> None:
    model = woken(*shape, **settings)
    label = 2 if settings.get("context") else None
    z = torch.randn(1, *model.flow.prior([0]).shape[1:], dtype=F64)
    z.requires_grad_()

    def sampled(latents: torch.Tensor) -> torch.Tensor:
        found = model.flow.rsample(latents, model._context(label, 1))
        return model.standard.inverse(model._from_latents(found)).flatten()

    jacobian = torch.stack([torch.autograd.grad(y, z, retain_graph=True)[0].flatten() for y in sampled(z)])
    x = sampled(z).view(1, *shape).detach()
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z.detach()).sum()
    wanted = prior - torch.linalg.slogdet(jacobian).logabsdet
    assert gap(model.log_prob(x, label)[0], wanted) <= 1e-9
    assert model.sample(3, label).shape == (3, *shape)


def test_standardisation_is_in_the_log_determinant() -> None:
    data = skewed().double()
    model = density(2, width=32, blocks=2).double()
    model.standardize(data)
    mean, scale = data.mean(0), data.std(0, correction=0)
    wanted = torch.distributions.Normal(mean, scale).log_prob(data).sum(1)  # a fresh flow is the identity
    assert gap(model.log_prob(data), wanted) <= 1e-9
    step = Standardize((2,)).double()
    step.set_from(data)
    z, logdet = step(data)
    assert gap(z.mean(0), torch.zeros(2)) <= 1e-9 and gap(z.std(0, correction=0), torch.ones(2)) <= 1e-9
    assert gap(logdet, -scale.log().sum().expand(400)) <= 1e-12 and gap(step.inverse(z), data) <= 1e-9


def test_patches_are_squares_of_the_picture() -> None:
    model = density((2, 4, 4), patch=2)
    x = torch.arange(32.0).view(1, 2, 4, 4)
    latents = model._to_latents(x)
    assert latents.shape == (1, 4, 8)
    assert latents[0, 1].tolist() == x[0, :, 0:2, 2:4].flatten().tolist()
    assert torch.equal(model._from_latents(latents), x)


def test_a_saved_density_is_the_same_one() -> None:
    model = woken(3)
    twin = density(3, width=32, blocks=3).double()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, dtype=F64)
    assert torch.equal(twin.log_prob(x), model.log_prob(x))


def test_the_same_seed_makes_the_same_weights_and_leaves_torch_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (density(3, seed=s).flow.deep.proj_in.weight for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


# -- fitting --------------------------------------------------------------------------------------


def test_a_fit_finds_a_dependence_and_draws_from_it() -> None:
    data = skewed()
    model = density(2, width=32, blocks=2)
    done: list[tuple[int, int]] = []
    fitted = model.fit(data, config=SHORT, progress=lambda step, steps: done.append((step, steps)))
    gaussian = torch.distributions.MultivariateNormal(data.mean(0), data.T.cov()).log_prob(skewed(200, 1)).mean()
    with torch.no_grad():
        nats = -model.log_prob(skewed(200, 1)).mean()
    assert float(nats) < -float(gaussian) - 0.1 and fitted.held_out < -float(gaussian)
    assert done == [(step, 40) for step in range(1, 41)] and fitted.step in (10, 20, 30, 40)
    drawn = model.sample(500, generator=torch.Generator().manual_seed(0))
    assert float(drawn[:, 0].mean()) == pytest.approx(1000, abs=15)
    again = density(2, width=32, blocks=2)
    assert again.fit(data, config=SHORT) == fitted
    assert torch.equal(again.log_prob(data[:5]), model.log_prob(data[:5]))


def test_labels_and_vectors_as_context_tell_rows_apart() -> None:
    labels = torch.arange(400) % 2
    data = skewed() + torch.tensor([0.0, 1.0]) * labels[:, None]
    model = density(2, context=2, width=32, blocks=2)
    model.fit(data, labels, config=FitConfig(steps=60, batch=128, lr=1e-2))
    with torch.no_grad():
        right, wrong = model.log_prob(data, labels), model.log_prob(data, 1 - labels)
        assert float((right > wrong).float().mean()) > 0.97
        assert torch.equal(model.log_prob(data[:3], 1), model.log_prob(data[:3], torch.tensor([1, 1, 1])))
        vectors = torch.nn.functional.one_hot(labels, 2).float()
        assert torch.equal(model.log_prob(data, vectors), right)
        assert torch.equal(model.log_prob(data, vectors[:, None]), right)
    assert float(model.sample(100, 1)[:, 1].mean() - model.sample(100, 0)[:, 1].mean()) == pytest.approx(1, abs=0.3)


def test_the_best_weights_on_held_out_rows_are_kept() -> None:
    data = skewed(40)
    config = FitConfig(steps=120, batch=36, lr=2e-2, checks=12)  # far too long for so few rows
    model = density(2, width=32, blocks=2)
    fitted = model.fit(data, config=config)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        held_out = -model.log_prob(data[order[:4]]).mean()
    assert float(held_out) == pytest.approx(fitted.held_out, abs=1e-5) and fitted.step < 120
    last = density(2, width=32, blocks=2).fit(data, config=FitConfig(steps=10, held_out=0.0))
    assert last.step == 10 and math.isnan(last.held_out)


def test_noise_fills_the_space_between_discrete_values() -> None:
    rolls = torch.randint(1, 7, (600, 1), generator=torch.Generator().manual_seed(0))
    model = density(1, spacing=1.0, width=32, blocks=2)
    model.fit(rolls, config=FitConfig(steps=60, lr=1e-2))
    with torch.no_grad():
        total = float(model.log_prob(torch.linspace(-3, 10, 1301)[:, None]).exp().sum() * 0.01)
        inside = model.log_prob(torch.arange(1.0, 7.0)[:, None]).exp()
    assert total == pytest.approx(1, abs=0.01)
    assert float(inside.sum()) == pytest.approx(1, abs=0.15), "a density over cells of width one is nearly their chance"


# -- a word on data that no density can have -----------------------------------------------------------


def spoiled(kind: str) -> torch.Tensor:
    data = skewed()
    if kind == "constant":
        data[:, 1] = 3.5
    elif kind == "discrete":
        data[:, 0] = data[:, 0].div(100).round()
    elif kind == "nan":
        data[7, 1], data[9, 0] = math.nan, math.inf
    return data


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("constant", r"data has feature 1 constant in 400 rows.*drop them, or give the spacing"),
        ("discrete", r"data has feature 0 discrete \(at most 20 distinct values\).*spacing=1 for whole numbers"),
        ("nan", r"data has NaN or infinite values in rows 7, 9; expected finite numbers: drop these rows"),
    ],
)
def test_data_that_no_density_can_have_is_refused_with_its_features_or_rows(kind: str, message: str) -> None:
    for call in (density(2).fit, density(2).standardize):
        with pytest.raises(DataError, match=message):
            call(spoiled(kind))


def test_discrete_data_may_be_taken_as_they_are_but_constant_ones_never() -> None:
    density(2, spacing=0.0).standardize(spoiled("discrete"))
    density(2, spacing=0.1).standardize(spoiled("constant"))
    with pytest.raises(DataError, match="constant"):
        density(2, spacing=0.0).standardize(spoiled("constant"))


def test_rows_that_cannot_be_scored_are_refused_by_name() -> None:
    model = density(2)
    with pytest.raises(DataError, match="x has NaN or infinite values in row 1"):
        model.log_prob(torch.tensor([[0.0, 1.0], [math.nan, 0.0]]))
    for x in (torch.zeros(3), torch.zeros(3, 3), torch.zeros(1, 2, 1)):
        with pytest.raises(ShapeError, match=r"x has shape .*; expected \(B, 2\)"):
            model.log_prob(x)
    with pytest.raises(ShapeError, match=r"dtype torch\.int64"):
        model.log_prob(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(DataError, match="data has 1 rows"):
        model.fit(torch.zeros(1, 2))


def test_contexts_that_do_not_fit_are_refused() -> None:
    model, x = density(2, context=3), torch.zeros(2, 2)
    with pytest.raises(ShapeError, match="context is None"):
        model.log_prob(x)
    with pytest.raises(ConfigError, match="context has labels from 0 to 3; expected 0 to 2"):
        model.log_prob(x, torch.tensor([0, 3]))
    with pytest.raises(ShapeError, match=r"context.states has shape \(2, 1, 4\)"):
        model.log_prob(x, torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="context was given; expected None"):
        density(2).sample(2, 1)


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        (0, {}, "shape is 0"),
        ((), {}, r"shape is \(\)"),
        ((2, 3, 4), {}, "with patch="),
        ((5, 4), {"patch": 2}, "multiples of patch"),
        ((4,), {"patch": 2}, "expected a picture"),
        (2, {"width": 50}, "width is 50; expected a multiple of 16"),
        (2, {"blocks": 0}, "blocks is 0"),
        (2, {"context": -1}, "context_dim is -1"),
        (2, {"spacing": math.nan}, "spacing is nan"),
        (2, {"seed": 1.5}, "seed is 1.5"),
        (None, {}, "shape is None"),
        (2.0, {}, r"shape is 2\.0"),
        ("ab", {}, "shape is 'ab'"),
        (b"\x02\x03", {}, "shape is "),
        (2, {"width": "x"}, "width is 'x'"),
        (2, {"width": -16}, "width is -16"),
        ((2**20, 2**20), {}, "at most 4194304 numbers a row"),
        (2, {"width": 2**20}, "and 4294967296 weights"),
    ],
)
def test_densities_that_mean_nothing_are_refused(shape: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        density(shape, **settings)


@pytest.mark.parametrize("rows", ["x", None, {}, [[1.0], [1.0, 2.0]], object(), torch.zeros(2, 2, device="meta")])
def test_what_holds_no_numbers_is_refused_by_its_name(rows: Any) -> None:
    model = density(2, width=32, context=3)
    for call in (model.log_prob, model.standardize, model.fit):
        with pytest.raises(ShapeError, match=r"^(x|data) is "):
            call(rows)  # type: ignore[operator]
    with pytest.raises(ShapeError, match=r"^context is "):
        model.log_prob(torch.zeros(2, 2), torch.zeros(2, 3, device="meta") if rows is None else rows)
    with pytest.raises(ShapeError, match=r"data has dtype torch\.complex64"):
        model.fit(torch.zeros(30, 2, dtype=torch.complex64))
    doubled = model.log_prob(torch.zeros(2, 2), torch.ones(2, 3, dtype=torch.float64))
    assert torch.equal(doubled, model.log_prob(torch.zeros(2, 2), torch.ones(2, 3)))
    with pytest.raises(DataError, match="context has NaN"):
        model.log_prob(torch.zeros(2, 2), torch.full((2, 3), math.nan))


def test_arrays_and_lists_are_rows_too() -> None:
    model, rows = density(2, width=32), [[1.0, 2.0], [3.0, 4.0]]
    wanted = model.log_prob(torch.tensor(rows))
    assert torch.equal(model.log_prob(rows), wanted)  # type: ignore[arg-type]
    assert torch.allclose(model.log_prob(np.array(rows)).float(), wanted)  # type: ignore[arg-type]
    assert density(np.int64(2)).shape == density(torch.Size([2])).shape == (2,)  # type: ignore[arg-type]


def test_the_callers_modes_change_no_likelihood_and_no_fit() -> None:
    def fitted() -> Density:
        model = density(2, width=32, blocks=2)
        model.fit(skewed(), config=FitConfig(steps=5))
        return model

    model = fitted()
    x = skewed()[:5]
    usual, drawn = model.log_prob(x), model.sample(3, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.log_prob(x), usual)
        assert torch.equal(model.sample(3, generator=torch.Generator().manual_seed(0)), drawn)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            twin = fitted()
        torch.testing.assert_close(twin.log_prob(x), usual, atol=1e-3, rtol=0)  # Adam magnifies rounding


def test_fits_that_mean_nothing_are_refused() -> None:
    for settings in ({"steps": 0}, {"lr": math.nan}, {"held_out": 1.0}, {"batch": 1.5}, {"weight_decay": -1}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            FitConfig(**settings)
    with pytest.raises(ConfigError, match=r"config is .*; expected FitConfig"):
        density(2, width=32).fit(skewed(), config={"steps": 2})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="progress is 'x'"):
        density(2, width=32).fit(skewed(), progress="x")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="context has 7 rows and data 400"):
        density(2, width=32, context=3).fit(skewed(), torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ConfigError, match="generator is 3"):
        density(2, width=32).sample(2, generator=3)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="the loss is nan"):
        density(2, width=32).fit(skewed(), config=FitConfig(steps=50, lr=1e6))
