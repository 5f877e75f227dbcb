"""colours.py: what PNG and EXIF say of colours in numbers is converted as a profile of the same numbers is."""

from __future__ import annotations

import io
import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from starflow2.core.colours import ADOBE_RGB, ColourSpace
from starflow2.core.images import read_picture

COLOUR = (120, 180, 110)
SRGB_PLACES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
WIDE_PLACES = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)


def png(gamma: float | None = None, places: tuple[float, ...] = (), mode: str = "RGB", **marks: bytes) -> bytes:
    """A flat PNG with these numbers about its colours, and further chunks by name."""
    info = PngImagePlugin.PngInfo()
    if gamma is not None:
        info.add(b"gAMA", struct.pack(">I", round(gamma * 1e5)))
    if places:
        info.add(b"cHRM", struct.pack(">8I", *(round(place * 1e5) for place in places)))
    for name, data in marks.items():
        info.add(name.encode(), data)
    return encoded(Image.new("RGB", (32, 32), COLOUR).convert(mode), "PNG", pnginfo=info)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def seen(data: bytes) -> np.ndarray:
    """The colour that is read, 0 to 255."""
    return ((read_picture(data, 32)[:, 16, 16] + 1) * 127.5).numpy()


def curve(light: np.ndarray) -> np.ndarray:
    """Light 0 to 1 as sRGB encodes it, 0 to 255."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def to_light(places: tuple[float, ...]) -> np.ndarray:
    """The matrix from linear RGB of these primaries to XYZ, by its definition."""
    points = np.array(places).reshape(4, 2)
    xyz = np.array([(x / y, 1, (1 - x - y) / y) for x, y in points])
    return xyz[1:].T * np.linalg.solve(xyz[1:].T, xyz[0])


@pytest.mark.parametrize(("gamma", "mode"), [(1.0, "RGB"), (0.55, "RGB"), (1.0, "L"), (1.0, "P")])
def test_a_png_of_another_gamma_is_read_as_the_light_that_it_means(gamma, mode):
    stored = np.array(Image.new("RGB", (32, 32), COLOUR).convert(mode).convert("RGB"))[16, 16]  # P dithers
    wanted = curve((stored / 255) ** (1 / gamma))
    assert np.abs(seen(png(gamma, mode=mode)) - wanted).max() <= 2
    assert np.abs(wanted - stored).max() > 10


def test_primaries_of_a_png_and_the_mark_of_adobe_in_a_photo_mean_one_conversion():
    light = np.linalg.solve(to_light(SRGB_PLACES), to_light(WIDE_PLACES) @ (np.array(COLOUR) / 255) ** 2.2)

    def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
        return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")

    def folder(entry: bytes) -> bytes:
        return struct.pack("<H", 1) + entry + b"\0" * 4  # 18 bytes

    at = lambda place: struct.pack("<I", place)  # noqa: E731
    tags = folder(entry(0x8769, 4, 1, at(26))) + folder(entry(0xA005, 4, 1, at(44))) + folder(entry(1, 2, 4, b"R03"))
    exif = b"Exif\0\0II*\0" + at(8) + tags
    photo = encoded(Image.new("RGB", (32, 32), COLOUR), "JPEG", quality=100, subsampling=0, exif=exif)
    for data in (png(1 / 2.2, WIDE_PLACES), png(None, WIDE_PLACES), photo):
        assert np.abs(seen(data) - curve(light)).max() <= 2.5
    assert np.abs(curve(light) - COLOUR).max() > 10
    assert ADOBE_RGB.gamma == pytest.approx(1 / 2.19921875)


NOTHING = {
    "the gamma of sRGB": png(0.45455),
    "its primaries, too": png(0.45455, SRGB_PLACES),
    "marked as sRGB": png(1.0, sRGB=b"\0"),
    "no gamma": png(0.0),
    "an absurd gamma": png(40_000.0),
    "primaries on a line": png(0.45455, (0.31, 0.33, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4)),
    "primaries without light": png(0.45455, (0.31, 0.0, 0.64, 0.0, 0.3, 0.0, 0.15, 0.0)),
    "primaries beyond all colours": png(0.45455, (0.31, 0.33, 9.0, 0.3, 0.3, 0.6, 0.15, 0.06)),
    "all primaries in one place": png(0.45455, (0.3127, 0.3290) * 4),
}


@pytest.mark.parametrize("case", NOTHING)
def test_what_means_srgb_or_nothing_changes_no_pixel(case):
    assert torch.equal(read_picture(NOTHING[case], 32), read_picture(png(), 32))


def test_spaces_that_make_no_profile_say_so():
    for space in (ColourSpace(red=(0.3, 0.0)), ColourSpace(red=(0.3127, 0.33), green=(0.3127, 0.33))):
        with pytest.raises((ValueError, np.linalg.LinAlgError)):
            space.profile()
    assert math.isclose(SRGB_PLACES[2], ColourSpace().red[0]) and ColourSpace().is_srgb and not ADOBE_RGB.is_srgb
