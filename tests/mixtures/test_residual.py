"""Residual mixtures in every framework: their start, their formula, files, merging, bad input."""

from __future__ import annotations

import copy
import pickle
from functools import partial
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
import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
import tensormoe_torch
from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Gate,
    Hadamard,
    LayerSpec,
    SharedBasis,
    SharedDelta,
    Tucker,
)
from tensormoe import TensorRing as Ring
from tensormoe import TensorTrain as Train
from tensormoe.checkpoint import save_checkpoint
from tensormoe.errors import (
    BackendError,
    BudgetError,
    CheckpointError,
    GateError,
    RankError,
    ShapeError,
    SpecError,
)
from tensormoe.functional import LayerConfig, Options
from tensormoe.mixtures import ResidualConfig, residual_config
from tensormoe_torch import MuMoE, ResidualExperts, SparseMoE, parameter_groups

FACTORIZATIONS = {
    "cp": CP(3),
    "ring": Ring(2),
    "train": Train(2),
    "tucker": Tucker(3),
    "hadamard": Hadamard(),
    "dense": Dense(),
    "base and deltas": BaseDelta(2),
    "shared delta": SharedDelta(2),
    "shared basis": SharedBasis((2, 3)),
}
NNX, EQUINOX = tensormoe_jax.nnx, tensormoe_jax.equinox


@pytest.fixture(params=FACTORIZATIONS, ids=str)
def factorization(request: Any) -> Any:
    return FACTORIZATIONS[request.param]


def _base(rows: int = 6, columns: int = 5, **options: Any) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(rows, columns, **options)


def _layer(base: nn.Module | None = None, **options: Any) -> ResidualExperts:
    options = {"experts": 4, "rank": 2} | options
    torch.manual_seed(0)
    return ResidualExperts(_base() if base is None else base, **options)


def _moved(layer: ResidualExperts) -> ResidualExperts:
    """The layer with a mixture that is not zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for each in layer.adapter.parameters():
            each.normal_()
    return layer


def _x(*shape: int, features: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, features, generator=generator, dtype=dtype)


# The start


@pytest.mark.parametrize("sizes", [(6, 5), (5, 6)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("experts", [4, (2, 3)], ids=str)
def test_outputs_start_at_the_bases_and_the_first_step_moves_them(
    factorization: Any, sizes: tuple[int, int], bias: bool, experts: Any
) -> None:
    base = _base(*sizes)
    options = {"factorization": factorization, "rank": None, "bias": bias, "experts": experts}
    layer = _layer(base, **options)
    x, target = _x(32, features=sizes[0]), _x(32, features=sizes[1])
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


@pytest.mark.parametrize("experts", [4, (2, 3)], ids=str)
def test_every_framework_starts_at_zero(factorization: Any, experts: Any) -> None:
    options: Any = {"experts": experts, "factorization": factorization, "bias": True}
    x = np.random.default_rng(0).standard_normal((3, 6)).astype("float32")
    layers = (
        (tensormoe_numpy.ResidualExperts(_double, 6, 6, seed=0, **options), x),
        (NNX.ResidualExperts(_double, 6, 6, rngs=0, **options), jnp.asarray(x)),
        (EQUINOX.ResidualExperts(_double, 6, 6, key=jax.random.key(0), **options), jnp.asarray(x)),
    )
    zeros = []
    for layer, given in layers:
        assert np.array_equal(layer(given), 2 * x)
        arrays = layer.adapter.parameters
        zeros.append({name for name, each in arrays.items() if not np.any(np.asarray(each))})
    assert zeros[0] == zeros[1] == zeros[2]


def _double(x: Any) -> Any:
    return 2 * x


def test_a_reset_starts_at_zero_again() -> None:
    for start in ("whole", "adapter"):
        layer = _moved(_layer(factorization="dense", rank=None))
        assert not torch.equal(layer(_x(3)), layer.base(_x(3)))
        (layer if start == "whole" else layer.adapter).reset_parameters()
        assert torch.equal(layer(_x(3)), layer.base(_x(3)))
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


def test_one_function_in_float64(factorization: Any, tmp_path: Path) -> None:
    options = {"factorization": factorization, "rank": None, "bias": True, "scale": -1.5}
    layer = _moved(_layer(_base(dtype=torch.float64), experts=(2, 3), **options))
    x = _x(2, 3, dtype=torch.float64)
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
    layer = _moved(_layer(bias=True, scale=0.5))
    for name, other in _all(layer, tmp_path / "first").items():
        other.save_adapter(tmp_path / name)
        assert (tmp_path / name).read_bytes() == (tmp_path / "first").read_bytes(), name
        fresh = _layer(bias=True, scale=0.5)
        assert fresh.load_adapter(tmp_path / name) is fresh
        assert torch.equal(fresh(_x(3)), layer(_x(3)))
        # in the other framework, over values that are there
        _layer(bias=True, scale=0.5).save_adapter(tmp_path / "zero")
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

    layer = _moved(_layer(bias=True))
    ours = _all(layer, tmp_path / "file")["NumPy"]
    x = _x(2, 3).numpy()
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


# Frozen


class _Block(nn.Module):
    """A base whose mode matters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(x))


