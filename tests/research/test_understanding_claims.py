"""The claim that understanding improves drawing: wins are counted by prompt, both arms see the same seeds."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from model_cases import STAGES, tiny_components
from starflow2.models.config import SelfCheckConfig
from starflow2.pipeline import StarFlow2
from starflow2.research.understanding import compared, sign_test, understanding_and_drawing

ASKED = SelfCheckConfig(shows="is there {}?", done="is {} there?", tries=2)


def test_wins_and_losses_are_those_of_prompts():
    one, other = np.array([[1, 1], [1, 0], [0, 0], [0, 1]]), np.array([[0, 1], [1, 0], [0, 1], [0, 0]])
    row = compared("skips", ("open", "closed"), (one, other))
    assert (row.prompts, row.wins, row.losses) == (4, 2, 1) and row.shares == (0.5, 0.375)
    assert row.to_json()["arms"] == {"open": 0.5, "closed": 0.375}


@pytest.mark.parametrize(("wins", "losses"), [(5, 0), (4, 2), (0, 3), (3, 3), (7, 1)])
def test_the_sign_test_counts_all_ways_in_which_the_wins_could_fall(wins, losses):
    """Compared with an enumeration of fair coins."""
    count = wins + losses
    apart = [abs(2 * sum(coins) - count) >= abs(wins - losses) for coins in product((0, 1), repeat=count)]
    assert sign_test(wins, losses) == pytest.approx(sum(apart) / len(apart))


@pytest.mark.slow
def test_a_model_is_compared_with_itself_without_its_skips_and_without_its_check():
    components = tiny_components(STAGES)
    components.cfg = replace(
        components.cfg, self_check=SelfCheckConfig(shows="is there {}?", done="is {} there?", tries=2)
    )
    found = understanding_and_drawing(StarFlow2(components), quick=True)
    assert [row.name for row in found] == ["skips", "self-check"]
    assert found[0].prompts == found[1].prompts == 88 and found[0].shares[0] == found[1].shares[1]
