"""What the tests of the NumPy layers share: layers with random values, and their inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from tensormoe import CP, Dense, Gate, LayerSpec, TensorRing
from tensormoe_numpy import MuMoE, MuMoEEmbedding, MuMoEMLP


def randomize(layer: Any, seed: int = 0) -> Any:
    """Random parameters, those of the gate included, which start at zero, and statistics."""
    rng = np.random.default_rng(seed)
    for array in layer.parameters.values():
        array[...] = rng.standard_normal(array.shape)
    for name, array in layer.buffers.items():
        array[...] = rng.uniform(0.5, 2, array.shape) * (1 if "variance" in name else 0.1)
    return layer


def build(spec: LayerSpec, gate: Gate | None = None, dtype: str = "float64") -> MuMoE:
    return randomize(
        MuMoE(
            spec.in_features,
            spec.out_features,
            spec.experts,
            spec.factorization,
            bias=spec.bias,
            gate=gate,
            dtype=dtype,
            seed=0,
        )
    )


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


def draw_input(data: st.DataObject, features: int, lead: tuple[int, ...], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "input seed"))
    return rng.standard_normal((*lead, features)).astype(dtype)


def same(left: Any, right: Any) -> bool:
    """The same arrays under the same names."""
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in ((left.parameters, right.parameters), (left.buffers, right.buffers))
    )