def test_the_base_is_frozen_in_pytorch() -> None:
    layer = _layer(_Block(), in_features=6, out_features=6).train()
    assert layer.training
    assert layer.adapter.training
    before = copy.deepcopy(layer.base.state_dict())
    x = _x(32)
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
    x, target = jnp.asarray(_x(16).numpy()), jnp.ones((16, 5))
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
    x, target = jnp.asarray(_x(16).numpy()), jnp.ones((16, 5))
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
    inner = NNX.ResidualExperts(_double, 6, 6, experts=2, rank=1, rngs=0)
    outer = NNX.ResidualExperts(inner, experts=3, rank=2, rngs=1)
    assert NNX.adapter_filter(outer).paths == {("adapter",)}
    layer = _layer(_layer(_base(6, 6)))
    assert not any(each.requires_grad for each in layer.base.parameters())
    assert layer(_x(3)).shape == (3, 6)


# What users do with it


def test_it_is_a_module_like_others(tmp_path: Path) -> None:
    layer = _moved(_layer(bias=True, scale=0.5))
    x = _x(2, 3)
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
        assert layer(_x(*shape)).shape == (*shape, 5)
    given = torch.rand(2, 3, 4)
    wanted = layer.base(x) + 0.5 * layer.adapter(x, given)
    torch.testing.assert_close(layer(x, given), wanted)
    assert "as code" in layer._repr_html_()
    assert (layer.weight.shape, layer.weight.dtype) == ((5, 6), torch.float32)
    with pytest.raises(SpecError, match=r"weight of ResidualExperts has no values"):
        _ = layer.weight + 1
    assert _layer(_base(bias=False)).bias is None


def test_the_mixture_may_be_wider_than_the_base() -> None:
    base = _base().bfloat16()
    layer = _layer(base, dtype=torch.float32)
    assert {each.dtype for each in layer.adapter.parameters()} == {torch.float32}
    x = _x(3).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), base(x))
    assert _moved(_layer(base)).adapter.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert _layer()(_x(3)).dtype == torch.bfloat16
    wide = NNX.ResidualExperts(_double, 6, 6, experts=4, rank=2, dtype="float32", rngs=0)
    assert wide(jnp.ones((3, 6), "bfloat16")).dtype == "bfloat16"


def test_pytrees_are_copied_and_compiled() -> None:
    x = jnp.asarray(_x(2, 3).numpy())
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
    x = jnp.asarray(_x(8).numpy())
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
    theirs = ResidualExperts.from_adapter(_base(), tmp_path / "file")
    assert theirs.adapter.gate is not None
    mean = theirs.adapter.gate.get_buffer("running_mean_0").numpy()
    assert np.array_equal(mean, held)


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_merged_layer_is_linear(factorization: Any, bias: bool, dtype: torch.dtype) -> None:
    options = {"factorization": factorization, "rank": None, "experts": (2, 3), "scale": 0.25}
    base = _base(dtype=dtype, bias=not bias)
    layer = _moved(_layer(base, bias=bias, **options))
    before = base.weight.clone()
    given = torch.rand(2), torch.rand(3)
    merged = layer.merge(given)
    assert type(merged) is nn.Linear
    assert torch.equal(base.weight, before)
    assert not any(each.requires_grad for each in merged.parameters())
    x = _x(7, dtype=dtype)
    wanted = layer(x, [each.expand(7, -1) for each in given])
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    assert (merged(x) - wanted).abs().max() < tolerance * wanted.abs().max()


