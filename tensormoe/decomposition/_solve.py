"""Small dense problems, solved on the host in float64, whatever library the tensor is of.

They are of the size of bonds, not of weights, and their accuracy decides how far alternating least
squares gets. One LAPACK serves all libraries, those without float64 included.
"""

from __future__ import annotations

from typing import Any

from tensormoe._devices import device_of
from tensormoe.backend import Array, Backend

__all__ = ["from_host", "solve", "to_host"]

# right-hand sides at a time: float64 copies stay small beside the tensor
_COLUMNS = 2048


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


def solve(gram: Any, residual: Any, damping: float = 0.0) -> Any:
    """Δ of ``(G + λ) Δ = R`` for NumPy arrays G (…, K, K), symmetric and not negative, R (…, K, L).

    λ is what G's own rounding hides, or ``damping`` if that is more: directions below it are left
    as they are. Components are scaled alike first, so that G has ones on its diagonal.
    """
    import numpy as np

    size, columns = residual.shape[-2:]
    ridge = max(size * float(np.finfo(gram.dtype).eps), damping)
    result = np.empty(residual.shape, residual.dtype)
    for place in np.ndindex(gram.shape[:-2]):
        wide = gram[place].astype(np.float64)
        scale = np.sqrt(np.maximum(np.diagonal(wide), 0.0))
        scale = np.where(scale > 0.0, scale, 1.0)[:, None]
        wide /= scale * scale.T
        wide[np.diag_indices(size)] += ridge
        inverse = np.linalg.inv(wide) if columns > _COLUMNS else None
        for start in range(0, columns, _COLUMNS):
            part = residual[place][:, start : start + _COLUMNS] / scale
            solved = np.linalg.solve(wide, part) if inverse is None else inverse @ part
            result[place][:, start : start + _COLUMNS] = solved / scale
    return result
