"""core/ranges.py: what a number, a flag or a choice has to be, said on one line."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from starflow2.core.ranges import check_choice, check_flag, check_real, check_whole
from starflow2.errors import ConfigError

NO_NUMBERS: list[Any] = [None, True, "3", b"3", [], {}, complex(1, 0), torch.tensor(3), object(), "x\ny" * 100]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, 9, -1, 3.0, math.nan, 10**30])
def test_what_is_no_whole_number_in_range_is_refused_by_name_on_one_short_line(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^depth is .*; expected a whole number from 1 to 8\.$") as error:
        check_whole(1, 8, depth=value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 150


@pytest.mark.parametrize("value", [*NO_NUMBERS, -0.1, 1.1, math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_is_no_finite_number_in_range_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^share is .*; expected a finite number from 0 to 1\.$"):
        check_real(0, 1, share=value)


def test_right_values_pass_and_the_first_wrong_one_is_named() -> None:
    check_whole(1, 8, depth=1, width=8, rows=np.int64(3))
    check_real(0, 1, a=0, b=1.0, c=np.float32(0.5))
    check_flag(rope=True)
    check_choice(("exp", "softplus"), scale="exp")
    with pytest.raises(ConfigError, match="width is 9"):
        check_whole(1, 8, depth=1, width=9)
    with pytest.raises(ConfigError, match="rope is 1; expected True or False"):
        check_flag(rope=1)
    for value in (None, 3, ["exp"], "Exp"):
        with pytest.raises(ConfigError, match="expected 'exp' or 'softplus'"):
            check_choice(("exp", "softplus"), scale=value)
