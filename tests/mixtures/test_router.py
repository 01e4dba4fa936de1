"""Routers: weights, choice, balance, noise and capacity, by formulas of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from tensormoe.backend import get_backend
from tensormoe.errors import GateError
from tensormoe.gates import importance_loss, load_balance_loss, z_loss
from tensormoe.routing import Router, by_expert, choose

rng = np.random.default_rng(0)
LOGITS = rng.standard_normal((40, 6))
ORDER = np.argsort(-LOGITS, axis=1)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_renormalized_softmax_is_a_softmax_over_the_k_largest(k: int) -> None:
    routes = choose(Router(), LOGITS, k)
    assert np.array_equal(routes.top_k_index, ORDER[:, :k])
    kept = np.take_along_axis(LOGITS, ORDER[:, :k], 1)
    np.testing.assert_allclose(routes.top_k_weights, softmax(kept, 1), rtol=1e-12)
    np.testing.assert_allclose(routes.scores, softmax(LOGITS, 1), rtol=1e-12)
    assert routes.logits is LOGITS


def test_switch_weights_do_not_sum_to_one() -> None:
    routes = choose(Router(renormalize=False), LOGITS, 2)
    wanted = np.take_along_axis(softmax(LOGITS, 1), ORDER[:, :2], 1)
    np.testing.assert_allclose(routes.top_k_weights, wanted, rtol=1e-12)


def test_sigmoid_scores_with_biases_for_the_choice_alone_and_a_scale() -> None:
    bias = np.linspace(-0.6, 0.6, 6)
    routes = choose(Router("sigmoid", balance=0.1, scale=2.5), LOGITS, 3, choice_bias=bias)
    scores = expit(LOGITS)
    wanted = np.argsort(-(scores + bias), axis=1)[:, :3]
    assert np.array_equal(routes.top_k_index, wanted)
    assert not np.array_equal(wanted, ORDER[:, :3])
    kept = np.take_along_axis(scores, wanted, 1)
    np.testing.assert_allclose(
        routes.top_k_weights, 2.5 * kept / kept.sum(1, keepdims=True), rtol=1e-12
    )
    far = choose(Router("sigmoid"), np.array([[-800.0, 800.0, 0.0]]), 3)
    assert far.scores.tolist() == [[0.0, 1.0, 0.5]]


def test_noise_is_for_the_choice_alone() -> None:
    noise = 3.0 * rng.standard_normal(LOGITS.shape)
    routes = choose(Router(noise=0.5), LOGITS, 2, noise=noise)
    wanted = np.argsort(-(LOGITS + 0.5 * noise), axis=1)[:, :2]
    assert np.array_equal(routes.top_k_index, wanted)
    assert not np.array_equal(wanted, ORDER[:, :2])
    kept = np.take_along_axis(LOGITS, wanted, 1)
    np.testing.assert_allclose(routes.top_k_weights, softmax(kept, 1), rtol=1e-12)
    np.testing.assert_allclose(routes.scores, softmax(LOGITS, 1), rtol=1e-12)


def _places(index: np.ndarray, experts: int, places: int) -> np.ndarray:
    """Choices that are kept, one after the other: all first choices, then all second ones."""
    taken, kept = np.zeros(experts, int), np.zeros(index.shape, bool)
    for choice in range(index.shape[1]):
        for token in range(len(index)):
            kept[token, choice] = taken[index[token, choice]] < places
            taken[index[token, choice]] += 1
    return kept


@pytest.mark.parametrize("capacity", [0.25, 0.5, 1.0, 1.25, 9.0])
@pytest.mark.parametrize("renormalize", [True, False])
def test_capacity(capacity: float, renormalize: bool) -> None:
    routes = choose(Router(capacity=capacity, renormalize=renormalize), LOGITS, 2)
    places = int(np.ceil(capacity * 2 * 40 / 6))
    kept = _places(ORDER[:, :2], 6, places)
    assert kept.all() == (capacity == 9.0)
    wanted = np.take_along_axis(softmax(LOGITS, 1), ORDER[:, :2], 1) * kept
    if renormalize:
        total = wanted.sum(1, keepdims=True)
        wanted = np.divide(wanted, total, out=np.zeros_like(wanted), where=total > 0)
    np.testing.assert_allclose(routes.top_k_weights, wanted, rtol=1e-12)
    assert np.array_equal(routes.top_k_index, ORDER[:, :2])
    if capacity == 0.25:
        # some tokens lose all of their experts: they are zero, not NaN
        assert (~kept).all(1).any()


def test_dropped_choices_count_for_the_load() -> None:
    # four of five tokens want the first expert, which has places for a third of all
    logits = np.array([[1.0, 0.0, 0.0]] * 24 + [[0.0, 1.0, 0.0]] * 6)
    routes = choose(Router(capacity=1.0), logits, 1)
    assert (routes.top_k_weights > 0).sum() == 10 + 6
    loss = load_balance_loss(routes.scores, routes.choices, experts=3)
    np.testing.assert_allclose(loss, 3 * softmax(logits, 1).mean(0) @ [0.8, 0.2, 0.0])
    assert loss > load_balance_loss(routes.scores, routes.chosen, experts=3)


def test_first_choices_go_before_second_ones() -> None:
    # the last token's first choice is the first token's second one
    logits = np.log([[0.6, 0.3, 0.1], [0.1, 0.6, 0.3]])
    routes = choose(Router(capacity=0.75, renormalize=False), logits, 2)
    np.testing.assert_allclose(routes.top_k_weights, [[0.6, 0.0], [0.6, 0.3]], rtol=1e-12)


def test_ties_masked_experts_and_tokens_without_any() -> None:
    assert choose(Router(), np.zeros((1, 4)), 2).top_k_index.tolist() == [[0, 1]]
    inf = np.inf
    routes = choose(Router(), np.array([[-inf, 0.0, -inf, 1.0], [0.0] * 4]), 3)
    assert routes.scores[0].tolist()[0::2] == [0.0, 0.0]
    assert routes.top_k_weights[0, 2] == 0.0
    assert np.isfinite(routes.top_k_weights).all()
    for name in ("numpy", "torch"):
        logits: Any = np.array([[-inf] * 3, [0.0, 1.0, 2.0]])
        logits = torch.tensor(logits) if name == "torch" else logits
        with np.errstate(invalid="ignore"):
            routes = choose(Router(), logits, 2)
        found = np.asarray(routes.top_k_weights)
        assert np.isnan(found[0]).all()
        np.testing.assert_allclose(found[1], softmax([2.0, 1.0]))


def test_a_nan_logit_is_its_tokens_own() -> None:
    logits = np.array(LOGITS)
    logits[3, 2] = np.nan
    with pytest.raises(GateError, match="logits must not be NaN; got some"):
        choose(Router(), logits, 2)
    others = np.arange(40) != 3
    for router in (Router(), Router("sigmoid"), Router(renormalize=False)):
        found = choose(router, torch.tensor(logits), 2)
        clean = choose(router, torch.tensor(LOGITS), 2)
        assert torch.equal(found.top_k_weights[others], clean.top_k_weights[others])
        assert torch.isnan(found.top_k_weights[3]).any(), router
        assert ((found.top_k_index >= 0) & (found.top_k_index < 6)).all()


@pytest.mark.parametrize("loss", ["balance", "z", "importance"])
def test_losses_of_the_record_reach_the_logits(loss: str) -> None:
    logits = torch.tensor(LOGITS, requires_grad=True)
    routes = choose(Router(), logits, 2)
    share, scores = np.zeros(6), softmax(LOGITS, 1)
    for token in ORDER[:, :2]:
        share[token] += 1 / 80
    if loss == "balance":
        value = load_balance_loss(routes.scores, routes.choices, experts=6)
        wanted = 6 * np.sum(share * scores.mean(0))
    elif loss == "z":
        value = z_loss(routes.logits)
        wanted = np.mean(np.log(np.exp(LOGITS).sum(1)) ** 2)
    else:
        value = importance_loss(routes.scores)
        total = scores.sum(0)
        wanted = total.var() / total.mean() ** 2
    np.testing.assert_allclose(value.item(), wanted, rtol=1e-10)
    value.backward()
    assert logits.grad is not None
    assert logits.grad.abs().min() > 0


def test_order_by_expert() -> None:
    index = rng.integers(0, 6, (7, 3))
    sent = by_expert(index, 8, get_backend("numpy"))
    wanted = sorted((expert, place) for place, expert in enumerate(index.ravel()))
    assert [*zip(sent.expert, sent.order, strict=True)] == wanted
    assert np.array_equal(sent.token, sent.order // 3)
    assert np.array_equal(sent.counts, np.bincount(index.ravel(), minlength=8))
    none = by_expert(np.zeros((0, 3), int), 8, get_backend("numpy"))
    assert none.counts.tolist() == [0] * 8


REFUSED: dict[str, tuple[Any, str]] = {
    "scores": (lambda: Router("soft"), "scores must be .*; got 'soft'"),
    "noise": (lambda: Router(noise=-1.0), "noise must be a number that is not negative; got -1"),
    "balance": (lambda: Router(balance=np.inf), "balance must be .* got inf. Use 0 for none"),
    "scale": (lambda: Router(scale=0.0), "scale must be a positive number; got 0.0. Use 1.0"),
    "capacity": (lambda: Router(capacity=-1.0), "capacity must be .* got -1.0. Use 1.25, or None"),
    "renormalize": (lambda: Router(renormalize=1), "renormalize must be .*; got 1"),  # type: ignore[arg-type]
    "k = 0": (lambda: choose(Router(), LOGITS, 0), "k must be .* got 0"),
    "k above N": (lambda: choose(Router(), LOGITS, 7), "k must be .* got 7"),
    "axes": (lambda: choose(Router(), LOGITS[0], 1), r"must be a .*matrix.*; got float64 \(6,\)"),
    "integers": (lambda: choose(Router(), LOGITS.astype(int), 1), "got int64"),
    "a list": (lambda: Router.parse(["softmax"]), "router must be a Router or .* Write Router"),  # type: ignore[arg-type]
    "description": (lambda: Router.from_dict({"scores": "softmax"}), "must have the fields"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(GateError, match=message):
        call()
