"""Images in and out: PIL images, byte arrays and tensors, contact sheets, PNG files that say how they were made.

As a tensor an image is (3, height, width) float32 in [-1, 1], the form in which images enter and leave the codec.
"""

from __future__ import annotations

import io
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import (
    Image,
    ImageColor,
    ImageDraw,
    ImageFile,
    ImageFont,
    ImageOps,
    PngImagePlugin,
    UnidentifiedImageError,
)
from torch import Tensor

from starflow2.core.colours import to_srgb
from starflow2.core.fields import Range, whole
from starflow2.core.files import replacing
from starflow2.core.places import is_of_the_system
from starflow2.core.png import missing_bytes
from starflow2.core.text import shown
from starflow2.errors import ConfigError, DataError, OutputError, PromptError, ShapeError, printable_line

__all__ = [
    "AS_UPLOADED",
    "FONT_SIZE",
    "FORMATS",
    "FRAME",
    "INK",
    "MARGIN",
    "MAX_BYTES",
    "MAX_PIXELS",
    "PAPER",
    "PICTURE_ENDINGS",
    "Fit",
    "ImageForm",
    "PILImage",
    "PictureError",
    "PictureReason",
    "PictureSource",
    "checked_pixels",
    "contact_sheet",
    "encoded",
    "grid_of",
    "is_same_image",
    "picture_files",
    "pixel_distances",
    "psnr",
    "read_files",
    "read_metadata",
    "read_picture",
    "read_pixels",
    "read_upright",
    "save_png",
    "to_bytes",
    "to_floats",
    "to_pil",
    "to_tensor",
]

T = TypeVar("T")
Bytes = NDArray[np.uint8]
Fit = Literal["crop", "pad", "stretch"]
PILImage = Image.Image  # for annotations elsewhere, without importing PIL there
PictureSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | PILImage | NDArray[Any] | Tensor
PictureReason = Literal["not a picture", "damaged picture", "huge picture", "unfit picture"]

# What is read, and nothing else: some of PIL's other readers start programs (EPS) or have no end.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # PIL reads MPO, a photo with more behind it, as JPEG
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 89_478_485  # of an image, 256 MiB as RGB
MAX_BYTES = 2**28  # of its file
MAX_SCANS = 100  # of a JPEG, in each of which every pixel is visited; usual ones have up to a dozen
ROUNDING = 1e-3  # by which resizing may leave [-1, 1]

INK, PAPER, FRAME = (32, 32, 36), (255, 255, 255), (214, 214, 220)
MIN_SIDE = 16  # pixels; a smaller image shows nothing
MARGIN, FONT_SIZE, LABEL_LINES = 12, 15, 6  # pixels, pixels, lines
SAME = 0.22  # of a colour from -1 to 1, the mean of a block
SHEET = "images on this contact sheet"  # key of a text chunk


# -- pixels and numbers --------------------------------------------------------------------------------------


def to_bytes(images: Tensor) -> Bytes:
    """Bytes (B, height, width, 3) of floats (B, 3, height, width); values outside [-1, 1] are clipped.

    >>> to_bytes(torch.zeros(1, 3, 2, 2)).shape
    (1, 2, 2, 3)
    """
    pixels = images.detach().float().cpu().permute(0, 2, 3, 1)  # (B, height, width, 3)
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def to_floats(images: Bytes) -> Tensor:
    """Floats (B, 3, height, width) in [-1, 1], float32, of bytes (B, height, width, 3).

    >>> to_floats(np.full((1, 2, 2, 3), 255, np.uint8)).max()
    tensor(1.)
    """
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1  # (B, 3, height, width)


