"""Sums of networks, a base and deltas: decomposed in every library, weighted, within budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tensormoe import BaseDelta, Budget, LayerSpec, SharedBasis, SharedDelta
from tensormoe.decomposition import Search, _source, decompose
from tensormoe.testing import reconstruct_by_einsum
from tests._kinds import DELTAS
from tests.decomposition._cases import relative, weights_of

SIZES = {(5,): (12, 9), (3, 2): (9, 12), (2, 2, 2): (10, 10)}
"""Sizes (in, out) of weights with that many experts: both orders, and equal ones."""


def planted(
    kind: Any, levels: tuple[int, ...], rng: np.random.Generator, noise: float = 0.0
) -> tuple[np.ndarray, np.ndarray, float]:
    """Weights and biases of random factors with noise, and the noise's share of the weights."""
    spec = LayerSpec(*SIZES[levels], levels, kind, bias=True)
    factors = {name: rng.standard_normal(shape) for name, shape in spec.shapes.items()}
    whole = reconstruct_by_einsum(kind, factors)
    random = rng.standard_normal(whole.shape)
    random *= noise * np.linalg.norm(whole) / np.linalg.norm(random)
    whole = whole + random
    weights = whole[..., :-1, :]
    return weights, whole[..., -1, :], float(np.linalg.norm(random) / np.linalg.norm(weights))


@dataclass(frozen=True)
class Library:
    """A library and a dtype.

    Args:
        name: of the library.
        dtype: of its arrays.
        given: from NumPy.
        host: to NumPy, in float64.
    """

    name: str
    dtype: str
    given: Callable[[np.ndarray], Any]
    host: Callable[[Any], np.ndarray]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}"


def _numpy(dtype: str) -> Library:
    return Library("numpy", dtype, lambda a: a.astype(dtype), lambda a: a.astype("float64"))


def _torch(dtype: str) -> Library:
    return Library(
        "torch",
        dtype,
        lambda a: torch.tensor(a, dtype=getattr(torch, dtype)),
        lambda a: a.double().numpy(),
    )


def _jax(dtype: str) -> Library:
    return Library(
        "jax", dtype, lambda a: jnp.asarray(a, dtype), lambda a: np.asarray(a, "float64")
    )


LIBRARIES = [
    *(_numpy(dtype) for dtype in ("float32", "float64", "float16")),
    *(_torch(dtype) for dtype in ("float32", "bfloat16")),
]


@pytest.mark.parametrize("levels", SIZES, ids=str)
@pytest.mark.parametrize("kind", DELTAS, ids=str)
@pytest.mark.parametrize("library", LIBRARIES, ids=str)
def test_factors_stay_in_their_library_and_the_report_is_true(
    library: Library, kind: Any, levels: tuple[int, ...], rng: np.random.Generator
) -> None:
    _check_report(library, kind, levels, rng, Search())


@pytest.mark.parametrize("kind", DELTAS, ids=str)
def test_jax_too(kind: Any, rng: np.random.Generator) -> None:
    """With few sweeps: each operation is compiled for each shape."""
    _check_report(_jax("float32"), kind, (3, 2), rng, Search(starts=1, sweeps=6, polish=2))


def _check_report(
    library: Library, kind: Any, levels: tuple[int, ...], rng: np.random.Generator, search: Search
) -> None:
    weights, bias, level = planted(kind, levels, rng, noise=0.1)
    given, row = library.given(weights), library.given(bias)
    found = decompose(given, kind, bias=row, search=search)
    spec, report = found.spec, found.report
    assert spec == LayerSpec(*SIZES[levels], levels, kind, bias=True)
    assert {name: tuple(each.shape) for name, each in found.factors.items()} == spec.shapes
    for array in found.factors.values():
        assert type(array) is type(given)
        assert array.dtype == given.dtype
        assert array.device == given.device
    # what was given is as it was
    exact, exact_row = library.host(given), library.host(row)
    np.testing.assert_array_equal(exact, library.host(library.given(weights)))
    whole = reconstruct_by_einsum(kind, {k: library.host(v) for k, v in found.factors.items()})
    made, made_row = whole[..., :-1, :], whole[..., -1, :]
    # the report is computed in float32 at least
    allowed = {"abs": 1e-9 if library.dtype == "float64" else 1e-6}
    assert report.error == pytest.approx(relative(made, exact), **allowed)
    assert report.bias_error == pytest.approx(relative(made_row, exact_row), **allowed)
    each = [relative(made[k], exact[k]) for k in np.ndindex(levels)]
    assert report.expert_errors == pytest.approx(each, **allowed)
    # factors of 16 bits add a rounding of their own
    assert report.error < level + (0.01 if library.dtype in ("float16", "bfloat16") else 0.0)
    assert report.parameters == spec.num_parameters
    assert len(report.history) == report.sweeps > 0


