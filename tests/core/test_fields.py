"""fields.py: a config holds what its annotations say, wherever its values come from; everything else is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch

from starflow2.core.fields import Config, Count, Natural, Positive, Range, Seed, Share, Size, Weight, number, whole
from starflow2.core.serialize import from_dict, to_dict
from starflow2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    steps: Count = 1


@dataclass(frozen=True, kw_only=True)
class Everything(Config):
    steps: Count = 1
    at: Natural = 0
    width: Size = 8
    seed: Seed = 0
    share: Share = 0.5
    weight: Weight = 0.0
    lr: Positive = 1e-3
    maybe: Positive | None = None
    sides: tuple[Count, Count] = (1, 2)
    many: tuple[Share, ...] = ()
    kind: Literal["a", "b"] = "a"
    on: bool = True
    name: str = "x"
    inner: Inner = Inner()
    other: Inner | None = None
    table: dict[str, Count] | None = None


WRONG: list[tuple[str, Any]] = [
    *((name, v) for name in ("steps", "width", "seed") for v in (1.0, 1.5, "1", None, True, [1], np.float64(1))),
    *((name, v) for name in ("share", "lr", "weight", "maybe") for v in ("0.5", True, [0.5], 1j, np.bool_(True))),
    *((name, v) for name in ("share", "lr", "weight", "maybe") for v in (math.nan, math.inf, np.float32("nan"))),
    ("steps", 0), ("at", -1), ("width", 2**20 + 1), ("seed", 2**63), ("seed", -(2**63) - 1), ("steps", 10**5000),
    ("share", -0.1), ("share", 1.1), ("weight", -1e-9), ("lr", 0), ("lr", 10**400), ("lr", torch.ones(2)), ("lr", None),
    ("sides", (1, 0)), ("sides", (1,)), ("sides", (1, 2, 3)), ("sides", 3), ("sides", "ab"), ("sides", [1, 2]),
    ("many", (0.5, 2)),
    ("kind", "c"), ("kind", 1), ("kind", None), ("on", 1), ("on", "yes"), ("name", 3), ("name", None), ("name", b"x"),
    ("inner", {"steps": 1}), ("inner", None), ("other", 3), ("table", {"a": 0}), ("table", {1: 1}), ("table", [1]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=range(len(WRONG)))
def test_a_value_outside_its_field_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name}.* is ") as caught:
        Everything(**{name: value})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200
    with pytest.raises(ConfigError):
        replace(Everything(), **{name: value})


def test_numbers_of_other_libraries_become_pythons_own():
    made = Everything(
        steps=np.int64(3), seed=np.int32(-4), share=np.float32(0.5), lr=Fraction(1, 2), weight=Decimal("0.25"),
        maybe=1, sides=(np.uint8(1), 2), on=np.bool_(False), at=torch.tensor(7),
    )  # fmt: skip
    assert made == Everything(steps=3, seed=-4, share=0.5, lr=0.5, weight=0.25, maybe=1.0, sides=(1, 2), on=False, at=7)
    assert all(type(getattr(made, n)) is int for n in ("steps", "seed", "at"))
    assert all(type(getattr(made, n)) is float for n in ("share", "lr", "weight", "maybe")) and made.on is False
    assert from_dict(Everything, to_dict(made)) == made


def test_a_config_that_is_read_names_the_path_to_a_value_out_of_range():
    data = to_dict(Everything())
    with pytest.raises(ConfigError, match=r"Everything\.inner: steps is 0; expected at least 1"):
        from_dict(Everything, {**data, "inner": {"steps": 0}})


def test_single_numbers_pass_the_same_gate():
    assert whole(np.int64(3), "n", Range(least=1)) == 3 and type(whole(np.int64(3), "n")) is int
    assert number(np.float32(0.5), "level") == 0.5 and number(2, "level") == 2.0
    with pytest.raises(ConfigError, match="level is nan; expected a finite number above 0 and at most 1"):
        number(float("nan"), "level", Range(above=0, most=1))


class Stubborn:
    def __index__(self) -> int:
        raise KeyError("no")

    __float__ = __index__


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(True), torch.tensor([3]), torch.empty((), dtype=torch.int64, device="meta"), np.array([3]),
        np.bool_(True), np.timedelta64(3), np.datetime64("2026"), Stubborn(), 1j, "3",
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_only_converts_to_a_number_is_none(value):
    for gate in (whole, number):
        with pytest.raises(ConfigError, match=r"^n is .*; expected a"):
            gate(value, "n")
    assert whole(torch.tensor(3), "n") == whole(np.int8(3), "n") == number(np.float16(3), "n") == 3
