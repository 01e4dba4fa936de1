"""Gates: normalization, activation and their derivative by finite differences."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tensormoe.errors import GateError
from tensormoe.gates import (
    Gate,
    Statistics,
    activate,
    activate_vjp,
    entmax,
    top_k,
    top_k_indices,
    top_k_indices_vjp,
    workspace,
)
from tensormoe_numpy import BACKEND

PAPER = Gate.paper()


def layer_norm(x, gate=PAPER):
    centred = x - x.mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + gate.eps)
    return gate.spread_of(x.shape[-1]) * unit


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("gate", [Gate(), PAPER], ids=["default", "paper"])
def test_layer_norm_then_entmax(gate, dtype, scale):
    x = (np.random.default_rng(0).standard_normal((2, 300, 257)) * scale + scale).astype(dtype)
    want = entmax(layer_norm(x.astype(np.float64), gate))
    tolerance = 2e-6 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(activate(gate, x).coefficients, want, atol=tolerance)


def test_layer_norm_of_masked_experts_is_as_if_they_were_absent():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 30))
    mask = rng.random((5, 30)) < 0.5
    x[~mask] = 1e20
    for filled, given_mask in ((x, mask), (np.where(mask, x, -np.inf), None)):
        got = activate(PAPER, filled, mask=given_mask).coefficients
        assert np.all(got[~mask] == 0)
        for row, use, have in zip(x, mask, got, strict=True):
            want = activate(PAPER, row[use]).coefficients
            np.testing.assert_allclose(have[use], want, atol=1e-13)


def test_constant_rows_and_infinite_logits_under_layer_norm():
    x = np.array([[3.0, 3.0, 3.0, 3.0], [np.inf, 1.0, 2.0, np.inf]])
    got = activate(Gate(), x).coefficients
    np.testing.assert_allclose(got, [[0.25] * 4, [0.5, 0, 0, 0.5]], atol=1e-15)


def test_a_skewed_row_is_found_from_a_start_right_of_its_root():
    """Far from normal logits: where the usual threshold is a bad guess, Newton recovers."""
    for experts in (16, 1024, 5000):
        x = np.zeros((4, experts))
        x[0, 0] = 1.0
        x[1, ::2] = 1.0
        x[2] = np.geomspace(1e-9, 1, experts)
        x[3] = -np.geomspace(1e-9, 1, experts)
        for gate in (Gate(), PAPER):
            want = entmax(layer_norm(x, gate))
            np.testing.assert_allclose(activate(gate, x).coefficients, want, atol=1e-12)


def test_an_overflowing_variance_is_an_error():
    x = np.zeros((2, 4), np.float32)
    x[1, 1] = -1e30
    with pytest.raises(GateError, match="variance"):
        activate(Gate(), x)


class TestBatchNorm:
    gate = Gate.paper("batch")

    def test_training_and_running_statistics(self):
        x = np.random.default_rng(0).standard_normal((3, 200, 9)) * 3 + 1
        flat = x.reshape(-1, 9)
        result = activate(self.gate, x, training=True)
        want = entmax((x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5))
        np.testing.assert_allclose(result.coefficients, want, atol=1e-12)
        np.testing.assert_allclose(result.statistics.mean, 0.1 * flat.mean(0))
        np.testing.assert_allclose(result.statistics.variance, 0.9 + 0.1 * flat.var(0, ddof=1))
        again = activate(self.gate, x, training=True, statistics=result.statistics).statistics
        np.testing.assert_allclose(again.mean, 0.19 * flat.mean(0))

    def test_of_the_default_gate(self):
        x = np.random.default_rng(0).standard_normal((200, 256)) * 3 + 1
        want = entmax((x - x.mean(0)) / np.sqrt(x.var(0) + 1.0) / 32**0.5)
        got = activate(Gate(normalization="batch"), x, training=True).coefficients
        np.testing.assert_allclose(got, want, atol=1e-12)

    def test_evaluation_uses_the_running_statistics(self):
        x = np.random.default_rng(0).standard_normal((1, 4))
        kept = Statistics(np.array([1.0, 2, 3, 4]), np.array([0.5, 1, 2, 4]))
        result = activate(self.gate, x, statistics=kept)
        want = entmax((x - kept.mean) / np.sqrt(kept.variance + 1e-5))
        np.testing.assert_allclose(result.coefficients, want, atol=1e-12)
        assert result.statistics is kept

    def test_masked_logits_do_not_count(self):
        rng = np.random.default_rng(0)
        x, mask = rng.standard_normal((50, 6)), rng.random((50, 6)) < 0.7
        mask[:, 0] = True
        mask[:, 5] = False
        noisy = np.where(mask, x, 99.0)
        result = activate(self.gate, noisy, mask=mask, training=True)
        for n in range(5):
            used = x[mask[:, n], n]
            np.testing.assert_allclose(result.statistics.mean[n], 0.1 * used.mean())
            np.testing.assert_allclose(result.statistics.variance[n], 0.9 + 0.1 * used.var(ddof=1))
        assert result.statistics.mean[5] == 0
        assert result.statistics.variance[5] == 1

    def test_bad_input(self):
        x = np.zeros((1, 3))
        with pytest.raises(GateError, match="at least 2 tokens; got 1"):
            activate(self.gate, x, training=True)
        with pytest.raises(GateError, match="needs running statistics"):
            activate(self.gate, x)
        with pytest.raises(GateError, match=r"statistics.variance .* \(3,\); got \(1,\)"):
            activate(self.gate, x, statistics=Statistics(np.zeros(3), np.ones(1)))


GATES = [
    *(Gate("entmax", a, n) for a in (1.0, 1.1, 1.5, 2.0, 3.0) for n in ("layer", "batch", None)),
    *(Gate(name, normalization=n) for name in ("sparsemax", "softmax") for n in ("layer", None)),
    *(Gate("top_k", k=k, normalization=n) for k in (2, 9) for n in ("layer", "batch", None)),
    *(Gate("relu_top_k", k=k, normalization=n) for k in (2, 12) for n in ("layer", "batch", None)),
]


@pytest.mark.parametrize("masked", ["no", "mask", "-inf"])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_the_vjp_is_the_finite_difference(gate, masked):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((6, 12)) * 0.7
    mask = None
    out = np.zeros(x.shape, bool)
    if masked != "no":
        out = rng.random(x.shape) < 0.2
        mask = ~out if masked == "mask" else None
        x = np.where(out, -np.inf if masked == "-inf" else 5.0, x)
    training = gate.normalization == "batch"
    cotangent = rng.standard_normal(x.shape)

    def loss(at):
        return np.sum(activate(gate, at, mask=mask, training=training).coefficients * cotangent)

    weights = activate(gate, x, mask=mask, training=training).coefficients
    got = activate_vjp(gate, x, weights, cotangent, mask=mask, training=training)
    step = 1e-6
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        want = 0.0 if out[place] else (loss(up) - loss(down)) / (2 * step)
        # the last support edge under α = 3 bends within the difference
        assert got[place] == pytest.approx(want, rel=1e-4, abs=2e-6)


def test_the_vjp_outside_training_and_in_blocks():
    rng = np.random.default_rng(0)
    gate = Gate(normalization="batch")
    kept = Statistics(rng.standard_normal(40), rng.random(40) + 0.5)
    x, g = rng.standard_normal((2, 3000, 40)), rng.standard_normal((2, 3000, 40))
    weights = activate(gate, x, statistics=kept).coefficients
    got = activate_vjp(gate, x, weights, g, statistics=kept)
    plain = Gate(normalization=None)
    scale = gate.spread_of(40) / np.sqrt(kept.variance + gate.eps)
    want = activate_vjp(plain, (x - kept.mean) * scale, weights, g) * scale
    np.testing.assert_allclose(got, want, atol=1e-13)
    one = activate_vjp(Gate(), x[1, 2999], activate(Gate(), x[1, 2999]).coefficients, g[1, 2999])
    all_weights = activate(Gate(), x).coefficients
    np.testing.assert_allclose(activate_vjp(Gate(), x, all_weights, g)[1, 2999], one, atol=1e-12)


def test_the_vjp_refuses_other_shapes():
    x = np.zeros((2, 3))
    with pytest.raises(GateError, match=r"cotangent must have the logits' shape \(2, 3\)"):
        activate_vjp(Gate(), x, x, np.zeros((3, 2)))


@pytest.mark.parametrize("activation", ["entmax", "sparsemax", "softmax", "top_k", "relu_top_k"])
@pytest.mark.parametrize("normalization", ["layer", None])
@pytest.mark.parametrize("shape", [(256, 512), (1024, 1024), (300, 8192)])
def test_the_workspace_is_predicted(activation, normalization, shape):
    gate = Gate(
        activation, normalization=normalization, k=3 if activation.endswith("top_k") else None
    )
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    activate(gate, x)
    found = peak(lambda: activate(gate, x))
    assert found == pytest.approx(workspace(gate, *shape, 4, BACKEND.row_block_bytes), rel=0.05)


def peak(call):
    """Bytes that a call allocates at its peak."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("k", [1, 3, 9, 20])
