"""The NumPy layers other than the mixture itself: the MLP and the embedding."""

from __future__ import annotations

import copy

import numpy as np

from tensormoe_numpy import MuMoEMLP
from tests.numpy._helpers import randomize


class TestMLP:
    def test_sizes_default_to_the_inputs(self) -> None:
        block = MuMoEMLP(6, experts=3, factorization="cp", rank=2)
        assert (block.first.spec.out_features, block.second.spec.out_features) == (6, 6)
        assert block.second.gate is None

    def test_dropout(self) -> None:
        """Half of the entries are dropped in training, the others doubled; none in inference."""
        block = randomize(MuMoEMLP(6, 50, 40, experts=3, rank=8, drop=0.5, seed=0, dtype="float64"))
        plain = copy.deepcopy(block)
        plain.config = type(block.config)(block.first.config, block.second.config, "gelu", 0.0)
        x = np.random.default_rng(0).standard_normal((200, 6))
        np.testing.assert_array_equal(block(x), plain(x))
        np.testing.assert_array_equal(block.vjp(x, training=False)[0], plain(x))
        output, _ = block.vjp(x)
        assert 0.45 < np.mean(output == 0) < 0.55
        assert not np.array_equal(block.vjp(x)[0], output)
