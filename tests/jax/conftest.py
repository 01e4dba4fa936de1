"""Modes of JAX."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module")
def wide() -> Iterator[None]:
    """JAX's 64-bit mode."""
    with jax.enable_x64(True):
        yield
