"""NumPy's layers against those of a library on a device: outputs and all gradients."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensormoe_numpy
from tensormoe import Gate
from tests._kinds import UNEVEN

DEVICE = os.environ.get("TENSORMOE_TEST_DEVICE", "cpu")
"""``"cuda"``, or ``"cpu"`` to try the tests themselves."""

GATES = [
    Gate(),
    Gate("softmax", bias=True),
    Gate("sparsemax", normalization=None),
    Gate("top_k", k=2),
    Gate(alpha=1.25, normalization=None),
]
TOLERANCES = {"float32": 1e-3, "float64": 1e-9}

Found = tuple[np.ndarray, dict[str, np.ndarray]]


class LayersMatch:
    """Tests of a library's layers; a subclass says how one runs there."""

    def run(self, layer: Any, path: Path, arguments: list[Any], cotangent: np.ndarray) -> Found:
        """Output and gradients of one of NumPy's layers, by the library under test.

        Args:
            layer: of NumPy's.
            path: its checkpoint.
            arguments: input or ids, and ready-made coefficients if it is to take them.
            cotangent: of the output.

        Returns:
            The output, and gradients by canonical name, that by the input as ``"x"``.
        """
        raise NotImplementedError

    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("gate", GATES, ids=lambda gate: f"{gate.activation}-{gate.alpha}")
    @pytest.mark.parametrize("kind", UNEVEN, ids=str)
    def test_layers(self, kind: Any, gate: Gate, dtype: str, tmp_path: Path) -> None:
        layer = tensormoe_numpy.MuMoE(24, 20, (16, 12), kind, gate=gate, dtype=dtype)
        self.check(layer, [normal(3, 11, 24, dtype=dtype)], tmp_path)

    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("act_layer", ["gelu", "gelu_tanh", "relu", "silu", "tanh"])
    def test_blocks(self, act_layer: str, dtype: str, tmp_path: Path) -> None:
        block = tensormoe_numpy.MuMoEMLP(
            24, 40, 20, act_layer, experts=16, factorization="cp", rank=8, dtype=dtype
        )
        self.check(block, [normal(33, 24, dtype=dtype)], tmp_path)

    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("kind", UNEVEN, ids=str)
    def test_embeddings(self, kind: Any, dtype: str, tmp_path: Path) -> None:
        table = tensormoe_numpy.MuMoEEmbedding(50, 20, (6, 4), kind, dtype=dtype)
        ids = np.random.default_rng(0).integers(50, size=(4, 9))
        made = [normal(4, 9, count, dtype=dtype) for count in (6, 4)]
        self.check(table, [ids, made], tmp_path)

    def check(self, layer: Any, arguments: list[Any], folder: Path) -> None:
        """Assert that a layer does what NumPy's does."""
        for array in layer.parameters.values():
            # spread over units, so that no output is a sum of huge terms
            array[...] = 0.5 * normal(*array.shape, dtype=layer.dtype.name)
        layer.save(folder / "layer")
        want, pull = layer.vjp(*arguments)
        cotangent = normal(*want.shape, seed=1, dtype=layer.dtype.name)
        gradients = pull(cotangent)
        named = gradients.parameters
        if gradients.input is not None:
            named = named | {"x": gradients.input}
        got, found = self.run(layer, folder / "layer", arguments, cotangent)
        assert set(found) == set(named)
        tolerance = TOLERANCES[layer.dtype.name]
        for name, each in {"output": want, **named}.items():
            other = got if name == "output" else found[name]
            assert (other.dtype, other.shape) == (each.dtype, each.shape), name
            size = max(1.0, float(np.max(np.abs(each))))
            np.testing.assert_allclose(other, each, rtol=0, atol=tolerance * size, err_msg=name)


def normal(*shape: int, seed: int = 0, dtype: str = "float64") -> np.ndarray:
    """Standard normal values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
