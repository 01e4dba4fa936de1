"""Coefficients by index: factors are gathered, or coefficients spread, whichever moves less."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
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
    TopK,
    Tucker,
)
from tensormoe.execution import execute
from tensormoe.planning import Program, Routing, plan_regimes, reverse
from tensormoe.planning._draft import Draft
from tensormoe.planning._regimes import best_candidate, build_program
from tensormoe.testing import specs
from tensormoe_numpy import BACKEND, MuMoE
from tests._planned_work import BATCH, WEIGHT, program_work

# experts that are as large as a matrix each
LARGE = [Dense(), SharedBasis((4, 256))]

FLOATS = 4


def ways(spec: LayerSpec, k: int, batch: int, indexed: bool = False) -> tuple[Program, Program]:
    """The cheapest program that gathers, and the cheapest that spreads."""
    drafts = [Draft(spec.network, Routing(k, indexed), spread=spread) for spread in (False, True)]
    gathered, spread = (build_program(best_candidate([draft], batch)) for draft in drafts)
    assert "eye" not in kinds(gathered)
    assert "eye" in kinds(spread)
    return gathered, spread


def kinds(program: Program) -> set[str]:
    return {step.kind for step in program.steps}


def selected_work(program: Program, batch: int) -> int:
    """What a program costs with the work on indices, and with what is read of the experts.

    Experts are read by the gather, as often as they are picked, or whole; the latter is counted
    of coefficients that are spread.
    """
    sizes = {**program.sizes, BATCH: batch}
    total = program_work(program, batch)
    for step in program.steps:
        written = WEIGHT * prod(sizes[leg] for leg in step.legs)
        total += written * {"gather": 2, "eye": 1, "reduce": 1}.get(step.kind, 0)
    if "eye" in kinds(program):
        for operand in program.operands:
            if operand.role == "factor" and any(leg.startswith("n") for leg in operand.legs):
                total += WEIGHT * prod(sizes[leg] for leg in operand.legs)
    return total


@pytest.mark.parametrize("factorization", LARGE, ids=str)
def test_many_rows_copy_no_matrix_each(factorization: Any) -> None:
    spec, batch = LayerSpec(256, 256, 8, factorization), 512
    plan = spec.plan(batch, top_k=2)
    sizes = {**plan.program.sizes, BATCH: batch}
    largest = max(prod(sizes[leg] for leg in step.legs) for step in plan.program.steps)
    # no array is larger than what dense coefficients need
    dense = spec.plan(batch).program
    assert largest == max(prod(sizes[leg] for leg in step.legs) for step in dense.steps)
    (identity,) = (step for step in plan.cost().steps if step.label.startswith("eye"))
    assert (identity.bytes_read, identity.bytes_written) == (0, FLOATS * 8 * 8)
    gathered = replace(plan, program=ways(spec, 2, batch)[0])
    assert gathered.cost().peak_memory > FLOATS * batch * 2 * 256 * 256
    for training in (False, True):
        ours, theirs = (each.cost(training=training) for each in (plan, gathered))
        assert 30 * ours.peak_memory < theirs.peak_memory
        assert 30 * ours.bytes_written < theirs.bytes_written


@pytest.mark.parametrize("factorization", LARGE, ids=str)
def test_memory_is_what_was_predicted(factorization: Any) -> None:
    layer, batch, k = MuMoE(256, 192, 8, factorization, seed=0), 512, 2
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, 256), "float32")
    chosen = TopK(rng.integers(8, size=(batch, k)), rng.random((batch, k), "float32"))
    layer(x, coefficients=chosen)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        layer(x, coefficients=chosen)
        found = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    predicted = layer.spec.plan(batch, top_k=k).cost().peak_memory
    assert abs(predicted - found) <= 0.05 * found


@pytest.mark.parametrize("factorization", [*LARGE, CP(64), TensorRing((4, 4, 32))], ids=str)
def test_a_single_row_reads_its_own_experts_alone(factorization: Any) -> None:
    plan = LayerSpec(256, 256, 64, factorization).plan(1, top_k=2)
    assert "eye" not in kinds(plan.program)


@pytest.mark.parametrize("factorization", [Dense(), CP(64), Hadamard(), Tucker(16)], ids=str)
def test_few_of_very_many_experts_are_gathered_at_any_batch(factorization: Any) -> None:
    spec = LayerSpec(96, 64, 4096, factorization)
    assert all("eye" not in kinds(each) for each in plan_regimes(spec.network, Routing(2)).programs)


SPECS = [
    LayerSpec(64, 48, 8, Dense()),
    LayerSpec(64, 48, (4, 3), Dense(), bias=False),
    LayerSpec(64, 48, 16, SharedBasis((3, 40))),
    LayerSpec(48, 64, (4, 3), SharedBasis((3, 40))),
    LayerSpec(40, 30, 8, CP(20)),
    LayerSpec(40, 30, (5, 4), TensorRing((3, 4, 3, 20))),
    LayerSpec(40, 30, 8, Hadamard()),
    LayerSpec(40, 30, 6, BaseDelta(8)),
    LayerSpec(30, 40, (3, 4), SharedDelta(8)),
    LayerSpec(24, 20, 6, Tucker((4, 12, 10))),
]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_batch_gets_the_cheaper_way(spec: LayerSpec, k: int) -> None:
    regimes = plan_regimes(spec.network, Routing(k))
    starts = {start + step for start in regimes.starts[1:] for step in (-1, 0)}
    for batch in sorted({1, 2, 3, 5, 10, 30, 100, 1000, 10**6} | starts):
        chosen = selected_work(regimes.program(batch), batch)
        assert chosen == min(selected_work(each, batch) for each in ways(spec, k, batch)), batch


def test_both_ways_are_taken() -> None:
    """Otherwise the test above would see nothing."""
    found = [
        {"eye" in kinds(each) for each in plan_regimes(s.network, Routing(1)).programs}
        for s in SPECS
    ]
    assert sum(each == {False, True} for each in found) >= 5


@settings(max_examples=60)
@given(spec=specs(), data=st.data())
def test_both_ways_give_the_same(spec: LayerSpec, data: st.DataObject) -> None:
    """Outputs and gradients; an expert may be named twice in a row."""
    k = data.draw(st.integers(1, min(spec.experts)), "k")
    indexed = data.draw(st.booleans(), "indexed input")
    batch = data.draw(st.integers(0, 6), "batch")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    programs = ways(spec, k, max(batch, 1), indexed)
    given = {}
    for operand in programs[0].operands:
        shape = tuple(batch if leg == BATCH else programs[0].sizes[leg] for leg in operand.legs)
        given[operand.name] = rng.standard_normal(shape)
        if operand.role == "indices":
            level = operand.name.partition("_")[2]
            count = spec.experts[int(level)] if level else spec.in_features
            given[operand.name] = rng.integers(count, size=shape)
    cotangent = rng.standard_normal((batch, spec.out_features))
    found = []
    for program in programs:
        back = reverse(program)
        arrays = [given[operand.name] for operand in program.operands]
        (output,), kept = execute(program, arrays, BACKEND, back.saved)
        saved = [kept[slot] for slot in back.saved]
        gradients, _ = execute(back.program, [*saved, cotangent], BACKEND)
        found.append({"output": output, **dict(zip(back.wanted, gradients, strict=True))})
    assert found[0].keys() == found[1].keys()
    for name, want in found[0].items():
        scale = max(1.0, float(np.max(np.abs(want), initial=0.0)))
        np.testing.assert_allclose(found[1][name], want, rtol=0, atol=1e-12 * scale, err_msg=name)


def test_other_experts_get_no_gradient() -> None:
    layer = MuMoE(24, 16, 6, Dense(), dtype="float64", seed=0)
    rng = np.random.default_rng(0)
    x, chosen = rng.standard_normal((40, 24)), TopK(rng.integers(2, size=(40, 1)), np.ones((40, 1)))
    assert "eye" in kinds(layer.spec.plan(40, top_k=1).program)
    output, pull = layer.vjp(x, coefficients=chosen)
    gradient = pull(np.ones_like(output)).parameters["factors.weight"]
    assert gradient[:2].any(axis=(1, 2)).all()
    assert not gradient[2:].any()
