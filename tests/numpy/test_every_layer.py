"""What every NumPy layer can do: print, copy, save and count itself."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensormoe import CP, Dense, Gate, Hadamard, TensorRing, TensorTrain, Tucker
from tensormoe_numpy import MuMoE, MuMoEEmbedding, MuMoEMLP
from tests._numpy_helpers import randomize, same


def layers() -> list[Any]:
    """Layers of every class, every option away from its default."""
    gate = Gate("top_k", k=2, normalization="batch", bias=True, momentum=0.3)
    return [
        MuMoE(6, 5, 4, "cp", rank=3, seed=0),
        MuMoE(6, 5, (3, 4), TensorRing((2, 3, 4, 5)), bias=False, gate=gate, dtype="float64"),
        MuMoE(6, 5, (3, 2, 2), "hadamard", gate=None, dtype="float16"),
        MuMoEMLP(6, 8, 5, experts=(3, 2), factorization="tucker", rank=2, gate=gate, seed=0),
        MuMoEMLP(6, experts=3, factorization=(CP(2), Dense()), act_layer="silu", drop=0.5),
        MuMoEEmbedding(9, 5, (3, 2), "tensor_train", rank=(2, 3, 4), dtype="float64"),
    ]


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: type(layer).__name__)
class TestEveryLayer:
    def run(self, layer: Any, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        spec = layer.config.spec if not isinstance(layer, MuMoEMLP) else layer.config.first.spec
        made = [rng.random((4, count)).astype(layer.dtype) for count in spec.experts]
        if isinstance(layer, MuMoEEmbedding):
            return layer(rng.integers(spec.in_features, size=4), made)
        x = rng.standard_normal((4, spec.in_features)).astype(layer.dtype)
        gateless = isinstance(layer, MuMoE) and layer.gate is None
        return layer(x, made if gateless else None)

    def test_repr_rebuilds_it(self, layer: Any) -> None:
        names = (MuMoE, MuMoEMLP, MuMoEEmbedding, CP, TensorRing, TensorTrain, Tucker)
        known = {each.__name__: each for each in (*names, Hadamard, Dense, Gate)}
        again = eval(repr(layer), known)
        assert type(again) is type(layer)
        assert again.config == layer.config
        assert again.dtype == layer.dtype
        assert repr(again) == repr(layer)

    def test_copies_are_its_own(self, layer: Any) -> None:
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert same(again, layer)
            assert again.config == layer.config
            np.testing.assert_array_equal(self.run(again), self.run(layer))
            for name, array in again.parameters.items():
                assert not np.shares_memory(array, layer.parameters[name])
                array += 1
            assert not same(again, layer)

    def test_saved_and_loaded_it_is_the_same(self, layer: Any, tmp_path: Path) -> None:
        randomize(layer)
        layer.save(tmp_path / "layer.safetensors")
        again = type(layer).load(tmp_path / "layer.safetensors")
        assert same(again, layer)
        assert again.config == layer.config
        assert again.dtype == layer.dtype
        np.testing.assert_array_equal(self.run(again), self.run(layer))

    def test_parameters_are_counted(self, layer: Any) -> None:
        assert layer.num_parameters == sum(array.size for array in layer.parameters.values())

    def test_costs_are_known(self, layer: Any) -> None:
        cost, training = layer.cost(64), layer.cost(64, training=True)
        assert 0 < cost.matmul_flops < training.matmul_flops
        assert 0 < cost.peak_memory < training.peak_memory
        assert cost.parameters == layer.num_parameters
