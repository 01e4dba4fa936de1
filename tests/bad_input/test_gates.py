"""Gates and logits that give no coefficients: error class, rule, value, remedy."""

from __future__ import annotations

import numpy as np
import pytest

from tensormoe import Gate, entmax
from tensormoe.errors import GateError, SpecError
from tensormoe.gates import Statistics, activate
from tests.bad_input._cases import Case, X, assert_refused, layer, tree


def with_nan(row: int) -> np.ndarray:
    x = X.copy()
    x[row, 2] = np.nan
    return x


CASES: dict[str, Case] = {
    "unknown gate": (
        lambda: layer(gate="relu"),
        GateError,
        "activation must be one of entmax, .*; got 'relu'. Compute other coefficients yourself",
    ),
    "no gate at all": (
        lambda: layer(gate=3),
        GateError,
        r"gate must be a Gate or the name of an activation; got 3. Write Gate\(",
    ),
    "unknown normalization": (
        lambda: Gate(normalization="group"),
        GateError,
        "normalization must be 'layer', 'batch' or None; got 'group'. Use 'layer'",
    ),
    "α below one": (
        lambda: Gate(alpha=0.5),
        GateError,
        r"alpha must be finite and at least 1; got 0\.5. Use 1 for softmax",
    ),
    "top-k without k": (
        lambda: Gate("top_k"),
        GateError,
        r"got k=None. Write Gate\('top_k', k=2\)",
    ),
    "more kept than there are": (
        lambda: tree(gate=Gate("top_k", k=3)),
        SpecError,
        "k of a top-k gate must be at most.*; got 3 for level 1 of 2. Lower k",
    ),
    "NaN in the input": (
        lambda: layer()(with_nan(1)),
        GateError,
        "logits must not be NaN; got NaN in row 1, expert 0. Look for an overflow",
    ),
    "NaN logits": (
        lambda: entmax(np.array([[0.0, 1.0], [0.5, np.nan]])),
        GateError,
        "logits must not be NaN; got NaN in row 1, expert 1",
    ),
    "integer logits": (
        lambda: entmax(np.array([1, 2])),
        GateError,
        "logits must be real floating point; got dtype int64. Convert them first",
    ),
    "a token without experts": (
        lambda: entmax(np.full((2, 3), -np.inf)),
        GateError,
        "every token must have at least one expert; got none in row 0",
    ),
    "batch norm of one token": (
        lambda: layer(gate=Gate(normalization="batch")).vjp(X[:1]),
        GateError,
        "must train on at least 2 tokens; got 1. Use larger batches",
    ),
    "statistics of other experts": (
        lambda: activate(
            Gate(normalization="batch"), np.ones((4, 3)), statistics=Statistics(X[0], X[0])
        ),
        GateError,
        r"statistics.mean must have one entry per expert, shape \(3,\); got \(8,\)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str) -> None:
    assert_refused(*CASES[name])
