"""Image quality and density as papers report them: PSNR, SSIM, bits per dimension.

The Fréchet distance is `evals.codec.frechet_distance`. Not here: features of Inception, whose package breaks others.
Letters: B images, h, w pixels.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from starflow2.errors import ShapeError

__all__ = ["BYTE_SCALE", "JET_SCALE", "bits_per_dim", "psnr", "ssim"]

WINDOW: Final = 11  # pixels of SSIM's Gaussian window
SIGMA: Final = 1.5  # pixels, its standard deviation
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for a data range of 1
BYTE_SCALE: Final = 128.0  # a byte b with uniform noise u as (b + u) / 256 * 2 - 1, STARFlow's form
JET_SCALE: Final = 127.5  # as b / 127.5 - 1 with noise of u / 127.5, JetFormer's; 0.0056 bits apart

Pixels = NDArray[np.float64]


def psnr(image: Pixels, reference: Pixels) -> float:
    """Peak signal-to-noise ratio of an image in dB; values are 0 to 1. Infinite for equal images.

    >>> round(psnr(np.zeros((4, 4)), np.full((4, 4), 0.1)), 6)
    20.0
    """
    error = float(np.mean(np.square(_same(image, reference) - reference)))
    return -10 * math.log10(error) if error else math.inf


def ssim(image: Pixels, reference: Pixels) -> float:
    """Structural similarity of two images (h, w, channels) with values 0 to 1, as the paper that names it defines it.

    A Gaussian window of 11 pixels with sigma 1.5, population covariances, the mean over channels and over the pixels
    whose window lies inside. Raises ShapeError for images smaller than the window.
    """
    a, b = _same(image, reference), reference
    if a.ndim != 3 or min(a.shape[:2]) < WINDOW:
        raise ShapeError(f"image has shape {a.shape}; expected (height, width, channels) of at least {WINDOW} pixels.")
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a, var_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
    return float(np.mean(likeness / ((mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2))))


def _blurred(image: Pixels) -> Pixels:
    """Gaussian means (h - 10, w - 10, channels) of the windows inside an image."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(image, WINDOW, axis=axis)
        image = windows @ weights
    return image


def _same(image: Pixels, reference: Pixels) -> Pixels:
    if image.shape != reference.shape:
        raise ShapeError(f"image has shape {image.shape}, its reference {reference.shape}; expected the same.")
    return image


def bits_per_dim(mean_square: float, mean_logdet: float, scale: float = BYTE_SCALE) -> float:
    """Bits per dimension of bytes under a flow onto a standard normal distribution.

    mean_square: of the prior's values, per dimension. mean_logdet: log|dz/dx| in nats per dimension, summed over
    blocks. scale: bytes per unit of x. 8 bits are those of uniform bytes; of noise-augmented data or of latents no
    number of this kind compares with others.

    >>> round(bits_per_dim(1 / 3, 0.0), 6)
    8.566197
    """
    nats = mean_square / 2 + math.log(2 * math.pi) / 2 - mean_logdet + math.log(scale)
    return nats / math.log(2)
