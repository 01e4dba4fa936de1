"""The CuPy layers in training: the same steps as NumPy's layers, from the same seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tensormoe_numpy
from tensormoe import CP, Gate, TensorRing
from tensormoe.errors import BackendError, ShapeError
from tests._cupy_standin import ADAPTER, assert_same, device, installed, randomize, twin

tensormoe_cupy = pytest.importorskip("tensormoe_cupy")


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    with installed():
        yield


def steps(layer: Any, x: Any, target: Any, count: int, **options: Any) -> list[Any]:
    """The losses of some steps of Adam, on whichever library."""
    adam = tensormoe_numpy.Adam(layer.parameters, **options)
    losses = []
    for _ in range(count):
        output, pull = layer.vjp(x)
        error = output - target
        losses.append((error * error).mean())
        adam.step(pull(2 * error / error.size).parameters)
    return losses


@pytest.mark.parametrize("gate", [Gate(), Gate(normalization="batch", bias=True)], ids=str)
@pytest.mark.parametrize("kind", [CP(4), TensorRing(3)], ids=str)
def test_layers_take_numpys_steps(kind: Any, gate: Gate) -> None:
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((32, 6)), rng.standard_normal((32, 5))
    options: dict[str, Any] = {"gate": gate, "dtype": "float64", "seed": 3}
    theirs = tensormoe_numpy.MuMoE(6, 5, (4, 3), kind, **options)
    ours = tensormoe_cupy.MuMoE(6, 5, (4, 3), kind, **options)
    how: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    want = steps(theirs, x, target, 20, **how)
    got = steps(ours, device(x), device(target), 20, **how)
    assert_same(got, [np.asarray(each) for each in want], 1e-7)
    assert_same(ours.arrays, theirs.arrays, 1e-7)
    assert want[-1] < want[0]


def test_blocks_drop_what_numpys_drop() -> None:
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((16, 6)), rng.standard_normal((16, 6))
    options: dict[str, Any] = {"experts": 4, "rank": 4, "drop": 0.25, "dtype": "float64", "seed": 3}
    theirs = tensormoe_numpy.MuMoEMLP(6, 8, **options)
    ours = tensormoe_cupy.MuMoEMLP(6, 8, **options)
    want = steps(theirs, x, target, 10, lr=0.02)
    got = steps(ours, device(x), device(target), 10, lr=0.02)
    assert_same(got, [np.asarray(each) for each in want], 1e-7)
    assert_same(ours.arrays, theirs.arrays, 1e-7)


def test_embeddings_take_numpys_steps() -> None:
    table = randomize(tensormoe_numpy.MuMoEEmbedding(9, 5, (3, 2), CP(3), dtype="float64"))
    ours = twin(table)
    rng = np.random.default_rng(0)
    # an id that comes twice, whose gradients are added up
    ids = np.array([[0, 4, 4], [8, 0, 1]])
    made = [rng.standard_normal((2, 3, count)) for count in (3, 2)]
    for layer, there in ((table, lambda a: a), (ours, device)):
        adam = tensormoe_numpy.Adam(layer.parameters, lr=0.1)
        for _ in range(3):
            output, pull = layer.vjp(there(ids), there(made))
            adam.step(pull(output).parameters)
    assert_same(ours.arrays, table.arrays, 1e-7)


def test_adam_refuses_gradients_of_another_library() -> None:
    weight = device({"w": np.ones(3)})
    adam = tensormoe_cupy.Adam(weight)
    with pytest.raises(BackendError, match=r"gradient of w must be an array of cupy"):
        adam.step({"w": np.ones(3)})
    with pytest.raises(ShapeError, match=r"gradient of w must have shape \(3,\)"):
        adam.step(device({"w": np.ones(2)}))
    adam.step(device({"w": np.ones(3)}))
    assert_same(weight["w"], np.full(3, 0.999), 1e-9)
    assert ADAPTER.owns(weight["w"])
    with pytest.raises(BackendError, match=r"got cupy\.ndarray at 0, numpy\.ndarray at 1"):
        tensormoe_cupy.Adam({**weight, "v": np.ones(3)})
