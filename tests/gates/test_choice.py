"""Terms for the choice of experts alone, loads, and losses of routers."""

from __future__ import annotations

import numpy as np
import pytest

from tensormoe.errors import GateError
from tensormoe.gates import (
    Gate,
    TopK,
    activate,
    activate_vjp,
    balanced_bias,
    entropy,
    entropy_loss,
    entropy_loss_vjp,
    expert_load,
    importance_loss,
    importance_loss_vjp,
    load_balance_loss,
    load_balance_loss_vjp,
    softmax,
    top_k,
    top_k_indices,
    z_loss,
    z_loss_vjp,
)


def logits(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def picked(values, indices):
    """Softmax of the entries at indices, zero elsewhere."""
    made = np.zeros_like(values)
    here = np.take_along_axis(values, indices, -1)
    np.put_along_axis(made, indices, softmax(here), -1)
    return made


@pytest.mark.parametrize("normalization", ["layer", "batch", None])
@pytest.mark.parametrize("k", [2, 9])
def test_choice_picks_and_does_not_weigh(normalization, k):
    x, gate = logits(6, 5, 12), Gate("top_k", k=k, normalization=normalization)
    uncut = activate(gate.uncut, x, training=True).coefficients
    normalized = np.log(uncut)
    for choice in (logits(12, seed=1), 3 * logits(6, 5, 12, seed=2)):
        made = activate(gate, x, training=True, choice=choice).coefficients
        best = np.argsort(-(normalized + choice), axis=-1)[..., :k]
        np.testing.assert_allclose(made, picked(normalized, best), atol=1e-12)
        assert not np.array_equal(made, activate(gate, x, training=True).coefficients)
        # the choice stays as it is while logits move a little
        direction, cotangent = 1e-6 * logits(6, 5, 12, seed=3), logits(6, 5, 12, seed=4)
        up, down = (
            activate(gate, x + sign * direction, training=True, choice=choice).coefficients
            for sign in (1, -1)
        )
        gradient = activate_vjp(gate, x, made, cotangent, training=True)
        np.testing.assert_allclose(
            np.sum(gradient * direction), np.sum((up - down) * cotangent) / 2, rtol=1e-4
        )


def test_choice_does_not_bring_back_masked_experts():
    gate, mask = Gate("top_k", k=1), np.array([True, False, True])
    made = activate(gate, np.zeros((1, 3)), mask=mask, choice=np.array([0.0, 9.0, 1.0]))
    np.testing.assert_array_equal(made.coefficients, [[0, 0, 1]])


def test_choice_in_blocks_of_rows():
    """As many rows as NumPy splits, with a choice for each."""
    x = logits(4096, 64)
    choice = logits(*x.shape, seed=1)
    gate = Gate("top_k", k=2, normalization=None)
    made = activate(gate, x, choice=choice).coefficients
    best = np.argsort(-(x + choice), axis=-1)[:, :2]
    np.testing.assert_allclose(made, picked(x, best), atol=1e-12)


def test_choices_that_cannot_be():
    x = logits(5, 3)
    with pytest.raises(GateError, match="choice belongs to top_k"):
        activate(Gate(), x, choice=np.zeros(3))
    with pytest.raises(GateError, match=r"shape \(3,\), or the logits' shape \(5, 3\); got \(4,\)"):
        activate(Gate("top_k", k=2), x, choice=np.zeros(4))


def test_bias_moves_towards_equal_load():
    made = np.array([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.9, 0.1, 0, 0], [0, 0.5, 0.5, 0]])
    bias = np.array([1.0, 2.0, 3.0, 4.0])
    want = [0.75, 1.75, 3.25, 4.25]  # loads are 3, 3, 1 and 0 of a mean of 1.75
    np.testing.assert_array_equal(balanced_bias(bias, made, 0.25), want)
    indexed = TopK(np.array([[0, 3], [0, 1], [0, 1], [1, 2]]), np.array([[1, 0]] + 3 * [[0.5] * 2]))
    np.testing.assert_array_equal(balanced_bias(bias, indexed, 0.25), want)
    np.testing.assert_array_equal(balanced_bias(bias, made[:0], 0.25), bias)
    assert balanced_bias(bias.astype("float32"), made).dtype == np.float32
    # others have as many tokens of the last expert as the first has here
    np.testing.assert_array_equal(
        balanced_bias(bias, made, 0.25, across=lambda load: load + np.array([0, 0, 0, 3])),
        [0.75, 1.75, 3.25, 3.75],
    )
    for speed in (0, -1, True, float("inf"), float("nan")):
        with pytest.raises(GateError, match="speed must be"):
            balanced_bias(bias, made, speed)
    with pytest.raises(GateError, match="must have 3 experts; got 4"):
        balanced_bias(bias[:3], made)
    with pytest.raises(GateError, match="one entry per expert"):
        balanced_bias(bias[None], made)


def test_biases_balance_a_skewed_router():
    x = logits(512, 8) + np.linspace(0, 4, 8)
    gate, bias = Gate("top_k", k=2, normalization=None), np.zeros(8)

    def load():
        return np.sum(activate(gate, x, choice=bias).coefficients > 0, axis=0)

    assert load().min() == 0
    for _ in range(400):
        bias = balanced_bias(bias, activate(gate, x, choice=bias).coefficients, 0.02)
    np.testing.assert_allclose(load(), 128, atol=12)


