"""images.py: bytes survive both ways, sheets keep their places, PNG files carry their story, none is half-written."""

from __future__ import annotations

import errno
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile

from starflow2.core.images import (
    FORMATS,
    checked_pixels,
    contact_sheet,
    picture_files,
    psnr,
    read_metadata,
    read_picture,
    save_png,
    to_pil,
    to_tensor,
)
from starflow2.core.png import missing_bytes
from starflow2.errors import ConfigError, DataError, OutputError, ShapeError


def every_byte() -> np.ndarray:
    return np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8)


def test_every_byte_survives_the_way_to_a_tensor_and_back():
    image = to_tensor(every_byte())
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32
    assert image.min() == -1 and image.max() == 1
    assert np.array_equal(np.asarray(to_pil(image)), every_byte())
    assert torch.equal(to_tensor(Image.fromarray(every_byte())), image)


def test_rows_stay_rows_and_red_stays_red():
    pixels = np.zeros((2, 4, 3), dtype=np.uint8)
    pixels[0, 3] = (255, 0, 0)
    image = to_tensor(pixels)
    assert image.shape == (3, 2, 4)
    assert image[:, 0, 3].tolist() == [1, -1, -1]
    assert to_pil(image).size == (4, 2) and to_pil(image).getpixel((3, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "RGB"])
def test_an_image_of_any_mode_becomes_three_channels(mode):
    assert to_tensor(Image.new("RGB", (5, 3), "white").convert(mode)).eq(1).all()


def test_what_is_transparent_becomes_paper_not_ink():
    assert to_tensor(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).eq(1).all()


def test_values_outside_the_range_are_clipped_and_bf16_is_taken():
    image = torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1).bfloat16()
    assert to_pil(image).getpixel((0, 0)) == (0, 128, 255)


def test_wrong_shapes_and_numbers_that_are_none_are_refused():
    with pytest.raises(ShapeError, match=r"\(2, 2\) uint8"):
        to_tensor(np.zeros((2, 2), dtype=np.uint8))
    with pytest.raises(ShapeError, match="float32"):
        to_tensor(np.zeros((2, 2, 3), dtype=np.float32))
    with pytest.raises(ShapeError, match=r"\(1, 3, 2, 2\)"):
        to_pil(torch.zeros(1, 3, 2, 2))
    with pytest.raises(DataError, match="NaN"):
        to_pil(torch.full((3, 2, 2), torch.nan))


def test_the_signal_to_noise_ratio_is_that_of_the_mean_square_error_image_by_image():
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64) - 0.5
    noisy = images + torch.tensor([0.1, 0.01])[:, None, None, None]
    torch.testing.assert_close(psnr(noisy, images), torch.tensor([26.0206, 46.0206], dtype=torch.float64))
    torch.testing.assert_close(psnr(127.5 * noisy, 127.5 * images, span=255), psnr(noisy, images))
    assert psnr(images, images).isfinite().all()


def test_a_sheet_shows_each_image_in_its_place_above_its_label():
    colours = ["red", "lime", "blue"]
    sheet = contact_sheet([Image.new("RGB", (64, 64), c) for c in colours], ["one", "", "three"], columns=2)
    assert sheet.width == 12 + 2 * (3 * 64 + 12)
    drop = (sheet.height - 12) // 2
    centres = [(12 + 96, 12 + 96), (12 + 192 + 12 + 96, 12 + 96), (12 + 96, 12 + drop + 96)]
    assert [sheet.getpixel(c) for c in centres] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    beneath = np.asarray(sheet)[12 + 192 + 2 : 12 + drop]
    assert (beneath[:, 12:204] < 100).any() and not (beneath[:, 216:408] < 100).any()  # ink under "one", none under ""


def test_a_label_without_an_image_stands_at_the_top_of_its_place():
    sheet = np.asarray(contact_sheet([Image.new("RGB", (64, 64), "white"), None], ["", "a question"], columns=2))
    assert (sheet[12:60, 216:408] < 100).any() and (sheet[100:204, 216:408] > 200).all()
    with pytest.raises(ShapeError, match="contact_sheet"):
        contact_sheet([None], ["a question"])


