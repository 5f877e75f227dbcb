"""How many bytes of pixels a PNG lacks: PIL fills the rows that its data do not reach with black, in silence.

Not here: checksums, which PIL compares, and decoding (`images`).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

__all__ = ["missing_bytes"]

HEAD = 8 + 8  # bytes before the content of the first chunk
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# First column and row of each pass of an interlaced image, and its steps.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
BLOCK = 1 << 16  # bytes that are kept of what is decompressed


def missing_bytes(data: bytes) -> int:
    """Bytes by which the pixels of a PNG file are too few; 0 for a whole one, and for a header that is none.

    data: a file whose checksums are right.
    """
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[HEAD : HEAD + 13])
    bits = depth * CHANNELS.get(colour, 0)
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    wanted = sum(_size(-(-(width - x) // dx), -(-(height - y) // dy), bits) for x, y, dx, dy in passes)
    return max(0, wanted - _length(data, wanted))


def _size(columns: int, rows: int, bits: int) -> int:
    """Bytes of the rows of a pass, each with its filter."""
    return rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0


def _length(data: bytes, most: int) -> int:
    """Bytes of the decompressed pixels, counted up to `most`."""
    stream, length = zlib.decompressobj(), 0
    try:
        for part in _pixels(data):
            while part and length < most:
                length += len(stream.decompress(part, BLOCK))
                part = stream.unconsumed_tail
    except zlib.error:  # the decoder says so, too
        pass
    return length


def _pixels(data: bytes) -> Iterator[bytes]:
    """Contents of the IDAT chunks."""
    at = 8
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            yield data[at + 8 : at + 8 + length]
        at += 12 + length
