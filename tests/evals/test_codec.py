"""Scores of a codec against formulas and against codecs whose faults are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from model_cases import tiny_components
from starflow2.errors import DataError
from starflow2.evals.codec import evaluate_codec, frechet_distance
from starflow2.training.datasets import to_images
from starflow2.world.captions import caption_task


class Pixels:
    """A codec that keeps every pixel, or blurs the picture on the way back."""

    dim, grid, image_size = 3, (64, 64), 64

    def __init__(self, blurs: bool = False) -> None:
        self.blurs = blurs

    def encode(self, images: Tensor) -> Tensor:
        return images.flatten(2).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        images = latents.transpose(1, 2).unflatten(2, self.grid).clamp(-1, 1)
        return torch.nn.functional.avg_pool2d(images, 5, 1, 2) if self.blurs else images


@pytest.fixture(scope="module")
def images() -> Tensor:
    return to_images([caption_task(0, i).scene for i in range(24)])


def test_a_perfect_codec_has_no_distance_and_noise_has_the_psnr_of_its_variance(images):
    flat = images * 0.2  # nothing is clamped
    clean, noisy = evaluate_codec(Pixels(), tiny_components().features, flat, levels=(0.0, 0.1)).rows
    assert clean.ssim == pytest.approx(1, abs=1e-4) and clean.feature_fd == pytest.approx(0, abs=1e-6)
    assert noisy.psnr == pytest.approx(10 * math.log10(4 / 0.1**2), abs=0.1)
    assert noisy.feature_fd > 100 * abs(clean.feature_fd) and noisy.ssim < 0.99
    assert clean.rfid is None or clean.rfid >= 0


def test_a_blurring_codec_is_worse_in_everything(images):
    features = tiny_components().features
    (sharp,), (soft,) = (evaluate_codec(Pixels(b), features, images, levels=(0.0,)).rows for b in (False, True))
    assert soft.psnr < sharp.psnr and soft.ssim < sharp.ssim and soft.feature_fd > sharp.feature_fd


def test_the_frechet_distance_of_gaussians_is_that_of_their_parameters():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (200_000, 3)), rng.normal([1, 0, 2], [2, 1, 1], (200_000, 3))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2, rel=0.02)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_one_picture_is_no_distribution(images):
    with pytest.raises(DataError, match="at least two"):
        evaluate_codec(Pixels(), tiny_components().features, images[:1])
