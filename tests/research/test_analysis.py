"""What is reported about a model: exact on cases known by hand, complete over every position, the same in any batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from model_cases import STAGES, tiny_components
from starflow2.errors import ConfigError, ShapeError
from starflow2.inference.config import DrawConfig
from starflow2.inference.sampler import Sampler
from starflow2.research.analysis import (
    Contribution,
    TurnCost,
    dev_prompts,
    median_cost,
    plot_skips,
    plot_turn_costs,
    skip_contributions,
    turn_costs,
)
from starflow2.research.mot import MotComponents
from starflow2.research.plots import CURVES, Panel, histogram_outline, plot_panels
from starflow2.world.questions import known_words
from stream_cases import Recording

SIDE = 2
COUNT = SIDE * SIDE


def a_sampler(**changes: object) -> Sampler:
    components = tiny_components(STAGES, side=SIDE)
    components.vocabulary = known_words()
    return Sampler(components, replace(DrawConfig(guidance=0.0, precision="float32"), **changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return a_sampler()


# -- skips ------------------------------------------------------------------------------------------------------


def test_ratio_and_cosine_are_right_where_they_are_known_by_hand():
    base = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    injected = torch.tensor([[0.0, 4.0], [1.0, 0.0], [0.0, -2.0], [0.0, 0.0]])
    contribution = Contribution.of(base, injected)
    assert contribution.contribution_ratio.tolist() == pytest.approx([4 / 7, 1 / 4, 1 / 2, 0])
    assert contribution.cosine.tolist() == pytest.approx([0, 1, -1, 0])
    numbers = contribution.to_json()
    assert numbers["cosine"]["mean"] == pytest.approx(0)
    assert numbers["contribution_ratio"]["percentiles"]["50"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert sum(numbers["cosine"]["histogram"]["counts"]) == numbers["positions"] == 4
    assert numbers["cosine"]["histogram"]["counts"][0] == numbers["cosine"]["histogram"]["counts"][-1] == 1


def test_a_constant_vector_raises_the_cosine_and_not_the_centred_one():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(200, 8, generator=generator) + torch.ones(8)
    same = torch.full((200, 8), 0.5)
    constant, both = Contribution.of(base, same), Contribution.of(base, 100 * same + (base - base.mean(0)))
    assert constant.cosine.mean() > 0.5 and constant.centred_cosine.eq(0).all()
    assert both.centred_cosine.tolist() == pytest.approx([1.0] * 200, abs=1e-4)


def test_every_latent_and_every_predicted_word_counts_once_whatever_the_batch(sampler, tmp_path):
    report = skip_contributions(sampler, prompts=3, seed=5)
    assert len(report.visual.cosine) == 3 * COUNT
    words = len(report.text.cosine)  # of each: the picture's begin, the end behind it, at least the end of a reply
    assert 3 * 3 <= words <= 3 * (3 + 64)
    assert (report.visual.contribution_ratio > 0).all() and (report.text.contribution_ratio > 0).all()
    assert report.by_place().shape == (SIDE, SIDE)
    split = skip_contributions(a_sampler(batch=2), prompts=3, seed=5)
    for mine, theirs in ((report.visual, split.visual), (report.text, split.text)):
        for name in ("contribution_ratio", "cosine"):  # words come in the order of packing
            gap = getattr(mine, name).sort().values - getattr(theirs, name).sort().values
            assert gap.abs().max() <= 1e-4
    assert json.loads(json.dumps(report.to_json()))["text"]["positions"] == words
    plot_skips(report, tmp_path / "skips.png")
    colours = {colour for _, colour in Image.open(tmp_path / "skips.png").convert("RGB").getcolors(10**6)}
    assert set(CURVES[:2]) <= colours


def test_skips_that_are_still_zero_carry_nothing():
    sampler = a_sampler()
    for layer in (sampler.pretzel.joints.visual_skip, sampler.pretzel.joints.text_skip):
        torch.nn.init.zeros_(layer.weight)
    report = skip_contributions(sampler, prompts=1)
    assert report.visual.contribution_ratio.eq(0).all() and report.text.cosine.eq(0).all()


def test_a_closed_skip_a_model_without_skips_and_no_prompts_are_refused():
    sampler = a_sampler()
    with pytest.raises(ConfigError, match="prompts is 0"):
        skip_contributions(sampler, prompts=0)
    sampler = sampler.changed(skips=("text",))
    with pytest.raises(ConfigError, match="expected both open"):
        skip_contributions(sampler)
    baseline = Sampler(MotComponents(sampler.components), sampler.config)
    with pytest.raises(ConfigError, match="expected both open"):
        skip_contributions(baseline)


def test_dev_prompts_take_the_families_in_turn():
    prompts = dev_prompts(50)
    assert len(prompts) == 50
    assert prompts[:7] == dev_prompts(7), "a longer list begins like a shorter one"


# -- likelihood and cost ------------------------------------------------------------------------------------------


def test_turns_are_timed_against_sessions_that_read_everything_anew(tmp_path):
    sampler = a_sampler()
    stream = sampler.pretzel = Recording(sampler.pretzel)  # type: ignore[assignment]
    costs = turn_costs(sampler, turns=3, repeats=1)
    read: dict[int, int] = {}  # positions by cache, in the order in which sessions began
    for slots, cache, _ in stream.calls:
        read[id(cache)] = read.get(id(cache), 0) + slots.ids.numel()
    lengths = [sum(c.slots for c in costs[: turn + 1]) for turn in range(3)]
    # a new session gets earlier images without the three tokens around each reply; the end of the last is not read yet
    assert list(read.values()) == [lengths[-1] - 3, *(length - 3 * turn - 3 for turn, length in enumerate(lengths))]
    assert [c.turn for c in costs] == [1, 2, 3]
    assert all(COUNT + 2 < c.slots < COUNT + 62 for c in costs)
    assert costs[2].reading_again > costs[2].reading > 0
    plot_turn_costs(costs, tmp_path / "turns.png")
    assert Image.open(tmp_path / "turns.png").width > 2 * 400
    with pytest.raises(ConfigError, match="repeats is 0"):
        turn_costs(sampler, repeats=0)


def test_costs_are_per_new_slot_and_the_median_of_repeats():
    runs = [TurnCost(2, 10, read, 1.0, 4.0, 1.5) for read in (9.0, 1.0, 2.0)]
    cost = median_cost(runs)
    assert cost.reading == 2.0
    numbers = cost.to_json()
    assert numbers["per_slot"] == pytest.approx(0.3) and numbers["per_slot_again"] == pytest.approx(0.55)
    assert numbers["slower"] == pytest.approx(5.5 / 3) and numbers["slower_to_start"] == pytest.approx(2)


# -- plots ------------------------------------------------------------------------------------------------------


def test_a_curve_is_drawn_where_its_numbers_say():
    panel = Panel(title="t", x_label="x", y_label="y", curves={"": [(0.0, 0.0), (0.5, 0.0)], " ": [(0.5, 1.0), (1, 1)]})
    page = plot_panels([panel])
    left, top, right, bottom = 84, 52, 84 + 400, 52 + 260
    assert page.getpixel((left + 100, bottom)) == CURVES[0]
    assert page.getpixel((right - 100, top)) == CURVES[1]
    assert page.getpixel((right - 100, bottom)) not in CURVES


@pytest.mark.parametrize("points", [[(3.0, 0.0)], [(-1e-6, 5e-7), (2e-6, 1e-6)], [(0, -1e9), (1, 1e9)]])
def test_any_scale_can_be_drawn(points, tmp_path: Path):
    assert plot_panels([Panel(title="t", x_label="x", y_label="y", curves={"a": points})]).width == 508


def test_a_histogram_with_a_missing_edge_and_a_plot_of_nothing_are_refused():
    with pytest.raises(ShapeError, match="one edge more"):
        histogram_outline([0.0, 1.0], [1.0, 2.0])
    with pytest.raises(ShapeError, match="at least one"):
        plot_panels([])
    with pytest.raises(ShapeError, match="a point"):
        plot_panels([Panel(title="t", x_label="x", y_label="y", curves={"a": []})])
