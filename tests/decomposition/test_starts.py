"""Where searches start, that they never end above it, and what they end with: finite, and small."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np
import pytest
import torch

from tensormoe import (
    CP,
    BaseDelta,
    LayerSpec,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.backend import backend_of
from tensormoe.decomposition import Search, _search, _starts, decompose
from tensormoe.decomposition._contractions import Structure, structures
from tensormoe.decomposition._runs import Runs
from tensormoe.decomposition._search import Problem, advance
from tensormoe.decomposition._source import Source
from tensormoe.factorizations import INPUT, OUTPUT
from tests._decomposition_cases import relative, weights_of

EXPERT = "n0"
OPEN = (EXPERT, INPUT, OUTPUT)
SIZES = [(14, 10), (10, 14), (12, 12)]


def spec_of(kind: Any, weights: Any) -> LayerSpec:
    return LayerSpec(*weights.shape[-2:], tuple(weights.shape[:-2]), kind, bias=False)


def structure_of(spec: LayerSpec) -> Structure:
    network = spec.network
    (found,) = structures(network, (*network.expert_legs, INPUT, OUTPUT), network.sizes)
    return found


def started(kind: Any, weights: Any, place: int = 0, seed: int = 0) -> dict[str, Any]:
    source = Source(weights, backend_of(weights))
    structure = structure_of(spec_of(kind, weights))
    return _starts.start(structure, source, place, np.random.default_rng(seed))


def planted(
    kind: Any, sizes: tuple[int, int], levels: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    spec = LayerSpec(*sizes, levels, kind, bias=False)
    return weights_of(spec, {k: rng.standard_normal(shape) for k, shape in spec.shapes.items()})


@pytest.mark.parametrize("rank", [(3, 4), (2, 2), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("levels", [(6,), (3, 4), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_few_experts_determine_a_shared_basis(
    sizes: tuple[int, int],
    levels: tuple[int, ...],
    rank: tuple[int, int],
    rng: np.random.Generator,
) -> None:
    """The start alone is exact, whichever side the shared matrices are on."""
    kind = SharedBasis(rank)
    for seed in range(10):
        weights = planted(kind, sizes, levels, rng)
        found = started(kind, weights, seed=seed)
        assert relative(weights_of(spec_of(kind, weights), found), weights) < 1e-8


def test_starts_are_of_the_weights_library_and_dtype(rng: np.random.Generator) -> None:
    weights = planted(SharedBasis((3, 4)), (14, 10), (6,), rng)
    for dtype, most in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
        found = started(SharedBasis((3, 4)), torch.tensor(weights, dtype=dtype))
        assert {array.dtype for array in found.values()} == {dtype}
        host = {name: array.double().numpy() for name, array in found.items()}
        made = weights_of(spec_of(SharedBasis((3, 4)), weights), host)
        assert relative(made, weights) < most


def drawn(kind: Any, weights: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Random factors, as any network starts from."""
    rng = np.random.default_rng(seed)
    structure = structure_of(spec_of(kind, weights))
    return {each.name: rng.standard_normal(structure.shape(each)) for each in structure.wanted}


@pytest.mark.parametrize(
    "kind",
    [
        SharedBasis((3, 4)),
        SharedBasis((1, 11)),
        TensorRing((2, 3, 4)),
        Tucker((3, 4, 5)),
        TensorTrain((3, 4)),
        CP(5),
    ],
    ids=str,
)
def test_every_other_start_is_drawn(kind: Any, rng: np.random.Generator) -> None:
    weights = rng.standard_normal((6, 14, 10))
    wanted = drawn(kind, weights, seed=3)
    for place in (1, 3):
        found = started(kind, weights, place, seed=3)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        # three spaces of five directions in fourteen
        (SharedBasis((3, 5)), 6),
        # as many experts as matrices: none is left to tell them apart
        (SharedBasis((3, 4)), 3),
        # experts that have no space of that size
        (SharedBasis((1, 11)), 6),
        # other networks
        (TensorRing((2, 3, 4)), 6),
        (CP(5), 6),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_otherwise_factors_are_drawn_around_a_tensor_of_rank_one(
    sizes: tuple[int, int], kind: Any, experts: int, rng: np.random.Generator
) -> None:
    """By how much of the tensor that is: all of it, or next to nothing."""
    vectors = [rng.standard_normal(size) for size in (experts, *sizes)]
    one = np.einsum("n,i,o->nio", *vectors)
    found, wanted = started(kind, one, seed=3), drawn(kind, one, seed=3)
    structure = structure_of(spec_of(kind, one))
    for factor in structure.factors:
        for axis, leg in enumerate(factor.legs):
            if leg not in OPEN or sum(leg in each.legs for each in structure.factors) > 1:
                continue
            mode = vectors[OPEN.index(leg)]
            along = np.moveaxis(found[factor.name], axis, 0).reshape(len(mode), -1)
            cosines = mode @ along / np.linalg.norm(mode) / np.linalg.norm(along, axis=0)
            np.testing.assert_allclose(abs(cosines), 1.0, rtol=1e-6)
    noise = rng.standard_normal((experts, *sizes))
    found = started(kind, noise, seed=3)
    for name, array in wanted.items():
        assert np.corrcoef(found[name].ravel(), array.ravel())[0, 1] > 0.5