def psnr(images: Tensor, references: Tensor, span: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each image of a batch in dB: (B, ...) and (B, ...) -> (B,).

    span: largest minus smallest value that a pixel can have. Equal images have the ratio of a mean square error of
    1e-12, so that a mean over images stays finite.

    >>> psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.2))
    tensor([20.])
    """
    error = (images - references).square().flatten(1).mean(1)  # (B,)
    return 10 * torch.log10(span**2 / error.clamp(min=1e-12))


def is_same_image(one: Tensor, other: Tensor) -> bool:
    """True if two images (3, s, s) in [-1, 1] show the same, but for what a codec does to their edges.

    No block of an eighth of the side differs by more than SAME on average. Our choice, from 56 edits (docs/LOG.md).

    >>> black = torch.full((3, 16, 16), -1.0)
    >>> is_same_image(black, black + 0.1), is_same_image(black, -black)
    (True, False)
    """
    blocks = F.avg_pool2d((one.cpu().float() - other.cpu().float())[None], max(1, one.shape[-1] // 8))
    return bool(blocks.abs().max() <= SAME)


def to_tensor(image: PILImage | np.ndarray) -> Tensor:
    """Tensor (3, height, width) float32 in [-1, 1] of a PIL image of any mode or a (height, width, 3) uint8 array.

    Transparent pixels become white. Raises ShapeError for an array of another shape or dtype.

    >>> to_tensor(np.full((2, 2, 3), 255, dtype=np.uint8)).unique()
    tensor([1.])
    """
    pixels = np.asarray(_rgb(image)) if isinstance(image, Image.Image) else image  # (height, width, 3)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise ShapeError(f"image is {pixels.shape} {pixels.dtype}; expected (height, width, 3) uint8.")
    return to_floats(pixels[None])[0]  # (3, height, width)


def to_pil(image: Tensor) -> PILImage:
    """PIL image of (3, height, width) floats, the exact inverse of `to_tensor`; values outside [-1, 1] are clipped.

    Raises ShapeError for another shape and DataError where a pixel is not a finite number.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ShapeError(f"image is {tuple(image.shape)} {image.dtype}; expected (3, height, width) floats.")
    if not image.isfinite().all():
        raise DataError("image has NaN or infinite pixels; expected finite ones: the model that drew it has diverged.")
    return Image.fromarray(to_bytes(image[None])[0])


# -- images from outside --------------------------------------------------------------------------------------


class PictureError(DataError):
    """An image that cannot be read; `reason` says in what way."""

    def __init__(self, message: str, reason: PictureReason = "unfit picture") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ImageForm:
    """How an image of any shape becomes the square that a model reads."""

    fit: Fit = "crop"  # crop: its central square; pad: all of it, with margins; stretch: all of it, squeezed
    flatten: str = ""  # colour behind transparent pixels and of margins; "": no transparency, grey margins

    def __post_init__(self) -> None:
        try:
            ImageColor.getrgb(self.flatten or "gray")
        except ValueError as error:
            raise ConfigError(f"flatten is {self.flatten!r}; expected a colour such as white or #c0ffee.") from error


AS_UPLOADED = ImageForm()  # how images are read that no source of a mixture describes


def read_picture(
    source: PictureSource, size: int, form: ImageForm = AS_UPLOADED, *, most_pixels: int = MAX_PIXELS
) -> Tensor:
    """Image as input of a model: upright, in sRGB, made a square as `form` says, (3, size, size) in [-1, 1].

    source: the name of a file, its bytes, an open binary file, a PIL image, an array (height, width, 3) or tensor
    (3, height, width) of uint8, 0 black and 255 white, or a tensor (3, size, size) of floats in [-1, 1], -1 black.
    most_pixels: more are refused, before anything is decoded. Raises DataError, naming the remedy, for a source that
    could be read only by guessing: no image, a damaged one, one of absurd size, several frames, CMYK, 16 bits,
    transparency without a colour to flatten it on, a side of less than 16 pixels, values outside their range; and
    ShapeError for tensors and arrays of another shape or dtype.
    """
    size = whole(size, "size", Range(least=1, most=2**14))
    if isinstance(source, Tensor) and source.is_nested:
        raise ShapeError(f"image is a nested tensor; expected (3, {size}, {size}), or uint8 of any size.")
    if isinstance(source, Tensor) and source.dtype != torch.uint8:
        if source.shape != (3, size, size):
            raise ShapeError(
                f"image is {tuple(source.shape)} floats; expected (3, {size}, {size}), or uint8 of any size."
            )
        return checked_pixels(source)
    name = printable_line(str(source)) if isinstance(source, str | os.PathLike) else "the image"
    with _undisturbed():
        try:
            with _opened(source, name, most_pixels) as image:
                _check_readable(image, name, allows_transparency=bool(form.flatten))
                upright = _upright(image)
                _check_single(image, name)  # text may stand after the pixels
                return to_tensor(_square(upright, size, form))
        except (DataError, ShapeError):
            raise
        except Exception as error:  # PIL's readers raise what they like on bad bytes
            raise _unreadable(name, str(error) or type(error).__name__, "damaged picture") from error