def test_a_label_stays_within_the_width_of_its_image_however_long():
    label = "x" * 400 + " two red hearts left of a blue square" * 40
    sheet = np.asarray(contact_sheet([Image.new("RGB", (64, 64), "white")] * 2, [label, ""], columns=2))
    assert sheet.shape[0] < 12 + 192 + 6 * 20 + 24
    assert not (sheet[12 + 192 + 2 :, 206:] < 100).any()


def test_a_sheet_of_nothing_or_without_all_labels_is_refused():
    picture = Image.new("RGB", (8, 8))
    for images, labels, columns in (([], [], 2), ([picture], [], 2), ([picture], ["a"], 0)):
        with pytest.raises(ShapeError, match="contact_sheet"):
            contact_sheet(images, labels, columns=columns)


def test_a_png_keeps_its_pixels_and_says_how_it_was_made(tmp_path):
    story = {"prompt": "two red hearts", "seed": "7", "note": "größer × α\nsecond line", "long": "word " * 5000}
    save_png(Image.fromarray(every_byte()), tmp_path / "new" / "hearts.png", story)
    assert read_metadata(tmp_path / "new" / "hearts.png") == story
    with Image.open(tmp_path / "new" / "hearts.png") as image:
        assert np.array_equal(np.asarray(image), every_byte())
    assert os.listdir(tmp_path / "new") == ["hearts.png"]


