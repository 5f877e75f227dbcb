"""scripts/soak: growth is told from none, and every call of a round works."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import ALWAYS, IN_TURN, Seen, growth, soaked

from starflow2.pipeline import StarFlow2

FLAT = [Seen(float(t), 1000 + t % 3, 6) for t in range(1, 101)]


def test_growth_is_that_of_the_last_fifth_over_the_second_one() -> None:
    assert abs(growth(FLAT)[0]) < 0.01 and growth(FLAT)[1]
    assert growth([Seen(s.seconds, 1000 + 10 * int(s.seconds), 6) for s in FLAT])[0] == pytest.approx(0.43, abs=0.01)
    assert not growth([*FLAT[:-5], *(Seen(s.seconds, s.resident, 7) for s in FLAT[-5:])])[1]


@pytest.fixture(scope="module")
def model() -> StarFlow2:
    return soaked()


@pytest.mark.slow
def test_every_call_of_the_rounds_works(model: StarFlow2, tmp_path: Path) -> None:
    for call in (*ALWAYS, *IN_TURN):
        call(model, tmp_path, 3)
