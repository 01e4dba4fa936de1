"""JAX keeps the contract of a backend, with its 64-bit mode on and off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tensormoe.testing import BackendContract
from tensormoe_jax import BACKEND


class OnJax(BackendContract):
    __test__ = False
    backend = BACKEND

    def from_numpy(self, array: np.ndarray) -> Any:
        return jnp.asarray(array)

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)


@pytest.fixture(scope="module")
def wide() -> Iterator[None]:
    """JAX's 64-bit mode."""
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("wide")
class TestJax(OnJax):
    __test__ = True


class TestJaxIn32Bits(OnJax):
    """As users get it: indices are of 32 bits, and there is no float64."""

    __test__ = True
    dtypes = ("float32",)
