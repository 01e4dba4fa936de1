"""The functions of the Array-API standard that the core uses, on CuPy's arrays.

CuPy 14 has nearly all of them under the standard's names. What it lacks or names otherwise is here.
The general wrappers of array-api-compat serve the installed module alone, while an adapter is to
work for the module that it is given, and they cost microseconds a call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tensormoe.backend import Array


class Namespace:
    """A module of CuPy's interface as the standard has it.

    Args:
        module: CuPy, or what has its functions.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __repr__(self) -> str:
        return f"Namespace({self._module!r})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._module, name)
        # the next look finds it without coming here
        setattr(self, name, found)
        return found

    def vecdot(self, x1: Array, x2: Array, /, *, axis: int = -1) -> Array:
        """Sums of products along an axis."""
        return self._module.sum(x1 * x2, axis=axis)

    def argsort(self, x: Array, /, *, axis: int = -1, stable: bool = True) -> Array:
        """Indices that sort; CuPy's order is stable always."""
        return self._module.argsort(x, axis=axis)

    def asarray(
        self, obj: Any, /, *, dtype: Any = None, device: Any = None, copy: bool | None = None
    ) -> Array:
        """An array of numbers or of an array."""
        options = {} if copy is None else {"copy": copy}
        with _on(device):
            return self._module.asarray(obj, dtype=dtype, **options)

    def arange(
        self,
        start: float,
        /,
        stop: float | None = None,
        step: float = 1,
        *,
        dtype: Any = None,
        device: Any = None,
    ) -> Array:
        """Evenly spaced numbers."""
        with _on(device):
            return self._module.arange(start, stop, step, dtype=dtype)

    def eye(
        self, n_rows: int, n_cols: int | None = None, /, *, dtype: Any = float, device: Any = None
    ) -> Array:
        """Ones on the diagonal."""
        with _on(device):
            return self._module.eye(n_rows, n_cols, dtype=dtype)

    def ones(self, shape: Any, *, dtype: Any = float, device: Any = None) -> Array:
        """Ones of a shape."""
        with _on(device):
            return self._module.ones(shape, dtype=dtype)

    def zeros(self, shape: Any, *, dtype: Any = float, device: Any = None) -> Array:
        """Zeros of a shape."""
        with _on(device):
            return self._module.zeros(shape, dtype=dtype)


def _on(device: Any) -> AbstractContextManager[Any]:
    """CuPy makes arrays on its current device; a device is a context that makes it so."""
    return nullcontext() if device is None else device
