"""Costs: the papers' closed forms, a count of executed arrays, and measured memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe import CP, Dense, Gate, Hadamard, LayerSpec, TensorRing, TensorTrain, Tucker
from tensormoe.execution import execute
from tensormoe.planning import Program, Routing, plan_regimes, reverse
from tensormoe.testing import specs
from tensormoe_numpy import BACKEND, MuMoE

# Closed forms: multiply-adds an input without bias and gate (Oldfield et al. 2024, sections 3.2
# and 3.3, appendix B), each of them two FLOPs.

I = O = 768  # noqa: E741
N = 512


@pytest.mark.parametrize("batch", [1, 64, 1024])
@pytest.mark.parametrize(
    ("factorization", "experts", "multiply_adds", "elementwise"),
    [
        (CP(256), (N,), 256 * (N + I + O), 256),
        (CP(256), (16, 32), 256 * (16 + 32 + I + O), 2 * 256),
        (CP(256), (8, 8, 8), 256 * (8 + 8 + 8 + I + O), 3 * 256),
        (TensorRing((4, 4, 90)), (N,), 4 * N * 4 + 4 * I * 90 + 4 * 4 * 90 + 90 * O * 4, 0),
        (
            TensorRing((4, 5, 6, 70)),
            (32, 16),
            4 * 32 * 5 + 5 * 16 * 6 + 4 * 5 * 6 + 6 * I * 70 + 4 * 6 * 70 + 70 * O * 4,
            0,
        ),
        (TensorTrain((16, 90)), (N,), N * 16 + 16 * I * 90 + 16 * 90 + 90 * O, 0),
        (Hadamard(), (N,), O * (N + I), O),
        (Hadamard(), (16, 32), O * (16 + 32 + I), 2 * O),
    ],
    ids=str,
)
def test_closed_forms(factorization, experts, multiply_adds, elementwise, batch) -> None:
    cost = LayerSpec(I, O, experts, factorization, bias=False).cost(batch)
    assert cost.matmul_flops == 2 * batch * multiply_adds
    assert cost.elementwise_flops == batch * elementwise


@pytest.mark.parametrize("batch", [1, 64])
def test_dense_experts_cost_what_the_soft_mixture_costs(batch: int) -> None:
    """N·I·O for all experts' matrices, and N·O to mix the results."""
    cost = LayerSpec(96, 80, 64, Dense(), bias=False).cost(batch)
    assert cost.matmul_flops == 2 * batch * (64 * 96 * 80 + min(64 * 80, 64 * 96, 96 * 80))


def test_the_gate_adds_its_projection() -> None:
    """I·N a level, on matrix products; a bias adds N."""
    spec = LayerSpec(I, O, (32, 16), CP(64))
    plain, gated = spec.cost(10), spec.cost(10, gate="entmax")
    assert gated.matmul_flops - plain.matmul_flops == 2 * 10 * I * (32 + 16)
    assert gated.parameters - plain.parameters == I * (32 + 16)
    assert spec.cost(10, gate=Gate(bias=True)).parameters - gated.parameters == 32 + 16


def test_a_bias_adds_no_matrix_product() -> None:
    for factorization in (CP(64), TensorRing((4, 4, 30)), TensorTrain(16), Hadamard()):
        with_bias = LayerSpec(I, O, 64, factorization).cost(64)
        without = LayerSpec(I, O, 64, factorization, bias=False).cost(64)
        assert with_bias.matmul_flops == without.matmul_flops
        assert with_bias.elementwise_flops > without.elementwise_flops


# An independent count: the arrays count themselves while a program runs.


class Counted(np.ndarray):
    """An array whose ufuncs add their work to a tally, by the shapes that NumPy sees."""

    tally: dict[str, int]

    def __array_ufunc__(self, ufunc: Any, method: str, *operands: Any, **options: Any) -> Any:
        plain = [each.view(np.ndarray) if isinstance(each, Counted) else each for each in operands]
        if options.get("out"):
            options["out"] = tuple(each.view(np.ndarray) for each in options["out"])
        result = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            self.tally["matmul"] += 2 * result.size * plain[0].shape[-1]
        elif method == "at":
            self.tally["elementwise"] += plain[2].size
        elif method == "reduce":
            self.tally["elementwise"] += plain[0].size
        else:
            assert ufunc in (np.add, np.multiply), ufunc
            self.tally["elementwise"] += result.size
        return None if result is None else counted(result, self.tally)


def counted(array: np.ndarray, tally: dict[str, int]) -> np.ndarray:
    if array.dtype.kind == "i":
        return array  # what is done to find a place is no arithmetic of the layer
    found = array.view(Counted)
    found.tally = tally
    return found


class CountingBackend(type(BACKEND)):  # type: ignore[misc]
    """NumPy, with every result a counted array."""

    def __init__(self) -> None:
        self.__dict__.update(vars(BACKEND))
        self.tally = {"matmul": 0, "elementwise": 0}

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in ("reshape", "permute", "contiguous", "take", "scatter_add", "sum", "matmul"):
            return lambda *arguments: counted(found(*arguments), self.tally)
        return found

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        return counted(np.ones(shape), self.tally)


def executed(program: Program, batch: int, keep: tuple[int, ...] = ()) -> tuple[dict, Any, Any]:
    """The work that NumPy did for a program on a batch."""
    backend = CountingBackend()
    arrays = []
    for operand in program.operands:
        shape = tuple(batch if leg == "b" else program.sizes[leg] for leg in operand.legs)
        if operand.role == "indices":
            arrays.append(np.zeros(shape, dtype=int))
        else:
            arrays.append(backend.array(shape))
    outputs, kept = execute(program, arrays, backend, keep)
    return backend.tally, outputs, kept


