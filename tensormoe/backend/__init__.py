"""Primitives that an array library must offer, and the adapters that provide them.

An adapter implements :class:`Backend` and is registered as an entry point in the group
``tensormoe.backends`` under the name of the array library's root module (``numpy`` for
``numpy.ndarray``). The core converts arrays from one library to another where it is asked to
(:func:`tensormoe.convert`), and nowhere else.
"""

from __future__ import annotations

from tensormoe.backend._devices import device_of as device_of
from tensormoe.backend._exchange import convert as convert
from tensormoe.backend._integers import default_integer as default_integer
from tensormoe.backend._protocol import Array as Array
from tensormoe.backend._protocol import Backend as Backend
from tensormoe.backend._protocol import Exchange as Exchange
from tensormoe.backend._protocol import LoopStep as LoopStep
from tensormoe.backend._protocol import Selects as Selects
from tensormoe.backend._protocol import State as State
from tensormoe.backend._protocol import Step as Step
from tensormoe.backend._registry import available_backends as available_backends
from tensormoe.backend._registry import backend_of as backend_of
from tensormoe.backend._registry import check_array as check_array
from tensormoe.backend._registry import get_backend as get_backend
from tensormoe.backend._registry import kind_of as kind_of
from tensormoe.backend._registry import known_backends as known_backends
from tensormoe.backend._registry import loaded_backend as loaded_backend

__all__ = [
    "Array",
    "Backend",
    "Exchange",
    "LoopStep",
    "Selects",
    "State",
    "Step",
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
