"""CuPy's primitives for the core."""

from __future__ import annotations

from typing import Any

import cupy
import numpy.typing as npt
from cupyx.scipy import special

from tensormoe.backend import Array
from tensormoe.errors import BackendError
from tensormoe_cupy._namespace import Namespace
from tensormoe_numpy import NumpyLikeBackend


class CupyBackend(NumpyLikeBackend):
    """Adapter of :class:`tensormoe.backend.Backend` for ``cupy.ndarray``.

    Nothing in it reads a value, which would wait for the device: NaN propagates, and ids that are
    out of range wrap around, as everywhere in CuPy. What :meth:`scatter_add` adds to one place
    comes in any order, so that its last digits may differ from run to run.

    Args:
        module: CuPy, or what has its functions.
        special: what has ``erf`` and ``expit``, as ``cupyx.scipy.special``.
    """

    name = "cupy"
    # large arrays fill the device; reading values steers nothing, as it waits for the device
    row_block_bytes = None
    eager = False
    checks_values = False
    # DLPack's numbers of the memory of CUDA's devices, of CUDA's managed memory, and of ROCm's
    devices = frozenset({2, 10, 13})

    def __init__(self, module: Any = cupy, special: Any = special) -> None:
        super().__init__(module, special, Namespace(module))

    def check_device(self) -> None:
        """Refuse to go on without a device.

        Raises:
            BackendError: no NVIDIA GPU, or no driver that CuPy's CUDA version works with.
        """
        runtime = self.module.cuda.runtime
        try:
            count = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as error:
            found = str(error)
        else:
            if count:
                return
            found = "no device"
        raise BackendError(
            f"the cupy backend must have an NVIDIA GPU and its driver; got: {found}. Install or "
            "update the driver, or take tensormoe_numpy, whose layers open the same checkpoints."
        )

    def scatter_add(self, values: Array, indices: Array, axis: int, size: int, /) -> Array:
        if values.dtype.name != "int64":
            return super().scatter_add(values, indices, axis, size)
        # devices add 64 bits without a sign; the bits of the sum are the same
        total = super().scatter_add(values.view("uint64"), indices, axis, size)
        return total.view("int64")

    def from_host(self, array: npt.NDArray[Any], /) -> Array:
        self.check_device()
        return self.module.asarray(array)

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: bytes, /) -> Array:
        if dtype == "bfloat16":
            # NumPy has it where another package brings it, but CuPy has no operations on it
            raise TypeError("no layer on CuPy has that data type")
        return super().from_bytes(dtype, shape, data)

    def to_host(self, array: Array, /) -> npt.NDArray[Any]:
        host: npt.NDArray[Any] = self.module.asnumpy(array)
        return host


BACKEND = CupyBackend()
"""The adapter of CuPy, which ``tensormoe.get_backend`` returns."""