def test_large_tensors_are_not_copied_for_a_start(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = SharedBasis((2, 3))
    weights = planted(kind, (14, 10), (6,), rng)
    exact = [
        relative(weights_of(spec_of(kind, weights), started(kind, weights, place)), weights) < 1e-8
        for place in range(4)
    ]
    assert exact == [True, False, True, False]
    monkeypatch.setattr(_starts, "_SMALL", weights.size - 1)
    found = started(kind, weights)
    assert relative(weights_of(spec_of(kind, weights), found), weights) > 0.1


SINGULAR = ["equal", "equal of rank 2", "one", "multiples", "two", "one is zero", "ones", "zero"]


def singular(name: str, sizes: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Six experts that determine no shared basis."""
    one, other = rng.standard_normal((2, *sizes))
    low = rng.standard_normal((sizes[0], 2)) @ rng.standard_normal((2, sizes[1]))
    zero = np.zeros(sizes)
    return np.stack(
        {
            "equal": [one] * 6,
            "equal of rank 2": [low] * 6,
            "one": [one, *[zero] * 5],
            "multiples": [scale * one for scale in range(6)],
            "two": [one, one, one, -one, 2 * one, low],
            "one is zero": [zero, *rng.standard_normal((5, *sizes))],
            "ones": [zero + 1] * 6,
            "zero": [zero + 0 * other] * 6,
        }[name]
    )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("rank", [(3, 4), (2, 3)], ids=str)
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
@pytest.mark.parametrize("name", SINGULAR)
def test_experts_that_determine_no_basis(
    name: str, sizes: tuple[int, int], rank: tuple[int, int], dtype: str, rng: np.random.Generator
) -> None:
    """Factors are finite, and nothing on the way to them overflows."""
    weights = singular(name, sizes, rng).astype(dtype)
    kind = SharedBasis(rank)
    for seed in range(2):
        start = started(kind, weights, seed=seed)
        assert all(np.isfinite(array).all() for array in start.values())
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            found = decompose(weights, kind, compare=False, seed=seed)
        assert all(np.isfinite(array).all() for array in found.factors.values())
        # no worse than nothing at all
        assert found.report.error < 1.0


def low_rank(name: str, rng: np.random.Generator) -> np.ndarray:
    """Weights (6, 14, 10) that need few bonds."""
    if name == "ones":
        return np.ones((6, 14, 10))
    if name == "equal":
        return np.stack([rng.standard_normal((14, 2)) @ rng.standard_normal((2, 10))] * 6)
    return planted({"cp": CP(2), "tucker": Tucker((2, 2, 2))}[name], (14, 10), (6,), rng)


WIDE: list[Any] = [
    Tucker((4, 6, 6)),
    Tucker((6, 14, 10)),
    Tucker((2, 6, 6)),
    TensorTrain((4, 6)),
    TensorTrain((6, 8)),
    TensorRing((3, 3, 4)),
    CP(8),
    SharedBasis((3, 4)),
    BaseDelta(4),
    SharedDelta(4),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", WIDE, ids=str)
@pytest.mark.parametrize("name", ["ones", "equal", "cp", "tucker"])
def test_more_bonds_than_the_weights_need(
    name: str, kind: Any, dtype: str, rng: np.random.Generator
) -> None:
    """Equations are singular then, and factors may run away: what was found before is kept."""
    weights = low_rank(name, rng).astype(dtype)
    found = decompose(weights, kind, compare=False)
    assert all(np.isfinite(array).all() for array in found.factors.values())
    error = relative(weights_of(found.spec, found.factors), weights)
    assert error < (1e-3 if dtype == "float32" else 1e-5)
    # the report is computed in the weights' own precision
    assert found.report.error == pytest.approx(error, rel=0.3, abs=1e-6)


@pytest.mark.parametrize("kind", [Tucker((4, 6, 6)), TensorTrain((4, 6)), CP(6)], ids=str)
@pytest.mark.parametrize("name", ["tucker", "noise", "nearly dependent"])
def test_longer_searches_are_no_worse(name: str, kind: Any, rng: np.random.Generator) -> None:
    """From the same start: a search gives back what it began with where it finds nothing better."""
    if name == "nearly dependent":
        factors = [np.ones((size, 1)) + 1e-3 * rng.standard_normal((size, 4)) for size in (6, 14)]
        weights = np.einsum("nr,ir,or->nio", *factors, rng.standard_normal((10, 4)))
    else:
        weights = rng.standard_normal((6, 14, 10)) if name == "noise" else low_rank(name, rng)
    for dtype in ("float32", "float64"):
        errors = [
            decompose(
                weights.astype(dtype),
                kind,
                search=Search(starts=1, sweeps=sweeps, polish=polish, tolerance=0.0),
                compare=False,
            ).report.error
            for sweeps, polish in ((10, 0), (11, 0), (40, 0), (40, 10))
        ]
        for before, after in pairwise(errors):
            # errors of a core, and those that rounding hides
            assert after <= 1.002 * before + (1e-5 if dtype == "float32" else 1e-10), errors


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [Tucker((4, 6, 6)), TensorTrain((4, 6)), CP(6)], ids=str)
def test_nothing_above_a_known_error_is_kept(
    kind: Any, dtype: str, rng: np.random.Generator
) -> None:
    weights = low_rank("tucker", rng).astype(dtype)
    source = Source(weights, backend_of(weights))
    structure = structure_of(spec_of(kind, weights))
    problem = Problem((structure,), source, source.squared_norm(), weights.size)
    factors = started(kind, weights)
    # with a bound that nothing reaches, nothing is returned but what was given
    same = advance(problem, factors, 5, 0.0, known=0.0)
    assert same.factors is factors
    assert same.errors == ()
    known = inf
    for _ in range(8):
        found = advance(problem, factors, 6, 0.0, known=known)
        factors, errors = found.factors, found.errors
        true = problem.error(factors)
        assert true <= known
        if errors:
            assert errors[-1] == pytest.approx(true, rel=1e-6, abs=1e-15)
        known = true
    assert known < 1e-3


@dataclass(frozen=True)
class Claims:
    """A problem whose factor is its error, and sweeps that say something else about it.

    Args:
        said: what each sweep says, and how the error then is.
        seen: the factor that each sweep started from, and its damping.
    """

    said: tuple[tuple[float, float], ...]
    seen: list[tuple[float, float]] = field(default_factory=list)
    terms: tuple[Any, ...] = ()
    source: Any = None
    squared_norm: float = 1.0
    room: int = 0
    hidden: float = 1e-9
    follower: Any = None

    def error(self, factors: Any) -> float:
        return float(factors["a"])

    def felt(self, error: float) -> float:
        return error

    def surprises(self, error: float, claimed: float) -> bool:
        return error > 1.05 * claimed + 3e-9

    def sweep(self, *given: Any) -> tuple[dict[str, float], float]:
        *_, factors, _, damping = given
        claimed, true = self.said[len(self.seen)]
        self.seen.append((factors["a"], damping))
        return {"a": true}, claimed


def test_errors_that_only_seem_to_fall_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where huge factors cancel one another: a sweep's own error is worthless there."""
    lies = tuple((0.5 - 0.05 * turn, 2.0 + turn) for turn in range(5))
    problem: Any = Claims((*lies, (0.4, 0.4), (0.3, 0.3)))
    monkeypatch.setattr(_search, "sweep", problem.sweep)
    given = {"a": 0.6}
    found = advance(problem, given, 7, 0.0, known=0.6)
    assert (found.factors, found.errors, found.ended) == ({"a": 0.3}, (0.4, 0.3), "sweeps")
    # from what was given, and along directions that are seen well
    (start, damping), (_, before) = problem.seen[5], problem.seen[4]
    assert start == 0.6
    assert damping > before == 0.0
    # a sweep that says itself that it ends above is taken back at once
    problem = Claims(((0.9, 0.9), (0.5, 0.5)))
    monkeypatch.setattr(_search, "sweep", problem.sweep)
    found = advance(problem, given, 2, 0.0, known=0.6)
    assert (found.factors, found.errors) == ({"a": 0.5}, (0.5,))
    assert problem.seen[1][0] == 0.6
    # and where no sweep is honest, nothing is changed
    problem = Claims(lies)
    monkeypatch.setattr(_search, "sweep", problem.sweep)
    found = advance(problem, given, 5, 0.0, known=0.6)
    assert found.factors is given
    assert found.errors == ()


def rounded(weights: np.ndarray, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    given = torch.tensor(weights).to(dtype)
    return given, relative(given.double().numpy(), weights)


def of_16_bits(found: Any) -> np.ndarray:
    factors = {name: array.double().numpy() for name, array in found.factors.items()}
    return weights_of(found.spec, factors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 1e-2])
@pytest.mark.parametrize("kind", [Tucker((3, 4, 5)), TensorTrain((3, 4))], ids=str)
def test_16_bits_lose_what_rounding_the_weights_does(
    kind: Any, spread: float, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    """From factors with nearly dependent columns; each of three or four is rounded for itself."""
    for _ in range(3):
        spec = LayerSpec(14, 12, 6, kind, bias=False)
        factors = {
            name: rng.standard_normal((*shape[:-1], 1)) + spread * rng.standard_normal(shape)
            for name, shape in spec.shapes.items()
        }
        weights = weights_of(spec, factors)
        weights /= abs(weights).max()
        given, lost = rounded(weights, dtype)
        found = decompose(given, kind, compare=False)
        assert {array.dtype for array in found.factors.values()} == {dtype}
        assert relative(of_16_bits(found), weights) < 8 * lost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_that_a_search_bends_are_straightened_before_they_are_rounded(
    dtype: torch.dtype, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a search ends with for large Tucker factors, made by hand."""
    kind = Tucker((3, 4, 5))
    run = Runs.run
    bad = (np.eye(5) * 1e-3 + 1).astype("f4")

    def bent(self: Runs, *given: Any) -> Any:
        found = run(self, *given)
        factors = found.factors
        # bonds: core (…, s), output (out, s)
        output = factors["output"] @ bad
        core = factors["core"] @ np.linalg.inv(bad.astype("f8")).astype("f4")
        return replace(found, factors={**factors, "output": output, "core": core})

    monkeypatch.setattr(Runs, "run", bent)
    weights = planted(kind, (14, 12), (6,), rng)
    given, lost = rounded(weights, dtype)
    found = decompose(given, kind, compare=False)
    # and what float32 loses in the bent ones, whose condition is 5000
    assert relative(of_16_bits(found), weights) < 5 * lost + 4e-3
    bad_ones = bent(_runs(given.float().numpy()), kind).factors.items()
    plain = {name: torch.tensor(array).to(dtype) for name, array in bad_ones}
    host = {name: array.double().numpy() for name, array in plain.items()}
    assert relative(weights_of(found.spec, host), weights) > 20 * lost


def _runs(given: np.ndarray) -> Runs:
    source = Source(given, backend_of(given))
    count, rows, columns = given.shape
    return Runs(source, (rows, columns, (count,)), False, Search(), 0)


def test_memory_beside_the_weights(rng: np.random.Generator) -> None:
    factors = [rng.standard_normal((size, 32)) for size in (16, 192, 256)]
    weights = np.einsum("nr,ir,or->nio", *factors)
    noise = rng.standard_normal(weights.shape)
    weights += 0.15 * np.linalg.norm(weights) / np.linalg.norm(noise) * noise
    given = weights.astype("float32")
    del weights, noise
    # what is planned once, and imported
    decompose(given, CP(128), search=Search(starts=1, sweeps=1, polish=1), compare=False)
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    found = decompose(given, CP(128), compare=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.report.error < 0.15
    assert peak - before < given.nbytes