def predicted(steps: Any) -> dict[str, int]:
    return {
        "matmul": sum(step.matmul_flops for step in steps),
        "elementwise": sum(step.elementwise_flops for step in steps),
    }


@given(data=st.data())
def test_executed_arrays_are_what_was_predicted(data: st.DataObject) -> None:
    spec = data.draw(specs(), "spec")
    batch = data.draw(st.integers(1, 9), "batch")
    cost = spec.cost(batch)
    program = spec.plan(batch).program
    assert executed(program, batch)[0] == predicted(cost.steps)
    back = reverse(program).program
    both = spec.cost(batch, training=True)
    assert executed(back, batch)[0] == predicted(both.steps[len(cost.steps) :])
    assert cost.parameters == sum(prod(shape) for shape in spec.shapes.values())


@given(data=st.data())
def test_executed_gathers_are_what_was_predicted(data: st.DataObject) -> None:
    spec = data.draw(specs(), "spec")
    k = data.draw(st.none() | st.integers(1, min(spec.experts)), "k")
    indexed = data.draw(st.booleans(), "indexed input")
    batch = data.draw(st.integers(1, 9), "batch")
    plan = spec.plan(batch, top_k=k, indexed_input=indexed)
    assert executed(plan.program, batch)[0] == predicted(plan.cost().steps)
    both = plan.cost(training=True).steps[len(plan.program.steps) :]
    assert executed(reverse(plan.program).program, batch)[0] == predicted(both)


@given(data=st.data())
def test_prepared_programs_cost_less_by_their_weight_steps(data: st.DataObject) -> None:
    spec = data.draw(specs(), "spec")
    batch = data.draw(st.integers(1, 9), "batch")
    prepared = spec.plan(batch, prepared=True)
    program = plan_regimes(spec.network, Routing()).programs[-1]
    first, rest = program.split()
    whole = executed(program, batch)[0]
    halves = executed(first, batch)[0], executed(rest, batch)[0]
    assert {name: halves[0][name] + halves[1][name] for name in whole} == whole
    assert predicted(prepared.cost().steps) == halves[1]


# Memory, against Python's own allocator.

SPECS = [
    (factorization, experts)
    for experts, factorizations in (
        ((256,), (CP(160), TensorRing((4, 4, 48)), TensorTrain((8, 96)), Tucker((8, 48, 48)))),
        ((24, 16), (CP(160), TensorRing((4, 4, 4, 48)), TensorTrain((4, 8, 96)), Tucker(16))),
        ((12, 10, 8), (CP(160), TensorRing((3, 4, 3, 4, 48)), TensorTrain((4, 4, 8, 96)))),
        ((12, 10, 8), (Tucker((4, 3, 2, 48, 48)), Hadamard())),
        ((256,), (Hadamard(),)),
        ((24, 16), (Hadamard(),)),
        ((12,), (Dense(),)),
        ((4, 3), (Dense(),)),
        ((3, 2, 2), (Dense(),)),
    )
    for factorization in factorizations
]


def peak(call: Callable[[], object]) -> int:
    """Bytes that a call allocates at its worst moment, beyond what was there before."""
    call()  # plans, imports and caches are not the call's
    # what was allocated before is not traced, and needs no collection
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = call()
        found = tracemalloc.get_traced_memory()[1] - before
        del kept
    finally:
        tracemalloc.stop()
    return found


def make_layer(*arguments: Any, **options: Any) -> MuMoE:
    """A layer whose gate has been trained: at the start all logits are equal, a case of its own."""
    layer = MuMoE(*arguments, seed=0, **options)
    rng = np.random.default_rng(1)
    for name, array in layer.parameters.items():
        if name.startswith("gate."):
            array[...] = rng.standard_normal(array.shape)
    return layer


def assert_memory(layer: MuMoE, batch: int) -> None:
    """Predicted within 5 %, for inference and for training."""
    dtype = layer.dtype.name
    x = np.random.default_rng(0).standard_normal((batch, layer.spec.in_features)).astype(dtype)
    cotangent = np.ones((batch, layer.spec.out_features), dtype)

    def train() -> object:
        output, pull = layer.vjp(x)
        return output, pull(cotangent)

    train()  # the running statistics of batch norm
    for training, call in ((False, lambda: layer(x)), (True, train)):
        got, want = layer.cost(batch, training=training).peak_memory, peak(call)
        assert abs(got - want) <= 0.05 * want, f"training={training}: {got / want:.3f}"


@pytest.mark.parametrize("batch", [256, 1000])
@pytest.mark.parametrize(("factorization", "experts"), SPECS, ids=str)
def test_peak_memory_is_tracemallocs(factorization: Any, experts: Any, batch: int) -> None:
    assert_memory(make_layer(384, 256, experts, factorization), batch)


@pytest.mark.parametrize(
    "gate",
    [
        Gate(),
        Gate(normalization=None),
        Gate(normalization="batch"),
        Gate(alpha=1.3),
        Gate("sparsemax"),
        Gate("softmax", bias=True),
        Gate("top_k", k=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_peak_memory_of_gates_and_dtypes(gate: Gate, dtype: str) -> None:
    assert_memory(make_layer(64, 48, 1024, CP(24), gate=gate, dtype=dtype), 512)
