"""Tests that every layer of every factorization passes on every backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensormoe import functional
from tensormoe._spec import LayerSpec
from tensormoe.backend import Array
from tensormoe.execution import execute
from tensormoe.factorizations import Factorization
from tensormoe.functional import LayerConfig
from tensormoe.gates import TopK
from tensormoe.testing import _oracle
from tensormoe.testing._comparison import TOLERANCES, assert_close, assert_output
from tensormoe.testing._oracle import reference_output
from tensormoe.testing._strategies import coefficients, dtypes, factors, inputs, seeds, specs

NDArray = npt.NDArray[Any]

CHECKS = settings(
    # every example plans a new layer and compares whole arrays
    max_examples=max(settings().max_examples // 2, 1),
    deadline=None,
    # a test of a contract is one function that several classes inherit
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)
"""Settings of every test of a contract; half as many examples as the active profile says."""


class Draw(Protocol):
    """``draw`` of :func:`hypothesis.strategies.data`."""

    def draw(self, strategy: st.SearchStrategy[Any], label: Any = None) -> Any:
        """An example of ``strategy``."""


@dataclass(frozen=True, eq=False)
class Case:
    """A layer, its values in NumPy, and what its output must be."""

    spec: LayerSpec
    factors: Mapping[str, NDArray]
    x: NDArray
    coefficients: Sequence[NDArray]

    @property
    def dtype(self) -> str:
        """Name of the dtype of all arrays."""
        return str(self.x.dtype.name)


class LayerChecks:
    """Tests that :class:`BackendContract` and :class:`FactorizationContract` share."""

    backend: Any
    """The adapter under test, a :class:`tensormoe.backend.Backend`."""

    dtypes: ClassVar[Sequence[str]] = ("float32", "float64")
    """Floating-point types to test, of those in :data:`TOLERANCES`."""

    def from_numpy(self, array: NDArray) -> Array:
        """``array`` as one of the backend's library, of the same dtype."""
        raise NotImplementedError("say how a NumPy array becomes one of your library")

    def to_numpy(self, array: Array) -> NDArray:
        """An array of the backend's library as NumPy's."""
        return np.asarray(array)

    def all_to_numpy(self, arrays: Sequence[Array]) -> list[NDArray]:
        """Several results of one call; a lazy library may compute them together."""
        return [self.to_numpy(array) for array in arrays]

    def specs(self) -> st.SearchStrategy[LayerSpec]:
        """The layers to test."""
        return specs()

    def reconstruct(self, factorization: Factorization, factors: Mapping[str, Any]) -> NDArray:
        """𝒲 (experts…, in, out), or (experts…, in + 1, out) with the bias as its last row."""
        return _oracle.reconstruct(factorization, factors)

    def draw_case(self, data: Draw, spec: LayerSpec | None = None) -> Case:
        """A layer and its values."""
        spec = data.draw(self.specs(), "spec") if spec is None else spec
        dtype = data.draw(dtypes(self.dtypes), "dtype")
        batch = data.draw(st.integers(0, 7), "batch")
        return Case(
            spec,
            data.draw(factors(spec, dtype)),
            data.draw(inputs(spec.in_features, (batch,), dtype)),
            data.draw(coefficients(spec.experts, (batch,), dtype)),
        )

    def run(
        self,
        case: Case,
        *,
        factors: Mapping[str, NDArray] | None = None,
        coefficients: Sequence[NDArray | TopK] | None = None,
    ) -> NDArray:
        """The output of a case, or of one with other values."""
        routing = case.coefficients if coefficients is None else coefficients
        result = functional.apply_experts(
            LayerConfig(case.spec, None),
            self._parameters(case.factors if factors is None else factors),
            self.from_numpy(case.x),
            [self._routing(each) for each in routing],
            self.backend,
        )
        found = self.to_numpy(result)
        assert found.dtype.name == case.dtype, f"a {case.dtype} layer returned {found.dtype.name}"
        return found

    def assert_output(self, output: NDArray, case: Case, **other: Any) -> None:
        """Assert that an output is that of a case, or of one with other values."""
        values = {"factors": case.factors, "coefficients": case.coefficients, "x": case.x} | other
        assert_output(
            output,
            case.spec.factorization,
            **values,
            tolerance=TOLERANCES[case.dtype],
            reconstruct=self.reconstruct,
        )

    @CHECKS
    @given(data=st.data())
    def test_factorized_equals_unfactorized(self, data: st.DataObject) -> None:
        case = self.draw_case(data)
        self.assert_output(self.run(case), case)

    @CHECKS
    @given(data=st.data())
    def test_gradients_are_differences_of_the_oracle(self, data: st.DataObject) -> None:
        """A layer is affine in each operand, so that finite differences are exact."""
        case = self.draw_case(data)
        output, pull = functional.experts_vjp(
            LayerConfig(case.spec, None),
            self._parameters(case.factors),
            self.from_numpy(case.x),
            [self.from_numpy(each) for each in case.coefficients],
            self.backend,
        )
        self.assert_output(self.to_numpy(output), case)
        rng = np.random.default_rng(data.draw(seeds()))
        cotangent = rng.standard_normal(output.shape).astype(case.dtype)
        gradients = pull(self.from_numpy(cotangent))
        values = self.all_to_numpy([*gradients.values()])
        found = dict(zip(gradients, values, strict=True))
        operands: dict[str, NDArray] = {f"factors.{name}": a for name, a in case.factors.items()}
        operands |= {f"coefficients_{e}": a for e, a in enumerate(case.coefficients)}
        operands["x"] = case.x
        assert set(found) == set(operands)

        def oracle(values: Mapping[str, NDArray]) -> NDArray:
            named = {k.partition(".")[2]: v for k, v in values.items() if k.startswith("factors.")}
            weights = self.reconstruct(case.spec.factorization, named)
            by_level = [values[f"coefficients_{e}"] for e in range(case.spec.levels)]
            return reference_output(weights, by_level, values["x"])

        doubles = {name: np.asarray(array, dtype=np.float64) for name, array in operands.items()}
        sizes = {name: np.abs(array) for name, array in doubles.items()}
        for name, gradient in found.items():
            direction = rng.standard_normal(gradient.shape)
            assert gradient.dtype.name == case.dtype, f"{name}: {gradient.dtype.name}"
            assert gradient.shape == operands[name].shape
            moved = oracle({**doubles, name: doubles[name] + direction}) - oracle(doubles)
            bound = oracle({**sizes, name: sizes[name] + np.abs(direction)})
            assert_close(
                np.sum(gradient * direction),
                np.sum(cotangent * moved),
                np.sum(np.abs(cotangent) * bound),
                TOLERANCES[case.dtype],
                f"the derivative by {name}",
            )

    @CHECKS
    @given(data=st.data())
    def test_experts_permute_together(self, data: st.DataObject) -> None:
        case = self.draw_case(data)
        level = data.draw(st.integers(0, case.spec.levels - 1), "level")
        order = np.array(data.draw(st.permutations(range(case.spec.experts[level])), "order"))
        leg = case.spec.network.expert_legs[level]
        moved = dict(case.factors)
        for factor in case.spec.network.all_factors:
            if leg in factor.legs:
                axis = factor.legs.index(leg)
                moved[factor.name] = np.take(moved[factor.name], order, axis=axis)
        permuted = list(case.coefficients)
        permuted[level] = permuted[level][..., order]
        self.assert_output(self.run(case, factors=moved, coefficients=permuted), case)
        # one without the other is another mixture, and the oracle says which
        alone = self.run(case, coefficients=permuted)
        self.assert_output(alone, case, coefficients=permuted)
        if not np.array_equal(permuted[level], case.coefficients[level]):
            assert not np.array_equal(alone, self.run(case))
        self.assert_output(self.run(case, factors=moved), case, factors=moved)

    @CHECKS
    @given(data=st.data())
    def test_prepared_layers_give_the_same(self, data: st.DataObject) -> None:
        case = self.draw_case(data)
        parameters = self._parameters(case.factors)
        program, arrays = functional.prepare(LayerConfig(case.spec, None), parameters, self.backend)
        weights = {operand.name for operand in program.operands if operand.role == "factor"}
        assert set(arrays) == weights
        assert all(step.batched for step in program.steps)
        made = {f"coefficients_{e}": self.from_numpy(a) for e, a in enumerate(case.coefficients)}
        named = {**made, **arrays, "x": self.from_numpy(case.x)}
        listed = [named[operand.name] for operand in program.operands]
        (result,), _ = execute(program, listed, self.backend)
        self.assert_output(self.to_numpy(result), case)

    @CHECKS
    @given(data=st.data())
    def test_indexed_coefficients_equal_dense_ones(self, data: st.DataObject) -> None:
        case = self.draw_case(data)
        k = data.draw(st.integers(1, min(case.spec.experts)), "k")
        rng = np.random.default_rng(data.draw(seeds()))
        batch = len(case.x)
        chosen, dense = [], []
        for count in case.spec.experts:
            indices = rng.permuted(np.tile(np.arange(count), (batch, 1)), axis=1)[:, :k]
            values = rng.standard_normal((batch, k)).astype(case.dtype)
            wide = np.zeros((batch, count), case.dtype)
            np.put_along_axis(wide, indices, values, axis=1)
            chosen.append(TopK(indices, values))
            dense.append(wide)
        self.assert_output(self.run(case, coefficients=chosen), case, coefficients=dense)
        # and in the backward pass: the chosen rows get the gradient, the others none
        config, x = LayerConfig(case.spec, None), self.from_numpy(case.x)
        parameters = self._parameters(case.factors)
        by_form = []
        for form in (chosen, dense):
            routed = [self._routing(each) for each in form]
            output, pull = functional.experts_vjp(config, parameters, x, routed, self.backend)
            by_form.append(pull(output))
        self._assert_same_gradients(by_form[0], by_form[1], case)
        for level, each in enumerate(chosen):
            name = f"coefficients_{level}"
            sparse, full = self.all_to_numpy([gradients[name] for gradients in by_form])
            picked = np.take_along_axis(full, each.indices, axis=1)
            self._assert_near(sparse, picked, TOLERANCES[case.dtype], name)

    @CHECKS
    @given(data=st.data())
    def test_indexed_inputs_equal_one_hot_ones(self, data: st.DataObject) -> None:
        case = self.draw_case(data)
        rng = np.random.default_rng(data.draw(seeds()))
        ids = rng.integers(case.spec.in_features, size=len(case.x))
        one_hot = np.eye(case.spec.in_features, dtype=case.dtype)[ids]
        parameters = self._parameters(case.factors)
        by_form = []
        for config, x in (
            (LayerConfig(case.spec, None, indexed_input=True), ids),
            (LayerConfig(case.spec, None), one_hot),
        ):
            made: list[Any] = [self.from_numpy(each) for each in case.coefficients]
            output, pull = functional.experts_vjp(
                config, parameters, self.from_numpy(x), made, self.backend
            )
            self.assert_output(self.to_numpy(output), case, x=one_hot)
            by_form.append(pull(output))
        assert "x" not in by_form[0], "integer ids have no gradient"
        self._assert_same_gradients(by_form[0], by_form[1], case)

    @CHECKS
    @given(data=st.data())
    def test_chunks_give_the_same(self, data: st.DataObject) -> None:
        case = self.draw_case(data)
        size = data.draw(st.integers(1, max(len(case.x), 1)), "chunk")
        program = LayerConfig(case.spec, None).regimes.program(len(case.x))
        parts = []
        for start in range(0, max(len(case.x), 1), size):
            part = {"x": case.x[start : start + size]} | {
                f"coefficients_{e}": a[start : start + size]
                for e, a in enumerate(case.coefficients)
            }
            named = {**case.factors, **part}
            arrays = [self.from_numpy(named[operand.name]) for operand in program.operands]
            parts.append(execute(program, arrays, self.backend)[0][0])
        self.assert_output(self.to_numpy(self.backend.namespace.concat(parts, axis=0)), case)

    @CHECKS
    @given(data=st.data())
    def test_explicit_weights_equal_the_oracle(self, data: st.DataObject) -> None:
        case = self.draw_case(data)
        config, parameters = LayerConfig(case.spec, None), self._parameters(case.factors)
        tolerance = TOLERANCES[case.dtype]
        want = self.reconstruct(case.spec.factorization, case.factors)
        sizes = {name: np.abs(array) for name, array in case.factors.items()}
        bound = self.reconstruct(case.spec.factorization, sizes)
        rows = case.spec.in_features
        index = tuple(data.draw(st.integers(0, count - 1)) for count in case.spec.experts)
        for (matrix, bias), place in (
            (functional.materialize(config, parameters, self.backend), ()),
            (functional.expert_weight(config, parameters, index, self.backend), index),
        ):
            full, most = want[place], bound[place]
            assert_close(
                self.to_numpy(matrix), full[..., :rows, :], most[..., :rows, :], tolerance, "𝒲"
            )
            assert (bias is None) == (not case.spec.bias)
            if bias is not None:
                assert_close(
                    self.to_numpy(bias), full[..., rows, :], most[..., rows, :], tolerance, "bias"
                )

    def _parameters(self, factors: Mapping[str, NDArray]) -> dict[str, Array]:
        return {f"factors.{name}": self.from_numpy(array) for name, array in factors.items()}

    def _routing(self, given: NDArray | TopK) -> Any:
        if isinstance(given, TopK):
            return TopK(self.from_numpy(given.indices), self.from_numpy(given.values))
        return self.from_numpy(given)

    def _assert_same_gradients(
        self, left: Mapping[str, Array], right: Mapping[str, Array], case: Case
    ) -> None:
        keys = [f"factors.{name}" for name in case.factors]
        values = self.all_to_numpy([side[key] for key in keys for side in (left, right)])
        for key, got, want in zip(keys, values[::2], values[1::2], strict=True):
            self._assert_near(got, want, 10 * TOLERANCES[case.dtype], key)

    @staticmethod
    def _assert_near(got: NDArray, want: NDArray, tolerance: float, what: str) -> None:
        """Assert equality relative to the largest entry: two runs of the same sums."""
        size = max(float(np.max(np.abs(want), initial=0.0)), 1.0)
        assert_close(got, want, size, 10 * tolerance, what)
