"""The library that does the work: NumPy for all arrays in host memory, shared without copies.

A search is hundreds of small products with a host solve after each. Libraries that are made for
large ones take twice NumPy's time for that, and lending costs microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensormoe.backend import Array, Backend, backend_of, convert, get_backend
from tensormoe.decomposition._solve import from_host
from tensormoe.decomposition._source import Source
from tensormoe.errors import BackendError
from tensormoe.functional._dtypes import cast, widened


@dataclass(frozen=True, eq=False)
class Workplace:
    """The library that a decomposition runs on, and conversions to and from it.

    Args:
        owner: adapter of the library that the weights are of.
        backend: adapter of the one that the work is done on: NumPy's, or the owner.
    """

    owner: Backend
    backend: Backend

    @classmethod
    def of(cls, weights: Array, owner: Backend) -> Workplace:
        """NumPy for weights that it can read without a copy; otherwise their own library.

        Args:
            weights: cut off from differentiation.
            owner: adapter of their library.
        """
        if owner.name == "numpy":
            return cls(owner, owner)
        try:
            convert(widened(weights[(slice(0, 0),)], owner), "numpy", copy=False)
        except BackendError:
            # on another device, traced, or of a library without DLPack
            return cls(owner, owner)
        return cls(owner, get_backend("numpy"))

    def take(self, array: Array) -> Array:
        """An array to work with, whole, in the same memory where NumPy has its dtype."""
        if self.backend is self.owner:
            return array
        return convert(widened(array, self.owner), "numpy")

    def lend(self, weights: Array) -> Array:
        """Return the array that a :class:`Source` reads the weights from, in the same memory.

        Of a dtype that NumPy lacks, such as bfloat16, no more is widened at a time than is read.
        """
        if self.backend is self.owner:
            return weights
        try:
            return convert(weights, "numpy", copy=False)
        except BackendError:
            return _Widened(weights, self.owner)

    def give(self, array: Array, like: Array) -> Array:
        """Convert a result of the work to the library, dtype and device of ``like``."""
        if self.backend is not self.owner:
            array = from_host(array, widened(like[(slice(0, 0),)], self.owner), self.owner)
        return cast(array, like.dtype, self.owner)


def source_of(weights: Array, bias: Array | None) -> Source:
    """Checked weights, and biases, as the tensor that is worked on."""
    owner = backend_of(*(each for each in (weights, bias) if each is not None))
    weights = owner.stop_gradient(weights)
    place = Workplace.of(weights, owner)
    bias = None if bias is None else place.take(owner.stop_gradient(bias))
    return Source(place.lend(weights), place.backend, bias).scaled()


class _Widened:
    """An array in a dtype that NumPy lacks, such as bfloat16: what is read of it is float32.

    Args:
        array: of its own library.
        owner: adapter of that.
    """

    def __init__(self, array: Array, owner: Backend) -> None:
        self._array, self._owner = array, owner
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.ndim = len(self.shape)
        self.dtype = array.dtype

        self._host = _readable(array)

    def __getitem__(self, key: Any) -> Any:
        if self._host is not None:
            return self._host[key].astype("float32")
        return convert(widened(self._array[key], self._owner), "numpy")


def _readable(array: Array) -> Any:
    """The same memory as a NumPy array, of a library that brings NumPy its own 16-bit dtype.

    Slices of it are cheap, and those of such a library are not.
    """
    import numpy as np

    try:
        found = np.asarray(array)
    except (TypeError, ValueError, RuntimeError):
        return None
    return found if found.dtype.itemsize == 2 else None
