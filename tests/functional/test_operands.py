"""Public functions leave what they are given as it was, unless they are told to consume it."""

from __future__ import annotations

import numpy as np

from tensormoe import functional
from tensormoe_numpy import BACKEND, MuMoE

LAYER = MuMoE(6, 5, (3, 2), rank=2, seed=0)
X = np.random.default_rng(0).standard_normal((4, 6)).astype("float32")


def test_the_callers_coefficients_stay() -> None:
    config, parameters = LAYER.config, LAYER.parameters
    given = functional.route(config, parameters, X, BACKEND).coefficients
    kept = [*given]
    outputs = [
        functional.apply_experts(config, parameters, X, given, BACKEND),
        functional.experts_vjp(config, parameters, X, given, BACKEND)[0],
        functional.experts_forward(config, parameters, X, given, BACKEND)[0],
        functional.apply_experts(config, parameters, X, tuple(given), BACKEND),
    ]
    assert len(given) == 2
    assert all(now is before for now, before in zip(given, kept, strict=True))
    for output in outputs:
        np.testing.assert_allclose(output, LAYER(X), rtol=1e-6)


def test_a_list_to_be_consumed_is_emptied() -> None:
    given = functional.route(LAYER.config, LAYER.parameters, X, BACKEND).coefficients
    output = functional.apply_experts(
        LAYER.config, LAYER.parameters, X, given, BACKEND, consume=True
    )
    assert not given
    np.testing.assert_allclose(output, LAYER(X), rtol=1e-6)
