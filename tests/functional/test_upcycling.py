"""Factors with which all experts equal one linear layer: the oracle is NumPy's own SVD."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Factorization,
    Hadamard,
    LayerSpec,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
    get_backend,
)
from tensormoe.errors import ShapeError, SpecError
from tensormoe.functional import LayerConfig, apply_experts, expert_weight, materialize
from tensormoe.functional._fit import Fit
from tensormoe.functional._upcycling import _split, upcycle
from tensormoe_numpy import BACKEND

IN, OUT = 7, 6
LEVELS = [(5,), (4, 3), (3, 2, 2)]


def cases(levels: int) -> list[tuple[Factorization, int]]:
    """Factorizations, and the highest rank that all of their experts can have at once."""
    outer = (2,) * levels
    rising, falling = range(3, 3 + levels), range(5, 5 - levels, -1)
    return [
        (CP(3), 3),
        (CP(20), 20),
        (TensorRing(2), 4),
        (TensorRing((3, *outer, 2)), 4),
        (TensorRing((2, *rising, 2)), 4),
        (TensorRing((6, *falling, 1)), 6 - levels),
        (TensorRing((1, *outer, 3)), 3),
        (TensorRing((4, *(5,) * levels, 4)), 16),
        (TensorTrain((*outer, 4)), 4),
        (TensorTrain((*rising, 2)), 2),
        (TensorTrain(9), 9),
        (Tucker((*outer, 3, 4)), 3),
        (Tucker((*rising, 5, 2)), 2),
        (Tucker(9), 9),
        (SharedBasis((2, 4)), 4),
        (SharedBasis((7, 3)), 3),
        (SharedBasis(9), 9),
        (BaseDelta(1), 99),
        (BaseDelta(9), 99),
        (SharedDelta(3), 99),
        (Hadamard(), 99),
        (Dense(), 99),
    ]


ALL = [
    pytest.param(experts, factorization, rank, id=f"{factorization}-{len(experts)}")
    for experts in LEVELS
    for factorization, rank in cases(len(experts))
]


def config_of(experts: Any, factorization: Factorization, bias: bool) -> LayerConfig:
    return LayerConfig(LayerSpec(IN, OUT, experts, factorization, bias), None)


def numpy_svd(table: np.ndarray) -> Any:
    return np.linalg.svd(table, full_matrices=False)


def made(
    config: LayerConfig,
    weight: np.ndarray,
    bias: np.ndarray | None,
    rng: np.random.Generator,
    noise: float = 0.0,
) -> tuple[dict[str, np.ndarray], float]:
    arrays, error, norm = upcycle(
        config, weight, bias, BACKEND, numpy_svd, rng.standard_normal, noise
    )
    table = weight if bias is None else np.vstack([weight, bias])
    assert norm == pytest.approx(np.linalg.norm(table.astype("float64")), rel=1e-5)
    assert {name: array.shape for name, array in arrays.items()} == config.parameter_shapes()
    assert {array.dtype for array in arrays.values()} == {weight.dtype}
    return arrays, error


def tables(config: LayerConfig, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """(experts, in + 1, out): every expert's weight with its bias below."""
    weight, bias = materialize(config, arrays, BACKEND)
    if bias is not None:
        weight = np.concatenate([weight, bias[..., None, :]], axis=-2)
    return weight.reshape(-1, *weight.shape[-2:])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("experts", "factorization", "rank"), ALL)
def test_every_expert_is_the_truncated_svd(
    experts: Any, factorization: Factorization, rank: int, bias: bool, rng: np.random.Generator
) -> None:
    weight, row = rng.standard_normal((IN, OUT)), rng.standard_normal(OUT)
    table = np.vstack([weight, row]) if bias else weight
    left, values, right = np.linalg.svd(table)
    wanted = (left[:, :OUT] * np.where(np.arange(OUT) < rank, values, 0.0)) @ right
    config = config_of(experts, factorization, bias)
    arrays, error = made(config, weight, row if bias else None, rng)
    np.testing.assert_allclose(
        tables(config, arrays),
        np.broadcast_to(wanted, (np.prod(experts), *table.shape)),
        atol=1e-12,
    )
    missing = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
    assert error == pytest.approx(missing, abs=1e-13)
    assert (error < 1e-12) == (rank >= OUT)
    # what the core calls the rank of one expert is what all of them get at once
    assert config.spec.expert_rank == min(rank, IN, OUT)


@pytest.mark.parametrize(("experts", "factorization", "rank"), ALL)
def test_noise_leaves_the_mean_of_all_experts(
    experts: Any, factorization: Factorization, rank: int, rng: np.random.Generator
) -> None:
    weight, row = rng.standard_normal((IN, OUT)), rng.standard_normal(OUT)
    config = config_of(experts, factorization, True)
    common = tables(config, made(config, weight, row, rng)[0])[0]
    squares = []
    for _ in range(25):
        arrays, _ = made(config, weight, row, rng, noise=0.3)
        found = tables(config, arrays)
        np.testing.assert_allclose(found.mean(axis=0), common, atol=1e-12)
        squares.append(np.mean(np.sum((found - common) ** 2, axis=(1, 2))))
    size = np.sqrt(np.mean(squares)) / np.linalg.norm(common)
    assert 0.75 * 0.3 < size < 1.25 * 0.3
    # experts differ in more than their size
    assert np.linalg.matrix_rank(found.reshape(len(found), -1)) > 1


