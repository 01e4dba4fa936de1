"""Dask's Array-API namespace: array-api-compat's, and what that lacks."""

from __future__ import annotations

import dask.array as da
import numpy as np
from array_api_compat.dask.array import *  # noqa: F403


def take_along_axis(x: da.Array, indices: da.Array, /, *, axis: int = -1) -> da.Array:
    """Pick entries along an axis, which must fit in memory; the others keep their chunks."""
    axis %= x.ndim
    places = list(range(x.ndim))
    picked = [x.ndim if place == axis else place for place in places]
    return da.blockwise(
        np.take_along_axis,
        picked,
        x,
        places,
        indices,
        picked,
        axis=axis,
        dtype=x.dtype,
        concatenate=True,
    )
