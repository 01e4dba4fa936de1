"""CuPy's layers are NumPy's, and so are their files: on the stand-in, or on the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("cupy")

from tests._cupy_standin import ON_DEVICE
from tests._frameworks import CUPY, NUMPY, everywhere
from tests._one_layer import TOLERANCES, assert_any_layer_is_one

# sums of a device run in another order
ON_A_DEVICE = {"float32": 1e-3, "float64": 1e-9}


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    with everywhere():
        yield


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_one_layer(data: st.DataObject, tmp_path: Path) -> None:
    """Any factorization, levels, gate, bias, class and coefficients, with all gradients."""
    tolerances = ON_A_DEVICE if ON_DEVICE else TOLERANCES
    assert_any_layer_is_one(data, (NUMPY, CUPY), tmp_path, tolerances)