@pytest.mark.parametrize("kind", [*DELTAS, SharedBasis((2, 3))], ids=str)
def test_cupy_too(kind: Any, rng: np.random.Generator) -> None:
    """The stand-in refuses operands that are not on the device."""
    pytest.importorskip("cupy")
    from tests._cupy_standin import ADAPTER, device, host, installed

    weights, bias, _ = planted(BaseDelta(2), (5,), rng, noise=0.1)
    weights, bias = weights.astype("float32"), bias.astype("float32")
    with installed():
        found = decompose(device(weights), kind, bias=device(bias))
        assert all(ADAPTER.owns(array) for array in found.factors.values())
        factors = host(dict(found.factors))
    assert {array.dtype.name for array in factors.values()} == {"float32"}
    made = weights_of(found.spec, factors)
    assert found.report.error == pytest.approx(relative(made, weights), abs=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("levels", SIZES, ids=str)
@pytest.mark.parametrize("kind", DELTAS, ids=str)
def test_blocks_of_experts_give_the_same_factors(
    kind: Any,
    levels: tuple[int, ...],
    weighted: bool,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What other terms take is cut into the same blocks as the tensor."""
    weights, bias, _ = planted(kind, levels, rng, noise=0.1)
    options: dict[str, Any] = {"bias": bias, "search": Search(starts=1, sweeps=4, polish=1)}
    if weighted:
        count = int(np.prod(levels))
        options["inputs"] = rng.standard_normal((50, weights.shape[-2]))
        options["coefficients"] = rng.dirichlet(np.ones(count), 50)
    found = []
    for entries in (_source._BLOCK, 1):
        monkeypatch.setattr(_source, "_BLOCK", entries)
        found.append(decompose(weights, kind, weighted=weighted, **options).factors)
    first, second = (reconstruct_by_einsum(kind, each) for each in found)
    np.testing.assert_allclose(first, second, atol=1e-6)


def samples(
    levels: tuple[int, ...], rng: np.random.Generator, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs whose directions differ in size, and coefficients of unequal loads, by powers of ten.

    Mean squared coefficients differ more: an expert that is rarely chosen counts little.
    """
    count = int(np.prod(levels))
    inputs = rng.standard_normal((400, SIZES[levels][0]))
    inputs *= np.logspace(0, -spread, inputs.shape[1])
    return inputs, rng.dirichlet(np.logspace(1, 1 - spread / 2, count), 400)


@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("levels", SIZES, ids=str)
@pytest.mark.parametrize("kind", DELTAS, ids=str)
def test_weights_are_taken_back_out_of_every_term(
    kind: Any, levels: tuple[int, ...], biased: bool, loads: bool, rng: np.random.Generator
) -> None:
    """An exact sum is found again whatever inputs and experts weigh."""
    weights, bias, _ = planted(kind, levels, rng)
    inputs, coefficients = samples(levels, rng, spread=1.0)
    found = decompose(
        weights,
        kind,
        bias=bias if biased else None,
        inputs=inputs,
        coefficients=coefficients if loads else None,
        weighted=True,
        search=Search(sweeps=3000, tolerance=1e-6),
    )
    whole = reconstruct_by_einsum(kind, found.factors)
    assert relative(whole[..., :-1, :] if biased else whole, weights) < 1e-6
    assert found.report.error < 1e-6
    assert found.report.output_error is not None
    assert found.report.output_error < 1e-6
    if biased:
        assert relative(whole[..., -1, :], bias) < 1e-6


@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("levels", SIZES, ids=str)
@pytest.mark.parametrize("kind", DELTAS, ids=str)
def test_weighted_sums_lower_the_error_of_outputs(
    kind: Any, levels: tuple[int, ...], biased: bool, loads: bool, rng: np.random.Generator
) -> None:
    """In every draw, and by much on average where the loads of experts differ."""
    ratios = []
    for _ in range(3):
        weights, bias, _ = planted(kind, levels, rng, noise=0.3)
        inputs, coefficients = samples(levels, rng, spread=2.0)
        given = np.concatenate([weights, bias[..., None, :]], axis=-2) if biased else weights
        rows = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1) if biased else inputs
        errors = []
        for weighted in (False, True):
            found = decompose(
                weights,
                kind,
                bias=bias if biased else None,
                inputs=inputs,
                coefficients=coefficients if loads else None,
                weighted=weighted,
            )
            made = reconstruct_by_einsum(kind, found.factors)
            errors.append(
                [
                    np.linalg.norm(outputs(rows, each, coefficients if loads else None))
                    for each in (given - made, given)
                ]
            )
        (plain, whole), (weighed, _) = errors
        assert weighed < plain
        assert weighed < 0.5 * whole
        ratios.append(weighed / plain)
    assert np.mean(ratios) < (0.9 if loads else 1.0)


@pytest.mark.parametrize("levels", SIZES, ids=str)
@pytest.mark.parametrize("kind", DELTAS, ids=str)
def test_experts_that_are_used_more_count_more(
    kind: Any, levels: tuple[int, ...], rng: np.random.Generator
) -> None:
    """What is shared by all experts fits those of the first level best that are chosen most."""
    weights, _, _ = planted(kind, levels, rng, noise=0.3)
    inputs, _ = samples(levels, rng, spread=1.0)
    first, *rest = levels
    used = np.repeat(np.logspace(0, -2, first), int(np.prod(rest)))
    coefficients = used * rng.dirichlet(np.ones(used.size), 400)
    loads = np.sqrt(np.mean(coefficients**2, axis=0))
    errors = []
    for given in (None, coefficients):
        found = decompose(weights, kind, weighted=True, inputs=inputs, coefficients=given)
        lost = outputs(inputs, weights - weights_of(found.spec, found.factors), None)
        errors.append(np.linalg.norm(loads[:, None] * lost))
    assert errors[1] < 0.97 * errors[0]


def outputs(rows: np.ndarray, whole: np.ndarray, coefficients: np.ndarray | None) -> np.ndarray:
    """What experts (…, in, out) make of rows: mixed, or each one's own."""
    matrices = whole.reshape(-1, *whole.shape[-2:])
    if coefficients is None:
        return np.einsum("bi,nio->bno", rows, matrices)
    return np.einsum("bn,bi,nio->bo", coefficients, rows, matrices)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ["base_delta", "shared_delta"])
