"""A layer is the same in every library that runs operation by operation, and so is its file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("jax")
pytest.importorskip("cupy")

from tensormoe import CP, Gate, LayerSpec, TensorRing
from tensormoe.functional import BlockConfig, LayerConfig
from tests._everywhere import EAGER
from tests._frameworks import Config, everywhere
from tests._kinds import UNEVEN
from tests._one_layer import (
    assert_any_layer_is_one,
    assert_one_file,
    assert_one_layer,
    call_of,
    values,
    ways,
)

BLOCK = BlockConfig(
    LayerConfig(LayerSpec(6, 8, (3, 2), TensorRing(2)), Gate()),
    LayerConfig(LayerSpec(8, 5, (3, 2), CP(3)), None),
    "gelu",
)
NARROW: list[Config] = [
    *(LayerConfig(LayerSpec(6, 5, (3, 2), kind), Gate()) for kind in UNEVEN),
    LayerConfig(LayerSpec(6, 5, 4, CP(3), False), Gate("top_k", k=2)),
    LayerConfig(LayerSpec(6, 5, 4, CP(3)), None),
    BLOCK,
    *(replace(BLOCK, act_layer=name) for name in ("gelu_tanh", "relu", "silu", "tanh")),
    replace(BLOCK, first=replace(BLOCK.first, gate=None)),
    LayerConfig(LayerSpec(9, 5, (3, 2), TensorRing(3), False), None, indexed_input=True),
]


@pytest.fixture(scope="module", autouse=True)
def libraries() -> Iterator[None]:
    with everywhere():
        yield


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_one_layer(data: st.DataObject, tmp_path: Path) -> None:
    assert_any_layer_is_one(data, EAGER, tmp_path)


@pytest.mark.parametrize("config", NARROW, ids=str)
def test_half_precision(config: Config, tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = values(config, rng, "float16")
    gateless = (config.first if isinstance(config, BlockConfig) else config).gate is None
    how = "dense" if gateless else ways(config)[0]
    call = call_of(config, arrays, (7,), how, rng, "float16")
    assert call is not None
    path = tmp_path / "layer"
    path.write_bytes(assert_one_file(config, arrays, EAGER, tmp_path))
    assert_one_layer(path, config, arrays, call, EAGER)


def test_dropped_entries_are_no_part_of_a_file(tmp_path: Path, rng: np.random.Generator) -> None:
    """But how many there are; outputs in training are random then."""
    config = replace(BLOCK, drop=0.5)
    arrays = values(config, rng, "float32")
    content = assert_one_file(config, arrays, EAGER, tmp_path)
    (tmp_path / "layer").write_bytes(content)
    for framework in EAGER:
        layer = framework.load("MuMoEMLP", tmp_path / "layer")
        assert layer.config == config
        for name, array in framework.arrays(layer).items():
            np.testing.assert_array_equal(array, arrays[name])