def read_upright(image: PILImage) -> Tensor:
    """An image in its own shape, upright and in RGB: (3, height, width) in [-1, 1]. Transparent pixels become white."""
    return to_tensor(_rgb(_upright(image)))


def _check_single(image: PILImage, name: str) -> None:
    """Raise DataError for a contact sheet of ours, of which only the middle would be read."""
    if SHEET in image.info:
        raise DataError(
            f"{name} is a contact sheet of {shown(image.info[SHEET])} images; expected one image: draw into a folder, "
            "such as -o out/, which keeps a file of each."
        )


def checked_pixels(images: Tensor, name: str = "image") -> Tensor:
    """Images (..., 3, height, width) as float32 in [-1, 1]: floats of that range, or uint8, 0 black and 255 white.

    Raises ShapeError for another dtype and DataError for values that are not finite or outside [-1, 1].

    >>> checked_pixels(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-1.,  1.])
    """
    if images.layout != torch.strided or images.is_quantized or images.device.type == "meta":
        raise ShapeError(f"{name} is a tensor of {images.layout} on {images.device}; expected one with its values.")
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    if not images.is_floating_point():
        raise ShapeError(f"{name} is a tensor of {images.dtype}; expected floats in [-1, 1], or uint8 in 0 to 255.")
    images = images.detach().float()
    if not images.numel():
        return images
    low, high = (float(value) for value in images.aminmax())
    if not math.isfinite(low + high):
        raise DataError(f"{name} has NaN or infinite pixels; expected finite numbers in [-1, 1].")
    if max(-low, high) > 1 + ROUNDING:
        raise DataError(
            f"{name} has values from {low:g} to {high:g}; expected [-1, 1], where -1 is black: give uint8, or divide "
            "0 to 255 by 127.5 and subtract 1."
        )
    return images.clamp(-1, 1)


def picture_files(folder: str | Path) -> list[Path]:
    """Image files of a folder by their endings, in the order of their names, without hidden ones and folders."""
    files = (path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURE_ENDINGS)
    return sorted(path for path in files if not path.name.startswith(".") and path.is_file())


def read_files(read: Callable[[Path], T], files: Sequence[Path]) -> list[T]:
    """Results of `read` for every file. Raises one DataError for all that it refuses, the first three by name."""
    found, refused = list[T](), list[str]()
    for file in files:
        try:
            found.append(read(file))
        except (DataError, PromptError) as error:
            refused.append(str(error))
    if refused:
        more = f" And {len(refused) - 3} more." if len(refused) > 3 else ""
        raise DataError(f"{len(refused)} of {len(files)} images cannot be used: {' '.join(refused[:3])}{more}")
    return found


@contextmanager
def _undisturbed() -> Iterator[None]:
    """PIL as this package expects it: no warnings amid the output, no half images, whatever the caller has set."""
    with _lock(os.getpid()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


@cache
def _lock(process: int) -> threading.RLock:
    """The lock of `_undisturbed`, another one in every process: a fork would copy one that is held."""
    return threading.RLock()


@contextmanager
def _opened(source: PictureSource, name: str, most_pixels: int = MAX_PIXELS) -> Iterator[PILImage]:
    """The image of any source, with its size checked and, in a PNG file, its checksums, but not yet decoded."""
    if isinstance(source, np.ndarray | Tensor):
        yield _of_array(source)
        return
    if isinstance(source, Image.Image):
        if getattr(source, "tile", None) and source.format not in (*FORMATS, "MPO"):
            raise PictureError(
                f"{name} is an undecoded {source.format} file; expected one of {', '.join(FORMATS)}: load it."
            )
        _check_size(source, name, most_pixels)
        yield source
        return
    data = _bytes_of(source, name)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, name, most_pixels)
            _check_whole(image, data, name)
            yield image
    except UnidentifiedImageError as error:
        raise _unreadable(name, "its bytes are of no known format", "not a picture") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _unreadable(name, str(error), "huge picture") from error


