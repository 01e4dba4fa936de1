"""The public test suite itself: its oracles are right, and its contracts catch what is broken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from tensormoe import CP, Gate, LayerSpec, TensorRing
from tensormoe.errors import RankError, ShapeError, SpecError
from tensormoe.factorizations import INPUT, OUTPUT, Factor, Factorization, Initializer, expert_leg
from tensormoe.testing import (
    BackendContract,
    FactorizationContract,
    assert_close,
    assert_output,
    batch_shapes,
    coefficients,
    factorizations,
    gates,
    reconstruct,
    reconstruct_by_einsum,
    reference_output,
    specs,
)
from tensormoe_numpy import BACKEND, MuMoE

# The oracles, on numbers that can be checked by hand.


def test_the_reference_is_the_definition() -> None:
    weights = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    a, b, x = np.array([2.0, 3.0]), np.array([1.0, 0.0, -1.0]), np.array([1.0, 0.5, 2.0])
    want = np.zeros(5)
    for n in range(2):
        for m in range(3):
            want += a[n] * b[m] * (x @ weights[n, m, :3] + weights[n, m, 3])
    np.testing.assert_allclose(reference_output(weights, [a, b], x), want)
    with pytest.raises(ShapeError, match="x must have 4 features, or 3"):
        reference_output(weights, [a, b], x[:2])


def test_the_oracles_know_the_librarys_own_factorizations_only() -> None:
    for oracle in (reconstruct, reconstruct_by_einsum):
        with pytest.raises(SpecError, match="own"):
            oracle(Mixtures(2), {"expert_0": np.ones((2, 2))})


def test_outputs_are_compared() -> None:
    layer = MuMoE(6, 4, (3, 2), TensorRing(3), dtype="float64", seed=0)
    x = np.random.default_rng(0).standard_normal((5, 6))
    rest = (layer.spec.factorization, layer.factors, layer.coefficients(x), x)
    assert_output(layer(x), *rest)
    wrong = layer(x)
    wrong[2, 1] *= 1 + 1e-6
    with pytest.raises(AssertionError, match=r"output is off by .* at \(2, 1\)"):
        assert_output(wrong, *rest)
    with pytest.raises(AssertionError, match="output has shape"):
        assert_output(wrong[:2], *rest)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(np.array([np.nan]), np.zeros(1), 1.0, 1.0)


# The strategies reach the cases that matter.


@pytest.mark.parametrize(
    "wanted",
    [
        lambda spec: spec.levels == 3 and spec.bias,
        lambda spec: spec.factorization.name == "hadamard" and not spec.bias,
        lambda spec: spec.num_experts == 1,
        lambda spec: spec.in_features == 1 and spec.out_features > 1,
        lambda spec: max((1, *spec.factorization.bonds(spec.levels))) > max(spec.experts),
        lambda spec: len(set(spec.factorization.bonds(spec.levels))) > 2,
    ],
)
def test_specs_reach_every_corner(wanted: Any) -> None:
    find(specs(), wanted, settings=settings(max_examples=5000, database=None))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (3, 2)])
def test_batch_shapes_reach_every_kind(shape: tuple[int, ...]) -> None:
    often = settings(max_examples=5000, database=None)
    find(batch_shapes(), lambda found: found == shape, settings=often)


def test_gates_reach_every_kind() -> None:
    for wanted in (Gate("top_k", k=2, normalization=None), Gate(normalization="batch", bias=True)):
        find(
            gates((3, 2), batch_norm=True),
            lambda gate, wanted=wanted: gate == wanted,
            settings=settings(max_examples=20000, database=None),
        )


@given(data=st.data())
def test_coefficients_are_sparse_and_differ(data: st.DataObject) -> None:
    dense, level = data.draw(coefficients((40, 30), (20,)))
    for each in (dense, level):
        share = np.mean(each != 0)
        assert 0.35 < share < 0.65
        assert np.all(np.any(each != 0, axis=-1)), "every input uses an expert"
        assert len(np.unique(each, axis=0)) == 20
        assert not np.allclose(each.sum(-1), 1)


@given(st.integers(1, 3), st.data())
def test_factorizations_fit_their_levels(levels: int, data: st.DataObject) -> None:
    value = data.draw(factorizations(levels))
    LayerSpec(3, 2, (2,) * levels, value)


# A factorization of somebody else's, in one class.


@dataclass(frozen=True)
class Mixtures(Factorization):
    """𝒲[n, i, o] = Σ_r C[n, r] V[r, i, o]: experts are mixtures of R full matrices."""

    rank: int
    name: ClassVar[str] = "mixtures"

    def rank_pattern(self, levels: int) -> tuple[str, ...]:
        return ("R",)

    def with_rank(self, rank: tuple[int, ...]) -> Mixtures:
        if len(rank) != 1:
            raise RankError(f"rank must have one bond; got {rank!r}.")
        return type(self)(*rank)

    def bonds(self, levels: int) -> tuple[int, ...]:
        return (self.rank,)

    def factors(self, levels: int) -> tuple[Factor, ...]:
        experts = [Factor(f"expert_{e}", (expert_leg(e), "r")) for e in range(levels)]
        return (*experts, Factor("basis", (INPUT, OUTPUT, "r")))

    def bond_sizes(self, experts: tuple[int, ...], out_features: int) -> Mapping[str, int]:
        return {"r": self.rank}

    def initializers(
        self, experts: tuple[int, ...], in_features: int, out_features: int, scheme: str
    ) -> Mapping[str, Initializer]:
        share = 2 ** (1 / len(experts)) - 1
        starts = {
            f"expert_{e}": Initializer(share**0.5, "normal", "one") for e in range(len(experts))
        }
        return starts | {"basis": Initializer((3 * in_features * 2 * self.rank) ** -0.5)}

    def to_tensorly(self, factors: Mapping[str, Any], xp: Any) -> Any:
        raise NotImplementedError

    def from_tensorly(self, decomposition: Any, xp: Any) -> dict[str, Any]:
        raise NotImplementedError


def by_einsum(factors: Mapping[str, Any]) -> np.ndarray:
    arrays = {name: np.asarray(array, dtype=np.float64) for name, array in factors.items()}
    basis = arrays["basis"]
    if "bias" in arrays:
        basis = np.concatenate([basis, arrays["bias"][None]], axis=0)
    experts = [array for name, array in arrays.items() if name.startswith("expert_")]
    modes = "abc"[: len(experts)]
    terms = ",".join(f"{mode}r" for mode in modes)
    return np.einsum(f"{terms},ior->{modes}io", *experts, basis)


class TestSomebodyElses(FactorizationContract):
    """The core needs no change for it."""

    factorization = Mixtures(1)

    def reconstruct(self, factorization: Factorization, factors: Mapping[str, Any]) -> np.ndarray:
        return by_einsum(factors)


# What is broken is caught. Few examples suffice, since random arrays hide nothing.

QUICK = settings(max_examples=60, phases=[Phase.generate], database=None, derandomize=True)


def run_contract(suite: Any, name: str) -> None:
    """Run one test of a contract, without Hypothesis's report of the example."""
    test = getattr(type(suite), name)
    if hasattr(test, "hypothesis"):
        inner = test.hypothesis.inner_test
        check = QUICK(given(data=st.data())(lambda data: inner(suite, data=data)))
        check()
    else:
        test(suite)


