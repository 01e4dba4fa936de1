"""Logits and coefficients are float32 at least, whatever the layer's dtype."""

from __future__ import annotations

from tensormoe.backend import Array, Backend


def widened(array: Array, backend: Backend) -> Array:
    """``array`` in float32 if it is narrower."""
    xp = backend.namespace
    return xp.astype(array, xp.float32) if xp.finfo(array.dtype).bits < 32 else array


def cast(array: Array, dtype: object, backend: Backend) -> Array:
    """``array`` in ``dtype``; itself if it has it already."""
    return array if array.dtype == dtype else backend.namespace.astype(array, dtype)