def test_balance_of_probabilities_and_choices():
    x = logits(4, 5, 6)
    probabilities, chosen = softmax(x), top_k(x, 2)
    share = np.mean(chosen.reshape(-1, 6) > 0, axis=0)  # sums to k
    want = 6 * np.sum(share / 2 * probabilities.reshape(-1, 6).mean(0))
    for given in (chosen, top_k_indices(x, 2)):
        assert float(load_balance_loss(probabilities, given)) == pytest.approx(want, rel=1e-14)
        got = load_balance_loss_vjp(probabilities, 2.0, chosen=given)
        np.testing.assert_allclose(got, np.broadcast_to(2 * 6 / 20 * share / 2, x.shape))
    # for one expert per token, it is what coefficients alone give
    assert float(load_balance_loss(probabilities, top_k(x, 1))) == pytest.approx(
        float(load_balance_loss(probabilities)), rel=1e-14
    )
    # uniform probabilities over equal choices of any k
    ring = np.eye(6) + np.roll(np.eye(6), 1, 0)
    assert float(load_balance_loss(np.full((6, 6), 1 / 6), ring / 2)) == pytest.approx(1.0)
    with pytest.raises(GateError, match="chosen must be of the same tokens, 20; got 15"):
        load_balance_loss(probabilities, chosen[:3])
    with pytest.raises(GateError, match="chosen must have 6 experts; got 5"):
        load_balance_loss(probabilities, chosen[..., :5])


def test_importance():
    a = top_k(logits(4, 5, 6), 2)
    importance = a.reshape(-1, 6).sum(0)
    want = np.var(importance) / np.mean(importance) ** 2
    assert float(importance_loss(a)) == pytest.approx(want, rel=1e-13)
    assert float(importance_loss(np.eye(6))) == 0.0
    assert float(importance_loss(np.eye(6)[[2, 2]])) == pytest.approx(5.0)


def test_z_loss():
    x = logits(4, 5, 6)
    want = np.mean(np.log(np.exp(x).sum(-1)) ** 2)
    assert float(z_loss(x)) == pytest.approx(want, rel=1e-14)
    # far from where exponentials are finite, and with experts that are not there
    assert float(z_loss(x + 1000)) == pytest.approx(1e6, rel=1e-2)
    np.testing.assert_allclose(
        z_loss(np.concatenate([x, np.full_like(x, -np.inf)], axis=-1)), z_loss(x)
    )
    assert np.all(np.isfinite(z_loss_vjp(np.array([[0.0, -np.inf]]))))


LOSSES = [
    (load_balance_loss, load_balance_loss_vjp),
    (importance_loss, importance_loss_vjp),
    (entropy_loss, entropy_loss_vjp),
]


@pytest.mark.parametrize(("loss", "vjp"), LOSSES)
def test_indexed_coefficients_are_the_dense_ones(loss, vjp):
    x = logits(4, 5, 6)
    dense, indexed = top_k(x, 2), top_k_indices(x, 2)
    options = {} if loss is entropy_loss else {"experts": 6}
    assert float(loss(indexed, **options)) == pytest.approx(float(loss(dense)), rel=1e-14)
    want = np.take_along_axis(vjp(dense, 2.0), indexed.indices, -1)
    np.testing.assert_allclose(vjp(indexed, 2.0, **options), want, rtol=1e-13)
    np.testing.assert_allclose(entropy(indexed), entropy(dense))
    np.testing.assert_array_equal(expert_load(indexed, experts=6), expert_load(dense))
    for bad in ({}, {"experts": 0}, {"experts": True}) if options else ():
        with pytest.raises(GateError, match="number of experts must be known for a TopK"):
            loss(indexed, **bad)


@pytest.mark.parametrize(("loss", "vjp"), [*LOSSES, (z_loss, z_loss_vjp)])
def test_losses_sum_over_levels(loss, vjp):
    levels = [softmax(logits(5, 4)), softmax(logits(5, 3))]
    assert float(loss(levels)) == pytest.approx(sum(float(loss(each)) for each in levels))
    got = vjp(tuple(levels), 2.0)
    assert isinstance(got, tuple)
    for made, each in zip(got, levels, strict=True):
        np.testing.assert_array_equal(made, vjp(each, 2.0))
    with pytest.raises(GateError, match="at least one level"):
        loss([])


def test_levels_have_choices_and_numbers_of_experts_of_their_own():
    x = [logits(5, 4), logits(5, 3)]
    chosen, probabilities = [top_k_indices(each, 2) for each in x], [softmax(each) for each in x]
    want = sum(float(load_balance_loss(*pair)) for pair in zip(probabilities, chosen, strict=True))
    assert float(load_balance_loss(probabilities, chosen)) == pytest.approx(want)
    dense = [top_k(each, 2) for each in x]
    assert float(importance_loss(chosen, experts=(4, 3))) == pytest.approx(
        float(importance_loss(dense))
    )
    with pytest.raises(GateError, match="one entry per level, 2; got 1"):
        load_balance_loss(probabilities, chosen[:1])