def _check_whole(image: PILImage, data: bytes, name: str) -> None:
    """Raise DataError for what PIL would not notice: wrong checksums and missing rows of a PNG, scans without end."""
    if image.format == "PNG":
        with Image.open(io.BytesIO(data), formats=("PNG",)) as twin:
            twin.verify()
        if missing_bytes(data):
            raise _unreadable(name, "some of its rows are missing", "damaged picture")
    elif image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise _unreadable(name, f"it has more than {MAX_SCANS} scans", "damaged picture")


def _bytes_of(source: object, name: str) -> bytes:
    """The bytes of a file, at most MAX_BYTES. Raises DataError."""
    if isinstance(source, str | os.PathLike):
        return _file_bytes(source, name)
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    data = source.read(MAX_BYTES + 1) if hasattr(source, "read") else None
    if not isinstance(data, bytes):
        raise PictureError(
            f"the image is {shown(source)} ({type(source).__name__}); expected the name of a file, bytes, an open "
            "binary file, a PIL image, an array or a tensor.",
            "not a picture",
        )
    return _bounded(data, name)


def _file_bytes(path: str | os.PathLike[str], name: str) -> bytes:
    try:
        if Path(path).is_file() and not is_of_the_system(path):
            with Path(path).open("rb") as file:
                return _bounded(file.read(MAX_BYTES + 1), name)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", name):
            raise PictureError(f"cannot read {name} as an image: images are local files; download it first.")
        reason = "it is no regular file" if Path(path).exists() else "No such file"
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise _unreadable(name, getattr(error, "strerror", None) or str(error), "not a picture") from error
    raise _unreadable(name, reason, "not a picture")


def _bounded(data: bytes, name: str) -> bytes:
    if len(data) > MAX_BYTES:
        raise _unreadable(name, f"it has more than {MAX_BYTES >> 20} MiB", "huge picture")
    return data


def _of_array(pixels: NDArray[Any] | Tensor) -> PILImage:
    """A PIL image of uint8: an array (height, width, 3) or a tensor (3, height, width). Raises ShapeError."""
    is_tensor = isinstance(pixels, Tensor)
    channels = pixels.shape[0 if is_tensor else -1] if pixels.ndim == 3 else 0
    is_bytes = pixels.dtype in (torch.uint8, np.uint8) and str(getattr(pixels, "device", "cpu")) != "meta"
    if channels != 3 or not is_bytes or 0 in pixels.shape or isinstance(pixels, np.ma.MaskedArray):
        wanted = "(3, height, width) uint8" if is_tensor else "(height, width, 3) uint8"
        raise ShapeError(f"image is {tuple(pixels.shape)} {pixels.dtype}; expected {wanted}, 0 black and 255 white.")
    array = pixels.detach().cpu().permute(1, 2, 0).numpy() if isinstance(pixels, Tensor) else pixels
    return Image.fromarray(np.ascontiguousarray(array))


def _unreadable(name: str, reason: str, kind: PictureReason) -> PictureError:
    remedy = "expected a complete image of ordinary size: save it again, or smaller."
    return PictureError(f"cannot read {name} as an image: {' '.join(reason.split()).rstrip('.')}; {remedy}", kind)


def _check_size(image: PILImage, name: str, most: int) -> None:
    if image.width * image.height > most:
        raise _unreadable(name, f"it has {image.width} x {image.height} pixels, more than {most}", "huge picture")


