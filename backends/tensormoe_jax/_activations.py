"""Elementwise functions between the two layers of a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["ACTIVATIONS"]


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "gelu": _gelu,
        "gelu_tanh": jax.nn.gelu,
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "tanh": jnp.tanh,
    }
)
"""Function by name; ``gelu`` is the exact one, ``gelu_tanh`` GPT-2's."""
