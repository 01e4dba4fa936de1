"""What layers can't be called with: error class, rule, value, remedy."""

from __future__ import annotations

import array_api_strict as strict
import numpy as np
import pytest

from tensormoe import TopK, entmax
from tensormoe.errors import BackendError, ShapeError
from tensormoe_numpy import MuMoEMLP
from tests.bad_input._cases import IDS, Case, X, assert_refused, layer, shares, table, tree

CASES: dict[str, Case] = {
    # shapes of inputs
    "another number of features": (
        lambda: layer()(np.ones((3, 7), "float32")),
        ShapeError,
        r"x must end in an axis of 8 features; got shape \(3, 7\). Check the layer's in_features",
    ),
    "no features at all": (
        lambda: layer()(np.float32(1)),
        ShapeError,
        r"x must end in an axis of 8 features; got shape \(\)",
    ),
    "a list": (
        lambda: layer()([[1.0] * 8]),
        BackendError,
        "x must be an array of numpy.*; got builtins.list. Convert it yourself",
    ),
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
    "an input of the block": (
        lambda: MuMoEMLP(8, experts=3, rank=2)(np.ones((3, 7), "float32")),
        ShapeError,
        r"axis of 8 features; got shape \(3, 7\)",
    ),
    # coefficients
    "coefficients of other experts": (
        lambda: layer()(X, shares(3, 4)),
        ShapeError,
        r"coefficients of level 0 must have shape \(3, 3\); got \(3, 4\). Their leading axes",
    ),
    "coefficients of other inputs": (
        lambda: layer()(X, shares(2, 3)),
        ShapeError,
        r"coefficients of level 0 must have shape \(3, 3\); got \(2, 3\)",
    ),
    "coefficients of other levels": (
        lambda: tree()(X, shares(3, 3)),
        ShapeError,
        "coefficients must have one array a level, 2; got 1",
    ),
    "coefficients of no array": (
        lambda: tree()(X, [shares(3, 3), [[1.0, 2.0]]]),
        BackendError,
        "coefficients of level 1 must be an array of numpy.*; got builtins.list",
    ),
    "a number for coefficients": (
        lambda: layer()(X, 3),
        BackendError,
        "coefficients of level 0 must be an array of numpy.*; got builtins.int",
    ),
    "no coefficients for a table": (
        lambda: table()(IDS, None),
        BackendError,
        "coefficients of level 0 must be an array of numpy.*; got builtins.NoneType",
    ),
    "dense and indexed coefficients": (
        lambda: tree()(X, [TopK(np.zeros((3, 1), int), shares(3, 1)), shares(3, 2)]),
        ShapeError,
        "all levels must be dense, or all indexed with one k; got a mixture",
    ),
    "an expert that is not there": (
        lambda: layer()(X, TopK(np.full((3, 1), 3), shares(3, 1))),
        ShapeError,
        r"must lie in \[0, 3\); got 3",
    ),
    "an expert before the first": (
        lambda: layer()(X, TopK(np.full((3, 1), -1), shares(3, 1))),
        ShapeError,
        r"must lie in \[0, 3\); got -1",
    ),
    "half an expert": (
        lambda: layer()(X, TopK(np.zeros((3, 1)), shares(3, 1))),
        ShapeError,
        r"must be integers; got float64. Cast them",
    ),
    "indices without values": (
        lambda: layer()(X, TopK(np.zeros((3, 2), int), shares(3, 1))),
        ShapeError,
        "coefficients of level 0 must have shape",
    ),
    "coefficients from nowhere": (
        lambda: layer(gate=None)(X),
        ShapeError,
        "this layer has no gate; got no coefficients. Call it with coefficients",
    ),
    "indexed coefficients for a prepared layer": (
        lambda: layer().prepare()(X, TopK(np.zeros((3, 1), int), shares(3, 1))),
        ShapeError,
        "prepared layer takes dense coefficients; got indexed ones. Call the layer",
    ),
    "whole coefficients": (
        lambda: layer()(X, np.ones((3, 3), dtype=np.int64)),
        ShapeError,
        "coefficients of level 0 must be real floating point; got int64. Cast them",
    ),
    # ids
    "ids that are no integers": (
        lambda: table()(np.ones(3), shares(3, 3)),
        ShapeError,
        "ids must be integers; got float64. Cast them",
    ),
    "an id beyond the vocabulary": (
        lambda: table()(np.array([1, 9]), shares(2, 3)),
        ShapeError,
        r"ids must lie in \[0, 9\); got 9. Check the size they index",
    ),
    "a negative id": (
        lambda: table()(np.array([-1]), shares(1, 3)),
        ShapeError,
        r"ids must lie in \[0, 9\); got -1",
    ),
    # single experts
    "an expert beyond the last": (
        lambda: layer().expert(3),
        ShapeError,
        r"expert index must lie in \[0, 3\) at level 0; got 3",
    ),
    "a negative expert": (
        lambda: tree().expert(0, -1),
        ShapeError,
        r"expert index must lie in \[0, 2\) at level 1; got -1",
    ),
    "an expert of another depth": (
        lambda: layer().expert(0, 0),
        ShapeError,
        r"an expert has one index a level, 1; got \(0, 0\)",
    ),
    "an expert by name": (
        lambda: layer().expert("first"),
        ShapeError,
        "expert index must lie in .* at level 0; got 'first'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str) -> None:
    assert_refused(*CASES[name])
