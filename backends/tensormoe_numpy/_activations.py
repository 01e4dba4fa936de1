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

# of an array, entries that are worked on at a time: they and some temporaries stay in cache
_BLOCK = 2**13


@cache
def activations(backend: NumpyLikeBackend) -> Mapping[str, Pair]:
    """Function and derivative by name, on the arrays of a library."""
    xp = backend.module
    pairs: dict[str, Pair] = {
        "gelu": _gelu(xp, backend.special.erf),
        "gelu_tanh": _gelu_tanh(xp),
        "relu": (lambda x: xp.maximum(x, 0), lambda x: (x > 0).astype(x.dtype)),
        "silu": _silu(backend.special.expit),
        "tanh": (xp.tanh, lambda x: 1.0 - xp.tanh(x) ** 2),
    }
    if backend.row_block_bytes is not None:
        pairs = {name: (_by_rows(f, xp), _by_rows(slope, xp)) for name, (f, slope) in pairs.items()}
    return MappingProxyType(pairs)


def _by_rows(function: Callable[[Array], Array], xp: Any) -> Callable[[Array], Array]:
    """The same elementwise function, on some rows at a time, so that temporaries stay small."""

    def run(x: Array) -> Array:
        if x.size <= _BLOCK:
            return function(x)
        rows = x.reshape(-1, x.shape[-1])
        result = xp.empty(rows.shape, dtype=x.dtype)
        step = max(1, _BLOCK // rows.shape[1])
        for start in range(0, len(rows), step):
            result[start : start + step] = function(rows[start : start + step])
        return result.reshape(x.shape)

    return run


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
