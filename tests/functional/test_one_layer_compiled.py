"""JAX's functions, Flax's and Equinox's modules are the layer that NumPy and PyTorch have.

Compilation takes a second for each configuration and shape, so that those are few, while values,
who writes and who reads are any. Every form runs every case in float64, and takes its turn with
half of them in float32. That the eager libraries agree on any configuration is proved elsewhere;
here they are the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("cupy")
pytest.importorskip("flax")
pytest.importorskip("equinox")

from tensormoe import (
    CP,
    Dense,
    Gate,
    Hadamard,
    LayerSpec,
    SharedBasis,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.functional import BlockConfig, LayerConfig
from tests._everywhere import COMPILED, EAGER, FRAMEWORKS
from tests._frameworks import Config, Framework, everywhere
from tests._one_layer import assert_one_file, assert_one_layer, call_of, values

PLAIN = LayerConfig(LayerSpec(5, 4, 3, CP(4)), Gate())
BATCH = LayerConfig(
    LayerSpec(4, 5, (4, 3), TensorRing(3)), Gate(normalization="batch", bias=True, momentum=0.3)
)
WIDE = LayerConfig(
    LayerSpec(5, 3, (3, 2, 2), TensorTrain((2, 3, 2, 3)), False),
    Gate("sparsemax", normalization=None, bias=True),
)
CHOSEN = LayerConfig(LayerSpec(6, 4, (4, 3), Hadamard()), Gate("top_k", k=2, balance=0.01))
EVERY = LayerConfig(LayerSpec(4, 3, (2, 3), Dense()), Gate("softmax", normalization="batch"))
STEEP = LayerConfig(LayerSpec(4, 6, 3, Tucker((2, 3, 4))), Gate(alpha=3.0))
SOFT = LayerConfig(
    LayerSpec(5, 4, (3, 2), SharedBasis((2, 3))), Gate("softmax", normalization=None, bias=True)
)
TABLE = LayerConfig(LayerSpec(9, 4, (3, 2), TensorRing(2), False), None, indexed_input=True)
BLOCK = BlockConfig(
    LayerConfig(LayerSpec(5, 6, (3, 2), CP(3)), Gate(alpha=1.25, bias=True)),
    LayerConfig(LayerSpec(6, 4, (3, 2), TensorRing(2)), None),
    "gelu",
)
LEARNT = BlockConfig(
    LayerConfig(LayerSpec(4, 5, 4, Tucker(2), False), Gate(normalization="batch")),
    LayerConfig(LayerSpec(5, 3, 4, CP(2), False), None),
    "silu",
)
GATED = BlockConfig(
    LayerConfig(LayerSpec(4, 6, (3, 2), CP(3)), Gate(alpha=1.25)),
    LayerConfig(LayerSpec(3, 5, (3, 2), TensorRing(2)), None),
    "silu",
    gated=True,
)

# configuration, how coefficients come, leading shape
SHAPES = [
    pytest.param(PLAIN, "gate", (2, 3), id="plain-gate"),
    pytest.param(PLAIN, "dense", (3,), id="plain-dense"),
    pytest.param(PLAIN, "gate", (0,), id="plain-gate-empty"),
    pytest.param(BATCH, "gate", (5,), id="batch-gate"),
    pytest.param(WIDE, "gate", (), id="wide-gate"),
    pytest.param(WIDE, "indexed", (2,), id="wide-indexed"),
    pytest.param(CHOSEN, "gate", (4,), id="chosen-gate"),
    pytest.param(EVERY, "gate", (4,), id="every-gate"),
    pytest.param(STEEP, "gate", (2,), id="steep-gate"),
    pytest.param(SOFT, "gate", (3,), id="soft-gate"),
    pytest.param(TABLE, "dense", (2, 2), id="table-dense"),
    pytest.param(TABLE, "indexed", (3,), id="table-indexed"),
    pytest.param(BLOCK, "gate", (3,), id="block-gate"),
    pytest.param(LEARNT, "dense", (2,), id="learnt-dense"),
    pytest.param(LEARNT, "gate", (4,), id="learnt-gate"),
    pytest.param(GATED, "gate", (3,), id="gated-gate"),
]
CASES = [
    pytest.param(*shape.values, "float64", FRAMEWORKS, id=f"{shape.id}-float64") for shape in SHAPES
]
CASES += [
    pytest.param(*shape.values, "float32", (*EAGER, COMPILED[turn % 3]), id=f"{shape.id}-float32")
    for turn, shape in enumerate(SHAPES[::2])
]


@pytest.fixture(scope="module", autouse=True)
def libraries() -> Iterator[None]:
    with everywhere():
        yield


@pytest.mark.parametrize(("config", "how", "lead", "dtype", "frameworks"), CASES)
@settings(
    max_examples=5,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_one_layer(
    config: Config,
    how: str,
    lead: tuple[int, ...],
    dtype: str,
    frameworks: Sequence[Framework],
    seed: int,
    data: st.DataObject,
    tmp_path: Path,
) -> None:
    order = data.draw(st.permutations(frameworks), "order")
    rng = np.random.default_rng(seed)
    arrays = values(config, rng, dtype)
    call = call_of(config, arrays, lead, how, rng, dtype)
    assume(call is not None)
    assert call is not None
    path = tmp_path / "layer"
    path.write_bytes(assert_one_file(config, arrays, order, tmp_path))
    assert_one_layer(path, config, arrays, call, order)
