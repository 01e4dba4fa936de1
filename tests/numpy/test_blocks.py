"""The NumPy layers other than the mixture itself: the MLP and the embedding."""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe import CP, TensorRing
from tensormoe.testing import assert_output, batch_shapes, coefficients, reference_output, specs
from tensormoe_numpy import MuMoEEmbedding, MuMoEMLP
from tests._numpy_helpers import randomize


class TestMLP:
    ACTIVATIONS: ClassVar = {
        "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda x: (
            0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        ),
        "relu": lambda x: max(x, 0.0),
        "silu": lambda x: x / (1 + math.exp(-x)),
        "tanh": math.tanh,
    }

    @pytest.mark.parametrize("name", ACTIVATIONS)
    @pytest.mark.parametrize("lead", [(), (0,), (4,), (2, 3)])
    def test_it_is_two_mixtures_with_one_gate(self, name: str, lead: tuple[int, ...]) -> None:
        block = randomize(
            MuMoEMLP(
                6,
                7,
                5,
                act_layer=name,
                experts=(3, 2),
                factorization=(TensorRing(2), CP(3)),
                dtype="float64",
            )
        )
        x = np.random.default_rng(1).standard_normal((*lead, 6))
        made = block.coefficients(x)
        first, second = (
            np.concatenate([w, b[..., None, :]], axis=-2)
            for w, b in (block.first.materialize(), block.second.materialize())
        )
        middle = reference_output(first, made, x)
        middle = np.vectorize(self.ACTIVATIONS[name], otypes=[float])(middle)
        want = reference_output(second, made, middle)
        got = block(x)
        assert got.shape == (*lead, 5)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(block(x, made), want, rtol=1e-9, atol=1e-9)

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


@given(data=st.data())
def test_embeddings_are_mixtures_of_rows(data: st.DataObject) -> None:
    spec = data.draw(specs(bias=False), "spec")
    lead = data.draw(batch_shapes(), "batch shape")
    table = randomize(
        MuMoEEmbedding(
            spec.in_features, spec.out_features, spec.experts, spec.factorization, dtype="float64"
        )
    )
    ids = np.random.default_rng(0).integers(spec.in_features, size=lead)
    made = data.draw(coefficients(spec.experts, lead))
    output = table(ids, made)
    one_hot = np.eye(spec.in_features)[ids]
    assert output.shape == (*lead, spec.out_features)
    assert_output(output, spec.factorization, table.factors, made, one_hot)
