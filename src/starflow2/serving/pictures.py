"""Images over the wire: data URLs and base64 in, files of a format and data URLs out."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass

from starflow2.core.images import PILImage, encoded
from starflow2.errors import DataError
from starflow2.serving.refusals import Refusal
from starflow2.serving.schemas_images import OutputFormat

__all__ = ["Fetch", "ImageFile", "data_url", "from_base64", "from_url"]

_DATA = re.compile(r"data:image/[a-z0-9.+-]+(?:;[a-z0-9=-]+)*;base64,", re.IGNORECASE)
Fetch = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Format of the images that a request wants; quality: 0 to 100, of jpeg and webp."""

    form: OutputFormat = "png"
    quality: int = 95

    @classmethod
    def of(cls, form: OutputFormat | None, compression: int | None) -> ImageFile:
        return cls(form or "png", 95 if compression is None else compression)

    def base64(self, image: PILImage) -> str:
        """The file of an image as base64, the same for the same image."""
        return base64.b64encode(encoded(image, self.form, self.quality)).decode("ascii")


def data_url(form: OutputFormat, text: str) -> str:
    """A URL that holds a file which is given as base64."""
    return f"data:image/{form};base64,{text}"


def from_base64(text: str, param: str) -> bytes:
    """Bytes of base64, blanks and line breaks aside. Raises Refusal."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(f"{param} is no whole base64: {error}.", status=400, code="invalid_image", param=param) from error


def from_url(url: str, param: str, fetch: Fetch | None) -> bytes:
    """Bytes of an image that a URL holds or, where `fetch` is given, leads to. Raises Refusal, DataError."""
    begun = _DATA.match(url)
    if begun:
        return from_base64(url[begun.end() :], param)
    if url.lower().startswith(("http://", "https://")):
        if fetch is None:
            text = f"{param} leads to another server, and this one fetches nothing; send the image as a data URL."
            raise Refusal(text, status=400, code="invalid_image_url", param=param)
        return fetch(url)
    if url.lower().startswith("data:"):
        raise DataError(f"{param} is a data URL of no image in base64; expected data:image/png;base64,...")
    text = f"{param} is no URL of an image; expected data:image/png;base64,..."
    raise Refusal(text, status=400, code="invalid_image_url", param=param)