def _check_readable(image: PILImage, name: str, *, allows_transparency: bool) -> None:
    """Raise DataError for an image that is complete but could be read only by guessing."""
    if image.format != "MPO" and getattr(image, "is_animated", False):  # the other frames of an MPO are depth, previews
        raise PictureError(f"{name} has several frames; expected a still image: save the frame you mean.")
    if image.mode not in ("1", "L", "P", "RGB", "RGBA", "LA", "PA"):
        raise PictureError(f"{name} has colour mode {image.mode}; expected 8-bit RGB or grey: convert it first.")
    is_deep = any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))  # PIL drops half of the bits
    if is_deep and image.format != "BMP":  # where it means 16 bits for three channels
        raise PictureError(f"{name} has 16 bits per channel; expected 8-bit RGB or grey: convert it first.")
    if min(image.size) < MIN_SIDE:
        raise PictureError(f"{name} is {image.width} x {image.height} pixels; expected at least {MIN_SIDE} a side.")
    is_opaque = allows_transparency or not image.has_transparency_data
    if not is_opaque and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise PictureError(f"{name} has transparent pixels; expected an opaque image: put it on a background first.")


def _upright(image: PILImage) -> PILImage:
    """The image turned as its EXIF data says, decoded to the end of its file."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data, about which PIL raises what it likes; the pixels are whole
        return image


def _square(image: PILImage, size: int, form: ImageForm) -> PILImage:
    """An image as `size` x `size` pixels in sRGB."""
    if form.fit == "crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    pixels = to_srgb(image)
    if form.flatten and image.has_transparency_data:
        page = Image.new("RGB", image.size, form.flatten)
        pixels = Image.composite(pixels, page, image.convert("RGBA").getchannel("A"))
    if form.fit == "pad":
        return ImageOps.pad(pixels, (size, size), Image.Resampling.LANCZOS, color=form.flatten or "gray")
    return pixels if pixels.size == (size, size) else pixels.resize((size, size), Image.Resampling.LANCZOS)


def contact_sheet(
    images: Sequence[PILImage | None], labels: Sequence[str], columns: int = 8, scale: int = 3
) -> PILImage:
    """Arrange images in rows of `columns` on one sheet, each enlarged `scale` times with its label beneath.

    A label is wrapped to the width of its image and ends in an ellipsis after six lines; None is a label alone.
    Raises ShapeError unless there are images, one label for each, and a column.

    >>> contact_sheet([Image.new("RGB", (64, 64))] * 3, ["one", "two", "three"], columns=2).size
    (420, 468)
    """
    pictures = [image for image in images if image is not None]
    if not pictures or len(images) != len(labels) or columns < 1 or scale < 1:
        raise ShapeError(
            f"contact_sheet got {len(images)} images, {len(labels)} labels, columns={columns}, scale={scale}; "
            "expected one label for each of one or more images, columns and scale of at least 1."
        )
    font = ImageFont.load_default(FONT_SIZE)
    width, height = max(i.width for i in pictures) * scale, max(i.height for i in pictures) * scale
    texts = [_wrap(label, width, font) for label in labels]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    drops = [height + _text_height(max((texts[i] for i in row), key=lambda t: t.count("\n")), font) for row in rows]
    sheet = Image.new(
        "RGB",
        (MARGIN + min(columns, len(images)) * (width + MARGIN), MARGIN + sum(drop + MARGIN for drop in drops)),
        PAPER,
    )
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for row, drop in zip(rows, drops, strict=True):
        for column, i in enumerate(row):
            left, image = MARGIN + column * (width + MARGIN), images[i]
            if image is not None:
                tile = _rgb(image)
                tile = tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.LANCZOS)
                sheet.paste(tile, (left, top))
                draw.rectangle((left - 1, top - 1, left + tile.width, top + tile.height), outline=FRAME)
            below = 0 if image is None else height + MARGIN // 2
            draw.multiline_text((left, top + below), texts[i], fill=INK, font=font, spacing=2)
        top += drop + MARGIN
    sheet.info[SHEET] = str(len(pictures))
    return sheet


def grid_of(images: Sequence[PILImage], columns: int) -> PILImage:
    """Images of one size side by side without gaps, row by row. Raises ShapeError unless they fill their rows.

    >>> grid_of([Image.new("RGB", (8, 6))] * 4, columns=2).size
    (16, 12)
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1 or columns < 1 or len(images) % columns:
        raise ShapeError(
            f"grid_of got {len(images)} images of sizes {sorted(sizes)} for {columns} columns; expected "
            "images of one size that fill their rows."
        )
    ((width, height),) = sizes
    grid = Image.new("RGB", (columns * width, len(images) // columns * height))
    for i, image in enumerate(images):
        grid.paste(_rgb(image), (i % columns * width, i // columns * height))
    return grid


def read_pixels(path: str | Path) -> Tensor:
    """An image file in its own size: (3, height, width) float32 in [0, 1]. Raises DataError for what is no image."""
    return torch.from_numpy(np.array(_decoded(path))).permute(2, 0, 1).float() / 255  # (3, height, width)


def pixel_distances(path: str | Path, target: str | Path) -> tuple[float, float]:
    """Mean absolute and mean square difference of two image files, of colours from 0 to 1.

    The first image is resized to the second, as MagicBrush's evaluation does. Raises DataError for what is no image.
    """
    one, other = _decoded(path), _decoded(target)
    a, b = (np.asarray(image, np.float64) / 255 for image in (one.resize(other.size), other))
    return float(np.abs(a - b).mean()), float(np.square(a - b).mean())


def _decoded(path: str | Path) -> PILImage:
    """An image file as RGB in its own size. Raises DataError."""
    with _undisturbed():
        try:
            with _opened(path, str(path)) as image:
                return _rgb(image)
        except DataError:
            raise
        except Exception as error:  # PIL's readers raise what they like on bad bytes
            raise _unreadable(str(path), str(error) or type(error).__name__, "damaged picture") from error


# -- files ------------------------------------------------------------------------------------------------


def encoded(image: PILImage, form: Literal["png", "jpeg", "webp"] = "png", quality: int = 95) -> bytes:
    """The bytes of an image file, the same for the same image; quality: of jpeg, and of webp below 100.

    >>> encoded(Image.new("RGB", (16, 16)))[1:4]
    b'PNG'
    """
    file, quality = io.BytesIO(), whole(quality, "quality", Range(least=0, most=100))
    options = {"png": {}, "jpeg": {"quality": quality}, "webp": {"quality": quality, "lossless": quality == 100}}[form]
    image.save(file, format=form.upper(), **options)
    return file.getvalue()


def save_png(image: PILImage, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a PNG with `metadata` as its text chunks, completely or not at all; missing folders are created.

    Raises OutputError if the name does not end in .png or the file cannot be written (folder read-only, disk full).
    """
    if Path(path).suffix.lower() != ".png":
        raise OutputError(f"cannot write {path}: images are PNG files; expected a name that ends in .png.")
    chunks = PngImagePlugin.PngInfo()
    about = dict(metadata or {}) | {key: image.info[key] for key in (SHEET,) if key in image.info}
    for key, text in about.items():
        chunks.add_text(key, text)  # tEXt, or iTXt where the text is not Latin-1
    with replacing(path) as temp:
        image.save(temp, format="PNG", pnginfo=chunks)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Text chunks of a PNG as `save_png` wrote them; empty for an image without any.

    Raises DataError for a file that does not exist or is not an image.
    """
    with _undisturbed():
        try:
            with _opened(path, str(path)) as image:
                image.load()  # text may stand after the pixels
                return {key: str(text) for key, text in getattr(image, "text", {}).items()}
        except DataError:
            raise
        except Exception as error:  # PIL's readers raise what they like on bad bytes
            raise _unreadable(str(path), str(error) or type(error).__name__, "damaged picture") from error


def _rgb(image: PILImage) -> PILImage:
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(page, image.convert("RGBA"))
    return image.convert("RGB")


def _wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Wrap `text` into at most LABEL_LINES lines of at most `width` pixels; a wider word is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        while font.getlength(word) > width:
            word = word[:-1]
        lines.append(word)
    lines = [line for line in lines if line]
    if len(lines) > LABEL_LINES:
        lines = [*lines[: LABEL_LINES - 1], lines[LABEL_LINES - 1] + " …"]
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 2:
            lines[-1] = lines[-1][:-3].rstrip() + " …"
    return "\n".join(lines)


def _text_height(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> int:
    """Pixels that `text` needs beneath an image, measured on lines with ascenders and descenders."""
    tall = "\n".join("Ag" for _ in range(text.count("\n") + 1))
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), tall, font=font, spacing=2)
    return int(box[3]) + MARGIN // 2
