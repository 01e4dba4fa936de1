"""Prepared NumPy layers give the same, and keep their values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe import Gate, LayerSpec
from tensormoe.testing import assert_output, batch_shapes, gates, specs
from tests._numpy_helpers import KINDS, build, draw_input, randomize


@given(data=st.data())
def test_prepared_layers_give_the_same(data: st.DataObject) -> None:
    spec = data.draw(specs(), "spec")
    layer = build(spec, data.draw(gates(spec.experts, batch_norm=True), "gate"))
    prepared = layer.prepare()
    x = draw_input(data, spec.in_features, data.draw(batch_shapes()), "float64")
    found = layer.coefficients(x)
    assert_output(prepared(x), spec.factorization, layer.factors, found, x)
    assert_output(prepared(x, found), spec.factorization, layer.factors, found, x)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_prepared_layers_keep_their_values(kind: Any) -> None:
    layer = build(LayerSpec(6, 5, (3, 2), kind), Gate(normalization="batch"))
    prepared = layer.prepare()
    x = np.random.default_rng(0).standard_normal((4, 6))
    before = prepared(x)
    layer.vjp(x)  # moves the running statistics
    randomize(layer, 1)
    np.testing.assert_array_equal(prepared(x), before)
    assert not np.allclose(layer(x), before)
