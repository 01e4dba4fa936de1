"""Numbers of 4 and 8 bits: bytes to float32, which holds every one of them exactly.

``e4m3`` is the 8-bit float of DeepSeek-V3 without infinities (Micikevicius et al. 2022,
arXiv:2209.05433); ``e2m1`` and the scales ``e8m0`` are those of the Microscaling formats
(Open Compute Project, OCP Microscaling Formats v1.0, 2023).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the 3 bits below the sign."""


def from_e4m3(data: bytes) -> NDArray[Any]:
    """One number per byte: sign, 4 bits of exponent, 3 of mantissa; NaN where all but it are 1."""
    import numpy as np

    found: NDArray[Any] = _e4m3()[np.frombuffer(data, np.uint8)]
    return found


def from_e2m1(data: bytes) -> NDArray[Any]:
    """Two numbers per byte, that of the lower four bits first."""
    import numpy as np

    found: NDArray[Any] = _e2m1()[np.frombuffer(data, np.uint8)].reshape(-1)
    return found


def from_e8m0(data: bytes) -> NDArray[Any]:
    """One power of two per byte, 2^(byte − 127); NaN for 255."""
    import numpy as np

    found: NDArray[Any] = _e8m0()[np.frombuffer(data, np.uint8)]
    return found


@cache
def _e4m3() -> NDArray[Any]:
    import numpy as np

    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    # without a leading one below the least exponent
    size = np.where(exponent == 0, mantissa * 2.0, (8.0 + mantissa) * 2.0**exponent) * 2.0**-10
    size[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -size, size).astype(np.float32)


@cache
def _e2m1() -> NDArray[Any]:
    """Pairs of numbers by byte."""
    import numpy as np

    values = np.array([*E2M1, *(-each for each in E2M1)], np.float32)
    codes = np.arange(256)
    return np.stack([values[codes & 15], values[codes >> 4]], axis=1)


@cache
def _e8m0() -> NDArray[Any]:
    import numpy as np

    powers = [2.0 ** (code - 127) for code in range(255)]
    return np.array([*powers, np.nan], np.float32)
