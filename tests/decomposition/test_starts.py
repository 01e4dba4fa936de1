"""Where searches start: from experts that determine a shared basis, around rank one, or drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tensormoe import CP, SharedBasis, TensorRing, TensorTrain, Tucker
from tensormoe.decomposition import _starts, decompose
from tensormoe.factorizations import INPUT, OUTPUT
from tests.decomposition._cases import (
    random_weights,
    relative,
    spec_of,
    started,
    structure_of,
    weights_of,
)

EXPERT = "n0"
OPEN = (EXPERT, INPUT, OUTPUT)
SIZES = [(14, 10), (10, 14), (12, 12)]


@pytest.mark.parametrize("rank", [(3, 4), (2, 2), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("levels", [(6,), (3, 4), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_few_experts_determine_a_shared_basis(
    sizes: tuple[int, int], levels: tuple[int, ...], rank: tuple[int, int], rng: np.random.Generator
) -> None:
    """The start alone is exact, whichever side the shared matrices are on."""
    kind = SharedBasis(rank)
    for seed in range(10):
        weights = random_weights(kind, sizes, levels, rng)
        found = started(kind, weights, seed=seed)
        assert relative(weights_of(spec_of(kind, weights), found), weights) < 1e-8


def test_starts_are_of_the_weights_library_and_dtype(rng: np.random.Generator) -> None:
    weights = random_weights(SharedBasis((3, 4)), (14, 10), (6,), rng)
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
    weights = random_weights(kind, (14, 10), (6,), rng)
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
