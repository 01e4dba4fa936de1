"""A NaN among a token's logits reaches its coefficients and gradients; others are untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tensormoe import Gate, entmax
from tensormoe.gates import (
    Statistics,
    activate,
    activate_vjp,
    entropy,
    entropy_loss_vjp,
    top_k,
    top_k_indices,
)
from tensormoe_torch._adapter import BACKEND, EAGER

ALPHAS = [1.0, 1.2, 1.5, 1.9, 2.0, 2.5, 4.0]
GATES = [
    *(
        Gate(name, normalization=norm)
        for name in ("sparsemax", "entmax")
        for norm in (None, "batch")
    ),
    *(Gate(alpha=alpha) for alpha in (1.0, 1.5, 2.0, 4.0)),
    *(Gate("top_k", k=2, normalization=norm) for norm in (None, "layer", "batch")),
    Gate("top_k", k=9),
]
EXPERTS = 12
# the sum of coefficients is one whatever the logits: weights that tell them apart
WEIGHTS = np.linspace(-1.0, 2.0, EXPERTS).astype("f4")


def logits() -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((9, EXPERTS)).astype("f4")
    x[1, 3] = x[4, :] = x[6, 0] = x[7, 2] = np.nan
    x[2, 5] = x[6, 1] = np.inf
    x[3, 5:] = x[7, 5:] = -np.inf
    return x


BAD = [1, 4, 6, 7]
Function = Callable[[Any], Any]


def on_torch(function: Function, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tensor = torch.from_numpy(x).requires_grad_()
    value = function(tensor)
    (value * torch.from_numpy(WEIGHTS)).sum().backward()
    assert tensor.grad is not None
    return value.detach().numpy(), tensor.grad.numpy()


def on_torch_func(function: Function, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    def loss(tensor: torch.Tensor) -> Any:
        value = function(tensor)
        return (value * torch.from_numpy(WEIGHTS)).sum(), value

    gradient, value = torch.func.grad(loss, has_aux=True)(torch.from_numpy(x))
    return value.numpy(), gradient.numpy()


def on_eager_torch(gate: Gate, x: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The closed form, as layers run it."""
    logits, given = torch.from_numpy(x), torch.from_numpy(WEIGHTS).expand(len(x), -1)
    value = activate(gate, logits, backend=EAGER, **options).coefficients
    back = activate_vjp(gate, logits, value, given, backend=EAGER, **options)
    return value.numpy(), back.numpy()


def on_jax(function: Function, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    def loss(array: jax.Array) -> Any:
        value = function(array)
        return (value * WEIGHTS).sum(), value

    (_, value), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(x))
    return np.asarray(value), np.asarray(gradient)


def on_jit(function: Function, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return on_jax(jax.jit(function), x)


def check(value: np.ndarray, gradient: np.ndarray, bad: list[int]) -> None:
    good = [row for row in range(len(value)) if row not in bad]
    assert np.isnan(value[bad]).all()
    # experts of logit -inf are out of reach of any gradient
    assert np.isnan(np.where(np.isinf(logits()), np.nan, gradient)[bad]).all()
    np.testing.assert_allclose(value[good].sum(axis=-1), 1.0, rtol=1e-5)
    assert np.isfinite(gradient[good]).all()


@pytest.mark.parametrize("run", [on_torch, on_torch_func, on_jit])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_every_alpha(run: Any, alpha: float) -> None:
    check(*run(lambda x: entmax(x, alpha), logits()), BAD)


@pytest.mark.parametrize("alpha", [2.0, 2.5])
def test_jax_without_jit(alpha: float) -> None:
    check(*on_jax(lambda x: entmax(x, alpha), logits()), BAD)


@pytest.mark.parametrize("run", [on_torch, on_jit])
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_masks_hide_what_they_hide(run: Any, alpha: float) -> None:
    mask = np.ones((9, EXPERTS), bool)
    mask[1, 3] = mask[5, 2] = mask[7, 4] = False
    wrap: Any = torch.from_numpy if run is on_torch else jnp.asarray
    value, gradient = run(lambda x: entmax(x, alpha, mask=wrap(mask)), logits())
    good = [0, 1, 2, 3, 5, 8]
    assert np.isnan(value[[4, 6, 7]]).all()
    assert np.isnan(gradient[[4, 6, 7]][:, 2]).all()
    np.testing.assert_allclose(value[good].sum(axis=-1), 1.0, rtol=1e-5)
    assert np.isfinite(gradient[good]).all()
    assert value[1, 3] == value[5, 2] == 0


@pytest.mark.parametrize("run", [on_torch, on_torch_func, on_jit])
@pytest.mark.parametrize(
    "gate", GATES, ids=lambda gate: f"{gate.activation} {gate.normalization} {gate.alpha} {gate.k}"
)
def test_every_gate(run: Any, gate: Gate) -> None:
    kept = [np.zeros(EXPERTS, "f4"), np.ones(EXPERTS, "f4")]
    wrap: Any = jnp.asarray if run is on_jit else torch.from_numpy
    statistics = Statistics(*map(wrap, kept)) if gate.normalization == "batch" else None
    check(*run(lambda x: activate(gate, x, statistics=statistics).coefficients, logits()), BAD)
    if run is on_torch:
        check(*on_eager_torch(gate, logits(), statistics=statistics), BAD)


@pytest.mark.parametrize("run", [on_torch, on_jit])
def test_batch_norm_spreads_it_over_the_batch(run: Any) -> None:
    gate = Gate("sparsemax", normalization="batch")
    x = np.random.default_rng(0).standard_normal((9, EXPERTS)).astype("f4")
    x[3, 3] = np.nan
    value, gradient = run(lambda x: activate(gate, x, training=True).coefficients, x)
    assert np.isnan(value).all()
    assert np.isnan(gradient).all()
    value, gradient = on_eager_torch(gate, x, training=True)
    assert np.isnan(value).all()
    assert np.isnan(gradient).all()


@pytest.mark.parametrize("k", [2, 9])
@pytest.mark.parametrize("wrap", [torch.from_numpy, jnp.asarray])
def test_top_k(wrap: Any, k: int) -> None:
    x = logits()
    assert np.isnan(np.asarray(top_k(wrap(x), k))[BAD]).all()
    chosen = top_k_indices(wrap(x), k)
    assert np.isnan(np.asarray(chosen.values)[BAD]).all()
    others = np.delete(np.asarray(chosen.values), BAD, axis=0)
    np.testing.assert_allclose(others.sum(axis=-1), 1.0, rtol=1e-5)


def test_compiled_by_pytorch() -> None:
    gate = Gate("sparsemax", normalization=None)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: torch.Tensor) -> Any:
        return activate(gate, x, backend=BACKEND).coefficients

    check(*on_torch(compiled, logits()), BAD)


@pytest.mark.parametrize("wrap", [torch.from_numpy, jnp.asarray])
def test_entropy(wrap: Any) -> None:
    shares = np.full((2, 4), 0.25, "f4")
    shares[1] = np.nan
    assert np.isnan(np.asarray(entropy(wrap(shares)))).tolist() == [False, True]
    found = np.isnan(np.asarray(entropy_loss_vjp(wrap(shares)))).all(axis=-1)
    assert found.tolist() == [False, True]
