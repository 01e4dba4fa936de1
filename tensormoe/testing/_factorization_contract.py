"""The contract of a factorization: subclass it, name a value, run pytest."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from math import prod, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe._spec import LayerSpec
from tensormoe.backend import Array, _registry
from tensormoe.errors import RankError
from tensormoe.factorizations import (
    INPUT,
    OUTPUT,
    Factorization,
    draw_factor,
    from_tensorly,
    to_tensorly,
)
from tensormoe.testing._comparison import assert_close
from tensormoe.testing._layer_checks import CHECKS, LayerChecks
from tensormoe.testing._strategies import factorizations, factors, seeds, specs

NDArray = npt.NDArray[Any]


class FactorizationContract(LayerChecks):
    """Everything that the library relies on in a factorization, as tests.

    The tests run on NumPy; a factorization that passes runs on every backend that passes
    :class:`BackendContract`.

    A factorization that does not come with the library also says, in :meth:`reconstruct`, what its
    tensor is, by an einsum of its own::

        class TestBlockTerm(FactorizationContract):
            factorization = BlockTerm(rank=1)

            def reconstruct(self, factorization, factors):
                ...

    Attributes:
        factorization: any value of the factorization under test; its rank is varied.
    """

    factorization: Factorization

    @property
    def backend(self) -> Any:
        """NumPy's adapter."""
        return _registry.get_backend("numpy")

    def from_numpy(self, array: NDArray) -> Array:
        """The array itself."""
        return array

    def specs(self) -> st.SearchStrategy[LayerSpec]:
        """Layers of the factorization under test."""
        return specs(self.factorization)

    @CHECKS
    @given(data=st.data())
    def test_values_compare_copy_and_print(self, data: st.DataObject) -> None:
        levels = data.draw(st.integers(1, 3))
        first, second = (data.draw(factorizations(levels, self.factorization)) for _ in range(2))
        assert isinstance(first, Factorization)
        assert (first == second) == (first.bonds(levels) == second.bonds(levels))
        known = {type(first).__name__: type(first)}
        again = [eval(repr(first), known), pickle.loads(pickle.dumps(first)), copy.deepcopy(first)]
        again.append(first.with_rank(first.bonds(levels)))
        assert all(value == first and hash(value) == hash(first) for value in again)
        with pytest.raises(AttributeError):
            first.rank = 7

    @CHECKS
    @given(data=st.data())
    def test_bonds_follow_the_pattern(self, data: st.DataObject) -> None:
        levels = data.draw(st.integers(1, 3))
        value = data.draw(factorizations(levels, self.factorization))
        bonds, pattern = value.bonds(levels), value.rank_pattern(levels)
        assert len(bonds) == len(pattern)
        assert all(isinstance(size, int) and size >= 1 for size in bonds)
        with pytest.raises(RankError):
            value.with_rank((*bonds, 2)).bonds(levels)

    @CHECKS
    @given(data=st.data())
    def test_shapes_and_parameters(self, data: st.DataObject) -> None:
        spec = data.draw(self.specs(), "spec")
        network = spec.network
        modes = {*network.expert_legs, INPUT, OUTPUT}
        assert modes <= {leg for factor in network.factors for leg in factor.legs}
        sizes = dict(zip(network.expert_legs, spec.experts, strict=True))
        sizes |= {INPUT: spec.in_features, OUTPUT: spec.out_features}
        names = [factor.name for factor in network.all_factors]
        assert len(set(names)) == len(names)
        for factor in network.all_factors:
            shape = spec.shapes[factor.name]
            assert len(shape) == len(factor.legs) == len(set(factor.legs))
            for leg, size in zip(factor.legs, shape, strict=True):
                assert size == sizes.setdefault(leg, size), "legs of one name have one size"
            # mode-major storage: no bond stands before a mode
            kinds = [leg in modes for leg in factor.legs]
            assert kinds == sorted(kinds, reverse=True), f"{factor.name} is not mode-major"
        # exactly one factor of a term meets the input; the bias takes its place for the constant 1
        assert ("bias" in names) == spec.bias
        for term in network.terms:
            (carrier,) = (factor for factor in term.factors if INPUT in factor.legs)
            assert any(OUTPUT in factor.legs for factor in term.factors)
            assert (term.bias is None) == (not spec.bias)
            if term.bias is not None:
                rest = tuple(leg for leg in carrier.legs if leg != INPUT)
                assert (term.bias.legs, term.bias.term) == (rest, carrier.term)
        bonds = [term.legs - modes for term in network.terms]
        assert sum(map(len, bonds)) == len(frozenset().union(*bonds)), "terms share no bond"
        stored = data.draw(factors(spec))
        assert spec.num_parameters == sum(array.size for array in stored.values())

    @CHECKS
    @given(data=st.data())
    def test_capacity_is_the_numerical_rank(self, data: st.DataObject) -> None:
        spec = data.draw(specs(self.factorization, bias=False, largest=7), "spec")
        weights = self.reconstruct(spec.factorization, data.draw(factors(spec)))
        count = prod(spec.experts)
        matrices = weights.reshape(count, spec.in_features, spec.out_features)
        assert {_rank(matrix) for matrix in matrices} == {spec.expert_rank}
        assert _rank(matrices.reshape(count, -1)) == spec.expert_span

    @pytest.mark.parametrize("levels", [1, 2, 3])
    @pytest.mark.parametrize("in_features", [3, 48])
    @pytest.mark.parametrize("uneven", [False, True])
    def test_weights_start_like_those_of_a_linear_layer(
        self, levels: int, in_features: int, uneven: bool
    ) -> None:
        """Entries of 𝒲, and biases, have mean 0 and variance 1/(3·in).

        Half of the variance is shared by all experts where all bonds are equally large. The
        statistic of every draw is one sample; their mean may be five standard errors off.
        """
        bonds = self.factorization.rank_pattern(levels)
        rank = tuple(3 + uneven * (index % 2) for index in range(len(bonds)))
        value = self.factorization.with_rank(rank)
        spec = LayerSpec(in_features, 4, (4, 3, 2)[:levels], value)
        rng = np.random.default_rng([levels, in_features])
        last = tuple(count - 1 for count in spec.experts)
        first = (0,) * levels
        means, squares, products, biases, common = [], [], [], [], []
        for _ in range(400):
            weights = self.reconstruct(value, self._initial(spec, "variance", rng))
            matrices = weights[..., :in_features, :]
            means.append(matrices.mean())
            squares.append(np.mean(matrices**2) * 3 * in_features)
            # experts that differ at every level share nothing but the common part
            products.append(np.mean(matrices[first] * matrices[last]) * 3 * in_features)
            rows = weights[..., in_features, :]
            biases.append(np.mean(rows**2) * 3 * in_features)
            common.append(np.mean(rows[first] * rows[last]) * 3 * in_features)
        _assert_mean(means, 0.0)
        _assert_mean(squares, 1.0)
        _assert_mean(biases, 1.0)
        if not uneven:
            _assert_mean(products, 0.5)
            _assert_mean(common, 0.5)

    @pytest.mark.parametrize("levels", [1, 2, 3])
    @pytest.mark.parametrize("scheme", ["variance", "paper"])
    def test_every_factor_is_initialized(self, levels: int, scheme: str) -> None:
        bonds = self.factorization.rank_pattern(levels)
        value = self.factorization.with_rank((3,) * len(bonds))
        spec = LayerSpec(5, 4, (3, 2, 4)[:levels], value)
        drawn = self._initial(spec, scheme, np.random.default_rng(0))
        assert {name: array.shape for name, array in drawn.items()} == dict(spec.shapes)
        weights = self.reconstruct(value, drawn)
        assert np.all(np.isfinite(weights))
        assert np.any(weights != 0)

    @CHECKS
    @given(data=st.data())
    def test_tensorly_layouts_round_trip(self, data: st.DataObject) -> None:
        spec = data.draw(self.specs(), "spec")
        stored = data.draw(factors(spec))
        try:
            layout = to_tensorly(spec.factorization, stored)
        except NotImplementedError:
            pytest.skip("TensorLy has no such decomposition")
        back = from_tensorly(spec.factorization, layout, bias=spec.bias)
        assert set(back) == set(stored)
        for name, array in back.items():
            np.testing.assert_array_equal(array, stored[name])
            assert not np.shares_memory(array, stored[name])

    @CHECKS
    @given(data=st.data())
    def test_weights_are_linear_in_each_factor(self, data: st.DataObject) -> None:
        """The oracle itself: scaling one factor scales its term of 𝒲, or of the bias row."""
        spec = data.draw(self.specs(), "spec")
        stored = data.draw(factors(spec))
        scale = np.random.default_rng(data.draw(seeds())).uniform(2, 3)
        name = data.draw(st.sampled_from(sorted(stored)))
        weights = self.reconstruct(spec.factorization, stored)
        scaled = self.reconstruct(spec.factorization, {**stored, name: stored[name] * scale})
        without = self.reconstruct(spec.factorization, {**stored, name: 0.0 * stored[name]})
        terms = spec.network.terms
        biases = [term.bias.name for term in terms if term.bias is not None]
        rows = slice(None)
        if name in biases:
            rows = slice(spec.in_features, None)
        elif spec.bias and name in [term.input_factor.name for term in terms]:
            rows = slice(spec.in_features)
        if len(terms) == 1:
            assert not np.any(without[..., rows, :])
        want = weights.copy()
        want[..., rows, :] += (scale - 1.0) * (weights - without)[..., rows, :]
        assert_close(scaled, want, np.max(np.abs(want)), 1e-10)

    def _initial(
        self, spec: LayerSpec, scheme: str, rng: np.random.Generator
    ) -> Mapping[str, NDArray]:
        return {
            name: draw_factor(
                initializer,
                spec.shapes[name],
                self.backend,
                rng.standard_normal,
                lambda shape: rng.uniform(-1.0, 1.0, shape),
            )
            for name, initializer in spec.initializers(scheme).items()
        }


def _rank(matrix: NDArray) -> int:
    values = np.linalg.svd(matrix, compute_uv=False)
    return int(np.sum(values > values[0] * 1e-11))


def _assert_mean(samples: list[float], expected: float) -> None:
    error = float(np.std(samples)) / sqrt(len(samples))
    assert error < 0.2 * max(abs(expected), 1.0), "too few draws to tell"
    found = float(np.mean(samples))
    assert abs(found - expected) <= 5 * error, f"{found:.4f} ± {error:.4f}, not {expected}"
