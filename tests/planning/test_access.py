"""Sizes of products as the array library sees them, and runs through memory counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensormoe import CP, Dense, Factorization, LayerSpec, SharedBasis, SharedDelta, TensorRing
from tensormoe.execution import execute
from tensormoe.planning import Program, Step, StepCost
from tensormoe.planning._access import product_sizes, runs
from tensormoe.planning._cost import batch_sizes, program_cost
from tensormoe.planning._program import View
from tensormoe.planning._reverse import reverse
from tensormoe_numpy._adapter import NumpyBackend

KINDS: list[tuple[Factorization, Any]] = [
    (CP(5), 6),
    (TensorRing((2, 3, 4)), 6),
    (TensorRing((2, 3, 2, 4)), (3, 4)),
    (SharedBasis((2, 3)), (3, 4)),
    (SharedDelta(2), 6),
    (SharedDelta(2), (3, 4)),
    (Dense(), (3, 4)),
]


class Recording(NumpyBackend):
    """NumPy, with the shapes of every product kept."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, tuple[int, int, int], int]] = []

    def matmul(self, left: Any, right: Any, /) -> Any:
        made = super().matmul(left, right)
        count = int(np.prod(made.shape[:-2], dtype=int))
        rows, summed, columns = left.shape[-2], left.shape[-1], right.shape[-1]
        turned = right.strides[-1] > right.strides[-2] and min(rows, summed, columns) > 1
        self.seen.append((count, (rows, summed, columns), right.size if turned else 0))
        return made


def _sizes(program: Program, batch: int) -> list[tuple[int, tuple[int, int, int], int]]:
    sizes = batch_sizes(program, batch)
    return [product_sizes(s, sizes) for s in program.steps if s.kind in ("linear", "matmul")]


def _operands(program: Program, batch: int) -> list[Any]:
    sizes = batch_sizes(program, batch)
    return [np.ones([sizes[leg] for leg in each.legs]) for each in program.operands]


@pytest.mark.parametrize("batch", [0, 1, 7, 300])
@pytest.mark.parametrize(("kind", "experts"), KINDS, ids=str)
def test_products_are_those_that_run(kind: Factorization, experts: Any, batch: int) -> None:
    program = LayerSpec(8, 9, experts, kind).plan(batch).program
    for each in (program, reverse(program).program):
        backend = Recording()
        execute(each, _operands(each, batch), backend)
        assert backend.seen == _sizes(each, batch)


def test_costs_have_them() -> None:
    program = LayerSpec(8, 9, (3, 4), Dense()).plan(7).program
    costs = program_cost(program, batch_sizes(program, 7))
    products = [each for each in costs if each.products]
    found = [(each.products, each.sides, each.turned) for each in products]
    assert found == _sizes(program, 7)
    for each in products:
        rows, summed, columns = each.sides
        assert each.matmul_flops == 2 * each.products * rows * summed * columns
    assert max(each.products for each in products) > 1


def _step(kind: Any, *arrays: tuple[str, View]) -> Step:
    legs = tuple(tuple(each) for each, _ in arrays)
    longest = max(legs, key=len)
    return Step(kind, tuple(range(len(legs))), 9, legs, longest, tuple(view for _, view in arrays))


SIZES = {"a": 4, "b": 3, "c": 5, "e": 0}
PLAIN = View()


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (_step("add", ("abc", PLAIN), ("abc", PLAIN)), 1),
        # one row for all of them, one entry for each row
        (_step("add", ("abc", PLAIN), ("c", PLAIN)), 12),
        (_step("add", ("abc", PLAIN), ("bc", PLAIN)), 4),
        (_step("multiply", ("abc", PLAIN), ("ab", View((4, 3, 1)))), 12),
        (_step("multiply", ("abc", PLAIN), ("a", View((-1, 1, 1)))), 4),
        # rows of one, entries of the other
        (_step("multiply", ("ab", View((4, 3, 1))), ("ac", View((4, 1, 5)))), 12),
        # one stride along each row, but no copy
        (_step("add", ("ab", PLAIN), ("ba", View(None, (1, 0)))), 4),
        (_step("permute", ("abc", View(None, (1, 0, 2)))), 12),
        (_step("permute", ("abc", View(None, (2, 0, 1)))), 60),
        (_step("permute", ("abc", PLAIN)), 1),
        (_step("add", ("e", PLAIN), ("e", PLAIN)), 0),
    ],
)
def test_runs(step: Step, found: int) -> None:
    assert runs(step, SIZES) == found


def test_views_are_operations() -> None:
    program = LayerSpec(8, 9, 6, TensorRing((2, 3, 4))).plan(7).program
    costs = program_cost(program, batch_sizes(program, 7))
    for step, cost in zip(program.steps, costs, strict=True):
        named = [each for view in step.views for each in (view.shape, view.axes)]
        assert cost.operations == sum(each is not None for each in (*named, step.shape))
    assert max(each.operations for each in costs) >= 2


def test_a_gate_makes_many_calls_and_one_row_fewer() -> None:
    spec = LayerSpec(8, 9, 64, CP(5))

    def gate(batch: int) -> StepCost:
        (found,) = [s for s in spec.cost(batch, gate="entmax").steps if s.label == "gate 0: entmax"]
        return found

    assert gate(1).operations < gate(2).operations == gate(1000).operations
    assert gate(1000).runs == 500 * gate(2).runs


def test_a_layer_is_one_call_and_chunks_are_too() -> None:
    spec = LayerSpec(8, 9, (3, 4), Dense())
    assert spec.cost(64, gate="entmax").calls == spec.cost(64, training=True).calls == 1
    small = spec.plan(64, memory_limit=20_000)
    assert small.chunk < 64
    assert small.cost().calls == 1
    assert spec.cost(3).then(spec.cost(4)).calls == 2