def test_an_image_without_a_story_has_an_empty_one(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.jpg") == read_metadata(tmp_path / "a.png") == {}


@pytest.mark.parametrize("content", [None, b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_not_an_image_gives_one_line_naming_it(tmp_path, content):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png as an image") as caught:
        read_metadata(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


def test_a_cut_png_is_refused(tmp_path):
    save_png(Image.effect_noise((64, 64), 80).convert("RGB"), tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.png"):
        read_metadata(tmp_path / "a.png")


class Unwritable(Image.Image):
    """An image whose bytes the disk takes half of."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code

    def save(self, path: Path, **options: object) -> None:
        path.write_bytes(b"\x89PNG\r\n")
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_disk_or_a_read_only_folder_leaves_the_old_image_alone(tmp_path, code):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (4, 4), "red"), path)
    old = path.read_bytes()
    with pytest.raises(OutputError, match=f"a.png: {os.strerror(code)}"):
        save_png(Unwritable(code), path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.png"]


def test_a_name_that_promises_another_format_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"\.png"):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "a.jpg")


# -- images as input


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **options: object) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 40)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA"])
def test_still_and_opaque_images_of_every_ordinary_mode_are_read(tmp_path, mode):
    picture = noise(mode, (32, 32))
    expected = to_tensor(picture.convert("RGB"))
    for source in (picture, saved(tmp_path, picture), str(tmp_path / "a.png")):
        assert torch.equal(read_picture(source, 32), expected)


@pytest.mark.parametrize(
    ("name", "size"), [("a.jpg", (32, 32)), ("a.gif", (32, 32)), ("a.webp", (40, 33)), ("a.bmp", (17, 90))]
)
def test_still_images_of_other_formats_are_read(tmp_path, name, size):
    read = read_picture(saved(tmp_path, noise(size=size), name), 32)
    assert read.shape == (3, 32, 32) and read.std() > 0.05


def test_an_image_that_is_not_square_is_cropped_to_its_middle(tmp_path):
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste(Image.new("RGB", (20, 20), "lime"), (20, 0))
    for picture in (wide, wide.rotate(90, expand=True)):
        read = read_picture(picture, 20)
        assert read.shape == (3, 20, 20)
        assert read[1].eq(1).all() and read[0].eq(-1).all()


def test_an_image_of_another_size_is_scaled_and_stays_in_range(tmp_path):
    for side in (16, 200):
        read = read_picture(noise(size=(side, side)), 64)
        assert read.shape == (3, 64, 64) and read.min() >= -1 and read.max() <= 1
    flat = read_picture(Image.new("RGB", (333, 200), (10, 200, 30)), 64)
    assert torch.equal(flat, to_tensor(Image.new("RGB", (64, 64), (10, 200, 30))))


def animated(tmp_path: Path, name: str) -> Path:
    first, *rest = (Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue"))
    return saved(tmp_path, first, name, save_all=True, append_images=rest)


def a_png(side: int, bits: int, pixels: bytes) -> bytes:
    """A PNG file in three colours, written by hand: PIL writes none with 16 bits, nor one that lies about its size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def a_bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it has `side` x `side` pixels."""
    return a_png(side, 8, b"\0" * 64)


def sixteen_bits() -> bytes:
    """Three channels of 16 bits, which PIL opens as one of 8 without a word."""
    return a_png(32, 16, b"".join(b"\0" + bytes(range(192)) for _ in range(32)))


def cut(path: Path, share: float = 0.5) -> Path:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def palette_with_a_hole() -> Image.Image:
    image = noise("P")
    image.info["transparency"] = image.getpixel((0, 0))
    return image


REFUSED = {
    "not there": (lambda t: t / "a.png", "expected a complete image"),
    "text": (lambda t: written(t / "a.png", b"hello"), "expected a complete image"),
    "truncated png": (lambda t: cut(saved(t, noise())), "expected a complete image"),
    "truncated jpeg": (lambda t: cut(saved(t, noise(), "a.jpg")), "expected a complete image"),
    "truncated by a little": (lambda t: cut(saved(t, noise(), "a.jpg"), 0.95), "expected a complete image"),
    "bomb": (lambda t: written(t / "a.png", a_bomb(30_000)), "expected a complete image of ordinary size"),
    "half a bomb": (lambda t: written(t / "a.png", a_bomb(11_000)), "expected a complete image of ordinary size"),
    "gif": (lambda t: animated(t, "a.gif"), "several frames.*save the frame"),
    "apng": (lambda t: animated(t, "a.png"), "several frames.*save the frame"),
    "tiff": (lambda t: animated(t, "a.tif"), "several frames.*save the frame"),
    "webp": (lambda t: animated(t, "a.webp"), "several frames.*save the frame"),
    "cmyk": (lambda t: saved(t, noise("CMYK"), "a.jpg"), "CMYK.*convert it"),
    "16 bits grey": (lambda t: saved(t, Image.fromarray(np.full((32, 32), 40_000, np.uint16))), "16.*convert it"),
    "16 bits colour": (lambda t: written(t / "a.png", sixteen_bits()), "16.*convert it"),
    "32 bits": (lambda t: saved(t, Image.new("F", (32, 32)), "a.tif"), "F.*convert it"),
    "transparent": (lambda t: saved(t, Image.new("RGBA", (32, 32), (9, 9, 9, 254))), "transparent.*background"),
    "transparent grey": (lambda t: saved(t, Image.new("LA", (32, 32), (9, 0))), "transparent.*background"),
    "transparent palette": (lambda t: saved(t, palette_with_a_hole()), "transparent.*background"),
    "thin": (lambda t: saved(t, Image.new("RGB", (1, 40))), "1 x 40.*at least 16"),
    "flat": (lambda t: saved(t, Image.new("RGB", (40, 15))), "40 x 15.*at least 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_only_be_read_by_guessing_is_refused_with_its_name_and_a_remedy(tmp_path, case):
    make, remedy = REFUSED[case]
    path = make(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=remedy) as caught:
            read_picture(path, 32)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and ".." not in message.removeprefix(str(path))


def test_an_image_without_a_file_is_refused_in_the_same_way():
    with pytest.raises(DataError, match=r"the image has transparent pixels.*background"):
        read_picture(Image.new("RGBA", (32, 32)), 32)
    with pytest.raises(DataError, match="the image has colour mode CMYK"):
        read_picture(Image.new("CMYK", (32, 32)), 32)


def test_a_folder_is_not_an_image(tmp_path):
    with pytest.raises(DataError, match="as an image"):
        read_picture(tmp_path, 32)


def test_a_photograph_is_read_upright(tmp_path):
    picture = Image.new("RGB", (32, 32))
    picture.paste((255, 255, 255), (0, 0, 32, 16))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned upside down
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = read_picture(tmp_path / "turned.png", 32)
    assert upright[:, 0].max() == -1 and upright[:, -1].min() == 1


def test_an_image_may_come_as_the_bytes_of_its_file(tmp_path):
    path = saved(tmp_path, noise(size=(40, 30)), "a.png")
    assert torch.equal(read_picture(path.read_bytes(), 32), read_picture(path, 32))
    with pytest.raises(DataError, match=r"the image as an image: its bytes are of no known format;"):
        read_picture(b"<html>", 32)


# -- one gate, whatever comes


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


@pytest.mark.parametrize("format", ["EPS", "PCX", "TGA", "ICO", "PPM", "JPEG2000", "SGI", "MSP", "PDF"])
def test_other_formats_are_refused_and_none_of_them_starts_a_program(format, tmp_path, monkeypatch):
    log = tmp_path / "log"
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho $@ >> {log}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    data = encoded(noise("1" if format == "MSP" else "RGB", (32, 32)), format)
    (tmp_path / "x.png").write_bytes(data)
    for read in (lambda: read_picture(tmp_path / "x.png", 32), lambda: read_picture(data, 32)):
        with pytest.raises(DataError, match="of no known format"):
            read()
    with pytest.raises(DataError, match="of no known format"):
        read_metadata(tmp_path / "x.png")
    assert not log.exists() and format not in FORMATS


def test_an_undecoded_postscript_image_is_not_decoded(tmp_path):
    image = Image.open(io.BytesIO(encoded(noise(), "EPS")))
    with pytest.raises(DataError, match="undecoded EPS file"):
        read_picture(image, 32)


def test_bytes_arrays_tensors_and_files_of_one_image_are_one_image(tmp_path):
    image = noise(size=(40, 30))
    pixels = np.asarray(image)
    expected = read_picture(image, 32)
    data = encoded(image)
    (tmp_path / "a.png").write_bytes(data)
    sources = [
        pixels, pixels[::-1].copy()[::-1], np.asfortranarray(pixels), torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        data, bytearray(data), memoryview(data), io.BytesIO(data), tmp_path / "a.png", (tmp_path / "a.png").open("rb"),
    ]  # fmt: skip
    for source in sources:
        assert torch.equal(read_picture(source, 32), expected)


def test_floats_are_taken_in_their_one_range_and_bytes_in_theirs():
    floats = read_picture(noise(size=(32, 32)), 32)
    raw = ((floats + 1) * 127.5).round().to(torch.uint8)
    assert torch.allclose(read_picture(raw, 32), floats, atol=1e-6)
    assert torch.equal(checked_pixels(raw[None])[0], read_picture(raw, 32))
    assert torch.equal(read_picture(floats.double(), 32), floats)
    assert read_picture(floats * 1.0005, 32).abs().max() <= 1, "rounding of a resize is cut off"
    assert torch.equal(read_picture(floats.requires_grad_(), 32), floats.detach())


FLOATS = torch.zeros(3, 32, 32)
NO_IMAGES = {
    "int64": (FLOATS.long(), ShapeError, "int64; expected floats"),
    "bool": (FLOATS.bool(), ShapeError, "bool; expected floats"),
    "complex": (FLOATS.cfloat(), ShapeError, "complex64; expected floats"),
    "0 to 255 as floats": (FLOATS + 255, DataError, r"255 to 255; expected \[-1, 1\]"),
    "nan": (FLOATS * torch.nan, DataError, "NaN"),
    "infinite": (FLOATS - torch.inf, DataError, "infinite"),
    "huge": (FLOATS.double() + 1e300, DataError, "infinite"),
    "meta": (FLOATS.to("meta"), ShapeError, "on meta"),
    "sparse": (FLOATS.to_sparse(), ShapeError, "sparse"),
    "another size": (torch.zeros(3, 16, 16), ShapeError, r"expected \(3, 32, 32\)"),
    "a batch": (FLOATS[None], ShapeError, r"expected \(3, 32, 32\)"),
    "bytes of a batch": (FLOATS[None].byte(), ShapeError, r"\(1, 3, 32, 32\) torch.uint8; expected \(3, height"),
    "meta bytes": (FLOATS.byte().to("meta"), ShapeError, "expected"),
    "an array of floats": (np.zeros((32, 32, 3)), ShapeError, r"float64; expected \(height, width, 3\) uint8"),
    "an array of bools": (np.zeros((32, 32, 3), bool), ShapeError, "bool; expected"),
    "an array of channels first": (np.zeros((3, 32, 32), np.uint8), ShapeError, "expected"),
    "a flat array": (np.zeros((32, 32), np.uint8), ShapeError, r"\(32, 32\) uint8; expected"),
    "an empty array": (np.zeros((0, 32, 3), np.uint8), ShapeError, "expected"),
    "a small array": (np.zeros((8, 8, 3), np.uint8), DataError, "at least 16"),
    "None": (None, DataError, "None .NoneType.; expected the name of a file"),
    "a number": (3, DataError, "3 .int.; expected"),
    "a list": ([[0, 0], [0, 0]], DataError, "list.; expected"),
    "text in a file": (io.StringIO("x"), DataError, "StringIO.; expected"),
    "no bytes": (b"", DataError, "no known format"),
    "an address": ("https://example.org/c.png", DataError, "local files; download it first"),
    "an address as a path": (Path("https://example.org/c.png"), DataError, "local files; download it first"),
    "an endless file": ("/dev/zero", DataError, "no regular file"),
    "a name with a null byte": ("a\0b", DataError, r"a\\x00b"),
    "no name": ("", DataError, "regular file"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_IMAGES)
def test_what_has_no_one_reading_as_an_image_is_refused_by_name(case):
    source, kind, message = NO_IMAGES[case]
    with pytest.raises(kind, match=message) as caught:
        read_picture(source, 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, -1, "64", None, 1.5, True, 10**6])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ConfigError, match=r"^size is"):
        read_picture(noise(), size)


def test_a_phone_photo_with_a_second_picture_in_its_file_is_its_first(tmp_path):
    photo, depth = noise(size=(32, 32)), Image.new("RGB", (32, 32), "red")
    data = encoded(photo, "MPO", save_all=True, append_images=[depth])
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert torch.equal(read_picture(data, 32), read_picture(encoded(photo, "JPEG"), 32))


def test_a_flipped_bit_anywhere_in_a_png_is_found():
    data = encoded(noise(size=(32, 32)))
    rng, whole = np.random.default_rng(0), read_picture(data, 32)
    for at in rng.integers(8, len(data), 60):
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        try:
            assert torch.equal(read_picture(bytes(broken), 32), whole)
        except DataError:
            continue


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA"])
def test_a_png_whose_rows_are_too_few_is_refused_though_its_checksums_are_right(mode):
    data = encoded(noise(size=(40, 37)).convert(mode))
    at = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[at - 4 : at])
    rows = zlib.decompress(data[at + 4 : at + 4 + length])
    for kept, is_whole in ((len(rows), True), (len(rows) - 1, False), (len(rows) // 2, False), (0, False)):
        chunk = b"IDAT" + zlib.compress(rows[:kept])
        body = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        short = data[: at - 4] + body + data[at + 8 + length :]
        assert (missing_bytes(short) == 0) == is_whole
        if is_whole:
            assert torch.equal(read_picture(short, 32), read_picture(data, 32))
        else:
            with pytest.raises(DataError, match=r"rows are missing|complete"):
                read_picture(short, 32)


def test_a_jpeg_of_scans_without_end_is_refused_and_one_of_a_dozen_is_read():
    data = encoded(noise(size=(64, 64)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    for copies, is_read in ((10, True), (3000, False)):
        many = data[:-2] + data[last:-2] * copies + data[-2:]
        if is_read:
            assert read_picture(many, 32).shape == (3, 32, 32)
        else:
            with pytest.raises(DataError, match="more than 100 scans"):
                read_picture(many, 32)


def wide_gamut(gamma: float = 2.2) -> bytes:
    """A colour profile with the primaries of Adobe RGB, written by hand."""
    fixed = lambda x: struct.pack(">i", round(x * 65536))  # noqa: E731
    colour = lambda *xyz: b"XYZ \0\0\0\0" + b"".join(map(fixed, xyz))  # noqa: E731
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + b"\0" * 78 + b"\0"
    tags = {
        b"desc": text, b"wtpt": colour(0.9642, 1.0, 0.8249), b"rXYZ": colour(0.6097, 0.3111, 0.0195),
        b"gXYZ": colour(0.2053, 0.6257, 0.0609), b"bXYZ": colour(0.1492, 0.0632, 0.7446),
        b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    table, body, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    head = b"lcms\x02\x10\0\0mntrRGB XYZ " + b"\0" * 12 + b"acsp" + b"\0" * 28
    head += b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    rest = head.ljust(124, b"\0") + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(rest) + 4) + rest


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colours_of_a_profile_become_those_of_srgb(format):
    options = {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    flat = Image.new("RGB", (32, 32), (120, 180, 110))
    plain = read_picture(encoded(flat, format, **options), 32)
    read = read_picture(encoded(flat, format, icc_profile=wide_gamut(), **options), 32)
    # by hand: to linear light, by both sets of primaries (white point D50) to linear sRGB, to its curve
    linear = (np.array([120, 180, 110]) / 255) ** 2.2
    adobe = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])
    srgb = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
    out = np.clip(np.linalg.solve(srgb, adobe @ linear), 0, 1)
    wanted = 255 * np.where(out <= 0.0031308, 12.92 * out, 1.055 * out ** (1 / 2.4) - 0.055)
    found = ((read[:, 16, 16] + 1) * 127.5).numpy()
    assert np.abs(found - wanted).max() <= 2, (found, wanted)
    assert (read - plain).abs().max() > 8 / 127.5


def test_srgb_itself_and_a_broken_profile_change_nothing():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = read_picture(encoded(noise(size=(32, 32))), 32)
    for profile in (srgb, b"no profile", wide_gamut()[:200]):
        assert torch.equal(read_picture(encoded(noise(size=(32, 32)), icc_profile=profile), 32), plain)


def test_what_the_caller_has_set_in_pil_changes_nothing(tmp_path, monkeypatch):
    data = encoded(noise(size=(64, 64)), "JPEG")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DataError, match="complete"):
        read_picture(data[: len(data) // 2], 32)
    with pytest.raises(DataError, match="30000 x 30000"):
        read_picture(a_bomb(30_000), 32)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_refused_images_leave_no_file_open_and_damaged_exif_prints_nothing(tmp_path, recwarn):
    for case in ("gif", "cmyk", "16 bits grey", "32 bits", "thin"):
        (tmp_path / case).mkdir()
        path = REFUSED[case][0](tmp_path / case)
        with pytest.raises(DataError):
            read_picture(path, 32)
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1"):
        flat = Image.new("RGB", (32, 32), (10, 200, 30))
        assert read_picture(encoded(flat, "JPEG", exif=exif), 32).shape == (3, 32, 32)
    assert not [str(w.message) for w in recwarn.list]


def test_a_folder_is_listed_without_hidden_files_and_folders(tmp_path):
    for name in ("b.PNG", "a.jpeg", "._a.jpeg", ".hidden.png", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "x.png").mkdir()
    assert [path.name for path in picture_files(tmp_path)] == ["a.jpeg", "b.PNG"]


@pytest.mark.parametrize("as_what", ["file", "bytes", "image"])
def test_a_contact_sheet_is_no_image_to_read(tmp_path, as_what):
    sheet = contact_sheet([Image.new("RGB", (64, 64))] * 4, ["a", "b", "c", "d"])
    save_png(sheet, tmp_path / "sheet.png", {"prompt": "a star"})
    source = {"file": tmp_path / "sheet.png", "bytes": (tmp_path / "sheet.png").read_bytes(), "image": sheet}[as_what]
    with pytest.raises(DataError, match=r"is a contact sheet of '?4'? images; expected one image: draw into a folder"):
        read_picture(source, 64)
    assert read_metadata(tmp_path / "sheet.png")["prompt"] == "a star"
