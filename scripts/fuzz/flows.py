"""Spoiled input of the flow library: configs, latents, contexts, noise levels, settings of sampling."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fuzz.cases import ALIENS, Bench, Case, spoiled_number
from starflow2.flow import BlockConfig, Context, Flow, FlowConfig, NoiseConfig, SampleConfig, StackConfig

__all__ = ["flows"]

STACK: dict[str, Any] = {"width": 40, "depth": 1, "head_dim": 20}
NAMES = ("clip", "dim", "context_dim", "noise_waves")


@cache
def _flow() -> Flow:
    torch.manual_seed(0)
    block = BlockConfig(dim=2, grid=(1, 3), stack=StackConfig(**STACK), context_dim=4)
    return Flow(FlowConfig(deep=block))


def flows(rng: random.Random, bench: Bench) -> Case:
    """One wrong value in a config, or in what a flow is given."""
    return _config(rng) if rng.random() < 0.5 else _input(rng)


def _config(rng: random.Random) -> Case:
    pick: Callable[[list[Any]], Any] = rng.choice  # of values that no type would let through
    right: dict[str, Any] = {"dim": 2, "grid": (1, 3), "stack": StackConfig(**STACK)}
    bad: Any = spoiled_number(rng)
    cases: list[tuple[str, Any]] = [
        ("stack", lambda: StackConfig(**(STACK | {rng.choice(list(STACK)): bad}))),
        ("number", lambda: BlockConfig(**(right | {rng.choice(NAMES): bad}))),
        ("direction", lambda: BlockConfig(**right, direction=pick(["rtl", "", 1, None]))),
        ("start", lambda: BlockConfig(**right, start=pick(["first", None, 0]))),
        ("scale", lambda: BlockConfig(**right, scale=pick(["sigmoid", None]))),
        (
            "grid",
            lambda: BlockConfig(
                **(
                    right
                    | {
                        "grid": rng.choice(
                            [(0, 3), (3, -1), (1.5, 2), (1, 2, 3), "33", None, (10**11, 1), (), math.nan]
                        )
                    }
                )
            ),
        ),
        ("head", lambda: StackConfig(width=48, depth=1, head_dim=rng.choice([16, 6, 12]))),
        ("noise", lambda: NoiseConfig(**{pick(["noise_min", "noise_max", "max_share"]): bad})),
        ("sampling", lambda: SampleConfig(**{pick(["guidance", "prior_scale"]): bad})),
        ("rule", lambda: SampleConfig(rule=pick(["starflo", None]))),
        ("directions", lambda: FlowConfig(deep=BlockConfig(**right), shallow=(BlockConfig(**right),))),
        (
            "sizes",
            lambda: FlowConfig(
                deep=BlockConfig(**right), shallow=(BlockConfig(**(right | {"dim": 3}), direction="r2l"),)
            ),
        ),
    ]
    name, call = rng.choice(cases)
    return Case(f"config {name}", call)


def _input(rng: random.Random) -> Case:
    flow, x, states = _flow(), torch.zeros(2, 3, 2), torch.zeros(2, 4, 4)
    context = Context(states)
    padded = torch.ones(2, 4, dtype=torch.bool)
    padded[:, -1] = False
    shapes: list[Tensor] = [x[0], x[:, :2], x[..., :1], x.long(), x.bool(), torch.zeros(2, 5), x.to(torch.complex64)]
    contexts: list[Any] = [
        None,
        Context(states[:1]),
        Context(states[..., :3]),
        Context(states[0]),
        Context(states.long()),
        Context(states, attend=torch.ones(2, 4)),
        Context(states, attend=padded),
        Context(states, attend=torch.ones(2, 3, dtype=torch.bool)),
        Context(states, positions=torch.zeros(2, 4, 2)),
        Context(states, step=torch.zeros(3)),
    ]
    wrong, bad = rng.choice(shapes), rng.choice(contexts)
    count: Any = rng.choice(
        [0, -1, 1.5, None, "3", math.nan, True, *[a for a in ALIENS if isinstance(a, float | str | list)]]
    )
    calls: list[tuple[str, Any]] = [
        ("log_prob", lambda: flow.log_prob(wrong, context)),
        ("inverse", lambda: flow.inverse(wrong, context)),
        ("sample", lambda: flow.sample(wrong, context)),
        ("denoise", lambda: flow.denoise(wrong, torch.ones(2), context)),
        ("log_prob context", lambda: flow.log_prob(x, bad)),
        ("sample context", lambda: flow.sample(2, bad)),
        ("sample count", lambda: flow.sample(count, context)),
        ("noise level", lambda: flow.log_prob(x, context, torch.ones(2))),
        ("guidance", lambda: flow.sample(2, context, config=SampleConfig(guidance=1.0))),
    ]
    name, call = rng.choice(calls)
    return Case(name, call)
