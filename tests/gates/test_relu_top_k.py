"""Positive logits as coefficients: what is kept, ties, masks, bad values, on every library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tensormoe_torch
from tensormoe import CP, Gate, LayerSpec
from tensormoe.errors import GateError
from tensormoe.functional import LayerConfig, initial_span
from tensormoe.gates import Statistics, activate, activate_vjp, relu_top_k, workspace
from tensormoe_jax import initialize
from tensormoe_numpy import BACKEND as NUMPY
from tensormoe_numpy import MuMoE
from tensormoe_torch._adapter import BACKEND, EAGER
from tests.gates.test_activate import peak


def on_numpy(x: np.ndarray, gate: Gate, **options: Any) -> np.ndarray:
    found: np.ndarray = activate(gate, x, **options).coefficients
    return found


def on_eager_torch(x: np.ndarray, gate: Gate, **options: Any) -> np.ndarray:
    return _torch(x, gate, EAGER, **options)


def on_torch(x: np.ndarray, gate: Gate, **options: Any) -> np.ndarray:
    return _torch(x, gate, BACKEND, **options)


def on_jax(x: np.ndarray, gate: Gate, **options: Any) -> np.ndarray:
    given = {name: jnp.asarray(array) for name, array in options.items()}
    return np.asarray(activate(gate, jnp.asarray(x), **given).coefficients)


def _torch(x: np.ndarray, gate: Gate, backend: Any, **options: Any) -> np.ndarray:
    given = {name: torch.from_numpy(array) for name, array in options.items()}
    made = activate(gate, torch.from_numpy(x), backend=backend, **given).coefficients
    found: np.ndarray = made.numpy()
    return found


RUNS = pytest.mark.parametrize("run", [on_numpy, on_eager_torch, on_torch, on_jax])
PROPAGATES = pytest.mark.parametrize("run", [on_eager_torch, on_torch, on_jax])
Run = Callable[..., np.ndarray]


def reference(x: np.ndarray, k: int) -> np.ndarray:
    """Row by row in Python's own sort, which is stable."""
    found = np.zeros_like(x)
    for row, values in enumerate(x.tolist()):
        for place in sorted(range(len(values)), key=lambda n: -values[n])[:k]:
            found[row, place] = max(values[place], 0.0)
    return found


@RUNS
@pytest.mark.parametrize("k", [1, 3, 9, 20])
@pytest.mark.parametrize("ties", [False, True])
def test_the_k_largest_above_zero_as_they_are(run: Run, k: int, ties: bool) -> None:
    x = np.random.default_rng(0).standard_normal((40, 20)).astype("f4")
    x[3] = -np.abs(x[3])  # nothing positive
    x[4, 2:] = -np.abs(x[4, 2:])  # at most two
    if ties:
        x = np.round(x)
    got = run(x, Gate("relu_top_k", k=k))
    np.testing.assert_array_equal(got, reference(x, k))
    assert not got[3].any()
    assert np.abs(got.sum(axis=-1) - 1.0).max() > 0.5


def test_the_function_is_the_gate_along_any_axis() -> None:
    x = np.random.default_rng(0).standard_normal((3, 7, 4))
    got = relu_top_k(x, 2, axis=1)
    want = activate(Gate("relu_top_k", k=2), np.moveaxis(x, 1, -1)).coefficients
    np.testing.assert_array_equal(np.moveaxis(got, 1, -1), want)
    assert relu_top_k(np.zeros((0, 4), "f4"), 2).shape == (0, 4)
    assert relu_top_k(np.zeros((1, 4), "f2"), 2).dtype == np.float32
    with pytest.raises(GateError, match="at most the number of experts, 4; got 5"):
        relu_top_k(np.zeros((1, 4)), 5)


@RUNS
@pytest.mark.parametrize("normalization", [None, "layer", "batch"])
def test_masked_experts_are_as_if_they_were_absent(run: Run, normalization: str | None) -> None:
    rng = np.random.default_rng(1)
    x, mask = rng.standard_normal((30, 12)).astype("f4"), rng.random((30, 12)) < 0.6
    mask[:, 0] = True
    gate = Gate("relu_top_k", k=3, normalization=normalization)
    kept = Statistics(rng.standard_normal(12).astype("f4"), np.full(12, 2.0, "f4"))
    for filled, options in (
        (np.where(mask, x, np.float32(1e4)), {"mask": mask}),
        (np.where(mask, x, np.float32(-np.inf)), {}),
    ):
        if normalization == "batch":
            if run is not on_numpy:
                pytest.skip("statistics are arrays of each library; NumPy's are enough")
            options["statistics"] = kept
        got = run(filled, gate, **options)
        for row, use, have, full in zip(x, mask, got, range(30), strict=True):
            logits = row
            if normalization == "batch":
                logits = (row - kept.mean) / np.sqrt(kept.variance + 1e-5)
            elif normalization == "layer":
                logits = (row - row[use].mean()) / np.sqrt(row[use].var() + 1e-5)
            want = reference(np.where(use, logits, -1.0)[None, :], 3)[0]
            np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5, err_msg=str(full))


