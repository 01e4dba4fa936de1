"""From cost to time: every part of a step's time, and ranks that are chosen by it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

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


MEASURED = Roofline(
    "measured",
    1e9,
    1e8,
    1e10,
    1e-6,
    cache=1e6,
    padding=(2.0, 3.0, 4.0),
    operation_overhead=2e-6,
    product_overhead=3e-6,
    turn_rate=1e6,
    run_overhead=4e-6,
    call_overhead=1e-4,
    threads=2,
)


def test_every_part_of_a_measured_time() -> None:
    def of(step: StepCost, calls: int = 0) -> float:
        return MEASURED.time(Cost(0, (step,), 0, calls=calls)) - MEASURED.overhead

    assert of(StepCost("nothing")) == pytest.approx(0)
    assert of(StepCost("nothing"), calls=2) == pytest.approx(2e-4)
    assert of(StepCost("views", operations=5)) == pytest.approx(1e-5)
    assert of(StepCost("copy", runs=5)) == pytest.approx(2e-5)
    assert of(StepCost("turned", turned=5)) == pytest.approx(5e-6)
    # the cache holds the first megabyte
    assert of(StepCost("reading", bytes_read=10**6)) == pytest.approx(0)
    assert of(StepCost("reading", bytes_read=10**10 + 10**6)) == pytest.approx(1)
    # 2·10·(5·6·7 + 2·6·7 + 3·5·7 + 4·5·6) FLOPs, and ten starts
    product = StepCost("products", 2 * 10 * 5 * 6 * 7, products=10, sides=(5, 6, 7))
    assert of(product) == pytest.approx(20 * (210 + 84 + 105 + 120) / 1e9 + 3e-5)
    # traffic and padding are no sum
    assert of(replace(product, bytes_read=10**10)) == pytest.approx(1 - 1e-4 + 3e-5)


def test_old_profiles_can_be_read() -> None:
    """Files of profiles that were measured before the new numbers were there."""
    old = {
        "name": "this machine",
        "matmul_rate": 1e11,
        "elementwise_rate": 1e10,
        "bandwidth": 2e10,
        "overhead": 1e-6,
        "fresh_bandwidth": 3e9,
        "backward_overhead": 2e-6,
    }
    assert Roofline.from_dict(old) == Roofline("this machine", 1e11, 1e10, 2e10, 1e-6, 3e9, 2e-6)
    with pytest.raises(PlanError, match="a roofline must have exactly"):
        Roofline.from_dict(old | {"speed": 1.0})
    with pytest.raises(PlanError, match="a roofline must have exactly"):
        Roofline.from_dict({key: old[key] for key in old if key != "fresh_bandwidth"})
    assert Roofline.from_dict(MEASURED.to_dict()) == MEASURED
    assert json.loads(json.dumps(MEASURED.to_dict())) == MEASURED.to_dict()


def test_calls_have_a_line_where_their_time_is_known() -> None:
    plan = LayerSpec(12, 10, 3, CP(5)).plan(4)
    assert "\n  call " in plan.describe(roofline=MEASURED)
    assert "\n  call " not in plan.describe(roofline=DEVICE)


@pytest.mark.parametrize("junk", [3, "abc", (1.0, 2.0), (1.0, 2.0, -1.0), (1.0, 2.0, "3")])
def test_paddings_that_cannot_be(junk: Any) -> None:
    with pytest.raises(PlanError, match="padding of a roofline must be three numbers"):
        Roofline.from_dict(MEASURED.to_dict() | {"padding": junk})


def test_what_is_left_out_costs_nothing() -> None:
    plain = Roofline("mine", 1e9, 1e8, 1e10, 1e-6)
    cost = Cost(0, (StepCost("back", bytes_written=10**7, backward=True),), 0)
    assert plain.time(cost) == pytest.approx(1e-3 + 1e-6)
    assert Roofline.from_dict(plain.to_dict()) == plain
    assert Roofline.from_dict(DEVICE.to_dict()) == DEVICE


@pytest.mark.parametrize("field", ["fresh_bandwidth", "backward_overhead", "cache", "threads"])
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
