"""Residual mixtures: bases that stay frozen, and what users do with them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

import tensormoe
from tensormoe import (
    Gate,
)
from tensormoe.errors import (
    GateError,
    SpecError,
)
from tensormoe_torch import ResidualExperts, parameter_groups
from tests.mixtures._residual import (
    EQUINOX,
    NNX,
    base_of,
    double,
    inputs,
    layer_of,
    moved,
)

# Frozen


class _Block(nn.Module):
    """A base whose mode matters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(x))


def test_the_base_is_frozen_in_pytorch() -> None:
    layer = layer_of(_Block(), in_features=6, out_features=6).train()
    assert layer.training
    assert layer.adapter.training
    before = copy.deepcopy(layer.base.state_dict())
    x = inputs(32)
    assert torch.equal(layer(x), layer(x))
    layer(x).square().sum().backward()
    for name, values in layer.base.state_dict().items():
        assert torch.equal(values, before[name]), name
    assert {n.split(".")[0] for n, each in layer.named_parameters() if each.requires_grad} == {
        "adapter"
    }
    groups = parameter_groups(layer, weight_decay=0.1)
    held = {id(each) for group in groups for each in group["params"]}
    assert held == {id(each) for each in layer.adapter.parameters()}
    assert layer.num_parameters == sum(each.numel() for each in layer.adapter.parameters())


class _Net(nnx.Module):
    def __init__(self) -> None:
        self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
        self.linear = nnx.Linear(6, 5, rngs=nnx.Rngs(1))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(2))

    def __call__(self, x: Any) -> Any:
        return self.drop(self.linear(self.norm(x)))


class _Model(nnx.Module):
    def __init__(self) -> None:
        self.first = NNX.ResidualExperts(_Net(), 6, 5, experts=4, rank=2, rngs=1)
        self.last = nnx.Linear(5, 5, rngs=nnx.Rngs(3))

    def __call__(self, x: Any) -> Any:
        return self.last(self.first(x))


def test_the_base_is_frozen_in_flax() -> None:
    model = _Model()
    model.train()
    x, target = jnp.asarray(inputs(16).numpy()), jnp.ones((16, 5))
    trained = NNX.adapter_filter(model)
    optimizer = nnx.Optimizer(model, optax.adamw(0.03, weight_decay=0.5), wrt=trained)
    before = _flat(nnx.state(model))
    quiet = nnx.clone(model.first.base)
    quiet.eval()
    assert np.array_equal(model.first(x), quiet(x))

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        def loss(model: Any) -> Any:
            return jnp.mean((model(x) - target) ** 2)

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, trained))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    for path, values in _flat(nnx.state(model)).items():
        assert np.array_equal(values, before[path]) == ("adapter" not in path), path
    # no gradients by the base even where all parameters are differentiated
    found = _flat(nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model))
    for path, values in found.items():
        assert np.any(values) == (path[:2] != ("first", "base")), path


def _flat(state: Any) -> dict[tuple[Any, ...], Any]:
    return {
        path: np.asarray(each[...])
        for path, each in nnx.to_flat_state(state)
        if not jnp.issubdtype(each[...].dtype, jax.dtypes.prng_key)
    }


def test_the_base_is_frozen_in_equinox() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    base = eqx.nn.Sequential([eqx.nn.Linear(6, 5, key=keys[0]), eqx.nn.Dropout(0.5)])
    layer = EQUINOX.ResidualExperts(base, 6, 5, experts=4, rank=2, key=keys[1])
    model = [layer, eqx.nn.Linear(5, 5, key=keys[2])]
    x, target = jnp.asarray(inputs(16).numpy()), jnp.ones((16, 5))
    trained, frozen = eqx.partition(model, EQUINOX.adapter_filter(model))
    assert sum(each.size for each in jax.tree.leaves(trained)) == layer.num_parameters
    optimizer = optax.adamw(0.03, weight_decay=0.5)
    state = optimizer.init(trained)

    @eqx.filter_jit
    def step(trained: Any, state: Any) -> Any:
        def loss(trained: Any) -> Any:
            first, last = eqx.combine(trained, frozen)
            return jnp.mean((jax.vmap(last)(first(x)) - target) ** 2)

        value, gradients = eqx.filter_value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradients, state, trained)
        return eqx.apply_updates(trained, updates), state, value

    losses = []
    for _ in range(20):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    whole = eqx.combine(trained, frozen)[0]
    gradients = eqx.filter_grad(lambda layer: jnp.sum(layer(x) ** 2))(whole)
    assert all(not np.any(each) for each in jax.tree.leaves(gradients.base))
    assert all(np.any(each) for each in gradients.adapter.parameters.values())