def test_one_expert_is_merged_without_coefficients() -> None:
    layer = _moved(_layer(experts=1))
    torch.testing.assert_close(layer.merge()(_x(3)), layer(_x(3)))
    positive = _layer(experts=1, gate=Gate("relu_top_k", k=1))
    with pytest.raises(SpecError, match=r"must have fixed coefficients .* got 1 expert\(s\)"):
        positive.merge()


def test_merged_in_jax() -> None:
    given, x = jnp.array([0.1, 0.2, 0.3, 0.9]), jnp.asarray(_x(7).numpy())
    rows = jnp.broadcast_to(given, (7, 4))
    options: Any = {"experts": 4, "rank": 2, "scale": 2.0, "bias": True}
    for held in (True, False):
        flax = NNX.ResidualExperts(
            nnx.Linear(6, 5, rngs=nnx.Rngs(0), use_bias=held), rngs=1, **options
        )
        flax.adapter.factors["output"][...] += 1.0
        merged = flax.merge(given)
        assert type(merged) is nnx.Linear
        np.testing.assert_allclose(merged(x), flax(x, rows), rtol=1e-4, atol=1e-5)
        keys = jax.random.split(jax.random.key(0))
        linear = eqx.nn.Linear(6, 5, use_bias=held, key=keys[0])
        layer = EQUINOX.ResidualExperts(linear, key=keys[1], **options)
        layer = eqx.tree_at(lambda each: each.adapter.factors["output"], layer, jnp.ones((5, 2)))
        whole = layer.merge(given)
        assert type(whole) is eqx.nn.Linear
        np.testing.assert_allclose(jax.vmap(whole)(x), layer(x, rows), rtol=1e-4, atol=1e-5)
        with pytest.raises(SpecError, match=r"fixed coefficients"):
            layer.merge()
    weight, bias = tensormoe_numpy.ResidualExperts(_double, 6, 6, seed=0, **options).delta(
        np.ones(4, "float32")
    )
    assert (weight.shape, bias.shape, weight.any()) == ((6, 6), (6,), False)


def _experts(package: Any, **options: Any) -> Any:
    return package.MuMoE(6, 5, 4, "dense", gate=None, **options)


