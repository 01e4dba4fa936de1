"""From cost to time: every part of a step's time, and ranks that are chosen by it."""

from __future__ import annotations

import pytest

from tensormoe import CP, Budget, LayerSpec, select_rank
from tensormoe.errors import PlanError
from tensormoe.planning import Cost, Roofline, StepCost

DEVICE = Roofline("mine", 1e9, 1e8, 1e10, 1e-6, 1e7, 5e-6)


def test_every_part_of_a_steps_time() -> None:
    def of(*steps: StepCost) -> float:
        return DEVICE.time(Cost(0, steps, 0))

    assert of() == 0
    assert of(StepCost("nothing")) == pytest.approx(1e-6)
    assert of(StepCost("product", matmul_flops=10**9)) == pytest.approx(1 + 1e-6)
    assert of(StepCost("elementwise", elementwise_flops=10**9)) == pytest.approx(10 + 1e-6)
    assert of(StepCost("reading", bytes_read=10**10)) == pytest.approx(1 + 1e-6)
    # written to memory, and memory that is new
    assert of(StepCost("writing", bytes_written=10**7)) == pytest.approx(1e-3 + 1 + 1e-6)
    # the slower of arithmetic and memory
    assert of(StepCost("both", 10**9, bytes_read=5 * 10**9)) == pytest.approx(1 + 1e-6)
    assert of(StepCost("back", backward=True)) == pytest.approx(5e-6)


def test_what_is_left_out_costs_nothing() -> None:
    plain = Roofline("mine", 1e9, 1e8, 1e10, 1e-6)
    cost = Cost(0, (StepCost("back", bytes_written=10**7, backward=True),), 0)
    assert plain.time(cost) == pytest.approx(1e-3 + 1e-6)
    assert Roofline.from_dict(plain.to_dict()) == plain
    assert Roofline.from_dict(DEVICE.to_dict()) == DEVICE


@pytest.mark.parametrize("field", ["fresh_bandwidth", "backward_overhead"])
def test_numbers_that_cannot_be(field: str) -> None:
    with pytest.raises(PlanError, match=f"{field} of a roofline must be a positive number"):
        Roofline.from_dict(DEVICE.to_dict() | {field: 0.0})


def test_steps_of_a_backward_pass_are_marked() -> None:
    spec = LayerSpec(12, 10, (4, 3), CP(5))
    forward = len(spec.cost(8, gate="entmax").steps)
    steps = spec.cost(8, gate="entmax", training=True).steps
    assert [step.backward for step in steps].count(False) == forward
    assert not any(step.backward for step in spec.cost(8, gate="entmax").steps)


def test_ranks_by_time_count_new_memory() -> None:
    """The largest rank whose own prediction keeps to the limit."""
    limit = 3e-3
    budget = Budget(time=limit, batch=64, roofline=DEVICE)
    rank = select_rank("cp", 48, 40, 12, budget=budget, gate=None)
    assert isinstance(rank, int)
    times = [DEVICE.time(LayerSpec(48, 40, 12, CP(k)).cost(64)) for k in (rank, rank + 1)]
    assert times[0] <= limit < times[1]