def assert_caught(suite: Any, name: str) -> None:
    caught = (AssertionError, ValueError, IndexError, TypeError, pytest.fail.Exception)
    with pytest.raises(caught):
        run_contract(suite, name)


class Numpy(BackendContract):
    __test__ = False
    backend = BACKEND

    def from_numpy(self, array: np.ndarray) -> np.ndarray:
        return array.copy()


def broken_backend(**methods: Any) -> Any:
    """The contract on an adapter with some primitives replaced."""
    adapter = type("Broken", (type(BACKEND),), methods)()
    return type("Suite", (Numpy,), {"backend": adapter})()


def take_reversed(self: Any, array: Any, indices: Any, axis: int, /) -> Any:
    return np.take(array, array.shape[axis] - 1 - indices, axis=axis)


def scatter_without_adding(self: Any, values: Any, indices: Any, axis: int, size: int, /) -> Any:
    before, after = values.shape[:axis], values.shape[axis + indices.ndim :]
    total = np.zeros((*before, size, *after), dtype=values.dtype)
    total[(slice(None),) * axis + (indices,)] = values
    return total


def matmul_in_place(self: Any, left: Any, right: Any, /) -> Any:
    product = np.matmul(left, right)
    left *= 1.5
    return product


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "matmul loses precision": (
        {"matmul": lambda self, a, b: np.matmul(a, b) * (1 + 1e-4)},
        "test_factorized_equals_unfactorized",
    ),
    "matmul itself": ({"matmul": lambda self, a, b: np.matmul(a, b) * 1.1}, "test_matmul"),
    "matmul writes into its operand": ({"matmul": matmul_in_place}, "test_matmul"),
    "matmul widens": (
        {"matmul": lambda self, a, b: np.matmul(a, b).astype("float64")},
        "test_matmul",
    ),
    "permute does not": ({"permute": lambda self, a, axes: a}, "test_views_and_sums"),
    "reshape is column-major": (
        {"reshape": lambda self, a, shape: a.reshape(shape, order="F")},
        "test_views_and_sums",
    ),
    "sum keeps its axes": (
        {"sum": lambda self, a, axes: np.sum(a, axis=axes, keepdims=True)},
        "test_views_and_sums",
    ),
    "take from the end": ({"take": take_reversed}, "test_take_and_scatter_add_are_transposes"),
    "take from the end, in a table": (
        {"take": take_reversed},
        "test_indexed_inputs_equal_one_hot_ones",
    ),
    "scatter forgets": (
        {"scatter_add": scatter_without_adding},
        "test_take_and_scatter_add_are_transposes",
    ),
    "scatter forgets, in gradients": (
        {"scatter_add": scatter_without_adding},
        "test_indexed_coefficients_equal_dense_ones",
    ),
    "row sums lose precision": (
        {"row_sums": lambda self, a: np.sum(a, axis=-1, keepdims=True) * (1 + 1e-2)},
        "test_gates_equal_those_of_numpy",
    ),
    "square sums lose precision": (
        {"square_sums": lambda self, a: np.sum(a * a, axis=-1, keepdims=True) * (1 + 1e-2)},
        "test_gates_equal_those_of_numpy",
    ),
    "bytes of another order": (
        {"to_bytes": lambda self, a: (a.dtype.name, a.shape, a.astype(">f8").tobytes())},
        "test_round_trip_through_numpy_and_bytes",
    ),
    "it is not registered": ({}, "test_the_adapter_is_found"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_backends_are_caught(name: str) -> None:
    methods, test = BROKEN[name]
    assert_caught(broken_backend(**methods), test)
    # and the test passes where nothing is broken
    run_contract(Numpy(), test)


class Mine(FactorizationContract):
    __test__ = False
    factorization = Mixtures(1)

    def reconstruct(self, factorization: Factorization, factors: Mapping[str, Any]) -> np.ndarray:
        return by_einsum(factors)


class OtherLegs(Mixtures):
    """Its network is another one than its formula: the bond is not shared by the levels."""

    def factors(self, levels: int) -> tuple[Factor, ...]:
        experts = [Factor(f"expert_{e}", (expert_leg(e), f"r{e}")) for e in range(levels)]
        bonds = tuple(f"r{e}" for e in range(levels))
        return (*experts, Factor("basis", (INPUT, OUTPUT, *bonds)))

    def bond_sizes(self, experts: tuple[int, ...], out_features: int) -> Mapping[str, int]:
        return {f"r{e}": self.rank for e in range(len(experts))}


class BondsFirst(Mixtures):
    def factors(self, levels: int) -> tuple[Factor, ...]:
        experts = [Factor(f"expert_{e}", ("r", expert_leg(e))) for e in range(levels)]
        return (*experts, Factor("basis", (INPUT, OUTPUT, "r")))


class LoudStart(Mixtures):
    def initializers(self, *arguments: Any) -> Mapping[str, Initializer]:
        starts = super().initializers(*arguments)
        return {**starts, "basis": Initializer(starts["basis"].std * 1.3)}


class AllAlike(Mixtures):
    """Experts that start as one another."""

    def initializers(self, *arguments: Any) -> Mapping[str, Initializer]:
        starts = super().initializers(*arguments)
        calm = {name: Initializer(0.0, "normal", "one") for name in starts if name != "basis"}
        return {**calm, "basis": Initializer(starts["basis"].std * 2**0.5)}


class Forgetful(Mixtures):
    def with_rank(self, rank: tuple[int, ...]) -> Mixtures:
        return type(self)(max(rank))


@pytest.mark.parametrize(
    ("kind", "test"),
    [
        (OtherLegs, "test_factorized_equals_unfactorized"),
        (BondsFirst, "test_shapes_and_parameters"),
        (Forgetful, "test_bonds_follow_the_pattern"),
    ],
)
def test_broken_factorizations_are_caught(kind: type[Mixtures], test: str) -> None:
    assert_caught(type("Suite", (Mine,), {"factorization": kind(1)})(), test)
    run_contract(Mine(), test)


@pytest.mark.parametrize("kind", [LoudStart, AllAlike])
@pytest.mark.parametrize("levels", [1, 2])
def test_wrong_starts_are_caught(kind: type[Mixtures], levels: int) -> None:
    suite = type("Suite", (Mine,), {"factorization": kind(1)})()
    with pytest.raises(AssertionError, match="not"):
        suite.test_weights_start_like_those_of_a_linear_layer(levels, 5, False)
    Mine().test_weights_start_like_those_of_a_linear_layer(levels, 5, False)


class Swapped(CP):
    """A CP whose TensorLy layout swaps input and output."""

    def with_rank(self, rank: tuple[int, ...]) -> Swapped:
        return Swapped(*rank)

    def to_tensorly(self, factors: Mapping[str, Any], xp: Any) -> Any:
        weights, listed = super().to_tensorly(factors, xp)
        return weights, [*listed[:-2], listed[-1], listed[-2]]


def test_a_wrong_layout_is_caught() -> None:
    suite = type("Suite", (FactorizationContract,), {"factorization": Swapped(1)})()
    assert_caught(suite, "test_explicit_weights_equal_the_oracle")
    assert_caught(suite, "test_tensorly_layouts_round_trip")
