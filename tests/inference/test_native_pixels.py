"""The compiled decoders of an FAE against torch's in float64, bit for bit among others, and what they refuse."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from helpers import wake
from model_cases import tiny_components
from starflow2.inference.backend import decoded_one_by_one
from starflow2.inference.native import NativeBackend, Unavailable
from starflow2.inference.native.pixels import CompiledDecoder, fae_of
from starflow2.inference.packed import pack
from starflow2.models.config import FaeConfig
from starflow2.models.fae import Fae, FaeCodec
from starflow2.nn import StackConfig

CLOSE = 1e-5  # of a pixel in float32

SMALL = StackConfig(width=32, depth=2, head_dim=16, activation="relu2", rope=False, causal=False)
CFG = FaeConfig(
    feature_dim=24, latent_dim=5, grid=(4, 4), image_size=32, encoder_width=32, encoder_heads=2,
    feature_decoder=SMALL, pixel_decoder=replace(SMALL, width=48),
)  # fmt: skip


def latents(count: int, n: int = 64, dim: int = 16) -> torch.Tensor:
    return torch.randn(count, n, dim, generator=torch.Generator().manual_seed(0))


def test_pixels_of_nano_are_those_of_torch_in_float64(nano, native):
    x = latents(2)
    found, exact = native.pixels(nano.codec, x), decoded_one_by_one(nano.codec_in_float64(), x.double())
    assert (found - exact).abs().max() <= CLOSE
    assert 0.5 < exact.abs().max() <= 1 and exact.std() > 0.05


@pytest.mark.parametrize("channels", [(), (7,), (9, 6), (40, 20, 5)], ids=str)
def test_decoders_of_any_channels_draw_what_torch_draws_in_float64(native, channels):
    """Without an upsampling, with some and a square of pixels for each position, and with a pixel for each."""
    fae = wake(Fae(replace(CFG, pixel_channels=channels)), 0.1)
    x = latents(3, 16, 5)
    found = native.pixels(FaeCodec(fae, None), x)  # type: ignore[arg-type]
    with torch.no_grad():
        exact = copy.deepcopy(fae).double().decode(x.double())
    assert found.shape == (3, 3, 32, 32) and exact.std() > 0.05
    assert (found - exact).abs().max() <= CLOSE


def test_an_image_has_the_same_bits_in_any_company_and_on_any_number_of_threads(nano, native):
    x = latents(5)
    x[1, 3, 2] = torch.nan
    together = native.pixels(nano.codec, x)
    assert bool(together[1].isnan().any()) and bool(together[[0, 2, 3, 4]].isfinite().all())
    assert torch.equal(native.pixels(nano.codec, x[3:4])[0], together[3])
    threaded = NativeBackend(pack(nano.pretzel), threads=2)
    assert torch.equal(threaded.pixels(nano.codec, x)[2:], together[2:])


def test_other_decoders_are_refused_by_the_name_of_the_setting(native):
    gelu = Fae(replace(CFG, pixel_decoder=replace(SMALL, activation="gelu")))
    with pytest.raises(Unavailable, match=r"fae.pixel_decoder.activation is gelu; the compiled form takes relu2"):
        CompiledDecoder(gelu)
    with pytest.raises(Unavailable, match=r"dtype of the FAE is torch\.float64"):
        CompiledDecoder(Fae(CFG).double())
    assert fae_of(tiny_components().codec) is not None and fae_of(object()) is None  # type: ignore[arg-type]


def test_decoders_that_are_refused_are_torch_s_one_image_at_a_time(native):
    gelu = wake(Fae(replace(CFG, pixel_decoder=replace(SMALL, activation="gelu"))), 0.1)
    x, codec = latents(2, 16, 5), FaeCodec(gelu, None)  # type: ignore[arg-type]
    assert torch.equal(native.pixels(codec, x), decoded_one_by_one(codec, x))
