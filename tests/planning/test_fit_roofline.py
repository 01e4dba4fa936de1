"""Profiles from times: the ones that made the times are found again, and bad samples refused."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from tensormoe import CP, Dense, LayerSpec, SharedBasis, SharedDelta, TensorRing
from tensormoe.errors import PlanError
from tensormoe.planning import Cost, Roofline, StepCost, fit_roofline

MINE = Roofline(
    "mine",
    matmul_rate=8e10,
    elementwise_rate=9e9,
    bandwidth=1.2e10,
    overhead=3e-6,
    fresh_bandwidth=2e10,
    backward_overhead=6e-6,
    cache=2.0**22,
    padding=(4.0, 40.0, 3.0),
    operation_overhead=1e-6,
    product_overhead=3e-8,
    turn_rate=2e9,
    run_overhead=4e-9,
    call_overhead=5e-5,
    threads=2,
)


def _costs(sizes: tuple[int, int], experts: int, batches: tuple[int, ...]) -> list[Cost]:
    kinds = [CP(48), TensorRing((3, 4, 24)), SharedBasis((3, 16)), SharedDelta(3), Dense()]
    return [
        LayerSpec(*sizes, experts, kind).cost(batch, gate="entmax", training=training)
        for kind in kinds
        for batch in batches
        for training in (False, True)
    ]


SAMPLES = _costs((96, 160), 24, (1, 16, 500)) + _costs((256, 128), 96, (1, 40, 2000))
OTHERS = _costs((200, 72), 40, (3, 90, 1000))


def test_a_profile_is_found_from_its_own_times() -> None:
    found = fit_roofline("yours", [(cost, MINE.time(cost)) for cost in SAMPLES], threads=2)
    assert (found.name, found.threads, found.link_bandwidth) == ("yours", 2, None)
    assert found.matmul_rate == pytest.approx(MINE.matmul_rate, rel=0.05)
    assert found.call_overhead == pytest.approx(5e-5, rel=0.3)
    assert found.cache == MINE.cache
    for cost in OTHERS:
        assert found.time(cost) == pytest.approx(MINE.time(cost), rel=0.1)


def test_noise_does_not_carry_it_away() -> None:
    random = Random(0)
    noisy = [(cost, MINE.time(cost) * random.uniform(0.8, 1.25)) for cost in SAMPLES]
    found = fit_roofline("yours", noisy)
    for cost in OTHERS:
        assert 0.75 < found.time(cost) / MINE.time(cost) < 1.33


def test_twice_the_times_are_half_of_the_rates() -> None:
    once, twice = (
        fit_roofline("x", [(cost, k * MINE.time(cost)) for cost in SAMPLES]) for k in (1, 2)
    )
    for cost in OTHERS:
        assert twice.time(cost) == pytest.approx(2 * once.time(cost), rel=0.05)


def test_work_that_takes_no_time_has_a_rate_all_the_same() -> None:
    steps = [(StepCost("product", 10**k, 0, 8, 8),) for k in range(3, 11)] * 4
    found = fit_roofline("x", [(Cost(0, each, 0), 1e-12 * each[0].matmul_flops) for each in steps])
    assert found.matmul_rate == pytest.approx(1e12, rel=0.1)
    assert Roofline.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("samples", "rule"),
    [
        ([], r"samples must be at least 28, twice as many as a profile has numbers; got 0\."),
        (None, r"samples must be a list of pairs \(cost, seconds\); got None"),
        ([(SAMPLES[0], 1.0)] * 27, r"got 27\. Time more layers"),
        (
            [(SAMPLES[0], 1.0)] * 28 + [(SAMPLES[0], 0.0)],
            r"a positive number of seconds; got .* at 28\. Write",
        ),
        ([(SAMPLES[0], float("nan"))] * 28, "at 0"),
        ([(SAMPLES[0], "1")] * 28, "at 0"),
        ([(1.0, 1.0)] * 28, "a sample must be a pair of a Cost and"),
        ([SAMPLES[0]] * 28, "a sample must be a pair of a Cost and"),
    ],
)
def test_samples_that_cannot_be(samples: Any, rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        fit_roofline("x", samples)
