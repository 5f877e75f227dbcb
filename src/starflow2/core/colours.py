"""Colours of images from outside, converted to sRGB: embedded profiles, and what PNG and EXIF say in numbers.

A camera or an editor names the colour space of its pixels in one of four ways: an ICC profile, an sRGB mark, PNG's
gamma and primaries (gAMA, cHRM), or the mark of Adobe RGB in EXIF. Without any of them pixels are sRGB, and so they are
where what is named is damaged. Not here: reading files (`images`).
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

__all__ = ["ColourSpace", "to_srgb"]

Floats = NDArray[np.float64]
PILImage = Image.Image

D50 = np.array([0.9642, 1.0, 0.8249])  # XYZ of the white that profiles are written for
# To cone responses, in which whites are exchanged (Bradford), row by row.
CONES = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
USUAL_GAMMA = (0.43, 0.48)  # 1 / 2.2, which stands for the curve of sRGB
GAMMAS = (0.2, 2.0)  # others are damage
NEAR = 0.005  # by which coordinates of primaries are rounded
INTEROPERABILITY, INDEX = 0xA005, 1  # tags of EXIF


@dataclass(frozen=True, slots=True)
class ColourSpace:
    """White and primaries as chromaticities (x, y), and the exponent that encodes light."""

    white: tuple[float, float] = (0.3127, 0.3290)
    red: tuple[float, float] = (0.64, 0.33)
    green: tuple[float, float] = (0.30, 0.60)
    blue: tuple[float, float] = (0.15, 0.06)
    gamma: float = 1 / 2.2  # a pixel is light ** gamma

    @property
    def is_srgb(self) -> bool:
        """True for the primaries of sRGB and the gamma that is written for its curve."""
        ours, plain = ((*s.white, *s.red, *s.green, *s.blue) for s in (self, SRGB))
        is_near = all(abs(a - b) <= NEAR for a, b in zip(ours, plain, strict=True))
        return is_near and USUAL_GAMMA[0] <= self.gamma <= USUAL_GAMMA[1]

    def profile(self) -> bytes:
        """An ICC profile of this space. Raises ValueError for numbers that make none."""
        return _profile(_colorants(self), 1 / self.gamma)


SRGB = ColourSpace()
ADOBE_RGB = ColourSpace(green=(0.21, 0.71), gamma=256 / 563)


def to_srgb(image: PILImage) -> PILImage:
    """RGB of an image of any 8-bit mode, in sRGB.

    >>> to_srgb(Image.new("L", (2, 2), 7)).getpixel((0, 0))
    (7, 7, 7)
    """
    embedded = image.info.get("icc_profile")
    if embedded:
        return _by_profile(image, embedded)
    space = _named_space(image)
    if space is None or space.is_srgb:
        return image.convert("RGB")
    try:
        profile = space.profile()
    except (ValueError, ArithmeticError, np.linalg.LinAlgError, struct.error):
        return image.convert("RGB")
    return _by_profile(image.convert("RGB"), profile)


def _by_profile(image: PILImage, profile: bytes) -> PILImage:
    """RGB of an image whose colours are those of a profile; one that is damaged, or of another mode, means sRGB."""
    pixels = image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L"}[source.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, KeyError):
        return pixels
    if (mode == "L") != (image.mode in ("1", "L", "LA")) or _moves_little(transform, mode):
        return pixels
    return ImageCms.applyTransform(image.convert(mode), transform) or pixels


def _moves_little(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """True for a profile that is sRGB up to rounding, whatever its name: it moves no colour of a grid by over 2/255."""
    steps = np.linspace(0, 255, 17).round().astype(np.uint8)
    grid = steps[None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(17, -1, 3)
    probe = Image.fromarray(grid)
    moved = ImageCms.applyTransform(probe, transform) or probe  # returned unless a transform is in place
    return int(np.abs(np.asarray(moved, int) - np.asarray(probe.convert("RGB"), int)).max()) <= 2


# -- spaces that are named in numbers


def _named_space(image: PILImage) -> ColourSpace | None:
    """The space that PNG's numbers or EXIF's mark name; None for none, a mark of sRGB, and what cannot be."""
    if "srgb" in image.info:
        return None
    gamma, places = image.info.get("gamma"), image.info.get("chromaticity")
    if gamma is None and places is None:
        return ADOBE_RGB if _has_adobe_mark(image) else None
    gamma = SRGB.gamma if gamma is None else gamma
    if not _is_between(gamma, *GAMMAS):
        return None
    if places is None:
        return ColourSpace(gamma=gamma)
    if len(places) != 8 or not all(_is_between(place, 0, 1) for place in places):
        return None
    white, red, green, blue = ((float(places[i]), float(places[i + 1])) for i in range(0, 8, 2))
    return ColourSpace(white=white, red=red, green=green, blue=blue, gamma=gamma)


def _is_between(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and low <= value <= high


def _has_adobe_mark(image: PILImage) -> bool:
    """True if EXIF data say R03, with which cameras mark Adobe RGB."""
    if "exif" not in image.info:
        return False
    try:
        return str(image.getexif().get_ifd(INTEROPERABILITY).get(INDEX, "")).startswith("R03")
    except Exception:  # damaged EXIF data, about which PIL raises what it likes
        return False


def _colorants(space: ColourSpace) -> Floats:
    """XYZ of the primaries under D50, one a column. Raises ValueError."""
    places = np.array([space.white, space.red, space.green, space.blue])
    if (places[:, 1] <= 0).any():
        raise ValueError("a chromaticity without light")
    xyz = np.stack([places[:, 0] / places[:, 1], np.ones(4), (1 - places.sum(1)) / places[:, 1]])  # (3, 4)
    white, primaries = xyz[:, 0], xyz[:, 1:]
    linear = primaries * np.linalg.solve(primaries, white)
    adapted = np.linalg.solve(CONES, np.diag((CONES @ D50) / (CONES @ white)) @ CONES @ linear)
    if not np.isfinite(adapted).all() or np.abs(adapted).max() > 8:
        raise ValueError("primaries that span no colours")
    return adapted


def _profile(colorants: Floats, exponent: float) -> bytes:
    """An ICC profile of version 2: matrix and curves, as ICC.1:2001-04 lays them out."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))
    text = b"desc\0\0\0\0" + struct.pack(">I", 1) + b"\0" * 79
    tags = {b"desc": text, b"wtpt": _xyz(D50), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    tags |= {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants.T, strict=True)}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = b"\0\0\0\0\x02\x10\0\0mntrRGB XYZ " + b"\0" * 12 + b"acsp" + b"\0" * 28 + _fixed(D50)
    rest = head.ljust(124, b"\0") + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(rest) + 4) + rest


def _xyz(values: Floats) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _fixed(values: Floats) -> bytes:
    """Numbers as s15Fixed16."""
    return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)
