"""A gate in float32 beside factors of 16 bits: made, run, differentiated, saved and opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tensormoe_numpy
import tensormoe_torch
from tensormoe import Gate
from tensormoe.errors import ShapeError, SpecError
from tensormoe_jax import apply, equinox, initialize, nnx

X = jnp.linspace(-1.0, 1.0, 60, dtype=jnp.bfloat16).reshape(5, 12)
PROJECTION = jax.random.normal(jax.random.key(1), (12, 6))


def options(kind: Any) -> dict[str, Any]:
    key = {"rngs": 0} if kind.__module__.startswith("tensormoe_jax.nnx") else {}
    key = key or {"key": jax.random.key(0)}
    return {"experts": 6, "rank": 4, "dtype": "bfloat16", "gate_dtype": "float32", **key}


def made(kind: Any, *sizes: int, **more: Any) -> Any:
    """A layer whose gate tells its experts apart."""
    layer = kind(*sizes, **options(kind) | more)
    config = layer.config
    arrays = layer.parameters | {"gate.projection_0": PROJECTION}
    if callable(layer.buffers):
        return kind.restore(config, arrays | layer.buffers())
    return kind.restore(config, arrays | layer.buffers)


LAYERS = [
    (nnx.MuMoE, (12, 5)),
    (nnx.MuMoEMLP, (12, 7, 12)),
    (equinox.MuMoE, (12, 5)),
    (equinox.MuMoEMLP, (12, 7, 12)),
]
IDS = ["nnx layer", "nnx block", "equinox layer", "equinox block"]


@pytest.mark.parametrize(("kind", "sizes"), LAYERS, ids=IDS)
def test_layers(kind: Any, sizes: tuple[int, ...], tmp_path: Path) -> None:
    layer = made(kind, *sizes)
    assert layer.dtype == jnp.bfloat16
    kinds = {name: array.dtype for name, array in layer.parameters.items()}
    assert {str(each) for name, each in kinds.items() if "gate." in name} == {"float32"}
    assert {str(each) for name, each in kinds.items() if "factors." in name} == {"bfloat16"}
    assert "dtype='bfloat16', gate_dtype='float32'" in repr(layer)
    found = layer(X)
    assert found.dtype == jnp.bfloat16
    # no bit of the gate is lost: the same coefficients as of float32 throughout
    coefficients = layer.coefficients(X)
    want = jax.nn.softmax(X.astype("float32") @ PROJECTION)
    assert coefficients[0].dtype == jnp.float32
    assert jnp.array_equal(coefficients[0].argmax(-1), want.argmax(-1))
    assert jnp.array_equal(found, layer(X, coefficients))
    assert jnp.array_equal(found, apply(layer.config, layer.parameters, X))
    jitted = jax.jit(lambda parameters: apply(layer.config, parameters, X))(layer.parameters)
    np.testing.assert_allclose(jitted.astype("f4"), found.astype("f4"), atol=0.02)

    def loss(parameters: Any) -> Any:
        return (apply(layer.config, parameters, X).astype("float32") ** 2).sum()

    slopes = jax.grad(loss)(layer.parameters)
    assert {name: array.dtype for name, array in slopes.items()} == kinds

    path = tmp_path / "layer.safetensors"
    layer.save(path)
    for package in (nnx, equinox):
        again = getattr(package, kind.__name__).load(path)
        assert {name: array.dtype for name, array in again.parameters.items()} == kinds
        assert jnp.array_equal(again(X), found)
    opened = getattr(tensormoe_torch, kind.__name__).load(path)
    assert opened.gate.projection_0.dtype == torch.float32
    assert opened.dtype == torch.bfloat16
    given = torch.from_numpy(np.array(X.astype("float32"))).to(torch.bfloat16)
    output = opened(given)
    assert output.dtype == torch.bfloat16
    np.testing.assert_allclose(output.detach().float(), found.astype("f4"), atol=0.02)
    # to the last bit
    assert np.array_equal(opened.gate.projection_0.detach(), PROJECTION)
    output.float().square().sum().backward()
    assert opened.gate.projection_0.grad.dtype == torch.float32
    opened.save(path)
    assert jnp.array_equal(kind.load(path)(X), found)


def test_float16_opens_in_numpy(tmp_path: Path) -> None:
    layer = made(nnx.MuMoE, 12, 5, dtype="float16")
    path = tmp_path / "layer.safetensors"
    layer.save(path)
    opened = tensormoe_numpy.MuMoE.load(path)
    x = np.asarray(X.astype("float16"))
    np.testing.assert_allclose(opened(x), layer(jnp.asarray(x)), atol=0.02)
    with pytest.raises(Exception, match="dtype"):
        tensormoe_numpy.MuMoE.load(made_and_saved(path))


def made_and_saved(path: Path) -> Path:
    made(nnx.MuMoE, 12, 5).save(path)
    return path


def test_batch_norm(tmp_path: Path) -> None:
    gate = Gate(normalization="batch")
    layer = made(nnx.MuMoE, 12, 5, gate=gate)
    assert layer(X).dtype == jnp.bfloat16
    assert {str(each.dtype) for each in layer.buffers.values()} == {"float32"}
    given = options(equinox.MuMoE) | {"gate": gate}
    module, state = eqx.nn.make_with_state(equinox.MuMoE)(12, 5, **given)
    output, state = module(X, state=state)
    assert output.dtype == jnp.bfloat16


def test_without_an_argument_all_is_one_dtype() -> None:
    parameters = initialize(made(nnx.MuMoE, 12, 5).config, jax.random.key(0), dtype="bfloat16")
    assert {str(array.dtype) for array in parameters.values()} == {"bfloat16"}


@pytest.mark.parametrize(
    ("dtype", "gate_dtype"),
    [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "bfloat16"), (None, "float16")],
)
def test_other_pairs_are_refused(dtype: Any, gate_dtype: Any) -> None:
    with pytest.raises(SpecError, match=r"gate_dtype must be the layer's, .* or float32 beside"):
        nnx.MuMoE(12, 5, 6, rank=4, dtype=dtype, gate_dtype=gate_dtype, rngs=0)


def test_other_mixtures_are_refused() -> None:
    layer = made(nnx.MuMoE, 12, 5)
    wide = {name: array.astype("float32") for name, array in layer.parameters.items()}
    for name, dtype in (("factors.input", "bfloat16"), ("gate.projection_0", "bfloat16")):
        with pytest.raises(ShapeError, match="only a gate may be in float32"):
            nnx.MuMoE.restore(layer.config, wide | {name: wide[name].astype(dtype)})
    # inputs have the dtype of the factors
    float32 = nnx.MuMoE.restore(layer.config, wide)
    for refused, x in ((layer, X.astype("float32")), (float32, X)):
        with pytest.raises(ShapeError, match="x must have the layer's dtype"):
            refused(x)
    plain = tensormoe_torch.MuMoE(12, 5, 6, rank=4)
    with pytest.raises(ShapeError, match="x must have the layer's dtype"):
        plain(torch.ones(2, 12, dtype=torch.bfloat16))
