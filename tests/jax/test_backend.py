"""JAX keeps the contract of a backend, with its 64-bit mode on and off."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tensormoe.testing import BackendContract
from tensormoe_jax import BACKEND
from tests._examples import with_examples


class OnJax(BackendContract):
    __test__ = False
    backend = BACKEND

    def from_numpy(self, array: np.ndarray) -> Any:
        return jnp.asarray(array)

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)


# JAX compiles each operation on each shape
@with_examples(operations=10, layers=4)
@pytest.mark.usefixtures("wide")
class TestJax(OnJax):
    __test__ = True


# as users get it: indices are of 32 bits, and there is no float64
@with_examples(operations=5, layers=3)
class TestJaxIn32Bits(OnJax):
    __test__ = True
    dtypes = ("float32",)
