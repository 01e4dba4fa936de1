"""Small dense problems, solved on the host in float64, whatever library the tensor is of.

They are of the size of bonds, not of weights, and their accuracy decides how far alternating least
squares gets. One LAPACK serves all libraries, those without float64 included.
"""

from __future__ import annotations

from typing import Any

from tensormoe._devices import device_of
from tensormoe.backend import Array, Backend

__all__ = ["from_host", "solve", "to_host"]

# relative to the mean diagonal: what directions without strength are held down by
_RIDGE = 1e-12

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


def solve(gram: Any, moment: Any) -> Any:
    """X of ``G X = M`` for NumPy arrays G (…, K, K), symmetric and not negative, and M (…, K, L).

    Components are scaled alike first, and directions that G does not see are held down.
    """
    import numpy as np

    size, columns = moment.shape[-2:]
    result = np.empty(moment.shape, moment.dtype)
    for place in np.ndindex(gram.shape[:-2]):
        wide = gram[place].astype(np.float64)
        scale = np.sqrt(np.maximum(np.diagonal(wide), 0.0))
        scale = np.where(scale > 0.0, scale, 1.0)[:, None]
        wide /= scale * scale.T
        wide[np.diag_indices(size)] += _RIDGE * size
        inverse = np.linalg.inv(wide) if columns > _COLUMNS else None
        for start in range(0, columns, _COLUMNS):
            part = moment[place][:, start : start + _COLUMNS] / scale
            solved = np.linalg.solve(wide, part) if inverse is None else inverse @ part
            result[place][:, start : start + _COLUMNS] = solved / scale
    return result
