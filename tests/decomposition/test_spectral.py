"""Networks without cycles: starts by singular value decompositions, and what is best by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensormoe import CP, Hadamard, LayerSpec, LowRank, SharedBasis, TensorRing, TensorTrain, Tucker
from tensormoe.backend import backend_of
from tensormoe.decomposition import Search, _fit, _source, decompose
from tensormoe.decomposition._contractions import Structure, structures
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._spectral import cuts, spectral
from tensormoe.factorizations import INPUT, OUTPUT
from tests.decomposition._cases import relative, weights_of

TREES: list[tuple[Any, tuple[int, ...], bool]] = [
    (Tucker((3, 4, 5)), (6,), False),
    (Tucker((6, 4, 5)), (6,), False),
    (Tucker((2, 3, 4, 5)), (3, 4), False),
    (TensorTrain((3, 4)), (6,), False),
    (TensorTrain((3, 5, 4)), (3, 4), False),
    (Hadamard(), (3, 4), False),
    (TensorRing((1, 3, 4)), (6,), False),
    # bonds that lead to next to nothing
    (Tucker((1, 1, 3)), (6,), False),
    (Tucker((1, 3, 1)), (6,), False),
    (Tucker((3, 1, 1)), (6,), False),
    (TensorTrain((1, 3)), (6,), False),
    (TensorTrain((3, 1)), (6,), False),
    (Tucker((1, 1, 1)), (6,), False),
    # all the first level has, or the first two
    (TensorTrain((6, 4)), (6,), True),
    (TensorTrain((3, 12, 4)), (3, 4), True),
    (Hadamard(), (6,), True),
    # one matrix for all experts, or one for each
    (SharedBasis((1, 4)), (6,), True),
    (SharedBasis((1, 4)), (3, 4), True),
    (SharedBasis((6, 3)), (6,), True),
    (SharedBasis((8, 3)), (6,), True),
    (SharedBasis((12, 3)), (3, 4), True),
]
IDS = [f"{kind}-{experts}" for kind, experts, _ in TREES]


def structure_of(spec: LayerSpec) -> Structure:
    network = spec.network
    (found,) = structures(network, (*network.expert_legs, INPUT, OUTPUT), network.sizes)
    return found


@pytest.mark.parametrize("block", [2**17, 1])
@pytest.mark.parametrize("sizes", [(14, 10), (10, 14)], ids=str)
@pytest.mark.parametrize(("kind", "experts", "best"), TREES, ids=IDS)
def test_the_start_is_exact_where_the_weights_are(
    kind: Any,
    experts: tuple[int, ...],
    best: bool,
    sizes: tuple[int, int],
    block: int,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_source, "_BLOCK", block)
    spec = LayerSpec(*sizes, experts, kind, bias=False)
    factors = {name: rng.standard_normal(shape) for name, shape in spec.shapes.items()}
    weights = weights_of(spec, factors)
    found = spectral(structure_of(spec), Source(weights, backend_of(weights)))
    assert found is not None
    assert {name: array.shape for name, array in found.items()} == spec.shapes
    assert relative(weights_of(spec, found), weights) < 1e-12
    plan = cuts(structure_of(spec))
    assert plan is not None
    assert plan.exact == best


@pytest.mark.parametrize("kind", [CP(3), TensorRing((2, 3, 4)), SharedBasis((2, 4))], ids=str)
def test_networks_with_cycles_have_none(kind: Any) -> None:
    assert cuts(structure_of(LayerSpec(14, 10, 6, kind, bias=False))) is None


def truncated(unfolding: np.ndarray, rank: int) -> float:
    """Relative error of the best matrix of a rank."""
    values = np.linalg.svd(unfolding, compute_uv=False)
    return float(np.linalg.norm(values[..., rank:]) / np.linalg.norm(values))


def best_error(spec: LayerSpec, weights: np.ndarray) -> float:
    experts, rows, columns = weights.shape
    kind: Any = spec.factorization
    if isinstance(kind, TensorTrain):
        return truncated(weights.reshape(-1, columns), kind.rank[1])
    if isinstance(kind, Hadamard):
        return truncated(weights.transpose(2, 0, 1), 1)
    count, rank = kind.rank
    if count == experts:
        return truncated(weights, rank)
    (shared,) = (each for each in spec.network.factors if "n0" not in each.legs)
    if INPUT in shared.legs:
        return truncated(weights.transpose(1, 0, 2).reshape(rows, -1), rank)
    return truncated(weights.reshape(-1, columns), rank)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "kind", [SharedBasis((1, 9)), SharedBasis((5, 3)), TensorTrain((5, 9)), Hadamard()], ids=str
)
def test_the_best_there_is(kind: Any, dtype: str, rng: np.random.Generator) -> None:
    """Noise, whose singular values are close, from which alternating least squares ends above."""
    weights = rng.standard_normal((5, 48, 40)).astype(dtype)
    found = decompose(weights, kind, compare=False)
    best = best_error(found.spec, weights.astype("float64"))
    assert found.report.error == pytest.approx(best, rel=1e-5)
    assert found.report.ended == "converged"


def test_the_best_there_is_by_inputs_and_loads(rng: np.random.Generator) -> None:
    """In coordinates in which errors of weights are errors of outputs it is as closed."""
    weights = rng.standard_normal((5, 24, 30))
    inputs = rng.standard_normal((400, 24)) * np.logspace(0, -1, 24)
    coefficients = rng.dirichlet(np.logspace(1, 0, 5), 400)
    kind = SharedBasis((1, 6))
    found = decompose(
        weights, kind, inputs=inputs, coefficients=coefficients, weighted=True, compare=False
    )
    moments = inputs.T @ inputs / 400
    moments += 1e-3 * np.trace(moments) / 24 * np.eye(24)
    loads = np.sqrt(np.mean(coefficients**2, axis=0))
    weighted = loads[:, None, None] * (np.linalg.cholesky(moments).T @ weights)
    best = best_error(found.spec, weighted)
    assert found.report.history[-1] == pytest.approx(best, rel=1e-6)


def decaying(rng: np.random.Generator, shape: tuple[int, int, int], power: float) -> np.ndarray:
    """Experts with singular values falling like k to a power, as trained ones'."""
    _, rows, columns = shape
    found = np.empty(shape)
    for expert in found:
        left = np.linalg.qr(rng.standard_normal((rows, rows)))[0]
        right = np.linalg.qr(rng.standard_normal((columns, rows)))[0]
        expert[...] = left * np.arange(1, rows + 1) ** -power @ right.T
    return found


