"""Rows of an engine in any order of joining, leaving, cancelling and copying that hypothesis draws."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch

from engine_cases import KINDS, Crowd, asked, begun, steered, told
from model_cases import STAGES, compiled_components, tiny_components
from starflow2.inference.config import DrawConfig, Precision
from starflow2.inference.engine import Engine
from starflow2.inference.events import DecodedImage
from starflow2.inference.lean import LeanBackend
from starflow2.inference.sampler import Sampler
from starflow2.inference.streams import StreamBackend

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis draws the orders; it is in the extra `dev`")
st = hypothesis.strategies

EVENTS = 40
ACTIONS = ("join", "join", "join", "step", "step", "cancel", "release", "copy")
ORDERS = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 99)), max_size=EVENTS)
QUICK = hypothesis.settings(max_examples=15, derandomize=True, deadline=None, database=None)
LONG = hypothesis.settings(max_examples=600, deadline=None, database=None, print_blob=True)


def sampler_of(precision: Precision) -> Sampler:
    components = compiled_components() if precision == "float32" else tiny_components(STAGES, side=3)
    return Sampler(components, DrawConfig(guidance=1.0, prior_scale=0.7, precision=precision))


@cache
def native() -> tuple[Sampler, list[list[object]]]:
    """A sampler whose streams are compiled, and what each request finds in an engine of its own."""
    sampler = sampler_of("float32")
    path, note = sampler.path()
    if note.startswith("no C++ compiler"):
        pytest.skip(note)
    assert path == "native", note
    return sampler, alone(sampler, is_plain=False)


@cache
def lean() -> tuple[Sampler, list[list[object]]]:
    """A sampler in float64, and what each request finds by the plain form in an engine of its own."""
    sampler = sampler_of("float64")
    return sampler, alone(sampler, is_plain=True)


def alone(sampler: Sampler, *, is_plain: bool) -> list[list[object]]:
    found = []
    for number in range(KINDS):
        backend = StreamBackend(sampler.pretzel, sampler.dtype) if is_plain else None
        engine = Engine(steered(sampler), backend)
        row = begun(engine, asked(number, sampler.config.precision))
        found.append(told(list(engine.run()), row))
    kinds = {type(event) for events in found for event in events}
    assert {int, DecodedImage} <= kinds, "some rows are to draw and some to write"
    return found


def numbers(image: DecodedImage) -> torch.Tensor:
    """Everything that a drawn image is, as one vector; log densities in units of 10 nats, as they sum many terms."""
    densities = [0.1 * (image.log_prob or 0.0), 0.1 * (image.unconditional_log_prob or 0.0)]
    parts = [image.u, image.x, image.image.to(image.u), torch.tensor(densities, dtype=image.u.dtype)]
    return torch.cat([part.flatten() for part in parts])


def assert_as_alone(crowd: Crowd, expected: Sequence[Sequence[object]], tolerance: float) -> None:
    """Every row that is over was told what it is told alone; 0: to the last bit."""
    for row, number in crowd.finished:
        mine, theirs = told(crowd.events, row), expected[number]
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            if isinstance(a, DecodedImage) and isinstance(b, DecodedImage):
                gap = (numbers(a) - numbers(b)).abs().max()
                assert gap <= tolerance, f"row {row}, request {number}: {gap}"
            else:
                assert a == b


def bits_are_those_alone(order: Sequence[tuple[str, int]]) -> None:
    sampler, expected = native()
    crowd = Crowd(sampler)
    crowd.take(order)
    assert_as_alone(crowd, expected, 0.0)


@QUICK
@hypothesis.given(ORDERS)
def test_in_any_order_compiled_rows_have_the_bits_that_they_have_alone(order):
    bits_are_those_alone(order)


@pytest.mark.slow
@LONG
@hypothesis.given(ORDERS)
def test_in_many_more_orders_compiled_rows_have_the_bits_that_they_have_alone(order):
    bits_are_those_alone(order)


@QUICK
@hypothesis.given(ORDERS)
def test_in_any_order_rows_in_torch_equal_those_alone_and_room_follows_the_longest(order):
    sampler, expected = lean()
    crowd = Crowd(sampler)
    crowd.take(order)
    assert_as_alone(crowd, expected, 1e-5)
    backend = crowd.engine.backend
    assert isinstance(backend, LeanBackend)
    assert backend.lanes.capacity <= max([*backend.lanes.lengths, 0]) + 64
