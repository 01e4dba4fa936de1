"""Where a module's first values come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from flax import nnx
from jax import Array

from tensormoe.errors import SpecError
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe_jax._keys import shown
from tensormoe_jax._layers import Ready, first_values

__all__ = ["Source", "checked_rngs", "drawn"]

Source = nnx.Rngs | int | Array
"""Streams of random keys, or the seed or the key that makes them."""

C = TypeVar("C", LayerConfig, BlockConfig)


def checked_rngs(rngs: Any) -> nnx.Rngs:
    """``rngs`` as Flax's value.

    Raises:
        SpecError: neither streams, nor a seed, nor a key.
    """
    if isinstance(rngs, nnx.Rngs):
        return rngs
    if not isinstance(rngs, bool) and isinstance(rngs, int | np.integer | Array):
        try:
            return nnx.Rngs(rngs if isinstance(rngs, Array) else int(rngs))
        except (OverflowError, ValueError):
            pass
    raise SpecError(
        f"rngs must be an nnx.Rngs, a seed, or a key of jax.random.key; got {shown(rngs)}. Pass "
        "nnx.Rngs(0), for instance."
    )


def drawn(rngs: Any, resolve: Callable[[], C], init: str, dtype: Any) -> tuple[C, dict[str, Array]]:
    """A layer's configuration, and its parameters and buffers by canonical name.

    Raises:
        SpecError: no source of keys, or one without a stream for parameters.
    """
    if isinstance(rngs, Ready):
        return first_values(rngs, resolve, init, dtype)
    try:
        key = checked_rngs(rngs).params()
    except AttributeError as error:
        raise SpecError(
            f"rngs must have a stream named 'params', or a default one; got {[*rngs]}. Pass "
            "nnx.Rngs(0), for instance."
        ) from error
    return first_values(key, resolve, init, dtype)