def test_float32_gets_as_far_as_float64(rng: np.random.Generator) -> None:
    """The core keeps what bonds need, so that no direction of theirs is lost."""
    weights = decaying(rng, (4, 96, 384), 0.35)
    for kind in (Tucker((4, 60, 60)), TensorTrain((3, 60))):
        wide = decompose(weights, kind, compare=False).report
        for seed in range(2):
            report = decompose(weights.astype("float32"), kind, compare=False, seed=seed).report
            assert report.error < 1.001 * wide.error
            assert report.history[-1] == pytest.approx(report.error, rel=1e-4)
            assert report.ended == "converged"


def test_a_core_has_no_fewer_directions_than_a_bond(rng: np.random.Generator) -> None:
    weights = decaying(rng, (4, 192, 1152), 0.35).astype("float32")
    source = Source(weights, backend_of(weights))
    for kind, least in ((Tucker((4, 120, 120)), (120, 120)), (TensorTrain((3, 120)), (192, 120))):
        structure = structure_of(LayerSpec(192, 1152, 4, kind, bias=False))
        core = _fit.compress(structure, source, source.squared_norm(), rng)
        assert all(a >= b for a, b in zip(core.source.shape[1:], least, strict=True))


@pytest.mark.parametrize("kind", [CP(6), Tucker((3, 8, 8))], ids=str)
def test_errors_on_a_core_are_those_of_the_tensor(
    kind: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part outside the core counts; sweeps on the tensor that end above it are not kept."""
    known = []
    real = _fit.advance

    def seen(*given: Any, **options: Any) -> Any:
        known.append(given)
        return real(*given, **options)

    monkeypatch.setattr(_fit, "advance", seen)
    weights = decaying(rng, (4, 60, 80), 0.35)
    few = decompose(weights, kind, search=Search(polish=0, starts=1), compare=False).report
    assert few.history[-1] == pytest.approx(few.error, rel=1e-6)
    report = decompose(weights, kind, search=Search(polish=1, starts=1), compare=False).report
    *_, bound = known[-1]
    assert bound == pytest.approx(few.error, rel=2e-3)
    assert bound > few.error > report.error


def test_one_start_is_enough_for_the_best_there_is(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    real = _fit.advance

    def counted(*given: Any, **options: Any) -> Any:
        tried.append(given)
        return real(*given, **options)

    monkeypatch.setattr(_fit, "advance", counted)
    weights = rng.standard_normal((5, 16, 12))
    decompose(weights, SharedBasis((1, 4)), search=Search(starts=8, polish=0), compare=False)
    few = len(tried)
    tried.clear()
    decompose(weights, CP(4), search=Search(starts=8, polish=0), compare=False)
    # the second sweep sees that nothing is gained
    assert (few, len(tried)) == (1, 9)
    for kind in (SharedBasis((1, 4)), LowRank(3)):
        report = decompose(weights, kind, search=Search(polish=0), compare=False).report
        assert (report.sweeps <= 2, report.ended) == (True, "converged")
