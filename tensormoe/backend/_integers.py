"""Integers that count and index, in every library."""

from __future__ import annotations

from typing import Any


def default_integer(namespace: Any) -> Any:
    """The integer type that a library takes by default.

    Of 64 bits nearly everywhere; JAX has none of these unless its 64-bit mode is on.

    >>> import numpy as np
    >>> default_integer(np)
    dtype('int64')
    """
    return namespace.arange(0).dtype
