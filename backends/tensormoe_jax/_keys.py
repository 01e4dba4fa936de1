"""Random keys, checked where they come in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tensormoe.errors import SpecError


def checked_key(key: Any, rule: str = "key must be one key of jax.random") -> Array:
    """``key`` if it is one of JAX's, new-style or raw, concrete or traced.

    Args:
        key: what was given.
        rule: what the message begins with.

    Raises:
        SpecError: no key, or several.
    """
    if isinstance(key, Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
            return key
        if key.dtype == jnp.uint32 and key.ndim == 1:
            return key
    raise SpecError(f"{rule}; got {shown(key)}. Pass jax.random.key(0), for instance.")


def shown(value: Any) -> str:
    """``value`` for a message, in short where its text may be long."""
    if isinstance(value, Array):
        return f"an array of {value.dtype} and shape {value.shape}"
    short = value is None or isinstance(value, bool | int | float | str)
    return repr(value) if short else f"a {type(value).__name__}"
