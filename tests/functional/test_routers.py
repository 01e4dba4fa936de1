"""Gates that choose k experts, and the logits of every gate, in every framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")
pytest.importorskip("equinox")

import equinox as eqx
import jax
import jax.numpy as jnp
import torch
from flax import nnx

import tensormoe_jax
import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
import tensormoe_torch
from tensormoe import CP, Gate, LayerSpec
from tensormoe.errors import GateError, SpecError
from tensormoe.functional import LayerConfig, route

IN, N = 32, 8
Coefficients = Callable[[np.ndarray, bool], np.ndarray]


def config(gate: Gate, experts: int | tuple[int, ...] = N) -> LayerConfig:
    return LayerConfig(LayerSpec(IN, 16, experts, CP(4)), gate)


def tokens(count: int = 256) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, IN)).astype("float32")


# what a new layer's gate makes of inputs, in training or not; several calls are one layer's


def _numpy(gate: Gate) -> Coefficients:
    layer = tensormoe_numpy.MuMoE(IN, 16, N, CP(4), gate=gate, seed=0)

    def run(x: np.ndarray, training: bool) -> np.ndarray:
        (made,), _ = layer.route_vjp(x, training=training)
        return made

    return run


def _torch(gate: Gate) -> Coefficients:
    torch.manual_seed(0)
    layer = tensormoe_torch.MuMoE(IN, 16, N, CP(4), gate=gate)

    def run(x: np.ndarray, training: bool) -> np.ndarray:
        (made,) = layer.train(training).coefficients(torch.from_numpy(x))
        return made.detach().numpy()

    return run


def _block(gate: Gate) -> Coefficients:
    torch.manual_seed(0)
    block = tensormoe_torch.MuMoEMLP(IN, 8, 4, experts=N, rank=4, gate=gate)

    def run(x: np.ndarray, training: bool) -> np.ndarray:
        (made,) = block.train(training).coefficients(torch.from_numpy(x))
        return made.detach().numpy()

    return run


def _jax(gate: Gate) -> Coefficients:
    parameters = tensormoe_jax.initialize(config(gate), jax.random.key(0))
    held = {"buffers": tensormoe_jax.initial_buffers(config(gate)), "calls": 0}

    def run(x: np.ndarray, training: bool) -> np.ndarray:
        held["calls"] += 1
        (made,), held["buffers"] = tensormoe_jax.coefficients(
            config(gate),
            parameters,
            jnp.asarray(x),
            buffers=held["buffers"],
            training=training,
            key=jax.random.key(held["calls"]),
        )
        return np.asarray(made)

    return run


def _nnx(gate: Gate) -> Coefficients:
    layer = tensormoe_jax.nnx.MuMoE(IN, 16, N, CP(4), gate=gate, rngs=0)

    def run(x: np.ndarray, training: bool) -> np.ndarray:
        (layer.train if training else layer.eval)()
        (made,) = layer.coefficients(jnp.asarray(x))
        return np.asarray(made)

    return run


def _equinox(gate: Gate) -> Coefficients:
    make = eqx.nn.make_with_state(tensormoe_jax.equinox.MuMoE)
    layer, state = make(IN, 16, N, CP(4), gate=gate, key=jax.random.key(0))
    held = {"state": state, "calls": 0}

    def run(x: np.ndarray, training: bool) -> np.ndarray:
        held["calls"] += 1
        (made,), held["state"] = layer.coefficients(
            jnp.asarray(x), held["state"], key=jax.random.key(held["calls"]), inference=not training
        )
        return np.asarray(made)

    return run


NEW = {
    "NumPy": _numpy,
    "PyTorch": _torch,
    "PyTorch's block": _block,
    "JAX": _jax,
    "Flax NNX": _nnx,
    "Equinox": _equinox,
}


@pytest.fixture(params=NEW.values(), ids=NEW)
def new(request: pytest.FixtureRequest) -> Callable[[Gate], Coefficients]:
    made: Callable[[Gate], Coefficients] = request.param
    return made


def load(made: np.ndarray) -> np.ndarray:
    return np.sum(made > 0, axis=0)


def test_every_expert_gets_tokens_at_the_first_call(new: Any) -> None:
    for normalization in ("layer", None):
        made = new(Gate("top_k", k=2, normalization=normalization))(tokens(), True)
        assert load(made).min() > 0
        assert load(made).sum() == 512


def test_other_gates_start_alike(new: Any) -> None:
    np.testing.assert_allclose(new(Gate())(tokens(4), True), 1 / N, rtol=1e-6)


def test_noise_is_for_the_choice_in_training(new: Any) -> None:
    x = tokens()
    run, quiet = new(Gate("top_k", k=2, noise=2.0)), new(Gate("top_k", k=2))(x, False)
    first, second = run(x, True), run(x, True)
    assert np.mean(np.any((first > 0) != (second > 0), axis=1)) > 0.3
    assert np.all(np.sum(first > 0, axis=1) == 2)
    # where the choice happens to be the same, coefficients are
    same = np.all((first > 0) == (quiet > 0), axis=1)
    assert same.sum() > 10
    np.testing.assert_allclose(first[same], quiet[same], rtol=1e-5)
    np.testing.assert_array_equal(run(x, False), quiet)
    np.testing.assert_array_equal(new(Gate("top_k", k=2, noise=2.0))(x, True), first)


def test_a_gate_with_balance_balances_itself(new: Any) -> None:
    """Inputs with much in common, most of which an untrained gate sends to the same experts."""
    x = tokens() + 2 * tokens(1)
    run = new(Gate("top_k", k=2, normalization=None, balance=0.1))
    before = load(run(x, False))
    assert np.abs(before - 64).max() > 45
    for _ in range(60):
        run(x, True)
    after = load(run(x, False))
    assert np.abs(after - 64).max() < 25
    np.testing.assert_array_equal(load(run(x, False)), after)


# noise without a source of randomness

NOISY = Gate("top_k", k=2, noise=1.0)


def test_noise_needs_a_source() -> None:
    parameters = tensormoe_jax.initialize(config(NOISY), jax.random.key(0))
    x = jnp.asarray(tokens(3))
    with pytest.raises(SpecError, match=r"noise=1\.0 needs a key in training; got None"):
        tensormoe_jax.train(config(NOISY), parameters, x)
    tensormoe_jax.apply(config(NOISY), parameters, x)
    layer = tensormoe_jax.nnx.MuMoE.restore(config(NOISY), parameters)
    with pytest.raises(GateError, match=r"needs random numbers in training; got none\. Pass rngs"):
        layer(x)
    layer.eval()
    layer(x)
    tensormoe_jax.nnx.MuMoE.restore(config(NOISY), parameters, rngs=0)(x)
    with pytest.raises(SpecError, match="stream named 'noise'"):
        tensormoe_jax.nnx.MuMoE(IN, 4, N, CP(2), gate=NOISY, rngs=nnx.Rngs(params=0))
    module = tensormoe_jax.equinox.MuMoE.restore(config(NOISY), parameters)
    with pytest.raises(SpecError, match="needs a key in training"):
        module(x)
    module(x, inference=True)
    plain = {name: np.asarray(array) for name, array in parameters.items()}
    with pytest.raises(GateError, match=r"noise=1\.0 needs a source of random numbers"):
        route(config(NOISY), plain, tokens(3), tensormoe_numpy.BACKEND, training=True)


def test_balance_needs_its_biases() -> None:
    gate = Gate("top_k", k=2, balance=0.1)
    parameters = tensormoe_jax.initialize(config(gate), jax.random.key(0))
    for training in (True, False):
        with pytest.raises(GateError, match=r"balance=0\.1 needs its biases"):
            tensormoe_jax.coefficients(
                config(gate), parameters, jnp.asarray(tokens(3)), training=training
            )


def test_one_batch_over_the_axis_of_a_vmap() -> None:
    """Each call draws its own noise, and all move the biases by the load of the whole batch."""
    gate = Gate("top_k", k=2, noise=1.0, balance=0.5)
    made = eqx.nn.make_with_state(tensormoe_jax.equinox.MuMoE)
    layer, state = made(IN, 4, N, CP(2), gate=gate, axis_name="b", key=jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 64)
    (quiet,), _ = layer.coefficients(jnp.asarray(tokens(64)), state, inference=True)
    (coefficients,), after = jax.vmap(
        lambda x, key: layer.coefficients(x, state, key=key), axis_name="b", out_axes=(0, None)
    )(jnp.asarray(tokens(64)), keys)
    loads = load(np.asarray(coefficients))
    np.testing.assert_array_equal(
        layer.buffers(after)["gate.choice_bias_0"], 0.5 * np.sign(16 - loads)
    )
    assert np.any((np.asarray(quiet) > 0) != (np.asarray(coefficients) > 0))


# logits beside coefficients

GATES = [
    Gate(),
    Gate("top_k", k=2),
    Gate("top_k", k=2, normalization=None, bias=True, balance=0.01),
    Gate("softmax", normalization="batch"),
]


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_logits_come_with_coefficients_and_are_differentiated(gate: Gate) -> None:
    """In every framework alike, with NumPy's closed forms as the reference."""
    made_of = config(gate, (4, 3))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, IN)).astype("float32")
    layer = tensormoe_numpy.MuMoE.restore(made_of, _values(made_of, rng))
    coefficients = layer.coefficients(x)
    again, logits = layer.route(x)
    for level in (0, 1):
        np.testing.assert_array_equal(again[level], coefficients[level])
        want = x @ layer.parameters[f"gate.projection_{level}"]
        want += layer.parameters.get(f"gate.bias_{level}", 0)
        np.testing.assert_allclose(logits[level], want, rtol=1e-5, atol=1e-6)
    cotangents = [rng.standard_normal(each.shape).astype("float32") for each in (*again, *logits)]
    arrays = {name: each.copy() for name, each in layer.arrays.items()}
    made, pull = layer.route_vjp(x, logits=True)
    by_x, by_parameter = pull(cotangents)
    reference = {"x": by_x, **by_parameter}
    for name, run in (("torch", _torch_route), ("jax", _jax_route)):
        found, gradients = run(made_of, arrays, x, cotangents)
        for got, want in zip(found, made, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=name)
        for key, want in reference.items():
            np.testing.assert_allclose(gradients[key], want, rtol=1e-3, atol=1e-4, err_msg=key)
    for module in _jax_modules(made_of, arrays):
        pairs = zip(module(jnp.asarray(x)), (made[:2], made[2:]), strict=True)
        for got, want in ((g, w) for pair in pairs for g, w in zip(*pair, strict=True)):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def _values(made_of: LayerConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {**made_of.parameter_shapes(), **made_of.buffer_shapes()}
    return {
        name: np.ones(shape, "float32")
        if "variance" in name
        else (0.3 * rng.standard_normal(shape)).astype("float32")
        for name, shape in shapes.items()
    }


def _torch_route(made_of: LayerConfig, arrays: Any, x: np.ndarray, cotangents: Any) -> Any:
    layer = tensormoe_torch.MuMoE.restore(
        made_of, {name: torch.from_numpy(each.copy()) for name, each in arrays.items()}
    )
    given = torch.from_numpy(x).requires_grad_()
    coefficients, logits = layer.route(given)
    made = [*coefficients, *logits]
    torch.autograd.backward(made, [torch.from_numpy(each) for each in cotangents])
    gradients = {f"gate.{name}": each.grad for name, each in layer.gate.named_parameters()}
    return [each.detach().numpy() for each in made], {"x": given.grad, **gradients}


def _jax_route(made_of: LayerConfig, arrays: Any, x: np.ndarray, cotangents: Any) -> Any:
    parameters = {name: arrays[name] for name in made_of.parameter_shapes()}
    buffers = {name: jnp.asarray(arrays[name]) for name in made_of.buffer_shapes()}

    def run(parameters: Any, x: Any) -> Any:
        (coefficients, logits), _ = tensormoe_jax.route(
            made_of, parameters, x, buffers=buffers, training=True
        )
        return [*coefficients, *logits]

    made, pull = jax.vjp(run, jax.tree.map(jnp.asarray, parameters), jnp.asarray(x))
    gradients, by_x = pull([jnp.asarray(each) for each in cotangents])
    return made, {"x": by_x, **gradients}


def _jax_modules(made_of: LayerConfig, arrays: Any) -> list[Callable[[Any], Any]]:
    held = jax.tree.map(jnp.asarray, arrays)
    layer = tensormoe_jax.nnx.MuMoE.restore(made_of, held)
    module, state = eqx.nn.make_with_state(tensormoe_jax.equinox.MuMoE.restore)(made_of, held)
    return [layer.route, lambda x: module.route(x, state)[0]]


def test_cotangents_of_routes_are_checked() -> None:
    layer = tensormoe_numpy.MuMoE(IN, 16, N, CP(4), seed=0)
    (made,), pull = layer.route_vjp(tokens(3))
    with pytest.raises(Exception, match="one cotangent per result, 1; got 2"):
        pull([made, made])
    with pytest.raises(Exception, match=r"cotangents\[0\] must have the result's shape \(3, 8\)"):
        pull([made[:2]])
