"""Searches never end above where they started, and what they end with is finite, and small."""

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
from tensormoe.decomposition import Search, _search, decompose
from tensormoe.decomposition._runs import Runs
from tensormoe.decomposition._search import Problem, advance
from tensormoe.decomposition._source import Source
from tests.decomposition._cases import (
    random_weights,
    relative,
    spec_of,
    started,
    structure_of,
    weights_of,
)


def low_rank(name: str, rng: np.random.Generator) -> np.ndarray:
    """Weights (6, 14, 10) that need few bonds."""
    if name == "ones":
        return np.ones((6, 14, 10))
    if name == "equal":
        return np.stack([rng.standard_normal((14, 2)) @ rng.standard_normal((2, 10))] * 6)
    return random_weights({"cp": CP(2), "tucker": Tucker((2, 2, 2))}[name], (14, 10), (6,), rng)


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
    workspace: int = 0
    resolution: float = 1e-9
    follower: Any = None

    def error(self, factors: Any) -> float:
        return float(factors["a"])

    def total(self, error: float) -> float:
        return error

    def exceeds(self, error: float, claimed: float) -> bool:
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
    """Factors as a search for large Tucker networks ends with, made by hand."""
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
    weights = random_weights(kind, (14, 12), (6,), rng)
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