def test_filters_want_adapters() -> None:
    with pytest.raises(SpecError, match=r"must hold ResidualExperts; Linear has none"):
        NNX.adapter_filter(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(SpecError, match=r"model must be an nnx.Module; got 3"):
        NNX.adapter_filter(3)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"must hold ResidualExperts; Linear has none"):
        EQUINOX.adapter_filter(eqx.nn.Linear(3, 2, key=jax.random.key(0)))


def test_nested_adapters_are_a_base(tmp_path: Path) -> None:
    inner = NNX.ResidualExperts(double, 6, 6, experts=2, rank=1, rngs=0)
    outer = NNX.ResidualExperts(inner, experts=3, rank=2, rngs=1)
    assert NNX.adapter_filter(outer).paths == {("adapter",)}
    layer = layer_of(layer_of(base_of(6, 6)))
    assert not any(each.requires_grad for each in layer.base.parameters())
    assert layer(inputs(3)).shape == (3, 6)


# What users do with it


def test_it_is_a_module_like_others(tmp_path: Path) -> None:
    layer = moved(layer_of(bias=True, scale=0.5))
    x = inputs(2, 3)
    y = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), y)
    known = {**vars(tensormoe), "Linear": nn.Linear, "torch": torch}
    again = eval(repr(layer), {**known, "ResidualExperts": ResidualExperts})
    assert again.config == layer.config
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), y)
    fast = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(x), y)
    fast(x).sum().backward()
    for shape in ((), (1,), (0,), (2, 0)):
        assert layer(inputs(*shape)).shape == (*shape, 5)
    given = torch.rand(2, 3, 4)
    wanted = layer.base(x) + 0.5 * layer.adapter(x, given)
    torch.testing.assert_close(layer(x, given), wanted)
    assert "as code" in layer._repr_html_()
    assert (layer.weight.shape, layer.weight.dtype) == ((5, 6), torch.float32)
    with pytest.raises(SpecError, match=r"weight of ResidualExperts has no values"):
        _ = layer.weight + 1
    assert layer_of(base_of(bias=False)).bias is None


def test_the_mixture_may_be_wider_than_the_base() -> None:
    base = base_of().bfloat16()
    layer = layer_of(base, dtype=torch.float32)
    assert {each.dtype for each in layer.adapter.parameters()} == {torch.float32}
    x = inputs(3).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), base(x))
    assert moved(layer_of(base)).adapter.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_of()(inputs(3)).dtype == torch.bfloat16
    wide = NNX.ResidualExperts(double, 6, 6, experts=4, rank=2, dtype="float32", rngs=0)
    assert wide(jnp.ones((3, 6), "bfloat16")).dtype == "bfloat16"


def test_pytrees_are_copied_and_compiled() -> None:
    x = jnp.asarray(inputs(2, 3).numpy())
    options: Any = {"experts": 4, "rank": 2, "scale": 0.5}
    keys = jax.random.split(jax.random.key(0))
    linear = eqx.nn.Linear(6, 5, key=keys[0])
    layer = EQUINOX.ResidualExperts(linear, key=keys[1], **options)
    flax = NNX.ResidualExperts(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), rngs=1, **options)
    flax.adapter.factors["output"][...] += 1.0
    for each, jit in ((layer, eqx.filter_jit), (flax, nnx.jit)):
        wanted = each(x)
        np.testing.assert_allclose(jit(lambda layer, x: layer(x))(each, x), wanted, atol=1e-6)
        for copied in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert np.array_equal(copied(x), wanted)
        assert each.config.arguments() in repr(each)
        found = jax.vmap(each)(x) if each is layer else each(x)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_state_of_equinox(tmp_path: Path) -> None:
    linear = eqx.nn.Linear(6, 5, key=jax.random.key(0))
    options: Any = {"experts": 4, "rank": 2, "gate": Gate(normalization="batch")}
    make = eqx.nn.make_with_state(EQUINOX.ResidualExperts)
    layer, state = make(linear, key=jax.random.key(1), **options)
    x = jnp.asarray(inputs(8).numpy())
    y, state = layer(x, state=state)
    assert layer.is_stateful()
    with pytest.raises(GateError, match=r"got none"):
        layer.save_adapter(tmp_path / "file")
    layer.save_adapter(tmp_path / "file", state)
    again, kept = eqx.nn.make_with_state(EQUINOX.ResidualExperts.from_adapter)(
        linear, tmp_path / "file"
    )
    held = again.adapter.buffers(kept)["gate.running_mean_0"]
    assert np.array_equal(again(x, state=kept)[0], y)
    with pytest.raises(GateError, match=r"make_with_state"):
        layer.load_adapter(tmp_path / "file")
    theirs = ResidualExperts.from_adapter(base_of(), tmp_path / "file")
    assert theirs.adapter.gate is not None
    mean = theirs.adapter.gate.get_buffer("running_mean_0").numpy()
    assert np.array_equal(mean, held)
