"""Factors rounded to 8 or 4 bits, on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensormoe._rounding import round_to_nearest, rounded_values
from tensormoe.backend import get_backend

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LARGEST = 65504.0


def in_bits(
    array: NDArray[Any], bits: int, dtype: str
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Codes and scales of a factor, and the values that they stand for.

    Args:
        array: float32 or float64.
        bits: 8 or 4.
        dtype: that the scales are stored in.

    Returns:
        ``codes``, ``scales`` and ``values``, the last two in the dtype of the array.
    """
    import numpy as np

    backend = get_backend("numpy")
    # scales have few enough bits for bfloat16, but float16 has fewer exponents besides
    plain = array
    if dtype == "float16":
        plain = np.clip(array, -_LARGEST, _LARGEST).astype(np.float16)
    codes, scales = round_to_nearest(plain, bits, backend)
    scales = scales.astype(array.dtype)
    return codes, scales, rounded_values(codes, scales, array.shape, bits, backend)
