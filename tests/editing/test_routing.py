"""Edits of routing records, on every library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from tensormoe.editing import scale_routes, silence_routes, steer_routes
from tensormoe.errors import ShapeError, SpecError
from tensormoe.routing import (
    Router,
    Routes,
    SoftRoutes,
    choose,
    choose_levels,
    choose_product,
    soft_routes,
)
from tensormoe_numpy import SparseMoE

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((12, 5)).astype("float32")
BIAS = RNG.standard_normal(5).astype("float32")
INF = float("inf")


def by_loops(
    logits: np.ndarray, router: Router, bias: np.ndarray | None, k: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Choices and weights, token by token."""
    index, weights = [], []
    for row in logits.astype("float64"):
        if router.scores == "sigmoid":
            scores = 1 / (1 + np.exp(-row))
        else:
            scores = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        ranked = np.where(row == -INF, -INF, scores + (0 if bias is None else bias))
        best = np.argsort(-ranked, kind="stable")[:k]
        total = scores[best].sum() if router.renormalize else 1.0
        index.append(best)
        weights.append(router.scale * scores[best] / total)
    return np.array(index), np.array(weights)


@pytest.mark.parametrize(
    ("router", "bias"),
    [
        (Router(), None),
        (Router(renormalize=False, scale=2.0), None),
        (Router("sigmoid", balance=0.1), BIAS),
    ],
    ids=str,
)
def test_every_library_chooses_as_plain_loops_do(
    libraries: dict[str, Any], router: Router, bias: np.ndarray | None
) -> None:
    moved = LOGITS + np.array([0, 1.5, 0, 0, -INF], "float32")
    index, weights = by_loops(moved, router, bias)
    without = by_loops(LOGITS + np.array([-INF, 0, 0, -INF, 0]), router, bias)
    plain = by_loops(LOGITS, router, bias)
    for library, (put, get) in libraries.items():
        given = None if bias is None else put(bias)
        routes = choose(router, put(LOGITS), 2, choice_bias=given)
        steered = steer_routes(routes, {1: 1.5, np.int64(4): -INF}, router, choice_bias=given)
        silent = silence_routes(routes, [0, 3], router, choice_bias=given)
        factors = np.array([3.0, 1.0, 1.0, 0.0, -1.0])
        scaled = scale_routes(routes, {0: 3.0, 3: 0.0, 4: -1.0})
        empty = silence_routes(routes, iter((0, 3)))
        for found, (want_index, want_weights) in (
            (steered, (index, weights)),
            (silent, without),
            (scaled, (plain[0], plain[1] * factors[plain[0]])),
            (empty, (plain[0], plain[1] * ~np.isin(plain[0], [0, 3]))),
        ):
            assert type(found.top_k_weights) is type(routes.top_k_weights), library
            np.testing.assert_array_equal(get(found.top_k_index), want_index, err_msg=library)
            np.testing.assert_allclose(
                get(found.top_k_weights), want_weights, rtol=1e-5, atol=1e-6, err_msg=library
            )
        np.testing.assert_allclose(get(steered.logits), moved, rtol=1e-6)
        assert found.logits is routes.logits


def test_mixtures_take_the_records() -> None:
    layer = SparseMoE(6, 8, experts=4, top_k=2, shared_features=4, mix_shared=True, seed=0)
    x = RNG.standard_normal((3, 5, 6)).astype("float32")
    routes = layer.route(x)
    steered = steer_routes(routes, {1: 1.0}, layer.config.router)
    assert steered.top_k_index.shape == (3, 5, 2)
    assert steered.mixing is routes.mixing
    nothing = scale_routes(routes, dict.fromkeys(range(4), 0.0))
    half = scale_routes(routes, dict.fromkeys(range(4), 0.5))
    shared, whole = layer(x, nothing), layer(x)
    np.testing.assert_allclose(layer(x, half) - shared, (whole - shared) / 2, atol=1e-6)
    assert np.abs(layer(x, steered) - whole).max() > 1e-3
    none = layer.route(x[:0])
    assert steer_routes(none, {1: 1.0}, Router()).top_k_index.shape == (0, 5, 2)


def test_records_of_other_routers(libraries: dict[str, Any]) -> None:
    logits = RNG.standard_normal((2, 4, 3, 2)).astype("float32")
    pair = [RNG.standard_normal((6, size)).astype("float32") for size in (4, 3)]
    for put, get in libraries.values():
        soft = soft_routes(put(logits))
        scaled = scale_routes(soft, {1: 0.0, 2: 2.0})
        want = get(soft.combine) * np.array([1.0, 0.0, 2.0])[:, None]
        np.testing.assert_allclose(get(scaled.combine), want, rtol=1e-6)
        assert scaled.dispatch is soft.dispatch
        product = choose_product(Router(), [put(each) for each in pair], 3)
        index = get(product.top_k_index)
        found = scale_routes(product, {int(index[0, 0]): 0.5})
        want = get(product.top_k_weights) * np.where(index == index[0, 0], 0.5, 1.0)
        np.testing.assert_allclose(get(found.top_k_weights), want, rtol=1e-6)


def test_a_weight_that_is_not_finite_is_silenced_too() -> None:
    routes = choose(Router(), LOGITS.astype("float64"), 2)
    broken = Routes(routes.top_k_index, np.full((12, 2), np.nan), routes.logits, routes.scores)
    silent = silence_routes(broken, range(5)).top_k_weights
    assert not silent.any()


ROUTES = choose(Router(), LOGITS, 2)
SOFT = SoftRoutes(*(np.ones((1, 2, 3, 1)) for _ in fields(SoftRoutes)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: steer_routes(ROUTES, {5: 1.0}, Router()), ShapeError, r"\[0, 5\); got 5"),
        (lambda: steer_routes(ROUTES, {0: INF}, Router()), SpecError, "or -inf; got inf"),
        (lambda: steer_routes(ROUTES, {0: "a"}, Router()), SpecError, "got 'a' for expert 0"),  # type: ignore[dict-item]
        (lambda: steer_routes(ROUTES, [1.0], Router()), TypeError, "must map experts' indices"),  # type: ignore[arg-type]
        (lambda: steer_routes(ROUTES, {0: 1.0}, "softmax"), SpecError, "router must be a"),  # type: ignore[arg-type]
        (lambda: steer_routes(SOFT, {0: 1.0}, Router()), SpecError, "routes must be the record"),  # type: ignore[arg-type]
        (lambda: silence_routes(ROUTES, range(5), Router()), ShapeError, "must be left"),
        (lambda: silence_routes(ROUTES, 1.5), TypeError, "got 1.5"),  # type: ignore[arg-type]
        (lambda: silence_routes(ROUTES, [True]), ShapeError, "got True"),
        (lambda: silence_routes(SOFT, 0), SpecError, "routes must be the record"),  # type: ignore[arg-type]
        (lambda: scale_routes(ROUTES, {0: -INF}), SpecError, "finite number; got -inf"),
        (lambda: scale_routes(SOFT, {3: 1.0}), ShapeError, r"\[0, 3\); got 3"),
        (
            lambda: scale_routes(choose_levels(Router(), [LOGITS, LOGITS], 2), {0: 1.0}),  # type: ignore[type-var]
            SpecError,
            "Scale the parts",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
