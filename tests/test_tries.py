"""Several tries for suites: the first is the plain sample, and conversations go on with the confirmed reply."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from model_cases import STAGES, tiny_components
from starflow2.errors import StateError
from starflow2.models.config import SelfCheckConfig
from starflow2.pipeline import StarFlow2

ASKED = SelfCheckConfig(shows="is there {}?", done="is {} there now?", tries=2)


@pytest.fixture(scope="module")
def model() -> StarFlow2:
    components = tiny_components(STAGES, side=3)
    components.cfg = replace(components.cfg, self_check=ASKED)
    return StarFlow2(components)


def test_the_first_try_is_the_plain_sample(model):
    images, sure = model.tried([["a red star"], ["two hearts"]], [3, 4], 2)
    assert images.shape == (2, 2, 3, 24, 24) and sure.shape == (2, 2) and 0 < sure.min() <= sure.max() < 1
    plain = model.draw(["a red star", "two hearts"], [3, 4])
    torch.testing.assert_close(images[:, 0], plain, rtol=1e-3, atol=1e-3)
    assert (images[:, 1] - plain).abs().max() > 1e-2


def test_tries_of_an_edit_read_its_image(model):
    source = torch.zeros(2, 3, 24, 24)
    source[1] += 0.5
    images, _ = model.tried([[source[0], "make it red"], [source[1], "make it red"]], [3, 3], 2)
    plain = model.edits(source, ["make it red"] * 2, [3, 3])
    torch.testing.assert_close(images[:, 0], plain, rtol=1e-3, atol=1e-3)


def test_a_confirmed_image_is_that_which_generate_keeps(model):
    images, sure = model.tried([["a red star"]], [3], 3)
    (kept,) = model.generate("a red star", seed=3, tries=3)
    assert kept.confidence == pytest.approx(float(sure.max()), abs=1e-5)
    drawn = torch.from_numpy(np.array(kept.image)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(drawn, images[0, int(sure.argmax())].clamp(-1, 1), rtol=0, atol=0.01)


def test_conversations_of_confirmed_replies_are_those_of_a_session(model):
    talk = ["a red star", "two hearts"]
    ((first, second),) = model.tell_confirmed([talk], [5], 2)
    session = model.session(seed=5)
    for said, told in zip(talk, (first, second), strict=True):
        events = list(session.add(said).run(tries=2))
        images = [event.picture.image for event in events if hasattr(event, "picture")]
        assert [block.shape for block in told if not isinstance(block, str)] == [image.shape for image in images]
        for image, block in zip(images, [b for b in told if not isinstance(b, str)], strict=True):
            torch.testing.assert_close(image, block)


def test_several_tries_need_a_model_that_has_learnt_to_check_itself():
    model = StarFlow2(tiny_components(STAGES, side=3))
    with pytest.raises(StateError, match="has not learnt to check"):
        model.tried([["a red star"]], [0], 2)
