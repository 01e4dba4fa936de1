"""Primitives that an array library must offer, and the adapters that provide them.

An adapter implements :class:`Backend` and is registered as an entry point in the group
``tensormoe.backends`` under the name of the array library's root module (``numpy`` for
``numpy.ndarray``). The core converts arrays from one library to another where it is asked to
(:func:`tensormoe.convert`), and nowhere else.
"""

from __future__ import annotations

from tensormoe.backend._devices import device_of
from tensormoe.backend._exchange import convert
from tensormoe.backend._integers import default_integer
from tensormoe.backend._protocol import (
    Array,
    Backend,
    Convolves,
    Exchange,
    Groups,
    LoopStep,
    Ranks,
    Selects,
    State,
    Step,
    StoredProducts,
)
from tensormoe.backend._registry import (
    available_backends,
    backend_of,
    check_array,
    get_backend,
    kind_of,
    known_backends,
    loaded_backend,
)

__all__ = [
    "Array",
    "Backend",
    "Convolves",
    "Exchange",
    "Groups",
    "LoopStep",
    "Ranks",
    "Selects",
    "State",
    "Step",
    "StoredProducts",
    "available_backends",
    "backend_of",
    "check_array",
    "convert",
    "default_integer",
    "device_of",
    "get_backend",
    "kind_of",
    "known_backends",
    "loaded_backend",
]
