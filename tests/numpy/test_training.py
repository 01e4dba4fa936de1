"""Training with NumPy alone: gradients by finite differences, Adam by hand, a loss that falls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormoe import Gate, LayerSpec, Tucker
from tensormoe.testing import specs
from tensormoe_numpy import Adam, MuMoE, MuMoEMLP
from tests._kinds import ABLE
from tests._task import task
from tests.numpy._helpers import build, randomize

STEP = 1e-6


def assert_gradients(
    arrays: dict[str, np.ndarray],
    gradients: dict[str, np.ndarray],
    value: Callable[[], np.ndarray],
    cotangent: np.ndarray,
    seed: int = 0,
) -> None:
    """Directional derivatives by central differences, one random direction an array.

    Args:
        arrays: what the value depends on; moved in place, and back.
        gradients: to be checked, by the same names.
        value: computes the output anew.
        cotangent: of the output.
        seed: of the directions.
    """
    rng = np.random.default_rng(seed)
    for name, array in arrays.items():
        assert gradients[name].shape == array.shape, name
        direction = rng.standard_normal(array.shape)
        kept = array.copy()
        array += STEP * direction
        above = value()
        array[...] = kept - STEP * direction
        below = value()
        array[...] = kept
        moved = (above - below) / (2 * STEP)
        want = np.sum(cotangent * moved)
        got = np.sum(gradients[name] * direction)
        size = np.sum(np.abs(cotangent * moved)) + np.sum(np.abs(cotangent * above)) * 1e-2 + 1e-3
        assert abs(got - want) <= 2e-5 * size, f"{name}: {got} is not {want}"


# Activations without kinks near a random point; sparse ones have none in float64 but by chance.
GATES = st.sampled_from(
    [
        Gate(),
        Gate(alpha=1.25, bias=True),
        Gate("softmax"),
        Gate("softmax", normalization=None, bias=True),
        Gate(normalization=None),
        Gate("sparsemax", normalization=None),
        Gate(normalization="batch", bias=True),
    ]
)


@settings(max_examples=80)
@given(data=st.data())
def test_layer_gradients_are_finite_differences(data: st.DataObject) -> None:
    spec = data.draw(specs(largest=5, largest_rank=5), "spec")
    gate = data.draw(GATES, "gate")
    lead = data.draw(st.sampled_from([(3,), (2, 2)]), "batch shape")
    training = data.draw(st.booleans(), "training")
    layer = randomize(build(spec, gate), data.draw(st.integers(0, 2**32 - 1), "seed"))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*lead, spec.in_features))
    buffers = dict(layer.buffers)

    def value() -> np.ndarray:
        layer.buffers.update(buffers)
        return layer.vjp(x, training=training)[0]

    output, pull = layer.vjp(x, training=training)
    cotangent = rng.standard_normal(output.shape)
    found = pull(cotangent)
    assert set(found.parameters) == set(layer.parameters)
    assert found.coefficients == ()
    arrays = {**layer.parameters, "x": x}
    assert_gradients(arrays, {**found.parameters, "x": found.input}, value, cotangent)


def test_dropped_entries_pass_no_gradient() -> None:
    block = randomize(MuMoEMLP(5, 6, 40, experts=3, rank=3, drop=0.5, dtype="float64", seed=0))
    x = np.random.default_rng(0).standard_normal((4, 5))
    output, pull = block.vjp(x)
    only_dropped = (output == 0).astype(float)
    assert only_dropped.any()
    assert not np.any(pull(only_dropped).input)
    assert np.any(pull(1 - only_dropped).input)


def test_adam_is_the_published_algorithm() -> None:
    """Kingma & Ba 2015, algorithm 1, with Loshchilov & Hutter's decay, entry by entry."""
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((3, 2)), "b": rng.standard_normal(4)}
    want = {name: array.copy() for name, array in weights.items()}
    first = {name: np.zeros_like(array) for name, array in weights.items()}
    second = {name: np.zeros_like(array) for name, array in weights.items()}
    adam = Adam(weights, lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(1, 8):
        gradients = {name: rng.standard_normal(array.shape) for name, array in weights.items()}
        if step == 5:
            adam.lr = 0.01
        adam.step(gradients)
        for name, g in gradients.items():
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            mean = first[name] / (1 - 0.8**step)
            square = second[name] / (1 - 0.95**step)
            want[name] = want[name] - adam.lr * (mean / (np.sqrt(square) + 1e-6) + 0.1 * want[name])
    for name, array in weights.items():
        np.testing.assert_allclose(array, want[name], rtol=1e-12)


def test_adam_moves_the_arrays_of_the_layer() -> None:
    block = MuMoEMLP(5, 6, 4, experts=3, rank=2, seed=0)
    before = {name: array.copy() for name, array in block.parameters.items()}
    adam = Adam(block.parameters, lr=0.1)
    adam.step({name: np.ones_like(array) for name, array in before.items()})
    for name, array in block.parameters.items():
        assert array.dtype == before[name].dtype
        np.testing.assert_allclose(array, before[name] - 0.1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "normalization"), [*((kind, "layer") for kind in ABLE), (ABLE[0], "batch")], ids=str
)
def test_training_lowers_the_loss(kind: Any, normalization: str) -> None:
    x, target, linear = task()
    layer = MuMoE(8, 3, 8, kind, gate=Gate(normalization=normalization), seed=0)
    adam = Adam(layer.parameters, lr=0.02)
    losses = []
    for _ in range(300):
        output, pull = layer.vjp(x)
        error = output - target
        losses.append(float(np.mean(error**2)))
        adam.step(pull(2 * error / error.size).parameters)
    assert losses[-1] < 0.5 * linear < losses[0]
    assert np.mean((layer(x) - target) ** 2) < 0.6 * linear


def test_specs_and_layers_agree_on_names() -> None:
    layer = MuMoE(5, 4, (3, 2), Tucker(2), gate=Gate(bias=True))
    spec = LayerSpec(5, 4, (3, 2), Tucker(2))
    assert layer.spec == spec
    assert list(layer.factors) == list(spec.shapes)
    assert [name for name in layer.parameters if name.startswith("gate.")] == [
        "gate.projection_0",
        "gate.bias_0",
        "gate.projection_1",
        "gate.bias_1",
    ]
