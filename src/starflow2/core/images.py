"""Images in and out: PIL images, byte arrays and tensors, contact sheets, PNG files that say how they were made.

As a tensor an image is (3, height, width) float32 in [-1, 1], the form in which images enter and leave the codec.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from starflow2.core.files import replacing
from starflow2.errors import ConfigError, DataError, OutputError, ShapeError

__all__ = [
    "AS_UPLOADED",
    "FONT_SIZE",
    "FRAME",
    "INK",
    "MARGIN",
    "PAPER",
    "Fit",
    "ImageForm",
    "PILImage",
    "contact_sheet",
    "psnr",
    "read_metadata",
    "read_picture",
    "save_png",
    "to_bytes",
    "to_floats",
    "to_pil",
    "to_tensor",
]

Bytes = NDArray[np.uint8]
Fit = Literal["crop", "pad", "stretch"]
PILImage = Image.Image  # for annotations elsewhere, without importing PIL there

INK, PAPER, FRAME = (32, 32, 36), (255, 255, 255), (214, 214, 220)
MIN_SIDE = 16  # pixels; a smaller image shows nothing
MARGIN, FONT_SIZE, LABEL_LINES = 12, 15, 6  # pixels, pixels, lines


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


def read_picture(source: str | Path | PILImage | bytes, size: int, form: ImageForm = AS_UPLOADED) -> Tensor:
    """Image as input of a model: upright, made a square as `form` says and scaled, (3, size, size) in [-1, 1].

    source: the name of a file, the bytes of one, or a PIL image. Raises DataError, naming the remedy, for a source that
    could be read only by guessing: no image, a truncated one, one of absurd size, several frames, CMYK, 16 bits,
    transparency without a colour to flatten it on, or a side of less than 16 pixels.
    """
    name = "the image" if isinstance(source, Image.Image | bytes) else str(source)
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else _opened(source) as image:
            _check_readable(image, name, allows_transparency=bool(form.flatten))
            upright = ImageOps.exif_transpose(image)  # here PIL meets the end of a truncated file
            pixels = _rgb(upright, form.flatten) if form.flatten else upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        unknown = isinstance(error, UnidentifiedImageError) and isinstance(source, bytes)
        reason = "its bytes are of no known format" if unknown else str(error).rstrip(".")
        raise DataError(
            f"cannot read {name} as an image: {reason}; expected a complete image of ordinary size: "
            "save it again, or smaller."
        ) from error
    return to_tensor(_square(pixels, size, form))


def _square(pixels: PILImage, size: int, form: ImageForm) -> PILImage:
    """An RGB image as `size` x `size` pixels."""
    if form.fit == "pad":
        colour = ImageColor.getrgb(form.flatten or "gray")
        return ImageOps.pad(pixels, (size, size), Image.Resampling.LANCZOS, color=colour)
    if form.fit == "crop":
        side = min(pixels.size)
        left, top = (pixels.width - side) // 2, (pixels.height - side) // 2
        pixels = pixels.crop((left, top, left + side, top + side))
    return pixels if pixels.size == (size, size) else pixels.resize((size, size), Image.Resampling.LANCZOS)


def _opened(source: str | Path | bytes) -> PILImage:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source))


def _check_readable(image: PILImage, name: str, *, allows_transparency: bool) -> None:
    """Raise DataError for an image that is complete but could be read only by guessing."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise DataError(f"{name} has {frames} frames; expected a still image: save the frame you mean.")
    if image.mode not in ("1", "L", "P", "RGB", "RGBA", "LA", "PA"):
        raise DataError(f"{name} has colour mode {image.mode}; expected 8-bit RGB or grey: convert it first.")
    if any(";16" in str(tile.args) for tile in getattr(image, "tile", ())):  # PIL drops half of the bits
        raise DataError(f"{name} has 16 bits per channel; expected 8-bit RGB or grey: convert it first.")
    is_opaque = allows_transparency or not image.has_transparency_data
    if not is_opaque and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise DataError(f"{name} has transparent pixels; expected an opaque image: put it on a background first.")
    if min(image.size) < MIN_SIDE:
        raise DataError(f"{name} is {image.width} x {image.height} pixels; expected at least {MIN_SIDE} a side.")


def contact_sheet(images: Sequence[PILImage], labels: Sequence[str], columns: int = 8, scale: int = 3) -> PILImage:
    """Arrange images in rows of `columns` on one sheet, each enlarged `scale` times with its label beneath.

    A label is wrapped to the width of its image and ends in an ellipsis after six lines.
    Raises ShapeError unless there are images, one label for each, and a column.

    >>> contact_sheet([Image.new("RGB", (64, 64))] * 3, ["one", "two", "three"], columns=2).size
    (420, 468)
    """
    if not images or len(images) != len(labels) or columns < 1 or scale < 1:
        raise ShapeError(
            f"contact_sheet got {len(images)} images, {len(labels)} labels, columns={columns}, scale={scale}; "
            "expected one label for each of one or more images, columns and scale of at least 1."
        )
    font = ImageFont.load_default(FONT_SIZE)
    width, height = max(i.width for i in images) * scale, max(i.height for i in images) * scale
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
            left = MARGIN + column * (width + MARGIN)
            tile = _rgb(images[i])
            tile = tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left, top))
            draw.rectangle((left - 1, top - 1, left + tile.width, top + tile.height), outline=FRAME)
            draw.multiline_text((left, top + height + MARGIN // 2), texts[i], fill=INK, font=font, spacing=2)
        top += drop + MARGIN
    return sheet


# -- files ------------------------------------------------------------------------------------------------


def save_png(image: PILImage, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a PNG with `metadata` as its text chunks, completely or not at all; missing folders are created.

    Raises OutputError if the name does not end in .png or the file cannot be written (folder read-only, disk full).
    """
    if Path(path).suffix.lower() != ".png":
        raise OutputError(f"cannot write {path}: images are PNG files; expected a name that ends in .png.")
    chunks = PngImagePlugin.PngInfo()
    for key, text in (metadata or {}).items():
        chunks.add_text(key, text)  # tEXt, or iTXt where the text is not Latin-1
    with replacing(path) as temp:
        image.save(temp, format="PNG", pnginfo=chunks)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Text chunks of a PNG as `save_png` wrote them; empty for an image without any.

    Raises DataError for a file that does not exist or is not an image.
    """
    try:
        with Image.open(path) as image:
            image.load()  # text may stand after the pixels
            return {key: str(text) for key, text in getattr(image, "text", {}).items()}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all from PIL
        raise DataError(f"cannot read {path} as an image: {error}.") from error


def _rgb(image: PILImage, colour: str = "white") -> PILImage:
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, ImageColor.getrgb(colour))
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
