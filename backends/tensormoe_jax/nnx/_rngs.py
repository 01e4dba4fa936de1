"""Sources of a module's initial values."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx
from jax import Array

from tensormoe.errors import SpecError
from tensormoe_jax._keys import shown

__all__ = ["Source", "checked_rngs", "noise_stream", "parameters_key"]

Source = nnx.Rngs | int | Array
"""Streams of random keys, or the seed or the key that makes them."""


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


def parameters_key(rngs: Any) -> Array:
    """The key that parameters are drawn by.

    Raises:
        SpecError: not a source of keys, or one without a stream for parameters.
    """
    key: Array = _stream(checked_rngs(rngs), "params")()
    return key


def noise_stream(rngs: nnx.Rngs) -> nnx.RngStream:
    """The stream that a gate's noise is drawn by, which the gate keeps.

    Raises:
        SpecError: no stream for noise.
    """
    stream: nnx.RngStream = _stream(rngs, "noise").fork()
    return stream


def _stream(rngs: nnx.Rngs, name: str) -> nnx.RngStream:
    try:
        stream: nnx.RngStream = getattr(rngs, name)
    except AttributeError as error:
        raise SpecError(
            f"rngs must have a stream named {name!r}, or a default one; got {[*rngs]}. Pass "
            "nnx.Rngs(0), for instance."
        ) from error
    return stream
