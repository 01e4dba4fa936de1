"""The array: NumPy's inside, CuPy's outside."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import pytest

from tests._cupy_standin._log import LOG
from tests._cupy_standin._signatures import signature_of

cupy = pytest.importorskip("cupy")

SCALARS = (bool, int, float, complex, np.generic)

_DATA = {"shape", "dtype", "ndim", "size", "itemsize", "nbytes", "T", "mT", "strides"}
_WAITING = {"get", "item", "tolist", "tobytes", "nonzero"}


class Device:
    """A device as a context; there is one, and it is equal to itself, as CuPy's are."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device)

    def __hash__(self) -> int:
        return 0

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class Array:
    """An array whose values only CuPy's own functions and methods see."""

    __slots__ = ("_host",)
    __hash__ = None  # type: ignore[assignment]
    # NumPy's operators leave operands of this type to them
    __array_ufunc__ = None

    def __init__(self, host: np.ndarray) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        real = getattr(cupy.ndarray, name)
        if name == "device":
            return Device()
        if name in _DATA:
            return wrap(getattr(self._host, name))
        return lambda *args, **kwargs: self._call(name, real, args, kwargs)

    def _call(self, name: str, real: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        signature_of(real).bind(self, *args, **kwargs)
        LOG.used.add(("method", name, frozenset(kwargs)))
        if name in _WAITING:
            LOG.waits.append(name)
        if name == "get":
            return self._host.copy()
        with np.errstate(all="ignore"):
            found = getattr(self._host, name)(*unwrap(args), **unwrap(kwargs))
        return found if name in {"item", "tolist", "tobytes"} else wrap(found)

    def __array__(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        # CUDA's first device, in DLPack's numbers
        return 2, 0

    def __dlpack__(self, **_: object) -> NoReturn:
        raise BufferError("memory of a device that is not there")

    def __array_function__(self, *_: object) -> NoReturn:
        raise TypeError("a function of NumPy was called with an array of CuPy")

    def __getitem__(self, place: Any) -> Array:
        return Array(self._host[_index(place, "__getitem__")])

    def __setitem__(self, place: Any, value: Any) -> None:
        if not isinstance(value, (Array, *SCALARS)):
            raise TypeError(f"Unsupported type {type(value)}")
        self._host[_index(place, "__setitem__")] = unwrap(value)

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[Array]:
        return (self[place] for place in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self._read("bool"))

    def __int__(self) -> int:
        return int(self._read("int"))

    def __float__(self) -> float:
        return float(self._read("float"))

    def __repr__(self) -> str:
        return repr(self._read("repr"))

    def __deepcopy__(self, memo: object) -> Array:
        return Array(self._host.copy())

    def __reduce__(self) -> tuple[Any, ...]:
        return wrap, (self._host.copy(),)

    def _read(self, name: str) -> np.ndarray:
        LOG.waits.append(name)
        return self._host


Array.__name__ = Array.__qualname__ = "ndarray"
# the registry asks for the root module of an array's type
Array.__module__ = "cupy"


def _index(place: Any, name: str) -> tuple[Any, ...]:
    parts = place if isinstance(place, tuple) else (place,)
    for part in parts:
        if isinstance(part, Array):
            if part.dtype.kind == "b":
                # how many entries there are is read from the device
                LOG.waits.append(name)
        elif not (part is None or part is Ellipsis or isinstance(part, (slice, int, np.integer))):
            raise TypeError(f"an array of CuPy was indexed with {type(part)}")
    found = tuple(unwrap(part) for part in parts)
    # with an ellipsis NumPy too gives an array without axes, and not a number
    return found if any(part is Ellipsis for part in found) else (*found, ...)


def unwrap(value: Any) -> Any:
    """NumPy's arrays for the stand-in's, inside tuples, lists and mappings too."""
    if isinstance(value, Array):
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, dict):
        return {name: unwrap(each) for name, each in value.items()}
    if isinstance(value, list):
        if not all(isinstance(each, Array) for each in value):
            raise TypeError(f"Unsupported type {type(value)}")
        return [unwrap(each) for each in value]
    return tuple(unwrap(each) for each in value) if isinstance(value, tuple) else value


def wrap(value: Any) -> Any:
    """The stand-in's arrays for NumPy's arrays and scalars; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(wrap(each) for each in value)
    return Array(np.asarray(value)) if isinstance(value, (np.ndarray, np.generic)) else value


def _operator(name: str, function: Callable[..., Any], swapped: bool) -> Callable[..., Any]:
    def method(self: Array, *others: Any) -> Any:
        for other in others:
            if not isinstance(other, (Array, *SCALARS)):
                raise TypeError(f"Unsupported type {type(other)}")
        LOG.used.add(("method", name, frozenset()))
        operands = [self._host, *map(unwrap, others)]
        with np.errstate(all="ignore"):
            found = function(*(reversed(operands) if swapped else operands))
        return self if found is self._host else wrap(found)

    return method


_OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "rshift"),
)
for _name in _OPERATORS:
    for _prefix in ("", "r", "i"):
        _method = f"__{_prefix}{_name}__"
        if hasattr(cupy.ndarray, _method):
            _function = getattr(operator, f"__{'i' if _prefix == 'i' else ''}{_name}__")
            setattr(Array, _method, _operator(_method, _function, _prefix == "r"))
for _name in ("neg", "pos", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Array, f"__{_name}__", _operator(f"__{_name}__", getattr(operator, _name), False))
