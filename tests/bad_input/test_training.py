"""Cotangents and steps that train nothing: error class, rule, value, remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensormoe.errors import BackendError, ShapeError, SpecError
from tensormoe_numpy import Adam
from tests.bad_input._cases import Case, X, assert_refused, layer, shares


def pull_back(cotangent: Any) -> Any:
    return layer().vjp(X)[1](cotangent)


CASES: dict[str, Case] = {
    # cotangents
    "a cotangent of another shape": (
        lambda: pull_back(shares(3, 5)),
        ShapeError,
        r"cotangent must have the output's shape \(3, 4\); got \(3, 5\)",
    ),
    "a cotangent of another dtype": (
        lambda: pull_back(np.ones((3, 4))),
        ShapeError,
        "cotangent must have the output's dtype float32; got float64. Cast it",
    ),
    "a cotangent of no array": (
        lambda: pull_back([1.0]),
        BackendError,
        "cotangent must be an array of numpy.*; got builtins.list",
    ),
    # the optimizer
    "a learning rate below zero": (
        lambda: Adam({}, lr=-1.0),
        SpecError,
        r"lr must be a number of at least 0; got -1\.0",
    ),
    "a learning rate in letters": (lambda: Adam({}, lr="1"), SpecError, "lr must be.*; got '1'"),
    "one β": (lambda: Adam({}, betas=0.9), SpecError, r"betas must be two numbers.*; got 0\.9"),
    "β of one": (
        lambda: Adam({}, betas=(0.9, 1.0)),
        SpecError,
        r"betas must be two numbers in \[0, 1\); got \(0\.9, 1\.0\)",
    ),
    "a gradient that is missing": (
        lambda: Adam({"w": np.ones(2)}).step({}),
        ShapeError,
        r"gradient of w must have shape \(2,\); got none",
    ),
    "a gradient of another shape": (
        lambda: Adam({"w": np.ones(2)}).step({"w": np.ones(3)}),
        ShapeError,
        r"gradient of w must have shape \(2,\); got \(3,\)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str) -> None:
    assert_refused(*CASES[name])
