"""What the tests of the NumPy layers share: layers with random values, and their inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from tensormoe import Gate, LayerSpec
from tensormoe_numpy import MuMoE


def randomize(layer: Any, seed: int = 0) -> Any:
    """Random parameters, those of the gate included, which start at zero."""
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


def draw_input(data: st.DataObject, features: int, lead: tuple[int, ...], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "input seed"))
    return rng.standard_normal((*lead, features)).astype(dtype)


def same(left: Any, right: Any) -> bool:
    """The same arrays under the same names."""
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in ((left.parameters, right.parameters), (left.buffers, right.buffers))
    )
