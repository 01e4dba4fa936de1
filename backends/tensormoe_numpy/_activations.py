"""Elementwise functions between the two layers of a block, with their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import pi, sqrt
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import erf, expit

from tensormoe._validation import choice
from tensormoe.errors import SpecError

NDArray = npt.NDArray[Any]
Pair = tuple[Callable[[NDArray], NDArray], Callable[[NDArray], NDArray]]

__all__ = ["ACTIVATIONS", "activation"]


def _gelu(x: NDArray) -> NDArray:
    result: NDArray = x * (0.5 * (1.0 + erf(x * sqrt(0.5)))).astype(x.dtype, copy=False)
    return result


def _gelu_slope(x: NDArray) -> NDArray:
    density = np.exp(-0.5 * x * x) * (1.0 / sqrt(2.0 * pi))
    result: NDArray = (0.5 * (1.0 + erf(x * sqrt(0.5))) + x * density).astype(x.dtype, copy=False)
    return result


def _bent(x: NDArray) -> NDArray:
    result: NDArray = np.tanh(sqrt(2.0 / pi) * (x + 0.044715 * x * x * x))
    return result


def _gelu_tanh(x: NDArray) -> NDArray:
    return 0.5 * x * (1.0 + _bent(x))


def _gelu_tanh_slope(x: NDArray) -> NDArray:
    bent = _bent(x)
    inner = sqrt(2.0 / pi) * (1.0 + 3 * 0.044715 * x * x)
    return 0.5 * (1.0 + bent) + 0.5 * x * (1.0 - bent * bent) * inner


def _relu(x: NDArray) -> NDArray:
    result: NDArray = np.maximum(x, 0)
    return result


def _relu_slope(x: NDArray) -> NDArray:
    return (x > 0).astype(x.dtype)


def _silu(x: NDArray) -> NDArray:
    result: NDArray = x * expit(x).astype(x.dtype, copy=False)
    return result


def _silu_slope(x: NDArray) -> NDArray:
    gate = expit(x).astype(x.dtype, copy=False)
    result: NDArray = gate * (1.0 + x * (1.0 - gate))
    return result


def _tanh_slope(x: NDArray) -> NDArray:
    result: NDArray = 1.0 - np.tanh(x) ** 2
    return result


ACTIVATIONS: Mapping[str, Pair] = MappingProxyType(
    {
        "gelu": (_gelu, _gelu_slope),
        "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope),
        "relu": (_relu, _relu_slope),
        "silu": (_silu, _silu_slope),
        "tanh": (np.tanh, _tanh_slope),
    }
)
"""Function and derivative by name; ``gelu`` is the exact one, ``gelu_tanh`` GPT-2's."""


def activation(name: str) -> Pair:
    """A function and its derivative.

    Raises:
        SpecError: an unknown name.
    """
    return ACTIVATIONS[choice(name, ACTIVATIONS, "act_layer", SpecError)]
