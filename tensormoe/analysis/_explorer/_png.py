"""Small pictures as data URIs, written with the standard library."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# channels → colour type of the format
_COLOURS = {1: 0, 3: 2, 4: 6}


def data_uri(pixels: NDArray[Any]) -> str:
    """A PNG of 8 bits per channel as a data URI.

    Args:
        pixels: (height, width, channels) of uint8, with 1 channel (grey), 3 (RGB) or 4 (RGBA).

    >>> import numpy as np
    >>> data_uri(np.zeros((1, 1, 1), "uint8"))[:32]
    'data:image/png;base64,iVBORw0KGg'
    """
    return "data:image/png;base64," + b64encode(png(pixels)).decode("ascii")


def png(pixels: NDArray[Any]) -> bytes:
    """The bytes of the file (PNG specification, third edition)."""
    import numpy as np

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
    # every line starts with the number of its filter: none
    lines = np.zeros((height, 1 + width * channels), np.uint8)
    lines[:, 1:] = pixels.reshape(height, width * channels)
    body = zlib.compress(lines.tobytes(), 9)
    parts = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(name, content) for name, content in parts)


def _chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def thumbnail(pixels: NDArray[Any], size: int) -> NDArray[Any]:
    """Pixels (height, width, channels) averaged in blocks until no side is above ``size``."""
    import numpy as np

    height, width, channels = pixels.shape
    step = -(-max(height, width) // size)
    if step <= 1:
        return pixels
    # the last block repeats the margin, so that no picture loses one
    pad = ((0, -height % step), (0, -width % step), (0, 0))
    padded = np.pad(pixels.astype(np.float64), pad, mode="edge")
    blocks = padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step, channels)
    made: NDArray[Any] = blocks.mean(axis=(1, 3)).round().astype(np.uint8)
    return made
