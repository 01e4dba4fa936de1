"""The primitives of NumPy and of libraries that copy its interface."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tensormoe.backend import Array, State, Step
from tensormoe.planning import Library


class NumpyLikeBackend:
    """Adapter of :class:`tensormoe.backend.Backend` for a library that has NumPy's interface.

    A subclass says its name and how the library runs, and brings what is faster there. The layers
    of this package run on any such adapter: ``class MuMoE(tensormoe_numpy.MuMoE): backend = …``.

    Args:
        module: the library, by NumPy's names.
        special: what has ``erf`` and ``expit``, as ``scipy.special``.
        namespace: the library's Array-API namespace; ``module`` itself by default.

    Attributes:
        module: as given.
        special: as given.
        namespace: the Array-API namespace.
    """

    name: str
    row_block_bytes: int | None = None
    # entries of the buffer through which an operand is repeated
    buffers: int = 0
    eager: bool = False
    checks_values: bool = False
    keeps_constants: bool = False
    devices: frozenset[int] | None = None

    def __init__(self, module: Any, special: Any, namespace: Any = None) -> None:
        self.module = module
        self.special = special
        self.namespace = module if namespace is None else namespace

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def library(self) -> Library:
        """Properties that the memory of a call depends on."""
        return Library(self.row_block_bytes, buffers=self.buffers)

    def check_device(self) -> None:
        """Refuse to go on where the library has nothing to run on."""

    def from_host(self, array: npt.NDArray[Any], /) -> Array:
        """An array of the library with the values of NumPy's; shared where it can be."""
        raise NotImplementedError

    def to_host(self, array: Array, /) -> npt.NDArray[Any]:
        """NumPy's array with the values of the library's; shared where it can be."""
        raise NotImplementedError

    def owns(self, array: Any, /) -> bool:
        return isinstance(array, self.module.ndarray)

    def matmul(self, left: Array, right: Array, /) -> Array:
        return self.module.matmul(left, right)

    def reshape(self, array: Array, shape: tuple[int, ...], /) -> Array:
        return array.reshape(shape)

    def permute(self, array: Array, axes: tuple[int, ...], /) -> Array:
        return array.transpose(axes)

    def contiguous(self, array: Array, /) -> Array:
        # always a copy: the executor may add into what it gets
        return array.copy(order="C")

    def sum(self, array: Array, axes: tuple[int, ...], /) -> Array:
        return self.module.sum(array, axis=axes)

    def row_sums(self, array: Array, /) -> Array:
        return self.module.sum(array, axis=-1, keepdims=True)

    def square_sums(self, array: Array, /) -> Array:
        return self.module.sum(array * array, axis=-1, keepdims=True)

    def while_loop(self, step: Step, state: State, max_steps: int, tolerance: float, /) -> State:
        # step sizes are not tested: reading a value waits for the device
        for _ in range(max_steps):
            state, _ = step(*state)
        return state

    def take(self, array: Array, indices: Array, axis: int, /) -> Array:
        return self.module.take(array, indices, axis=axis)

    def scatter_add(self, values: Array, indices: Array, axis: int, size: int, /) -> Array:
        before, after = values.shape[:axis], values.shape[axis + indices.ndim :]
        total = self.module.zeros((*before, size, *after), dtype=values.dtype)
        index: Any = (slice(None),) * axis + (indices,)
        self.module.add.at(total, index, values)
        return total

    def floats(self, array: Array, /) -> list[float]:
        listed: list[float] = array.tolist()
        return listed

    def stop_gradient(self, array: Array, /) -> Array:
        return array

    def to_bytes(self, array: Array, /) -> tuple[str, tuple[int, ...], bytes]:
        host = np.ascontiguousarray(self.to_host(array))
        little = host.astype(host.dtype.newbyteorder("<"), copy=False)
        # ascontiguousarray makes vectors of numbers
        return host.dtype.name, tuple(array.shape), little.tobytes()

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: bytes, /) -> Array:
        found = np.dtype(dtype)
        little = np.frombuffer(data, dtype=found.newbyteorder("<"))
        return self.from_host(little.astype(found).reshape(shape))

    def to_dlpack(self, array: Array, /, *, copy: bool) -> tuple[Array, bool]:
        return (array.copy() if copy else array), True

    def from_dlpack(self, array: Array, /, *, copy: bool | None) -> Array:
        self.check_device()
        return self.module.from_dlpack(array)