def test_experts_of_a_router_are_merged_one_by_one() -> None:
    base = _experts(tensormoe_torch)
    layer = _moved(_layer(base, gate=None, bias=True, scale=0.5))
    given = torch.rand(3, 4)
    wanted = base(_x(3), given) + 0.5 * layer.adapter(_x(3), given)
    torch.testing.assert_close(layer(_x(3), given), wanted)
    merged = layer.merge()
    assert type(merged) is MuMoE
    torch.testing.assert_close(merged(_x(3), given), wanted)
    x, rows = jnp.asarray(_x(3).numpy()), jnp.asarray(given.numpy())
    options: Any = {"experts": 4, "rank": 2, "gate": None}
    flax = NNX.ResidualExperts(_experts(NNX, rngs=0), rngs=1, **options)
    flax.adapter.factors["output"][...] += 1.0
    np.testing.assert_allclose(flax.merge()(x, rows), flax(x, rows), rtol=1e-4, atol=1e-5)
    key = jax.random.key(0)
    layer = EQUINOX.ResidualExperts(_experts(EQUINOX, key=key), key=key, **options)
    layer = eqx.tree_at(lambda each: each.adapter.factors["output"], layer, jnp.ones((5, 2)))
    np.testing.assert_allclose(layer.merge()(x, rows), layer(x, rows), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_merged() -> None:
    cases: list[tuple[Any, Any, str]] = [
        (_layer(), None, r"fixed coefficients .* got 4 expert\(s\) with Gate"),
        (_layer(gate=None), None, r"got 4 expert\(s\) with no gate"),
        (_layer(nn.Sequential(_base()), in_features=6, out_features=5), None, r"got a Sequential"),
        (_layer(), torch.ones(3), r"shape \(4,\) at level 0; got torch.float32 \(3,\)"),
        (_layer(), torch.ones(4, dtype=torch.int64), r"must be floats"),
        (_layer(), [torch.ones(4)] * 2, r"one array per level, 1; got 2"),
        (_layer(), np.ones(4), r"coefficients of level 0"),
        (_layer(_experts(tensormoe_torch), gate=None), torch.ones(4), r"one by one; got coeff"),
        (
            _layer(MuMoE(6, 5, 4, CP(2), gate=None), gate=None),
            None,
            r"must be dense to be merged .* got CP\(rank=2\)",
        ),
        (
            _layer(_experts(tensormoe_torch, bias=False), gate=None, bias=True),
            None,
            r"must have biases to be merged",
        ),
    ]
    for layer, given, message in cases:
        with pytest.raises((SpecError, ShapeError, BackendError), match=message):
            layer.merge(given)


class _Own(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def test_a_base_that_runs_in_another_way_is_not_merged() -> None:
    with pytest.raises(SpecError, match=r"has a forward of its own"):
        _layer(_Own(6, 5), experts=1).merge()


# Bad input


def test_bad_arguments() -> None:
    bad: list[tuple[Any, type[Exception], str]] = [
        (lambda: _layer(3), SpecError, r"base must be an nn.Module; got int"),
        (lambda: _layer(nn.ReLU()), SpecError, r"in_features must be given .* for a ReLU"),
        (lambda: _layer(in_features=7), SpecError, r"in_features must be the base's own, 6; got 7"),
        (lambda: _layer(out_features=0), SpecError, r"out_features must be a positive integer"),
        (lambda: _layer(rank=0), RankError, r"rank"),
        (lambda: _layer(factorization=Ring((1, 2, 3, 4)), rank=None), RankError, r"rank must have"),
        (lambda: _layer(budget=3), RankError, r"exclude one another"),
        (lambda: _layer(rank=None, budget=3), BudgetError, r"3"),
        (lambda: _layer(scale=float("nan")), SpecError, r"scale must be a finite number"),
        (lambda: _layer(scale=0), SpecError, r"scale must be a finite number other than 0; got 0"),
        (lambda: _layer(scale="2"), SpecError, r"scale must be"),
        (lambda: _layer(gate="nothing"), Exception, r"nothing"),
        (
            lambda: _layer(_experts(tensormoe_torch)),
            SpecError,
            r"must share coefficients: experts=\(4,\) and gate=None; got experts=\(4,\) and gate=G",
        ),
        (
            lambda: tensormoe_numpy.ResidualExperts(3, 6, 6, experts=2),  # type: ignore[arg-type]
            SpecError,
            r"base must be a layer, called with arrays",
        ),
        (
            lambda: NNX.ResidualExperts(None, 6, 6, experts=2, rngs=0),  # type: ignore[arg-type]
            SpecError,
            r"base must be a layer",
        ),
        (
            lambda: EQUINOX.ResidualExperts(
                eqx.nn.Linear("scalar", 5, key=jax.random.key(0)), experts=2, key=jax.random.key(0)
            ),
            SpecError,
            r"in_features must be given",
        ),
        (
            lambda: ResidualConfig(LayerConfig(LayerSpec(4, 4, 2, CP(2)), None, True)),
            SpecError,
            r"got one for ids",
        ),
        (lambda: ResidualConfig(3), SpecError, r"layer must be a LayerConfig"),  # type: ignore[arg-type]
        (
            lambda: ResidualExperts.of(_layer().config, _base(7, 5)),
            SpecError,
            r"in_features must be the base's own, 7; got 6",
        ),
    ]
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()


def test_bad_calls() -> None:
    wide = _layer(nn.Sequential(_base()), in_features=6, out_features=4)
    with pytest.raises(ShapeError, match=r"base must return \(3, 4\) .* got \(3, 5\)"):
        wide(_x(3))
    with pytest.raises(ShapeError, match=r"7"):
        _layer()(_x(3, features=7))
    with pytest.raises(BackendError, match=r"x"):
        _layer()(np.ones((3, 6)))

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x, x

    with pytest.raises(BackendError, match=r"the base's output"):
        _layer(Pair(), in_features=6, out_features=6)(_x(3))
    ours = tensormoe_numpy.ResidualExperts(lambda x: x[..., :2], 6, 5, experts=2, rank=1, seed=0)
    with pytest.raises(ShapeError, match=r"base must return \(3, 5\)"):
        ours(np.ones((3, 6), "float32"))
    flax = NNX.ResidualExperts(lambda x: x[..., :2], 6, 5, experts=2, rank=1, rngs=0)
    with pytest.raises(ShapeError, match=r"base must return \(3, 5\)"):
        flax(jnp.ones((3, 6)))
    key = jax.random.key(0)
    layer = EQUINOX.ResidualExperts(lambda x: x[:2], 6, 5, experts=2, rank=1, key=key)
    with pytest.raises(ShapeError, match=r"base must return \(3, 5\)"):
        layer(jnp.ones((3, 6)))


def test_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "file"
    _layer().save_adapter(path)
    others = _layer(_base(7, 5), experts=3, rank=1, scale=2.0, gate=None)
    with pytest.raises(CheckpointError) as caught:
        others.load_adapter(path)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(" must be ")[0] for line in lines] == [
        "layer.spec.in_features",
        "layer.spec.experts",
        "layer.spec.rank",
        "layer.gate",
        "scale",
    ]
    with pytest.raises(SpecError, match=r"in_features must be the base's own, 7; got 6"):
        ResidualExperts.from_adapter(_base(7, 5), path)
    numpys = tensormoe_numpy.ResidualExperts(_double, 6, 6, experts=2, rank=1, seed=0)
    for load in (
        numpys.load_adapter,
        NNX.ResidualExperts(_double, 6, 6, experts=2, rank=1, rngs=0).load_adapter,
        EQUINOX.ResidualExperts(
            _double, 6, 6, experts=2, rank=1, key=jax.random.key(0)
        ).load_adapter,
    ):
        with pytest.raises(CheckpointError, match=r"layer.spec.out_features must be 6; got 5"):
            load(path)
        with pytest.raises(CheckpointError, match=r"name must be the path .* got 'a', and it hold"):
            load(path, "a")
    with pytest.raises(CheckpointError, match=r"must hold a MuMoE; got a ResidualExperts"):
        MuMoE.load(path)
    MuMoE(6, 5, 4, rank=2).save(path)
    with pytest.raises(CheckpointError, match=r"must hold adapters.* got a MuMoE"):
        _layer().load_adapter(path)
    good = _layer().config.to_dict()
    damaged: list[tuple[Any, str]] = [
        ({}, r"must describe its modules"),
        ({"modules": {}}, r"must describe its modules"),
        ({"modules": {"": {"layer": good["layer"]}}}, r"at '': a residual mixture's config"),
        ({"modules": {"": good | {"scale": 0}}}, r"scale must be"),
        ({"modules": {"": good}}, r"'adapter.factors.input' \(6, 2\) is missing"),
    ]
    for config, message in damaged:
        save_checkpoint(path, "ResidualExperts", config, {"a": np.ones(3)})
        with pytest.raises(CheckpointError, match=message):
            _layer().load_adapter(path)


def test_descriptions() -> None:
    config = residual_config(_double, 6, 5, Options((2, 3), "tucker", rank=2), 0.5)
    assert ResidualConfig.from_dict(config.to_dict()) == config
    shapes = {**config.parameter_shapes(), **config.buffer_shapes()}
    assert set(shapes) == {f"adapter.{name}" for name in config.layer.parameter_shapes()}
    assert config.num_parameters == sum(np.prod(shape) for shape in shapes.values())


def test_any_mixture_may_be_the_base() -> None:
    sparse = SparseMoE(6, 8, 5, experts=4, top_k=2)
    layer = _layer(sparse)
    assert torch.equal(layer(_x(2, 3)), sparse(_x(2, 3)))
    with pytest.raises(SpecError, match=r"got a SparseMoE"):
        layer.merge(torch.ones(4))
