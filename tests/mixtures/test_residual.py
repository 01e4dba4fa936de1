"""Residual mixtures in every framework: their start, their formula, and files."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import tensormoe_numpy
from tensormoe import (
    Dense,
)
from tensormoe_torch import ResidualExperts
from tests.mixtures._residual import (
    EQUINOX,
    NNX,
    base_of,
    double,
    each_factorization,
    inputs,
    layer_of,
    moved,
)

# The start


@each_factorization
@pytest.mark.parametrize("sizes", [(6, 5), (5, 6)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("experts", [4, (2, 3)], ids=str)
def test_outputs_start_at_the_bases_and_the_first_step_moves_them(
    factorization: Any, sizes: tuple[int, int], bias: bool, experts: Any
) -> None:
    base = base_of(*sizes)
    options = {"factorization": factorization, "rank": None, "bias": bias, "experts": experts}
    layer = layer_of(base, **options)
    x, target = inputs(32, features=sizes[0]), inputs(32, features=sizes[1])
    assert torch.equal(layer(x), base(x))
    start = copy.deepcopy(layer.state_dict())
    # only experts that nothing else tells apart need a gate that does
    gates = [each for name, each in start.items() if ".gate." in name]
    assert any(bool(each.any()) for each in gates) == isinstance(factorization, Dense)
    trained = [each for each in layer.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.3)

    def step() -> None:
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()

    step()
    moved = {name for name, each in layer.adapter.named_parameters() if each.grad.any()}  # type: ignore[union-attr]
    zero = {name for name, each in start.items() if name[8:] in moved and not each.any()}
    assert moved == {name.removeprefix("adapter.") for name in zero} != set()
    assert not torch.equal(layer(x), base(x))
    for _ in range(5):
        step()
    for name, values in layer.state_dict().items():
        assert torch.equal(values, start[name]) == name.startswith("base."), name
    weights = layer.adapter.materialize()[0].flatten(0, layer.spec.levels - 1)
    for n in range(len(weights)):
        for m in range(n):
            assert (weights[n] - weights[m]).norm() > 1e-3, f"experts {n} and {m} are one"


@each_factorization
@pytest.mark.parametrize("experts", [4, (2, 3)], ids=str)
def test_every_framework_starts_at_zero(factorization: Any, experts: Any) -> None:
    options: Any = {"experts": experts, "factorization": factorization, "bias": True}
    x = np.random.default_rng(0).standard_normal((3, 6)).astype("float32")
    layers = (
        (tensormoe_numpy.ResidualExperts(double, 6, 6, seed=0, **options), x),
        (NNX.ResidualExperts(double, 6, 6, rngs=0, **options), jnp.asarray(x)),
        (EQUINOX.ResidualExperts(double, 6, 6, key=jax.random.key(0), **options), jnp.asarray(x)),
    )
    zeros = []
    for layer, given in layers:
        assert np.array_equal(layer(given), 2 * x)
        arrays = layer.adapter.parameters
        zeros.append({name for name, each in arrays.items() if not np.any(np.asarray(each))})
    assert zeros[0] == zeros[1] == zeros[2]


def test_a_reset_starts_at_zero_again() -> None:
    for start in ("whole", "adapter"):
        layer = moved(layer_of(factorization="dense", rank=None))
        assert not torch.equal(layer(inputs(3)), layer.base(inputs(3)))
        (layer if start == "whole" else layer.adapter).reset_parameters()
        assert torch.equal(layer(inputs(3)), layer.base(inputs(3)))
        assert layer.adapter.gate is not None
        assert layer.adapter.gate.get_parameter("projection_0").any()


# The formula, in every framework


def _all(layer: ResidualExperts, path: Path) -> dict[str, Any]:
    """The same layer in the other frameworks, by way of a file."""
    layer.save_adapter(path)
    base: Any = layer.base
    weight, bias = (each.detach().numpy().copy() for each in (base.weight, base.bias))
    sizes, dtype = weight.shape[::-1], weight.dtype
    flax: Any = nnx.Linear(*sizes, rngs=nnx.Rngs(0), param_dtype=dtype)
    flax.kernel[...], flax.bias[...] = jnp.asarray(weight.T), jnp.asarray(bias)
    equinox = eqx.nn.Linear(*sizes, key=jax.random.key(0))
    arrays = jnp.asarray(weight), jnp.asarray(bias)
    equinox = eqx.tree_at(lambda each: (each.weight, each.bias), equinox, arrays)
    return {
        "NumPy": tensormoe_numpy.ResidualExperts.from_adapter(
            partial(_affine, weight.T, bias), path
        ),
        "Flax NNX": NNX.ResidualExperts.from_adapter(flax, path),
        "Equinox": EQUINOX.ResidualExperts.from_adapter(equinox, path),
    }


def _affine(weight: Any, bias: Any, x: Any) -> Any:
    return x @ weight + bias


@each_factorization
def test_one_function_in_float64(factorization: Any, tmp_path: Path) -> None:
    options = {"factorization": factorization, "rank": None, "bias": True, "scale": -1.5}
    layer = moved(layer_of(base_of(dtype=torch.float64), experts=(2, 3), **options))
    x = inputs(2, 3, dtype=torch.float64)
    first, second = layer.coefficients(x)
    weight, bias = layer.adapter.materialize()
    mixed = torch.einsum("...n,...m,nmio,...i->...o", first, second, weight, x)
    assert bias is not None
    mixed = mixed + torch.einsum("...n,...m,nmo->...o", first, second, bias)
    wanted = layer.base(x) - 1.5 * mixed
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-10)
    with jax.enable_x64(True):
        for name, other in _all(layer, tmp_path / "file").items():
            given = x.numpy() if name == "NumPy" else jnp.asarray(x.numpy())
            found = np.asarray(other(given))
            np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-10, err_msg=name)
            assert np.array_equal(other(given[:0]), found[:0])
            np.testing.assert_allclose(np.asarray(other(given[0, 1])), found[0, 1], atol=1e-10)


def test_files_are_the_same_whoever_writes_them(tmp_path: Path) -> None:
    layer = moved(layer_of(bias=True, scale=0.5))
    for name, other in _all(layer, tmp_path / "first").items():
        other.save_adapter(tmp_path / name)
        assert (tmp_path / name).read_bytes() == (tmp_path / "first").read_bytes(), name
        fresh = layer_of(bias=True, scale=0.5)
        assert fresh.load_adapter(tmp_path / name) is fresh
        assert torch.equal(fresh(inputs(3)), layer(inputs(3)))
        # in the other framework, over values that are there
        layer_of(bias=True, scale=0.5).save_adapter(tmp_path / "zero")
        again = other.load_adapter(tmp_path / "zero")
        assert not np.asarray(again.adapter.parameters["factors.output"]).any(), name
        again = again.load_adapter(tmp_path / "first")
        again.save_adapter(tmp_path / "last")
        assert (tmp_path / "last").read_bytes() == (tmp_path / "first").read_bytes(), name
    size = (tmp_path / "first").stat().st_size
    assert size < 4 * layer.num_parameters + 2000


def test_cupy(tmp_path: Path) -> None:
    pytest.importorskip("cupy")
    from tests._cupy_standin import assert_same, device, installed

    layer = moved(layer_of(bias=True))
    ours = _all(layer, tmp_path / "file")["NumPy"]
    x = inputs(2, 3).numpy()
    with installed():
        import tensormoe_cupy

        kind = tensormoe_cupy.ResidualExperts
        weight, bias = device(ours.base.args[0].copy()), device(ours.base.args[1].copy())
        theirs = kind.from_adapter(lambda x: x @ weight + bias, tmp_path / "file")
        assert_same(theirs(device(x)), ours(x), 1e-5)
        given = np.linspace(0, 1, 4, dtype="float32")
        assert_same(theirs.delta(device(given)), ours.delta(given), 1e-5)
        fresh = kind(lambda x: 2 * x, 6, 6, experts=4, factorization="dense", seed=0)
        assert_same(fresh(device(x)), 2 * x)
