"""Elementwise functions between the two layers of a block, with their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from math import pi, sqrt
from types import MappingProxyType
from typing import Any

from tensormoe.backend import Array
from tensormoe_numpy._adapter import BACKEND
from tensormoe_numpy._like_numpy import NumpyLikeBackend

Pair = tuple[Callable[[Array], Array], Callable[[Array], Array]]

__all__ = ["ACTIVATIONS", "activations"]


@cache
def activations(backend: NumpyLikeBackend) -> Mapping[str, Pair]:
    """Function and derivative by name, on the arrays of a library."""
    xp = backend.module
    return MappingProxyType(
        {
            "gelu": _gelu(xp, backend.special.erf),
            "gelu_tanh": _gelu_tanh(xp),
            "relu": (lambda x: xp.maximum(x, 0), lambda x: (x > 0).astype(x.dtype)),
            "silu": _silu(backend.special.expit),
            "tanh": (xp.tanh, lambda x: 1.0 - xp.tanh(x) ** 2),
        }
    )


def _gelu(xp: Any, erf: Callable[[Array], Array]) -> Pair:
    def function(x: Array) -> Array:
        return x * (0.5 * (1.0 + erf(x * sqrt(0.5)))).astype(x.dtype, copy=False)

    def slope(x: Array) -> Array:
        density = xp.exp(-0.5 * x * x) * (1.0 / sqrt(2.0 * pi))
        return (0.5 * (1.0 + erf(x * sqrt(0.5))) + x * density).astype(x.dtype, copy=False)

    return function, slope


def _gelu_tanh(xp: Any) -> Pair:
    def bend(x: Array) -> Array:
        return xp.tanh(sqrt(2.0 / pi) * (x + 0.044715 * x * x * x))

    def function(x: Array) -> Array:
        return 0.5 * x * (1.0 + bend(x))

    def slope(x: Array) -> Array:
        bent = bend(x)
        inner = sqrt(2.0 / pi) * (1.0 + 3 * 0.044715 * x * x)
        return 0.5 * (1.0 + bent) + 0.5 * x * (1.0 - bent * bent) * inner

    return function, slope


def _silu(expit: Callable[[Array], Array]) -> Pair:
    def function(x: Array) -> Array:
        return x * expit(x).astype(x.dtype, copy=False)

    def slope(x: Array) -> Array:
        gate = expit(x).astype(x.dtype, copy=False)
        return gate * (1.0 + x * (1.0 - gate))

    return function, slope


ACTIVATIONS = activations(BACKEND)
"""Function and derivative by name; ``gelu`` is the exact one, ``gelu_tanh`` GPT-2's."""
