"""The contract of a backend: subclass it, name the adapter, run pytest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe import functional
from tensormoe._spec import LayerSpec
from tensormoe.backend import Array, Backend, _registry
from tensormoe.errors import BackendError
from tensormoe.factorizations import (
    CP,
    BaseDelta,
    Dense,
    Hadamard,
    LowRank,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.functional import LayerConfig
from tensormoe.gates import Gate, Statistics, activate, activate_vjp
from tensormoe.testing._layer_checks import CHECKS, LayerChecks
from tensormoe.testing._strategies import dtypes, factors, gates, inputs, seeds

NDArray = npt.NDArray[Any]
Convert = Callable[[Any], Any]
Back = Callable[[Sequence[Any]], list[NDArray]]

# a gate runs the same operations everywhere: only their rounding differs
_GATE_TOLERANCES = {"float32": 1e-5, "float64": 1e-11}


class BackendContract(LayerChecks):
    """Everything that the library relies on in a backend, as tests.

    The adapter must be registered (:mod:`tensormoe.backend` says how), so that functions of arrays
    alone find it. A subclass gives the adapter and the way from NumPy and back::

        class TestMyBackend(BackendContract):
            backend = my_adapter.BACKEND

            def from_numpy(self, array):
                return my_library.asarray(array)

            def to_numpy(self, array):
                return my_library.to_numpy(array)

    Attributes:
        backend: the adapter under test.
        dtypes: floating-point types to test; leave out those that the library lacks.
    """

    def check_inputs_untouched(self, before: NDArray, array: Array) -> None:
        """Assert that an operand still has the values it was made of."""
        np.testing.assert_array_equal(self.to_numpy(array), before)

    def test_the_adapter_is_found(self) -> None:
        array = self.from_numpy(np.ones((2, 3), self.dtypes[0]))
        assert isinstance(self.backend, Backend), "a member of tensormoe.backend.Backend is missing"
        assert _registry.get_backend(self.backend.name) is self.backend
        assert _registry.backend_of(array, array) is self.backend
        assert self.backend.name in _registry.known_backends()
        assert self.backend.name in _registry.available_backends()
        assert self.backend.owns(array)
        assert not self.backend.owns([1.0])
        assert isinstance(self.backend.eager, bool)
        assert self.backend.row_block_bytes is None or self.backend.row_block_bytes > 0

    def test_another_librarys_arrays_are_refused(self) -> None:
        array = self.from_numpy(np.ones(3, self.dtypes[0]))
        with pytest.raises(BackendError, match="one library"):
            _registry.backend_of(array, [1.0])

    @CHECKS
    @given(data=st.data())
    def test_round_trip_through_numpy_and_bytes(self, data: st.DataObject) -> None:
        array = self._array(data)
        stored = self.from_numpy(array)
        np.testing.assert_array_equal(self.to_numpy(stored), array, strict=True)
        name, shape, content = self.backend.to_bytes(stored)
        little = array.astype(array.dtype.newbyteorder("<"))
        assert (name, tuple(shape), content) == (array.dtype.name, array.shape, little.tobytes())
        again = self.backend.from_bytes(name, shape, content)
        np.testing.assert_array_equal(self.to_numpy(again), array, strict=True)
        constant = self.to_numpy(self.backend.stop_gradient(stored))
        np.testing.assert_array_equal(constant, array, strict=True)

    @CHECKS
    @given(data=st.data())
    def test_matmul(self, data: st.DataObject) -> None:
        batch, rows, inner, columns = (data.draw(st.integers(0, 4)) for _ in range(4))
        dtype = data.draw(dtypes(self.dtypes))
        rng = np.random.default_rng(data.draw(seeds()))
        leads = [((), ()), ((batch,), ()), ((), (batch,)), ((batch,), (batch,))]
        leads += [((batch, 1), (2,)), ((3, 1, batch), (1, 2, 1))]
        before, after = data.draw(st.sampled_from(leads))
        left = rng.standard_normal((*before, rows, inner)).astype(dtype)
        right = rng.standard_normal((*after, inner, columns)).astype(dtype)
        given = self.from_numpy(left), self.from_numpy(right)
        self._assert_equals(self.backend.matmul(*given), left @ right, dtype)
        self.check_inputs_untouched(left, given[0])
        # and of operands that are views
        flipped = self.from_numpy(np.moveaxis(left, -1, -2).copy())
        axes = (*range(left.ndim - 2), left.ndim - 1, left.ndim - 2)
        view = self.backend.permute(flipped, axes)
        self._assert_equals(self.backend.matmul(view, given[1]), left @ right, dtype)

    @CHECKS
    @given(data=st.data())
    def test_views_and_sums(self, data: st.DataObject) -> None:
        array = self._array(data)
        stored, dtype = self.from_numpy(array), array.dtype.name
        order = tuple(data.draw(st.permutations(range(array.ndim))))
        turned = self.backend.permute(stored, order)
        np.testing.assert_array_equal(self.to_numpy(turned), array.transpose(order), strict=True)
        solid = self.backend.contiguous(turned)
        np.testing.assert_array_equal(self.to_numpy(solid), array.transpose(order), strict=True)
        shapes = [array.shape, (array.size,), (*array.shape, 1), (1, *array.shape)]
        shapes += [(-1,), (-1, 1)] if array.size else []
        shape = data.draw(st.sampled_from(shapes))
        # of a permuted array too: reshape is row-major in the legs' order, not in memory's
        for source, want in ((stored, array), (turned, array.transpose(order))):
            got = self.to_numpy(self.backend.reshape(source, shape))
            np.testing.assert_array_equal(got, want.reshape(shape), strict=True)
        axes = tuple(k for k in range(array.ndim) if data.draw(st.booleans()))
        if axes:
            total = self.backend.sum(stored, axes)
            self._assert_equals(total, np.sum(array, axis=axes), dtype)
        self.check_inputs_untouched(array, stored)

    @CHECKS
    @given(data=st.data())
    def test_take_and_scatter_add_are_transposes(self, data: st.DataObject) -> None:
        array = self._array(data, least_axes=1)
        axis = data.draw(st.integers(0, array.ndim - 1))
        size = array.shape[axis]
        rng = np.random.default_rng(data.draw(seeds()))
        shape = tuple(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=2)))
        if size == 0:
            shape = (0, *shape[1:])
        indices = rng.integers(max(size, 1), size=shape)
        stored, places = self.from_numpy(array), self.from_numpy(indices)
        picked = self.backend.take(stored, places, axis)
        want = np.take(array, indices, axis=axis)
        np.testing.assert_array_equal(self.to_numpy(picked), want, strict=True)
        values = rng.standard_normal(want.shape).astype(array.dtype)
        added = self.backend.scatter_add(self.from_numpy(values), places, axis, size)
        one_hot = np.eye(max(size, 1))[:size, indices.ravel()]
        flat = values.reshape(*array.shape[:axis], indices.size, *array.shape[axis + 1 :])
        total = np.moveaxis(np.tensordot(one_hot, flat, axes=(1, axis)), 0, axis)
        self._assert_equals(added, total, array.dtype.name)
        self.check_inputs_untouched(indices, places)
        self.check_inputs_untouched(array, stored)

    @CHECKS
    @given(data=st.data())
    def test_while_loop_ends_below_its_tolerance(self, data: st.DataObject) -> None:
        rows, dtype = data.draw(st.integers(1, 6)), data.draw(dtypes(self.dtypes))
        most = data.draw(st.integers(0, 9), "max steps")
        bound = data.draw(st.sampled_from([0.0, 0.01]), "tolerance")
        rng = np.random.default_rng(data.draw(seeds()))
        squares = rng.uniform(0.5, 4.0, (rows, 1)).astype(dtype)
        given, first = self.from_numpy(squares), self.from_numpy(np.full_like(squares, 2.0))

        def step(root: Array, last: Array) -> tuple[tuple[Array, Array], Array]:
            following = (root + given / root) * 0.5
            return (following, root), self.backend.namespace.abs(following - root)

        found = self.backend.while_loop(step, (first, first), most, bound)
        root, last = self.all_to_numpy(found)
        assert (root.dtype.name, root.shape) == (last.dtype.name, last.shape) == (dtype, (rows, 1))
        want = [np.full_like(squares, 2.0)]
        while len(want) <= most:
            want.append((want[-1] + squares / want[-1]) * want[-1].dtype.type(0.5))
        tolerance = {"float32": 1e-5, "float64": 1e-12}.get(dtype, 1e-2)
        for row in range(rows):
            # rows are independent, so that each may end by itself
            values = [float(each[row, 0]) for each in want]
            changes = [abs(after - before) for before, after in pairwise(values)]
            least = next((k for k, change in enumerate(changes, start=1) if change <= bound), most)
            ends = [(values[k], values[max(k - 1, 0)]) for k in range(least, most + 1)]
            got = (float(root[row, 0]), float(last[row, 0]))
            assert any(np.allclose(got, end, rtol=0, atol=tolerance) for end in ends), (got, ends)

    @CHECKS
    @given(data=st.data())
    def test_concat(self, data: st.DataObject) -> None:
        array = self._array(data, least_axes=1)
        parts = [array[:1], array[1:], array[:0]]
        joined = self.backend.namespace.concat([self.from_numpy(part) for part in parts])
        np.testing.assert_array_equal(self.to_numpy(joined), array, strict=True)

    @CHECKS
    @given(data=st.data())
    def test_gates_equal_those_of_numpy(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, 12), "experts")
        gate: Gate = data.draw(gates((count,), batch_norm=True), "gate")
        rows = data.draw(st.integers(2 if gate.normalization == "batch" else 0, 6), "rows")
        dtype = data.draw(dtypes([d for d in self.dtypes if d in _GATE_TOLERANCES]), "dtype")
        rng = np.random.default_rng(data.draw(seeds()))
        # steps of a half: ties are common
        logits = (rng.integers(-6, 6, (rows, count)) * 0.5).astype(dtype)
        if data.draw(st.booleans(), "free"):
            logits = rng.standard_normal((rows, count)).astype(dtype)
        kept = Statistics(*(np.abs(rng.standard_normal((2, count))) + 0.5).astype(dtype))
        training = data.draw(st.booleans(), "training")
        upstream = rng.standard_normal((rows, count)).astype(dtype)
        found = []
        for backend, convert, back in self._beside_numpy():
            statistics = Statistics(convert(kept.mean), convert(kept.variance))
            given = convert(logits)
            result = activate(
                gate, given, statistics=statistics, training=training, backend=backend
            )
            gradient = activate_vjp(
                gate,
                given,
                result.coefficients,
                convert(upstream),
                statistics=statistics,
                training=training,
                backend=backend,
            )
            assert result.statistics is not None
            parts = (result.coefficients, result.statistics.mean, result.statistics.variance)
            found.append(back([*parts, gradient]))
            np.testing.assert_array_equal(back([given])[0], logits)
        tolerance = _GATE_TOLERANCES[dtype]
        for got, want in zip(*found, strict=True):
            assert got.dtype == want.dtype
            # gradients of nearly equal logits are large, and so is their rounding
            size = max(1.0, float(np.max(np.abs(want), initial=0.0)))
            np.testing.assert_allclose(got, want, rtol=0, atol=10 * tolerance * size)

    @CHECKS
    @given(data=st.data())
    def test_routing_equals_that_of_numpy(self, data: st.DataObject) -> None:
        spec = data.draw(self.specs(), "spec")
        gate = data.draw(gates(spec.experts), "gate")
        dtype = data.draw(dtypes([d for d in self.dtypes if d in _GATE_TOLERANCES]), "dtype")
        config = LayerConfig(spec, gate)
        rng = np.random.default_rng(data.draw(seeds()))
        stored = {
            f"factors.{name}": array for name, array in data.draw(factors(spec, dtype)).items()
        }
        for name, shape in config.parameter_shapes().items():
            if name.startswith("gate."):
                stored[name] = rng.standard_normal(shape).astype(dtype)
        x = data.draw(inputs(spec.in_features, (data.draw(st.integers(1, 5)),), dtype))
        upstream = [rng.standard_normal((len(x), n)).astype(dtype) for n in spec.experts]
        found = []
        for backend, convert, back in self._beside_numpy():
            parameters = {name: convert(array) for name, array in stored.items()}
            given = convert(x)
            routed = functional.route(config, parameters, given, backend, keep=True)
            by_input, named = functional.gate_vjp(
                config, parameters, given, routed, [convert(u) for u in upstream], backend
            )
            parts = [*routed.coefficients, by_input, *(named[name] for name in sorted(named))]
            found.append(back(parts))
        # matrix products of other libraries round otherwise, and logits may stand close together
        tolerance = 100 * _GATE_TOLERANCES[dtype]
        for got, want in zip(*found, strict=True):
            assert got.dtype == want.dtype
            size = max(1.0, float(np.max(np.abs(want), initial=0.0)))
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * size)

    @pytest.mark.parametrize("init", ["variance", "paper"])
    def test_layers_are_drawn(self, init: str) -> None:
        rng = np.random.default_rng(0)
        dtype = self.dtypes[0]
        for spec in _some_specs():
            config = LayerConfig(spec, Gate(bias=True))
            drawn = functional.initialize(
                config,
                self.backend,
                lambda shape: self.from_numpy(rng.standard_normal(shape).astype(dtype)),
                lambda shape: self.from_numpy(rng.uniform(-1, 1, shape).astype(dtype)),
                lambda shape: self.from_numpy(np.zeros(shape, dtype)),
                init,
            )
            shapes = {name: self.to_numpy(array).shape for name, array in drawn.items()}
            assert shapes == config.parameter_shapes()
            assert {self.to_numpy(array).dtype.name for array in drawn.values()} == {dtype}
            assert all(self.backend.owns(array) for array in drawn.values())

    def _beside_numpy(self) -> tuple[tuple[Backend, Convert, Back], ...]:
        """The adapter under test and NumPy's, each with the way from NumPy and back."""
        return (
            (self.backend, self.from_numpy, self.all_to_numpy),
            (_registry.get_backend("numpy"), np.asarray, lambda arrays: [*map(np.asarray, arrays)]),
        )

    def _array(self, data: st.DataObject, least_axes: int = 0) -> NDArray:
        shape = data.draw(st.lists(st.integers(0, 4), min_size=least_axes, max_size=4))
        dtype = data.draw(dtypes(self.dtypes))
        rng = np.random.default_rng(data.draw(seeds()))
        return rng.standard_normal(shape).astype(dtype)

    def _assert_equals(self, got: Array, want: NDArray, dtype: str) -> None:
        found = self.to_numpy(got)
        assert found.dtype.name == dtype
        assert found.shape == want.shape
        tolerance = 1e-5 if dtype == "float32" else 1e-12 if dtype == "float64" else 1e-1
        np.testing.assert_allclose(found, want, rtol=tolerance, atol=tolerance)


def _some_specs() -> list[LayerSpec]:
    kinds = (
        CP(3),
        TensorRing(3),
        TensorTrain(2),
        Tucker(2),
        LowRank(2),
        SharedBasis(3),
        BaseDelta(2),
        SharedDelta(2),
        Hadamard(),
        Dense(),
    )
    return [LayerSpec(5, 4, (3, 2), kind) for kind in kinds]
