"""Dtypes that a layer may be stored in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tensormoe._validation import brief
from tensormoe.errors import SpecError

FLOATS = ("float16", "bfloat16", "float32", "float64")


def checked_dtype(dtype: Any) -> np.dtype[Any]:
    """``dtype`` if a layer can be stored in it; JAX's default one for None.

    Raises:
        SpecError: not a floating-point type, or float64 while JAX's 64-bit mode is off.
    """
    try:
        if isinstance(dtype, jax.Array):
            raise TypeError("an array stands for its dtype elsewhere, and is none")
        found = jax.dtypes.canonicalize_dtype(float) if dtype is None else jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found is None or found.name not in FLOATS:
        raise SpecError(f"dtype must be one of {', '.join(FLOATS)}; got {brief(dtype)}.")
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise SpecError(
            f"dtype {found.name} needs JAX's 64-bit mode, which is off. Switch it on with "
            "jax.config.update('jax_enable_x64', True) before anything else, or take float32."
        )
    return found


def checked_gate_dtype(gate_dtype: Any, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of a gate's parameters, in a layer of ``dtype``.

    Raises:
        SpecError: another one than ``dtype``, or float32 beside 16 bits.
    """
    found = dtype if gate_dtype is None else checked_dtype(gate_dtype)
    if found != dtype and (found.name != "float32" or dtype.itemsize > 2):
        raise SpecError(
            f"gate_dtype must be the layer's, {dtype.name}, or float32 beside factors of 16 bits; "
            f"got {found.name}."
        )
    return found
