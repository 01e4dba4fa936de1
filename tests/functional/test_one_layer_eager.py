"""A layer is the same in every library that runs operation by operation, and so is its file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("jax")
pytest.importorskip("cupy")

from tests._everywhere import EAGER, everywhere
from tests._one_layer import (
    TOLERANCES,
    assert_one_file,
    assert_one_layer,
    call_of,
    configs,
    leads,
    values,
    ways,
)


@pytest.fixture(scope="module", autouse=True)
def libraries() -> Iterator[None]:
    with everywhere():
        yield


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_one_layer(data: st.DataObject, tmp_path: Path) -> None:
    config = data.draw(configs(), "config")
    dtype = data.draw(st.sampled_from(sorted(TOLERANCES)), "dtype")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    arrays = values(config, rng, dtype)
    lead, how = data.draw(leads(config), "lead"), data.draw(st.sampled_from(ways(config)), "how")
    call = call_of(config, arrays, lead, how, rng, dtype)
    assume(call is not None)
    assert call is not None
    path = tmp_path / "layer"
    path.write_bytes(assert_one_file(config, arrays, EAGER, tmp_path))
    assert_one_layer(path, config, arrays, call, EAGER)
