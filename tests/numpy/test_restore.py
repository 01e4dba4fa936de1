"""Layers of arrays that exist already: they are used as they are, and must fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensormoe import Gate
from tensormoe.checkpoint import peek_checkpoint
from tensormoe.errors import BackendError, CheckpointError, ShapeError
from tensormoe_numpy import MuMoE, MuMoEEmbedding, MuMoEMLP

LAYERS = [
    MuMoE(6, 5, (3, 2), rank=2, gate=Gate(normalization="batch", bias=True), seed=0),
    MuMoEMLP(6, 8, experts=3, rank=2, gate=Gate(normalization="batch"), drop=0.5, seed=0),
    MuMoEEmbedding(9, 5, (3, 2), rank=2, seed=0),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
class TestRestored:
    def test_arrays_are_used_as_they_are(self, layer: Any) -> None:
        again = type(layer).restore(layer.config, layer.arrays)
        assert again.config == layer.config
        assert list(layer.arrays) == [*layer.parameters, *layer.buffers]
        assert list(again.arrays) == list(layer.arrays)
        assert all(again.arrays[name] is array for name, array in layer.arrays.items())

    def test_names_and_shapes_must_be_the_layers(self, layer: Any) -> None:
        first, *others = layer.arrays
        arrays = {name: layer.arrays[name] for name in others}
        with pytest.raises(CheckpointError, match=f"'{first}' .* is missing"):
            type(layer).restore(layer.config, arrays)
        with pytest.raises(CheckpointError, match=r"'spare' .* is unexpected"):
            type(layer).restore(layer.config, {**layer.arrays, "spare": np.ones(2)})
        wrong = {**layer.arrays, first: layer.arrays[first].T}
        with pytest.raises(CheckpointError, match=f"'{first}' must have the shape"):
            type(layer).restore(layer.config, wrong)

    def test_arrays_must_be_the_librarys(self, layer: Any) -> None:
        first = next(iter(layer.arrays))
        listed = {**layer.arrays, first: layer.arrays[first].tolist()}
        with pytest.raises(BackendError, match=f"{first} must be an array of numpy"):
            type(layer).restore(layer.config, listed)

    def test_parameters_have_one_dtype(self, layer: Any) -> None:
        last = list(layer.parameters)[-1]
        mixed = {**layer.arrays, last: layer.arrays[last].astype("float64")}
        with pytest.raises(ShapeError, match=f"got float64 for '{last}' and float32 for the first"):
            type(layer).restore(layer.config, mixed)
        whole = {name: array.astype("int64") for name, array in layer.arrays.items()}
        with pytest.raises(ShapeError, match="one dtype of float16, float32, float64; got int64"):
            type(layer).restore(layer.config, whole)


def test_cotangents_of_the_gate_are_checked() -> None:
    layer = MuMoE(6, 5, 3, rank=2)
    _, pull = layer.route_vjp(np.ones((4, 6), "float32"))
    with pytest.raises(BackendError, match=r"cotangents\[0\] must be an array of numpy"):
        pull([[1.0, 2.0, 3.0]])


class OfAUser(MuMoE):
    """A class that a user derived."""


def test_a_derived_class_is_saved_as_the_librarys(tmp_path: Path) -> None:
    layer = OfAUser(5, 4, 3, rank=2, seed=0)
    layer.save(tmp_path / "a")
    assert peek_checkpoint(tmp_path / "a").block == "MuMoE"
    for kind in (MuMoE, OfAUser):
        assert type(kind.load(tmp_path / "a")) is kind
