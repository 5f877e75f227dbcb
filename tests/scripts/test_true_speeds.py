"""The script that holds logged speeds against the clock: what it calls true, and what false."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import script


@pytest.fixture(scope="module")
def speeds() -> Any:
    return script("true_speeds")


def lines(start: float, factor: float = 1.0) -> list[dict[str, float]]:
    """Lines of a run that began at `start`, 16 images a step and two steps a second, with speeds times `factor`."""
    found = []
    for step in (1, 2, 3):
        images, seconds = 16 * step, 10 + 0.5 * step - start
        rates = {"images_per_s": factor * images / seconds, "latents_per_s": factor * 64 * images / seconds}
        found.append({"images": images, "latents": 64 * images, **rates})
    return found


@pytest.mark.parametrize(("factor", "off"), [(1.0, 0.0), (1.05, 0.05), (0.9, -0.1)])
def test_a_speed_is_compared_with_the_time_between_the_lines_as_seen_from_outside(speeds, factor, off):
    moments = [speeds.Moment(10.5, 16), speeds.Moment(11.0, 32), speeds.Moment(11.5, 48)]
    found = speeds.differences(lines(9.0, factor), moments, 64)
    assert found["images_per_s"] == pytest.approx(off) and found["latents_per_s"] == pytest.approx(off)
    assert found["images"] == found["latents"] == 0


def test_a_count_that_differs_by_one_image_is_false(speeds):
    moments = [speeds.Moment(10.5, 16), speeds.Moment(11.0, 32), speeds.Moment(11.5, 49)]
    found = speeds.differences(lines(9.0), moments, 64)
    assert (found["images"], found["latents"]) == (-1, -64)


@pytest.mark.slow
def test_the_speeds_of_a_run_are_true(speeds, capsys):
    assert speeds.main(["--steps", "12"]) == 0, capsys.readouterr().out
