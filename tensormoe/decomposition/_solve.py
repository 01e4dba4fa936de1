"""Small dense problems, solved on the host in float64, whatever library the tensor is of.

They are of the size of bonds, not of weights, and their accuracy decides how far alternating least
squares gets. One LAPACK serves all libraries, those without float64 included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensormoe.backend import Array, Backend, convert, device_of
from tensormoe.errors import BackendError
from tensormoe.functional._dtypes import widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

# rows of a large matrix that are widened at a time, and entries of a large one
_ROWS, _LARGE = 4096, 2**22
# of the largest entry of a triangular matrix's diagonal, the smallest that is not rounding
_DETERMINED = 1e-6


def to_host(array: Array, backend: Backend) -> NDArray[Any]:
    """The values as a NumPy array of the same dtype, in the same memory where that can be.

    Raises:
        BackendError: an array without values: traced, or on PyTorch's meta device.
    """
    import numpy as np

    try:
        return convert(array, "numpy")  # type: ignore[return-value]
    except BackendError as error:
        try:
            # libraries without DLPack
            dtype, shape, content = backend.to_bytes(array)
        except (TypeError, RuntimeError):
            raise error from None
    return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).reshape(shape)


def wide(array: Array, backend: Backend) -> NDArray[Any]:
    """The values on the host in float64, whatever the dtype, cut off from differentiation."""
    return to_host(widened(backend.stop_gradient(array), backend), backend).astype("float64")


def from_host(array: NDArray[Any], like: Array, backend: Backend) -> Array:
    """An array of the library from NumPy's, in the dtype and on the device of ``like``.

    It may share memory with the one that is given.
    """
    import numpy as np

    xp = backend.namespace
    dtype = to_host(like[(slice(0, 0), *(0,) * (like.ndim - 1))], backend).dtype
    values = np.ascontiguousarray(array, dtype)
    try:
        found = convert(values, backend.name)
    except BackendError:
        found = backend.from_bytes(dtype.name, values.shape, values.tobytes())
    device = device_of(like)
    if device is None or device_of(found) == device:
        return found
    return xp.asarray(found, device=device)


def inverse(gram: NDArray[Any], damping: float = 0.0) -> NDArray[Any]:
    """(G + λ)⁻¹ in float64 for a NumPy array G (…, K, K), symmetric and not negative.

    λ is what G's own rounding hides, or ``damping`` if that is more; for it, components are scaled
    alike, so that G has ones on its diagonal. Those that are nothing but the rounding of the
    largest are not: what is left of the tensor, over next to nothing, would be huge.
    """
    import numpy as np

    size, rounding = gram.shape[-1], float(np.finfo(gram.dtype).eps)
    ridge = max(size * rounding, damping)
    wide: NDArray[Any] = gram.astype(np.float64)
    scale = np.sqrt(np.maximum(np.diagonal(wide, axis1=-2, axis2=-1), 0.0))
    scale = np.maximum(scale, rounding * scale.max(axis=-1, keepdims=True))
    scale = np.where(scale > 0.0, scale, 1.0)
    rows, columns = scale[..., :, None], scale[..., None, :]
    wide /= rows
    wide /= columns
    places = np.arange(size)
    wide[..., places, places] += ridge
    while True:
        try:
            wide = np.linalg.inv(wide)
            break
        except np.linalg.LinAlgError:
            # elimination can end at a zero all the same
            wide[..., places, places] += ridge
            ridge *= 2.0
    wide /= rows
    wide /= columns
    return wide


def orthonormal_columns(matrix: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Q and R of a tall matrix: orthonormal columns in its dtype, and what makes it of them.

    LAPACK takes copies of a whole matrix in float64. Of a large one only blocks of rows are
    widened: R first, block after block, and the columns from its inverse, as far as that is well
    determined.
    """
    import numpy as np

    count, size = matrix.shape
    step = max(size, _ROWS)
    if count <= 2 * step or matrix.size <= _LARGE:
        return np.linalg.qr(matrix)
    spans = [slice(start, start + step) for start in range(0, count, step)]
    rest: Any = np.zeros((0, size))
    for span in spans:
        rest = np.linalg.qr(np.concatenate([rest, matrix[span].astype("float64")]), "r")
    sizes = np.abs(np.diagonal(rest))
    if not sizes.min() > _DETERMINED * sizes.max():
        return np.linalg.qr(matrix)
    inverted, columns = np.linalg.inv(rest), np.empty_like(matrix)
    for span in spans:
        columns[span] = matrix[span].astype("float64") @ inverted
    return columns, rest.astype(matrix.dtype)
