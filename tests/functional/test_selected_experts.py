"""Coefficients by index in every library, where they are spread over all experts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("cupy")
pytest.importorskip("flax")
pytest.importorskip("equinox")

import jax
import jax.numpy as jnp
import torch

import tensormoe_jax
import tensormoe_torch
from tensormoe import CP, Dense, LayerSpec, SharedBasis, TopK
from tensormoe.functional import LayerConfig
from tests._everywhere import FRAMEWORKS
from tests._frameworks import Call, everywhere
from tests._one_layer import assert_one_file, assert_one_layer, values

ROWS = 40

CONFIGS = [
    LayerConfig(LayerSpec(12, 10, 6, Dense()), None),
    LayerConfig(LayerSpec(12, 10, 6, SharedBasis((3, 10))), None),
    LayerConfig(LayerSpec(9, 12, (4, 3), SharedBasis((2, 8)), bias=False), None),
    LayerConfig(LayerSpec(30, 8, 5, CP(24), bias=False), None, indexed_input=True),
]


@pytest.fixture(scope="module", autouse=True)
def libraries() -> Iterator[None]:
    with everywhere():
        yield


def spreads(config: LayerConfig, k: int, rows: int = ROWS) -> bool:
    plan = config.spec.plan(rows, top_k=k, indexed_input=config.indexed_input)
    return "eye" in {step.kind for step in plan.program.steps}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.spec))
def test_one_layer(config: LayerConfig, tmp_path: Path) -> None:
    """Outputs and all gradients are the same; rows may name an expert twice."""
    assert spreads(config, 2)
    rng, spec = np.random.default_rng(0), config.spec
    arrays = values(config, rng, "float64")
    x = rng.standard_normal((ROWS, spec.in_features))
    if config.indexed_input:
        x = rng.integers(spec.in_features, size=ROWS)
    made = [
        TopK(rng.integers(count, size=(ROWS, 2)), rng.standard_normal((ROWS, 2)))
        for count in spec.experts
    ]
    call = Call(x, made, rng.standard_normal((ROWS, spec.out_features)) / ROWS)
    path = tmp_path / "layer"
    path.write_bytes(assert_one_file(config, arrays, FRAMEWORKS, tmp_path))
    assert_one_layer(path, config, arrays, call, FRAMEWORKS)


def test_indices_that_nobody_looks_at() -> None:
    """Out of range, as under a transformation of JAX: NaN in that row, as from any gather."""
    config = CONFIGS[0]
    assert spreads(config, 1)
    parameters = tensormoe_jax.initialize(config, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (ROWS, 12))
    indices = jnp.zeros((ROWS, 1), "int32").at[3].set(6).at[5].set(-1)
    run = jax.jit(
        lambda k: tensormoe_jax.apply(config, parameters, x, TopK(k, jnp.ones((ROWS, 1))))
    )
    wrong = np.isnan(run(indices)).all(axis=-1)
    assert np.flatnonzero(wrong).tolist() == [3, 5]
    assert not np.isnan(run(jnp.full((ROWS, 1), 5))).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_of_pytorch(dtype: torch.dtype) -> None:
    """The identity matrix has the layer's dtype, whatever the coefficients have."""
    layer = tensormoe_torch.MuMoE(12, 10, 6, Dense(), gate=None, dtype=dtype)
    chosen = TopK(torch.zeros((ROWS, 2), dtype=torch.int64), torch.full((ROWS, 2), 0.5))
    output = layer(torch.ones((ROWS, 12), dtype=dtype), coefficients=chosen)
    assert output.dtype == dtype
    output.sum().backward()
    gradient = layer.factors["weight"].grad
    assert gradient is not None
    assert gradient[0].any()
    assert not gradient[1:].any()


SEVERAL_DEVICES = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import tensormoe_jax
from tensormoe import Dense, LayerSpec, TopK
from tensormoe.functional import LayerConfig

config = LayerConfig(LayerSpec(12, 8, 6, Dense(), bias=False), None)
parameters = tensormoe_jax.initialize(config, jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (40, 12))
chosen = TopK(jax.random.randint(jax.random.key(2), (40, 2), 0, 6), jax.numpy.ones((40, 2)))
want = np.asarray(tensormoe_jax.apply(config, parameters, x, chosen))
mesh = Mesh(np.array(jax.devices()), ("d",))
assert mesh.size == 4
by_output = NamedSharding(mesh, PartitionSpec(None, None, "d"))
parameters = {name: jax.device_put(each, by_output) for name, each in parameters.items()}
found = tensormoe_jax.apply(config, parameters, x, chosen)
np.testing.assert_allclose(np.asarray(found), want, rtol=1e-5, atol=1e-5)
"""


def test_factors_on_several_devices() -> None:
    """Without ``jit`` as well: the layout of a factor fits no identity matrix."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", SEVERAL_DEVICES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
