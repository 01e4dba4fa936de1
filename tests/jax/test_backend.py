"""JAX keeps the contract of a backend, with its 64-bit mode on and off."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, is_hypothesis_test, settings
from hypothesis import strategies as st

from tensormoe.testing import BackendContract
from tensormoe.testing._layer_checks import CHECKS
from tensormoe_jax import BACKEND


def fewer(contract: type[BackendContract], examples: int) -> dict[str, Any]:
    """The tests of a contract with fewer examples: JAX compiles each operation on each shape."""
    return {
        name: settings(CHECKS, max_examples=examples)(given(data=st.data())(inner))
        for name, test in inspect.getmembers(contract, is_hypothesis_test)
        for inner in [test.hypothesis.inner_test]
    }


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


TestJax = pytest.mark.usefixtures("wide")(
    type("TestJax", (OnJax,), {"__test__": True, **fewer(BackendContract, 15)})
)

# as users get it: indices are of 32 bits, and there is no float64
TestJaxIn32Bits = type(
    "TestJaxIn32Bits",
    (OnJax,),
    {"__test__": True, "dtypes": ("float32",), **fewer(BackendContract, 5)},
)
