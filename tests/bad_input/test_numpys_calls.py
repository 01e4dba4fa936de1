"""What NumPy's layers alone can't be called with: error class, rule, value, remedy."""

from __future__ import annotations

import array_api_strict as strict
import numpy as np
import pytest

from tensormoe import TopK, entmax
from tensormoe.errors import BackendError, ShapeError
from tests.bad_input._cases import IDS, Case, X, assert_refused, layer, shares, table

CASES: dict[str, Case] = {
    "another library": (
        lambda: layer()(strict.ones((3, 8), dtype=strict.float32)),
        BackendError,
        "x must be an array of numpy.*; got array_api_strict.Array. Convert it yourself",
    ),
    "a masked input": (
        lambda: layer()(np.ma.masked_array(X, mask=X > 0)),
        BackendError,
        "x must be a plain, dense array; got numpy.MaskedArray that is not. Convert it",
    ),
    "a matrix": (
        lambda: layer()(X.view(np.matrix)),
        BackendError,
        "x must be a plain, dense array; got numpy.matrix that is not",
    ),
    "logits under a mask of their own": (
        lambda: entmax(np.ma.masked_array(X, mask=X > 0)),
        BackendError,
        "arrays must be plain and dense; got numpy.MaskedArray at 0",
    ),
    "no coefficients for a table": (
        lambda: table()(IDS, None),
        BackendError,
        "coefficients of level 0 must be an array of numpy.*; got builtins.NoneType",
    ),
    "indexed coefficients for a prepared layer": (
        lambda: layer().prepare()(X, TopK(np.zeros((3, 1), int), shares(3, 1))),
        ShapeError,
        "prepared layer takes dense coefficients; got indexed ones. Call the layer",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str) -> None:
    assert_refused(*CASES[name])
