"""Gates with batch norm in the NumPy layers."""

from __future__ import annotations

import copy

import numpy as np

from tensormoe import CP, Gate, LayerSpec
from tensormoe_numpy import MuMoE
from tests._numpy_helpers import build


class TestBatchNorm:
    def layer(self) -> MuMoE:
        return build(LayerSpec(6, 5, (3, 4), CP(4)), Gate(normalization="batch", momentum=0.25))

    def test_statistics_follow_the_batches(self) -> None:
        layer = self.layer()
        x = np.random.default_rng(0).standard_normal((50, 6)) + 1
        old = copy.deepcopy(layer.buffers)
        layer.vjp(x)
        for level in range(2):
            logits = x @ layer.parameters[f"gate.projection_{level}"]
            for name, new in (("mean", logits.mean(0)), ("variance", logits.var(0, ddof=1))):
                key = f"gate.running_{name}_{level}"
                np.testing.assert_allclose(layer.buffers[key], 0.75 * old[key] + 0.25 * new)

    def test_inference_leaves_them_and_sees_one_input_at_a_time(self) -> None:
        layer = self.layer()
        x = np.random.default_rng(0).standard_normal((5, 6))
        old = copy.deepcopy(layer.buffers)
        whole = layer(x)
        layer.vjp(x, training=False)
        layer.coefficients(x)
        assert all(np.array_equal(old[name], layer.buffers[name]) for name in old)
        for row, output in zip(x, whole, strict=True):
            np.testing.assert_allclose(layer(row), output, atol=1e-12)

    def test_training_sees_the_batch(self) -> None:
        x = np.random.default_rng(0).standard_normal((5, 6))
        first, _ = self.layer().vjp(x)
        second, _ = self.layer().vjp(np.concatenate([x, 3 * x]))
        assert not np.allclose(first, second[:5])
