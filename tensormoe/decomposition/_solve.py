"""Small dense problems, solved on the host in float64, whatever library the tensor is of.

They are of the size of bonds, not of weights, and their accuracy decides how far alternating least
squares gets. One LAPACK serves all libraries, those without float64 included.
"""

from __future__ import annotations

from typing import Any

from tensormoe._devices import device_of
from tensormoe.backend import Array, Backend

__all__ = ["from_host", "inverse", "to_host"]


def to_host(array: Array, backend: Backend) -> Any:
    """The values as a NumPy array of the same dtype."""
    import numpy as np

    dtype, shape, content = backend.to_bytes(array)
    return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).reshape(shape)


def from_host(array: Any, like: Array, backend: Backend) -> Array:
    """An array of the library from NumPy's, in the dtype and on the device of ``like``."""
    xp = backend.namespace
    dtype = to_host(like[(slice(0, 0), *(0,) * (like.ndim - 1))], backend).dtype
    found = backend.from_bytes(dtype.name, array.shape, array.astype(dtype).tobytes())
    device = device_of(like)
    return found if device is None else xp.asarray(found, device=device)


def inverse(gram: Any, damping: float = 0.0) -> Any:
    """(G + λ)⁻¹ in float64 for a NumPy array G (…, K, K), symmetric and not negative.

    λ is what G's own rounding hides, or ``damping`` if that is more; for it, components are scaled
    alike, so that G has ones on its diagonal.
    """
    import numpy as np

    size = gram.shape[-1]
    ridge = max(size * float(np.finfo(gram.dtype).eps), damping)
    wide = gram.astype(np.float64)
    scale = np.sqrt(np.maximum(np.diagonal(wide, axis1=-2, axis2=-1), 0.0))
    scale = np.where(scale > 0.0, scale, 1.0)
    rows, columns = scale[..., :, None], scale[..., None, :]
    wide /= rows
    wide /= columns
    places = np.arange(size)
    wide[..., places, places] += ridge
    wide = np.linalg.inv(wide)
    wide /= rows
    wide /= columns
    return wide
