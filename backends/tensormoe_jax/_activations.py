"""Elementwise functions between the two layers of a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import Array

from tensormoe._validation import choice
from tensormoe.errors import SpecError

__all__ = ["ACTIVATIONS", "Act", "activation_name"]

Act = str | Callable[[Array], Array]


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

_FUNCTIONS: Mapping[Callable[[Array], Array], str] = MappingProxyType(
    {jax.nn.gelu: "gelu_tanh", jax.nn.relu: "relu", jax.nn.silu: "silu", jnp.tanh: "tanh"}
)


def activation_name(act_layer: Act) -> str:
    """The name of an activation that is given by its name, or as JAX's function.

    Raises:
        SpecError: another name or function.

    >>> activation_name(jax.nn.silu), activation_name("gelu")
    ('silu', 'gelu')
    """
    known = _FUNCTIONS.get(act_layer) if callable(act_layer) else act_layer
    return choice(act_layer if known is None else known, ACTIVATIONS, "act_layer", SpecError)