def test_top_k_dense_and_indexed_agree(k):
    x = np.round(np.random.default_rng(0).standard_normal((3, 50, 20)), 1)  # with ties
    dense = top_k(x, k)
    assert np.all(np.count_nonzero(dense, axis=-1) == k)
    order = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    chosen = top_k_indices(x, k)
    np.testing.assert_array_equal(chosen.indices, order)
    np.testing.assert_allclose(np.take_along_axis(dense, order, -1), chosen.values, atol=1e-15)
    picked = np.exp(np.take_along_axis(x, order, -1))
    np.testing.assert_allclose(chosen.values, picked / picked.sum(-1, keepdims=True))
    g = np.random.default_rng(1).standard_normal(x.shape)
    want = activate_vjp(Gate("top_k", k=k, normalization=None), x, dense, g)
    got = top_k_indices_vjp(chosen, np.take_along_axis(g, order, -1), 20)
    np.testing.assert_allclose(got, want, atol=1e-15)


@pytest.mark.parametrize("k", [3, 9])
def test_top_k_with_too_few_usable_experts(k):
    x = np.full((1, 12), -np.inf)
    x[0, :2] = 0.0
    np.testing.assert_array_equal(top_k(x, k)[0, :3], [0.5, 0.5, 0])
    chosen = top_k_indices(x, k)
    assert len(set(chosen.indices[0].tolist())) == k
    np.testing.assert_array_equal(chosen.values[0, :3], [0.5, 0.5, 0])
    mask = np.arange(12) < 2
    np.testing.assert_array_equal(top_k(np.zeros((1, 12)), k, mask=mask)[0, :3], [0.5, 0.5, 0])


def test_top_k_of_an_empty_batch_and_bad_k():
    x = np.zeros((0, 4), np.float32)
    assert top_k(x, 2).shape == (0, 4)
    assert top_k_indices(x, 2).values.shape == (0, 2)
    assert activate_vjp(Gate(), x, x, x).shape == (0, 4)
    for k in (0, -1, 1.0, True, None):
        with pytest.raises(GateError, match="k must be a positive integer"):
            top_k(x, k)
    with pytest.raises(GateError, match="at most the number of experts, 4; got 5"):
        top_k_indices(x, 5)