def test_budgets_are_kept_and_used(name: str, biased: bool, rng: np.random.Generator) -> None:
    weights, bias, _ = planted(BaseDelta(4), (3, 2), rng, noise=0.1)
    options: dict[str, Any] = {"bias": bias if biased else None}
    dense = weights.size + (bias.size if biased else 0)
    errors = []
    for budget in (0.4, int(0.6 * dense), Budget(parameters=int(0.8 * dense))):
        most = {float: 0.4, int: 0.6}.get(type(budget), 0.8) * dense
        found = decompose(weights, name, budget=budget, **options)
        kind = found.spec.factorization
        assert isinstance(kind, BaseDelta)
        assert found.report.parameters <= most
        wider = LayerSpec(9, 12, (3, 2), type(kind)(kind.rank + 1), bias=biased)
        assert wider.num_parameters > most
        errors.append(found.report.error)
    assert errors == sorted(errors, reverse=True)
    flops = Budget(flops=16 * 9 * 12 * 12, batch=16)
    found = decompose(weights, name, budget=flops, **options)
    assert found.spec.cost(16).flops <= 16 * 9 * 12 * 12
    with pytest.raises(ValueError, match=r"parameters must be at least \d+ for"):
        decompose(weights, name, budget=9 * 12, **options)


@pytest.mark.parametrize("planned", [BaseDelta(3), SharedDelta(3)], ids=str)
def test_tolerances_are_reached_by_the_smallest_rank(
    planned: Any, rng: np.random.Generator
) -> None:
    weights, _, _ = planted(planned, (2, 2, 2), rng, noise=0.1)
    kinds = [type(planned)(rank) for rank in (1, 2, 3)]
    errors = [decompose(weights, kind).report.error for kind in kinds]
    for kind, error, wider in zip(kinds[:-1], errors, kinds[1:], strict=False):
        for tolerance, wanted in ((1.001 * error, kind), (0.999 * error, wider)):
            found = decompose(weights, planned.name, tolerance=tolerance)
            assert found.report.error <= tolerance
            assert found.spec.factorization == wanted


def _deltas(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Deltas (8, 24, 20) of rank 3."""
    left, right = rng.standard_normal((8, 24, 3)), rng.standard_normal((8, 3, 20))
    return strength * np.einsum("nir,nro->nio", left, right)


def _random(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((8, 24, 20))


def _structured(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((24, 20)) + _deltas(rng, 0.3) + 0.2 * _random(rng)


def _decaying(rng: np.random.Generator) -> np.ndarray:
    """Differences from the base whose singular values fall, as those of trained experts do."""
    left, _, right = np.linalg.svd(_random(rng), full_matrices=False)
    return rng.standard_normal((24, 20)) + 5 * left * np.exp(-np.arange(20) / 3) @ right


def _unequal(rng: np.random.Generator) -> np.ndarray:
    """One expert is far larger than all others: the mean is a poor base."""
    found = _structured(rng)
    found[0] *= 20.0
    return found


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("make", [_random, _structured, _decaying, _unequal])
def test_as_good_as_the_papers_closed_form(
    make: Callable[[np.random.Generator], np.ndarray],
    dtype: str,
    rank: int,
    rng: np.random.Generator,
) -> None:
    """D²-MoE: the mean of the experts, and truncated SVDs of what they differ from it by."""
    weights = make(rng).astype(dtype)
    left = weights.astype("float64") - weights.mean(axis=0, dtype="float64")
    size = np.linalg.norm(weights)
    values = np.linalg.svd(left, compute_uv=False)
    apart = np.sqrt((values[:, rank:] ** 2).sum()) / size
    assert decompose(weights, BaseDelta(rank), compare=False).report.error <= apart
    # where all experts read the same directions, the closed form is the best there is
    values = np.linalg.svd(left.swapaxes(0, 1).reshape(24, -1), compute_uv=False)
    best = np.sqrt((values[rank:] ** 2).sum()) / size
    for search, more in ((Search(), 1e-2), (Search(sweeps=2000, tolerance=1e-7), 1e-5)):
        found = decompose(weights, SharedDelta(rank), search=search, compare=False)
        assert found.report.error <= best * (1 + more)