@pytest.mark.parametrize(("experts", "factorization", "rank"), ALL)
def test_no_bond_is_dead(experts: Any, factorization: Factorization, rank: int, seed: int) -> None:
    """For every index of every bond, some factor gets a gradient from the start."""
    rng = np.random.default_rng(seed)
    config = config_of(experts, factorization, True)
    weight, row = rng.standard_normal((IN, OUT)), rng.standard_normal(OUT)
    arrays, _ = made(config, weight, row, rng, noise=0.1)
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in arrays.items()}
    coefficients = [torch.tensor(rng.dirichlet(np.ones(n), 9)) for n in config.spec.experts]
    x = torch.tensor(rng.standard_normal((9, IN)))
    result = apply_experts(config, tensors, x, [*coefficients], get_backend("torch"))
    (result * torch.tensor(rng.standard_normal((9, OUT)))).sum().backward()
    alive: dict[tuple[str, int], bool] = {}
    for factor in config.spec.network.factors:
        gradient = tensors[f"factors.{factor.name}"].grad
        assert gradient is not None
        for axis, leg in enumerate(factor.legs):
            for index in range(gradient.shape[axis]):
                key = (leg, index)
                some = bool((gradient.select(axis, index).abs() > 1e-12).any())
                alive[key] = alive.get(key, False) or some
    assert all(alive.values()), [key for key, value in alive.items() if not value]


def test_zero_weights_still_get_gradients(rng: np.random.Generator) -> None:
    """A layer that starts at zero, as last layers of residual branches do, can leave it."""
    arrays, error = made(config_of(4, CP(3), True), np.zeros((IN, OUT)), None, rng, noise=0.1)
    assert error == 0
    assert not arrays["factors.input"].any()
    assert np.linalg.matrix_rank(arrays["factors.output"]) == 3


@pytest.mark.parametrize("size", [1e-30, 1e18])
def test_errors_of_tiny_and_huge_weights(size: float, rng: np.random.Generator) -> None:
    weight = (size * rng.standard_normal((IN, OUT))).astype("float32")
    values = np.linalg.svd(weight.astype("float64"), compute_uv=False)
    _, error = made(config_of(4, CP(3), False), weight, None, rng)
    assert error == pytest.approx(np.linalg.norm(values[3:]) / np.linalg.norm(values), rel=1e-4)


def test_splitting_keeps_rank_deficient_matrices(rng: np.random.Generator) -> None:
    table = rng.standard_normal((IN, 2)) @ rng.standard_normal((2, OUT))
    left, right = _split(numpy_svd(table), 5, BACKEND)
    np.testing.assert_allclose(left @ right, table, atol=1e-13)
    # both sides share the strength, and none is lost to nothing
    np.testing.assert_allclose(
        np.linalg.norm(left[:, :2], axis=0), np.linalg.norm(right[:2], axis=1), rtol=1e-12
    )
    assert (np.linalg.norm(right, axis=1) > 0.1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_stays_torch(dtype: torch.dtype) -> None:
    config = config_of((4, 3), TensorRing((2, 3, 2, 4)), True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(IN, OUT, generator=generator).to(dtype)
    bias = torch.randn(OUT, generator=generator).to(dtype)
    backend = get_backend("torch")
    arrays, error, _ = upcycle(
        config,
        weight,
        bias,
        backend,
        lambda t: torch.linalg.svd(t, full_matrices=False),
        torch.randn,
    )
    assert {array.dtype for array in arrays.values()} == {dtype}
    assert error < 32 * torch.finfo(dtype).eps
    wide = {name: array.to(torch.float64) for name, array in arrays.items()}
    found, row = expert_weight(config, wide, (3, 1), backend)
    assert row is not None
    tolerance = {"rtol": 0.0, "atol": 64 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found, weight.to(torch.float64), **tolerance)
    torch.testing.assert_close(row, bias.to(torch.float64), **tolerance)


def test_bad_input(rng: np.random.Generator) -> None:
    config = config_of(4, CP(3), True)
    weight = rng.standard_normal((IN, OUT))
    with pytest.raises(ShapeError, match=r"weight must have .* \(7, 6\); got \(6, 7\)"):
        made(config, weight.T, None, rng)
    with pytest.raises(ShapeError, match=r"bias must have shape \(6,\); got shape \(7,\)"):
        upcycle(config, weight, np.ones(7), BACKEND, numpy_svd, rng.standard_normal)
    with pytest.raises(ShapeError, match="bias must be None for a layer without bias"):
        made(config_of(4, CP(3), False), weight, np.ones(6), rng)
    for noise in (-0.1, float("nan"), float("inf"), True, "0.1", None):
        with pytest.raises(SpecError, match="noise must be a finite number of at least 0"):
            made(config, weight, None, rng, noise)  # type: ignore[arg-type]


def test_a_factorization_may_not_know_how() -> None:
    class Other(CP):
        name = "other"
        upcycled_factors = Factorization.upcycled_factors

    with pytest.raises(SpecError, match="other does not say which factors make all experts equal"):
        upcycle(
            config_of(4, Other(3), False), np.ones((IN, OUT)), None, BACKEND, numpy_svd, np.ones
        )


def test_fits_of_a_block_together() -> None:
    parts = Fit(0.3, 4.0, 10, 12, 5, 3), Fit(0.4, 3.0, 20, 21, 4, 8, 0.1)
    both = Fit.of_block(*parts)
    assert both.error == pytest.approx(np.hypot(0.3 * 4, 0.4 * 3) / 5)
    assert (both.parameters_before, both.parameters_after) == (30, 33)
    assert (both.expert_rank, both.expert_span, both.noise, both.parts) == (4, 3, 0.1, parts)
    assert str(both).count("\n") == 2
    assert Fit.of_block(Fit(0.0, 0.0, 1, 1, 1, 1)).error == 0
