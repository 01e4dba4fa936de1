"""The module: every function by its name in the installed CuPy."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.special

from tests._cupy_standin._array import Array, unwrap, wrap
from tests._cupy_standin._log import LOG
from tests._cupy_standin._signatures import signature_of

cupy = pytest.importorskip("cupy")

# made of what is on the host, hence a copy to the device
_UPLOADS = {"asarray", "array"}

_WAITING = {"nonzero", "flatnonzero", "argwhere", "unique"}

# CUDA adds no others atomically
_ATOMIC = {"int32", "uint32", "uint64", "float16", "float32", "float64"}


class Standin:
    """In place of ``import cupy``.

    Args:
        devices: how many there are; ``None`` for no driver.
    """

    ndarray = Array

    def __init__(self, devices: int | None = 1) -> None:
        self._devices = devices
        runtime = SimpleNamespace(
            getDeviceCount=self._count, CUDARuntimeError=cupy.cuda.runtime.CUDARuntimeError
        )
        assert all(hasattr(cupy.cuda.runtime, name) for name in vars(runtime))
        self.cuda = SimpleNamespace(runtime=runtime)

    def _count(self) -> int:
        if self._devices is None:
            raise cupy.cuda.runtime.CUDARuntimeError(35)
        return self._devices

    def __getattr__(self, name: str) -> Any:
        real = getattr(cupy, name)
        same = getattr(np, name, None)
        if same is real:
            return real
        if name == "asnumpy":
            return self._asnumpy
        if name in _UPLOADS:
            return lambda *args, **kwargs: _upload(name, real, args, kwargs)
        if same is None:
            raise NotImplementedError(f"the stand-in has nothing in place of cupy.{name}")
        return _Function("function", name, real, same)

    def _asnumpy(self, *args: Any, **kwargs: Any) -> np.ndarray:
        bound = signature_of(cupy.asnumpy).bind(*args, **kwargs)
        LOG.used.add(("function", "asnumpy", frozenset(kwargs)))
        LOG.waits.append("asnumpy")
        host: np.ndarray = unwrap(bound.arguments["a"]).copy()
        return host


class Special:
    """In place of ``import cupyx.scipy.special``."""

    def __getattr__(self, name: str) -> Any:
        import cupyx.scipy.special

        function = getattr(scipy.special, name)

        def wide(x: np.ndarray) -> Any:
            # CuPy's kernels have no narrow variant
            return function(x.astype("float64") if x.dtype == "float16" else x)

        return _Function("special", name, getattr(cupyx.scipy.special, name), wide)


class _Function:
    def __init__(self, kind: str, name: str, real: Any, same: Callable[..., Any]) -> None:
        self._kind, self._name, self._real, self._same = kind, name, real, same

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        signature_of(self._real).bind(*args, **kwargs)
        LOG.used.add((self._kind, self._name, frozenset(kwargs)))
        if self._name in _WAITING:
            LOG.waits.append(self._name)
        args, kwargs = unwrap(args), unwrap(kwargs)
        if self._name == "take":
            # indices out of range wrap around
            kwargs["mode"] = "wrap"
        with np.errstate(all="ignore"):
            return wrap(self._same(*args, **kwargs))

    def at(self, array: Array, indices: Any, values: Any) -> None:
        """Unbuffered addition in place."""
        assert hasattr(self._real, "at")
        LOG.used.add(("function", f"{self._name}.at", frozenset()))
        if self._name != "add" or array.dtype.name not in _ATOMIC:
            raise TypeError(f"{self._name}.at does not support {array.dtype}")
        self._same.at(*unwrap((array, indices, values)))  # type: ignore[attr-defined]


def _upload(name: str, real: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
    signature_of(real).bind(*args, **kwargs)
    LOG.used.add(("function", name, frozenset(kwargs)))
    source, *others = args
    options = {key: value for key, value in kwargs.items() if key != "blocking"}
    if isinstance(source, Array):
        return Array(getattr(np, name)(source._host, *others, **options))
    LOG.uploads.append(name)
    return Array(np.array(source, *others, **options))
