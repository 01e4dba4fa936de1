"""The gate as a value, and the losses."""

from __future__ import annotations

import numpy as np
import pytest

from tensormoe.errors import GateError
from tensormoe.gates import (
    Gate,
    activate,
    entropy,
    entropy_loss,
    entropy_loss_vjp,
    expert_load,
    importance_loss,
    importance_loss_vjp,
    load_balance_loss,
    load_balance_loss_vjp,
    softmax,
    z_loss,
    z_loss_vjp,
)


@pytest.mark.parametrize(
    "gate",
    [
        Gate(),
        Gate.paper(),
        Gate(spread=2),
        Gate("top_k", k=2, normalization=None, noise=0.5, balance=0.01),
        Gate("relu_top_k", k=3),
        Gate("entmax", 1.25, "batch", bias=True),
    ],
)
def test_round_trips(gate):
    assert eval(repr(gate)) == gate  # repr reconstructs
    assert Gate.from_dict(gate.to_dict()) == gate
    assert Gate.parse(gate) is gate


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Gate("relu"), "activation must be one of .*; got 'relu'"),
        (lambda: Gate(normalization="group"), "normalization must be .*; got 'group'"),
        (lambda: Gate(alpha=0.9), "alpha must be finite and at least 1; got 0.9"),
        (lambda: Gate("softmax", alpha=2.0), "alpha belongs to entmax"),
        (lambda: Gate("top_k"), r"Gate\('top_k', k=2\)"),
        (lambda: Gate("top_k", k=0), "k must be a positive integer; got 0"),
        (lambda: Gate(k=2), "k belongs to top_k and relu_top_k"),
        (lambda: Gate("relu_top_k"), r"relu_top_k needs .* Gate\('relu_top_k', k=2\)"),
        (lambda: Gate(bias=1), "bias must be True or False"),
        (lambda: Gate(eps=0), "eps must be a positive number"),
        (lambda: Gate(spread=0), "spread must be a positive number or None; got 0"),
        (lambda: Gate(spread="1"), "spread must be a positive number or None; got '1'"),
        (lambda: Gate(normalization=None, spread=1.0), "spread belongs to a normalization"),
        (lambda: Gate(momentum=1.5), r"momentum must be in \(0, 1\]; got 1.5"),
        (lambda: Gate("top_k", k=2, noise=-1.0), "noise must be a number that is not negative"),
        (lambda: Gate("top_k", k=2, noise=True), "noise must be a number"),
        (lambda: Gate("top_k", k=2, balance=float("inf")), "balance must be a number"),
        (lambda: Gate("softmax", noise=0.5), "noise belongs to top_k; got 0.5"),
        (lambda: Gate(balance=0.1), "balance belongs to top_k; got 0.1"),
        (lambda: Gate.parse("top_k"), r"Gate\('top_k', k=2\)"),
        (lambda: Gate.parse(3), "gate must be a Gate or the name"),
        (lambda: Gate.from_dict({"activation": "entmax"}), "missing .*'alpha'"),
        (lambda: Gate.from_dict({**Gate().to_dict(), "x": 1}), r"unknown \['x'\]"),
        (lambda: Gate.from_dict([]), "must be a mapping; got list"),
    ],
)
def test_impossible_gates(make, words):
    with pytest.raises(GateError, match=words):
        make()


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0])
def test_a_small_logit_changes_a_coefficient_by_the_same_factor_for_any_number(alpha):
    factors = []
    for experts in (16, 256, 4096):
        # one expert apart from the others by a small share of a standard deviation of eps
        x = np.zeros((1, experts))
        x[0, 0] = 1e-6
        a = activate(Gate("entmax", alpha), x).coefficients[0]
        factors.append((a[0] / a[1] - 1) / 1e-6)
    np.testing.assert_allclose(factors, 8 ** (alpha - 1), rtol=1e-3)


@pytest.mark.parametrize("gate", [Gate.paper(), Gate("top_k", k=2, normalization=None)])
def test_descriptions_without_later_fields_are_of_gates_without(gate):
    old = gate.to_dict()
    del old["noise"], old["balance"], old["spread"]
    assert Gate.from_dict(old) == gate


def test_uncut_gates_keep_the_normalization():
    for normalization in ("layer", "batch", None):
        gate = Gate("top_k", k=2, normalization=normalization, eps=0.1, noise=1.0, balance=0.1)
        assert gate.uncut == Gate("softmax", normalization=normalization, eps=0.1)


def coefficients():
    return softmax(np.random.default_rng(0).standard_normal((4, 5, 6)))


def test_load_balance():
    a = coefficients()
    flat = a.reshape(-1, 6)
    share = np.bincount(flat.argmax(-1), minlength=6) / 20
    assert float(load_balance_loss(a)) == pytest.approx(6 * share @ flat.mean(0), rel=1e-14)
    assert float(load_balance_loss(np.eye(6))) == pytest.approx(1.0)
    alone = np.zeros((4, 6))
    alone[:, 2] = 1
    assert float(load_balance_loss(alone)) == pytest.approx(6.0)


def test_entropy_of_dense_and_sparse_coefficients():
    a = coefficients()
    np.testing.assert_allclose(entropy(a), -np.sum(a * np.log(a), axis=-1))
    np.testing.assert_array_equal(entropy(np.eye(3)), 0)
    assert float(entropy_loss(np.full((3, 8), 0.125))) == pytest.approx(np.log(8))


@pytest.mark.parametrize(
    ("loss", "vjp"),
    [
        (load_balance_loss, load_balance_loss_vjp),
        (entropy_loss, entropy_loss_vjp),
        (importance_loss, importance_loss_vjp),
        (z_loss, z_loss_vjp),
    ],
)
def test_gradients_of_losses(loss, vjp):
    a = coefficients()
    got = vjp(a, 2.5)
    for place in np.ndindex(a.shape):
        up, down = a.copy(), a.copy()
        up[place] += 1e-7
        down[place] -= 1e-7
        want = 2.5 * float(loss(up) - loss(down)) / 2e-7
        assert got[place] == pytest.approx(want, rel=1e-5, abs=1e-7)
    a[0, 0] = np.eye(6)[0]
    assert np.all(np.isfinite(vjp(a)))


def test_expert_load_counts_from_the_threshold_on():
    a = np.array([[[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]]])
    np.testing.assert_array_equal(expert_load(a), [1, 2, 0])
    np.testing.assert_array_equal(expert_load(a, 0.6), [0, 1, 0])
    for bad in (0, 1.1, "x", True):
        with pytest.raises(GateError, match="threshold must be"):
            expert_load(a, bad)


@pytest.mark.parametrize(
    "loss", [load_balance_loss, entropy_loss, expert_load, importance_loss, z_loss]
)
def test_losses_refuse_what_is_no_coefficients(loss):
    with pytest.raises(GateError, match="at least one token"):
        loss(np.zeros((0, 3)))
    with pytest.raises(GateError, match="real floating point"):
        loss(np.zeros((2, 3), int))