@PROPAGATES
@pytest.mark.parametrize("normalization", [None, "layer"])
def test_nan_and_infinity_spoil_their_token_alone(run: Run, normalization: str | None) -> None:
    x = np.random.default_rng(0).standard_normal((5, 12)).astype("f4")
    clean = run(x, Gate("relu_top_k", k=2, normalization=normalization))
    x[1, 3], x[2, 5] = np.nan, np.inf
    x[4, :] = -np.inf
    got = run(x, Gate("relu_top_k", k=2, normalization=normalization))
    assert np.isnan(got[[1, 2]]).all()
    np.testing.assert_array_equal(got[[0, 3]], clean[[0, 3]])
    np.testing.assert_array_equal(got[4], 0.0)


@pytest.mark.parametrize("normalization", [None, "layer"])
def test_gradients_of_spoiled_tokens_are_nan(normalization: str | None) -> None:
    gate = Gate("relu_top_k", k=2, normalization=normalization)
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    x[1, 3], x[2, 5], x[3, 1] = float("nan"), float("inf"), -float("inf")
    given = torch.linspace(-1.0, 2.0, 9).expand(4, 9)
    leaf = x.clone().requires_grad_()
    (activate(gate, leaf, backend=BACKEND).coefficients * given).sum().backward()
    made = activate(gate, x, backend=EAGER).coefficients
    closed = activate_vjp(gate, x, made, given, backend=EAGER)
    for gradient in (leaf.grad, closed):
        assert gradient is not None
        assert gradient[1].isnan().all()
        assert gradient[2, :5].isnan().all()
        assert gradient[[0, 3]].isfinite().all()
        assert gradient[3, 1] == 0


def test_numpy_refuses_what_has_no_coefficients() -> None:
    gate = Gate("relu_top_k", k=1)
    x = np.zeros((3, 4))
    x[2, 1] = np.inf
    with pytest.raises(GateError, match="must be finite or -inf; got inf in row 2"):
        activate(gate, x)
    x[2, 1] = np.nan
    with pytest.raises(GateError, match="must not be NaN; got NaN in row 2, expert 1"):
        activate(gate, x)
    with pytest.raises(GateError, match="at least one expert; got none in row 0"):
        activate(gate, np.full((1, 4), -np.inf))


@pytest.mark.parametrize("normalization", [None, "layer"])
@pytest.mark.parametrize("shape", [(256, 512), (1024, 1024), (300, 8192)])
def test_the_workspace_of_the_gradient(normalization: str | None, shape: tuple[int, int]) -> None:
    gate = Gate("relu_top_k", k=12, normalization=normalization)
    x = np.random.default_rng(0).standard_normal(shape).astype("f4")
    made = activate(gate, x).coefficients
    found = peak(lambda: activate_vjp(gate, x, made, x))
    want = workspace(gate, *shape, 4, NUMPY.row_block_bytes, backward=True)
    assert found == pytest.approx(want, rel=0.05)


def test_normalization_is_none_unless_given() -> None:
    assert Gate("relu_top_k", k=2).normalization is None
    assert Gate("relu_top_k", k=2, normalization="layer").normalization == "layer"
    assert Gate().normalization == "layer"
    assert not Gate("relu_top_k", k=2).sums_to_one
    assert all(Gate(name).sums_to_one for name in ("entmax", "sparsemax", "softmax"))


def test_gates_start_where_they_learn() -> None:
    """A projection of zeros would give no coefficients and no gradients, for ever."""
    config = LayerConfig(LayerSpec(64, 3, 50, CP(2)), Gate("relu_top_k", k=5, bias=True))
    assert initial_span(config, "gate.projection_0") == 0.125
    layer = MuMoE(64, 3, 50, CP(2), gate=config.gate, seed=0)
    drawn = [layer.parameters, initialize(config, jax.random.key(0))]
    other = tensormoe_torch.MuMoE.of(config)
    drawn.append({name: array.detach() for name, array in other.named_parameters()})
    for arrays in drawn:
        for name in ("gate.projection_0", "gate.bias_0"):
            values = np.asarray(arrays[name])
            assert 0.9 * 0.125 < np.abs(values).max() <= 0.125
            assert abs(values.mean()) < 0.05
    (made,) = other.coefficients(torch.randn(8, 64))
    assert ((made > 0).sum(-1) == 5).all()


@pytest.mark.parametrize("normalization", [None, "layer", "batch"])
@pytest.mark.parametrize("k", [3, 9])
def test_gradients_are_those_of_every_library(normalization: str | None, k: int) -> None:
    gate = Gate("relu_top_k", k=k, normalization=normalization)
    rng = np.random.default_rng(3)
    x, given = rng.standard_normal((2, 7, 12)).astype("f4")
    x[2, 4] = -np.inf
    options: Any = {"training": normalization == "batch"}
    made = activate(gate, x.astype("f8"), **options).coefficients
    want = activate_vjp(gate, x.astype("f8"), made, given.astype("f8"), **options)

    def loss(array: Any) -> Any:
        return (activate(gate, array, **options).coefficients * given).sum()

    leaf, logits = torch.from_numpy(x).requires_grad_(), torch.from_numpy(x)
    weights = torch.from_numpy(given)
    (activate(gate, leaf, backend=BACKEND, **options).coefficients * weights).sum().backward()
    assert leaf.grad is not None
    eager = activate(gate, logits, backend=EAGER, **options).coefficients
    closed = activate_vjp(gate, logits, eager, weights, backend=EAGER, **options)
    found = [leaf.grad, closed, jax.jit(jax.grad(loss))(jnp.asarray(x))]
    for gradient in found:
        np.testing.assert_allclose(np.asarray(gradient), want, atol=2e-5)
