"""flow/: configs and arguments that mean nothing are refused when they are given, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flow_cases import STATES, WIDE, block_config, contexts
from starflow2.errors import ConfigError, ShapeError
from starflow2.flow import (
    AffineBlock,
    BlockConfig,
    BlockJacobi,
    Context,
    Density,
    Flow,
    FlowConfig,
    Guide,
    NoiseConfig,
    SampleConfig,
    ShallowFlow,
    StackConfig,
)

STACK = StackConfig(width=40, depth=1, head_dim=20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "rtl"}, "direction is 'rtl'; expected one of l2r, r2l"),
        ({"start": "never"}, "start is 'never'"),
        ({"scale": "sigmoid"}, "scale is 'sigmoid'"),
        ({"dim": 0}, "dim is 0; expected at least 1"),
        ({"dim": 2.0}, "dim is 2.0"),
        ({"grid": (2, -1)}, r"an axis of grid \(2, -1\) is -1; expected at least 1"),
        ({"grid": ()}, r"grid is \(\)"),
        ({"grid": (1, 2, 3)}, r"grid is \(1, 2, 3\)"),
        ({"grid": "23"}, "an axis of grid '23' is"),
        ({"grid": (2**19, 2**19)}, "latents"),
        ({"clip": math.nan}, "clip is nan"),
        ({"clip": -1}, "clip is -1"),
        ({"context_dim": -1}, "context_dim is -1"),
        ({"noise": 1}, "noise is 1"),
        ({"noise": True, "noise_waves": 7}, "noise_waves is 7; expected an even number"),
        ({"stack": {"width": 40}}, "stack is .*expected StackConfig"),
        ({"stack": replace(STACK, causal=False)}, r"stack\.causal is False"),
    ],
)
def test_block_configs_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        block_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"width": 2**40}, "width is 1099511627776"),
        ({"depth": 10**9}, "depth is 1000000000"),
        ({"head_dim": -20}, "head_dim is -20"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"width": 48, "head_dim": 16}, "head_dim is 16; rotary positions on three axes need a multiple of 4"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"rope": None}, "rope is None"),
    ],
)
def test_stack_configs_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(STACK, **changes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "x", None])
def test_settings_that_are_no_numbers_are_refused_everywhere(value: Any) -> None:
    calls = [
        lambda: SampleConfig(guidance=value),
        lambda: SampleConfig(prior_scale=value),
        lambda: Guide(contexts("plain"), value),
        lambda: NoiseConfig(noise_max=value),
        lambda: NoiseConfig(max_share=value),
        lambda: FlowConfig(deep=block_config(), latent_penalty=value),
        lambda: BlockJacobi(tolerance=value),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="expected"):
            call()


def test_unknown_rules_and_schedules_are_refused_before_anything_is_sampled() -> None:
    with pytest.raises(ConfigError, match=r'rule is .starflo.*Did you mean "starflow"'):
        SampleConfig(rule="starflo")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="schedule is 'cosine'"):
        Guide(contexts("plain"), 1.0, schedule="cosine")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="weight is 'two'"):
        NoiseConfig(weight="two")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shallow", "message"),
    [
        (block_config(direction="r2l", dim=2), "grid and dim of the blocks"),
        (block_config(direction="r2l", grid=(3, 2)), "grid and dim of the blocks"),
        (block_config(direction="r2l", context_dim=3), "only the deep block takes a context"),
        ("r2l", "shallow"),
    ],
)
def test_blocks_that_do_not_fit_together_are_refused(shallow: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowConfig(deep=block_config(), shallow=(shallow,))


@pytest.mark.parametrize("changes", [{"shallow": 5}, {"shallow": [block_config()]}, {"noise": {}}, {"noise": 0.5}])
def test_parts_of_another_type_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"shallow|noise"):
        FlowConfig(deep=block_config(), **changes)


@pytest.mark.parametrize("grid", [6, (6,), [1, 6], (1, 6)])
def test_rows_of_vectors_have_one_axis(grid: Any) -> None:
    assert BlockConfig(dim=1, grid=grid, stack=STACK).grid == (1, 6)


# -- conditions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["auto", "always", "none"])
def test_a_conditional_flow_without_its_context_is_refused_at_every_door(start: str) -> None:
    flow = Flow(FlowConfig(deep=block_config(context_dim=WIDE, start=start)))
    x = torch.zeros(2, 6, 3)
    doors = (
        flow,
        flow.log_prob,
        flow.nats_per_dim,
        flow.inverse,
        flow.sample,
        flow.rsample,
        flow.deep,
        flow.deep.inverse,
    )
    for door in doors:
        with pytest.raises(ShapeError, match=rf"context is None; expected a Context of width {WIDE}"):
            door(x)
    with pytest.raises(ShapeError, match="context is None"):
        flow.denoise(x, torch.ones(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": torch.zeros(2, STATES, WIDE, dtype=torch.int64)}, "context.states has dtype torch.int64"),
        ({"attend": torch.ones(2, STATES)}, "context.attend has dtype torch.float32; expected torch.bool"),
        ({"attend": torch.ones(2, STATES + 1, dtype=torch.bool)}, "context.attend has shape"),
        ({"attend": torch.tensor([[True] * STATES, [True] * (STATES - 1) + [False]])}, "False at the last state"),
        ({"positions": torch.zeros(2, STATES, 2)}, "context.positions has shape"),
        ({"step": torch.zeros(3)}, "context.step has shape"),
    ],
)
def test_contexts_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    block, context = AffineBlock(block_config(context_dim=WIDE)), replace(contexts("plain"), **changes)
    for call in (block, block.inverse):
        with pytest.raises(ShapeError, match=message):
            call(torch.zeros(2, 6, 3), context)


def test_noise_levels_of_zero_or_nan_are_refused() -> None:
    block = AffineBlock(block_config(noise=True))
    for level in (0.0, -0.1, math.nan):
        with pytest.raises(ShapeError, match="expected levels above 0"):
            block(torch.zeros(2, 6, 3), None, torch.tensor([0.1, level]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_latents_that_are_no_floats_are_refused(dtype: torch.dtype) -> None:
    flow, x = Flow(FlowConfig(deep=block_config())), torch.zeros(2, 6, 3).to(dtype)
    for call in (flow, flow.deep, flow.log_prob, flow.inverse, flow.deep.inverse, flow.sample):
        with pytest.raises(ShapeError, match=r"has dtype .* x\.float\(\)"):
            call(x)


def test_an_empty_context_says_that_there_is_no_condition() -> None:
    block = AffineBlock(block_config(context_dim=WIDE))
    x = torch.randn(2, 6, 3)
    z, _ = block(x, Context(torch.zeros(2, 0, WIDE)))
    assert z.shape == x.shape


# -- other things in the place of configs and tensors

X = torch.zeros(2, 6, 3)
WRONG_THINGS: dict[str, Callable[[Any], object]] = {
    "a flow": lambda wrong: Flow(wrong),
    "a shallow flow": lambda wrong: ShallowFlow((wrong,)),
    "shallow blocks": lambda wrong: ShallowFlow(wrong),
    "a block": lambda wrong: AffineBlock(wrong),
    "a density": lambda wrong: Density((3,), wrong, None, None),
    "latents": lambda wrong: a_flow()(wrong),
    "latents of an inverse": lambda wrong: a_flow().inverse(wrong),
    "latents of a block": lambda wrong: a_flow().deep(wrong),
    "a context": lambda wrong: a_flow(context_dim=WIDE).log_prob(X, wrong),
    "states": lambda wrong: a_flow(context_dim=WIDE).log_prob(X, Context(wrong)),
    "positions": lambda wrong: a_flow(context_dim=WIDE).log_prob(X, Context(torch.zeros(2, 1, WIDE), wrong)),
    "a level": lambda wrong: a_flow(noise=True).log_prob(X, None, wrong),
    "settings of sampling": lambda wrong: a_flow().sample(1, config=wrong),
    "a generator": lambda wrong: a_flow().sample(1, generator=wrong),
    "a solver": lambda wrong: a_flow().deep.inverse(X, solver=wrong),
    "a guide": lambda wrong: a_flow().deep.inverse(X, guide=wrong),
}


def a_flow(**changes: Any) -> Flow:
    deep = block_config(grid=(2, 3), dim=3, **changes)
    return Flow(FlowConfig(deep=deep, noise=NoiseConfig() if deep.noise else None))


@pytest.mark.parametrize("wrong", ["x", {"width": 8}, 1.5], ids=["text", "a dictionary", "a number"])
@pytest.mark.parametrize("door", WRONG_THINGS)
def test_what_is_no_config_and_no_tensor_is_refused_by_name(door: str, wrong: object) -> None:
    with pytest.raises((ConfigError, ShapeError), match=r"is .*\((str|dict|float)\); expected|is 1\.5"):
        WRONG_THINGS[door](wrong)
