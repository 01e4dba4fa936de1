"""Elementwise functions between the two layers of a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import Array

from tensormoe._validation import brief, choice
from tensormoe.errors import SpecError

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


def activation_name(act_layer: Act) -> str | None:
    """The name of an activation that is given by its name, or as JAX's function.

    Returns:
        None for another function, or a module: the block holds it, and no checkpoint names it.

    Raises:
        SpecError: another name, or nothing that can be called.

    >>> activation_name(jax.nn.silu), activation_name("gelu"), activation_name(jnp.sin)
    ('silu', 'gelu', None)
    """
    if callable(act_layer) and not isinstance(act_layer, type):
        # a module need not be hashable
        named = (name for function, name in _FUNCTIONS.items() if function is act_layer)
        return next(named, None)
    try:
        return choice(act_layer, ACTIVATIONS, "act_layer", SpecError)
    except SpecError as error:
        raise SpecError(f"{error} Or give a function of arrays, such as jax.nn.relu6.") from None


def own_activation(name: str | None, act_layer: Act | None) -> Callable[[Array], Array] | None:
    """Return the activation that a block must hold: None if its configuration names one.

    Raises:
        SpecError: neither or both, where they are not the same.
    """
    if name is None and callable(act_layer):
        return act_layer
    if act_layer is None or activation_name(act_layer) != name:
        raise SpecError(
            f"act must be the activation of a block whose configuration names none; got "
            f"{brief(act_layer)} for {name!r}."
        )
    return None
