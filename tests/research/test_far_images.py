"""Images from elsewhere: the limit of the shipped weights lies between the drawn world and all that is not of it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw

from model_cases import STAGES, tiny_components
from starflow2.core.images import contact_sheet
from starflow2.models.checkpoint import load_components, save_components
from starflow2.models.config_file import FORMAT
from starflow2.models.hub import NANO
from starflow2.pipeline import StarFlow2
from starflow2.research.far_images import far_limit, keep_far_limit, world_images
from starflow2.world.captions import caption_task
from starflow2.world.scene import render, stream


@pytest.fixture(scope="module")
def nano() -> StarFlow2:
    return StarFlow2.from_pretrained("nano")


def face() -> Image.Image:
    image = Image.new("RGB", (256, 256), (240, 240, 250))
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 30, 226, 226), fill=(250, 200, 40), outline=(40, 30, 20), width=4)
    for x in (95, 160):
        draw.ellipse((x - 14, 90, x + 14, 125), fill=(40, 30, 20))
    draw.arc((80, 110, 176, 195), 20, 160, fill=(40, 30, 20), width=10)
    return image


def sheet() -> np.ndarray:
    """A screenshot of a contact sheet, which has no mark of one."""
    drawn = [Image.fromarray(render(caption_task(3, i).scene)) for i in range(4)]
    return np.asarray(contact_sheet(drawn, ["a", "b", "c", "d"], columns=2).convert("RGB"))


def gradient() -> np.ndarray:
    ramp = np.linspace(0, 255, 64)[:, None, None]
    return np.broadcast_to(ramp, (64, 64, 3)).astype(np.uint8)


def test_what_is_not_of_the_drawn_world_is_far_and_what_is_is_not(nano):
    rng = stream(0, 9)
    elsewhere = {
        "noise": rng.integers(0, 256, (64, 64, 3)).astype(np.uint8),
        "face": face(),
        "sheet": sheet(),
        "gradient": gradient(),
        "negative": 255 - render(caption_task(3, 5).scene),
    }
    assert {name: nano.is_far(image) for name, image in elsewhere.items()} == dict.fromkeys(elsewhere, True)
    assert not any(nano.is_far(render(caption_task(5, i).scene)) for i in range(12))
    assert not nano.is_far(nano.generate("a red star")[0].image)


def test_limits_are_three_times_as_far_from_the_median_as_the_farthest_drawn_image():
    class Brightness:
        def nats_of(self, images):
            return [float(np.mean(image)) for image in images]

    found = far_limit(Brightness(), 8)
    rows = np.array([np.mean(image) for _, images in world_images(8) for image in images])
    assert found.limit == pytest.approx(np.median(rows) + 3 * (rows.max() - np.median(rows)))
    assert set(found.largest) == set(found.median) == {name for name, _ in world_images(8)}


def test_a_limit_is_kept_in_the_folder_and_nothing_else_changes(tmp_path):
    save_components(tiny_components(STAGES), tmp_path / "model")
    before = json.loads((tmp_path / "model" / "config.json").read_text())
    found = keep_far_limit(tmp_path / "model", 4)
    after = json.loads((tmp_path / "model" / "config.json").read_text())
    assert load_components(tmp_path / "model").cfg.far_nats == pytest.approx(found.limit, abs=1e-3)
    assert after["format"] == FORMAT and after["model"] | {"far_nats": None} == before["model"]
    assert {k: v for k, v in after.items() if k != "model"} == {k: v for k, v in before.items() if k != "model"}


def test_a_folder_of_the_format_before_says_nothing_about_far_images(tmp_path):
    shutil.copytree(NANO, tmp_path / "nano")
    path = tmp_path / "nano" / "config.json"
    config = json.loads(path.read_text())
    del config["model"]["far_nats"]
    path.write_text(json.dumps(config | {"format": FORMAT - 1}))
    model = StarFlow2.from_pretrained(tmp_path / "nano")
    assert model.components.cfg.far_nats is None and not model.is_far(face())
