"""The judge reads the drawn world back exactly, and says so when it cannot."""

import numpy as np
import pytest

from starflow2.errors import DataError
from starflow2.world.detector import MIN_PIXELS, Scan, connected_components, detect
from starflow2.world.scene import BACKGROUNDS, COLORS, SHAPES, Scene, SceneObject, render, sample_scene, stream


def scenes(count, seed=0):
    rng = stream(seed)
    return [sample_scene(rng, shapes=rng.integers(len(SHAPES), size=1 + i % 4).tolist()) for i in range(count)]


def noisy(images, sigma, seed=1):
    noise = np.random.default_rng(seed).normal(0, 255 * sigma, images.shape)
    return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def is_read_back(scene: Scene, scan: Scan, sigma: float) -> bool:
    truth = sorted((t.shape, t.color, t.size, t.x, t.y, t.radius) for t in scene.objects)
    found = sorted((d.shape, d.color, d.size, *d.center, d.radius) for d in scan.detections)
    # objects darken the median of a noisy picture a little
    tint = np.abs(np.array(scan.background) - BACKGROUNDS[scene.background] / 255).max()
    return (
        len(truth) == len(found)
        and not scan.unknown
        and np.allclose(truth, found, atol=0.8)
        and tint < 0.02 + sigma / 2
    )


@pytest.mark.parametrize("sigma", [0.0, 0.03, 0.06])
@pytest.mark.parametrize("count", [200, pytest.param(1200, marks=pytest.mark.slow)])
def test_every_object_of_every_scene_is_found_with_its_shape_color_size_and_place(count, sigma):
    truth = scenes(count)
    scans = detect(noisy(np.stack([render(scene) for scene in truth]), sigma))
    assert [i for i in range(count) if not is_read_back(truth[i], scans[i], sigma)] == []


def test_a_picture_is_judged_alike_alone_and_in_a_batch():
    images = noisy(np.stack([render(scene) for scene in scenes(70)]), 0.06)
    together, alone = detect(images), [detect(image[None])[0] for image in images]
    names = [[[(d.shape, d.color, d.size) for d in scan.detections] for scan in scans] for scans in (together, alone)]
    assert names[0] == names[1]


def test_pixel_noise_on_an_empty_picture_is_nothing():
    scan = detect(noisy(np.full((1, 64, 64, 3), 214, np.uint8), 0.06))[0]
    assert not scan.detections and not scan.unknown


def test_a_bar_is_an_unknown_blob_and_two_touching_circles_are_not_two_circles():
    images = np.full((2, 64, 64, 3), 250, np.uint8)
    images[0, 30:34, 8:56] = 30
    touching = [SceneObject(shape=0, color=4, size=1, x=22 + 18 * i, y=32, angle=0) for i in range(2)]
    images[1] = render(Scene(objects=tuple(touching), background=0))
    bar, pair = detect(images)
    assert (len(bar.detections), bar.unknown) == (0, 1)
    assert len(pair.detections) + pair.unknown == 1


def test_a_color_that_the_world_does_not_have_is_none_and_the_shape_still_known():
    image = render(
        Scene(objects=(SceneObject(shape=1, color=COLORS.index("black"), size=1, x=32, y=32, angle=0),), background=0)
    )
    image[(image < 60).all(axis=-1)] = (0, 255, 255)
    (found,) = detect(image[None])[0].detections
    assert (found.shape, found.color) == (1, None)


def test_components_agree_with_flood_fill():
    mask = np.random.default_rng(0).random((3, 40, 40)) < 0.55
    labels, count = connected_components(mask)
    expected = np.zeros_like(labels)
    number = 0
    for seed in map(tuple, np.argwhere(mask)):
        stack, area = [seed], {seed}
        while stack:
            b, y, x = stack.pop()
            for near in ((b, y - 1, x), (b, y + 1, x), (b, y, x - 1), (b, y, x + 1)):
                if near not in area and 0 <= near[1] < 40 and 0 <= near[2] < 40 and mask[near]:
                    area.add(near)
                    stack.append(near)
        if seed == min(area) and len(area) >= MIN_PIXELS:
            number += 1
            expected[tuple(np.array(sorted(area)).T)] = number
    assert count == number > 3
    assert np.array_equal(labels, expected)


@pytest.mark.parametrize("images", [np.zeros((64, 64, 3), np.uint8), np.zeros((1, 64, 64, 3))])
def test_anything_but_a_batch_of_byte_images_is_refused(images):
    with pytest.raises(DataError, match="expected uint8"):
        detect(images)
