"""Programs compute what their legs say, in place and in order where they can."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Hadamard,
    LayerSpec,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.execution import execute
from tensormoe.planning import Operand, Program, Routing, Step, plan_regimes, reverse
from tensormoe.testing import specs
from tensormoe_numpy import BACKEND
from tests.planning._work import BATCH

REALISTIC = [
    (factorization, experts)
    for experts, factorizations in (
        ((128,), (CP(512), TensorRing((4, 4, 90)), TensorTrain((16, 200)))),
        ((1024,), (CP(256), TensorRing((4, 4, 90)), TensorTrain((16, 90)))),
        ((32, 16), (CP(256), TensorRing((4, 4, 4, 90)), TensorTrain((4, 16, 90)))),
        ((16, 8, 8), (CP(256), TensorRing((4, 4, 4, 4, 90)), TensorTrain((4, 4, 4, 90)))),
        ((128,), (SharedBasis((8, 512)), BaseDelta(64), SharedDelta(64), Hadamard(), Dense())),
        ((32, 16), (SharedBasis((8, 256)), BaseDelta(64), SharedDelta(64), Hadamard(), Dense())),
        ((16, 8, 8), (Hadamard(), Dense())),
    )
    for factorization in factorizations
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("factorization", "experts"), REALISTIC, ids=str)
def test_forward_never_copies_into_another_order(factorization, experts, bias) -> None:
    spec = LayerSpec(768, 768, experts, factorization, bias=bias)
    for program in plan_regimes(spec.network).programs:
        assert "permute" not in {step.kind for step in program.steps}


def programs(draw: st.DrawFn) -> tuple[LayerSpec, Program]:
    spec = draw(specs())
    k = draw(st.none() | st.integers(1, min(spec.experts)))
    regimes = plan_regimes(spec.network, Routing(k, draw(st.booleans())))
    return spec, draw(st.sampled_from(regimes.programs))


@given(drawn=st.composite(programs)())
def test_programs_are_well_formed(drawn: tuple[LayerSpec, Program]) -> None:
    _, program = drawn
    for each in (program, *program.split(), reverse(program).program):
        known = set(range(len(each.operands)))
        last = {slot: k for k, step in enumerate(each.steps) for slot in step.inputs}
        for place, step in enumerate(each.steps):
            assert set(step.inputs) <= known, "a step takes what is there, and what is not freed"
            assert step.input_legs == tuple(each.legs[slot] for slot in step.inputs)
            assert step.output not in known
            assert len(set(step.legs)) == len(step.legs)
            freed = {s for s, k in last.items() if k == place and s not in each.outputs}
            assert set(step.free) == freed
            known = (known | {step.output}) - freed
        assert set(each.outputs) <= known
    (output,) = program.outputs
    assert program.legs[output] == (BATCH, "o")


@given(drawn=st.composite(programs)(), batch=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
def test_split_programs_give_the_same(
    drawn: tuple[LayerSpec, Program], batch: int, seed: int
) -> None:
    spec, program = drawn
    rng = np.random.default_rng(seed)
    named = {}
    for operand in program.operands:
        shape = tuple(batch if leg == BATCH else program.sizes[leg] for leg in operand.legs)
        named[operand.name] = rng.standard_normal(shape)
        if operand.role == "indices":
            level = operand.name.partition("_")[2]
            count = spec.experts[int(level)] if level else spec.in_features
            named[operand.name] = rng.integers(count, size=shape)
    (whole,), _ = execute(program, [named[o.name] for o in program.operands], BACKEND)
    first, rest = program.split()
    assert all(not step.batched for step in first.steps)
    assert all(step.batched for step in rest.steps)
    prepared, _ = execute(first, [named[o.name] for o in first.operands], BACKEND)
    weights = [o.name for o in rest.operands if o.role == "factor"]
    named |= dict(zip(weights, prepared, strict=True))
    (parts,), _ = execute(rest, [named[o.name] for o in rest.operands], BACKEND)
    np.testing.assert_array_equal(parts, whole)


def test_sums_are_made_in_place_only_where_nobody_looks() -> None:
    """Nothing writes to an operand of the caller's, or a slot kept for the backward pass."""
    legs = (BATCH, "o")
    operands = (Operand("left", legs, "data"), Operand("right", legs, "data"))
    product = Step("multiply", (0, 1), 2, (legs, legs), legs)
    rng = np.random.default_rng(0)
    for steps, kept, want in (
        ((Step("add", (0, 1), 2, (legs, legs), legs),), 1, lambda a, b: a + b),
        ((product, Step("add", (2, 1), 3, (legs, legs), legs)), 2, lambda a, b: a * b + b),
    ):
        program = Program(operands, steps, (steps[-1].output,), (("o", 3),)).with_liveness()
        left, right = rng.standard_normal((2, 4, 3))
        before = left.copy(), right.copy()
        (result,), found = execute(program, [left, right], BACKEND, (kept,))
        np.testing.assert_array_equal(result, want(*before))
        np.testing.assert_array_equal(found[kept], right if kept == 1 else left * right)
        np.testing.assert_array_equal((left, right), before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("factorization", "experts"),
    [*REALISTIC, (Tucker(32), (16, 32)), (Tucker((8, 8, 64, 64)), (32, 32))],
    ids=str,
)
def test_forward_reads_no_operand_in_far_apart_entries(factorization, experts, bias) -> None:
    """A product for every input whose operand has the batch as its fastest axis is 3 to 6 times
    slower than one in order."""
    spec = LayerSpec(768, 768, experts, factorization, bias=bias)
    for program in plan_regimes(spec.network).programs:
        for step in program.steps:
            if step.kind not in ("linear", "matmul"):
                continue
            first, second = step.input_legs
            looped = {*first} & {*second} & {*step.legs}
            assert not (looped and {first[-1], second[-1]} & looped), step
