"""Rates, rounding, rows and timing of ``make gpu-report``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from _gpu_roofline import bound, measured, published
from _gpu_settings import BFLOAT16, FLOAT32, FULL, TF32, TINY, check_rounding, settings
from _gpu_timing import MOST_CALLS, Turns
from _shared import interleaved

from tensormoe import CP, Gate, LayerSpec
from tensormoe.functional import LayerConfig
from tensormoe.planning import published_roofline


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100"),
    ],
)
def test_devices_that_are_known_have_the_rates_of_a_precision(device: str, name: str) -> None:
    found, peaks = published(device), published_roofline(name)
    assert found is not None
    assert found[FLOAT32.name].matmul_rate == peaks.matmul_rate
    if name in ("t4", "v100"):
        assert set(found) == {FLOAT32.name}
        return
    for precision, dtype in ((TF32, "tfloat32"), (BFLOAT16, "bfloat16")):
        assert found[precision.name].matmul_rate == published_roofline(name, dtype).matmul_rate
    assert {each.bandwidth for each in found.values()} == {peaks.bandwidth}


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA A10G",
        "NVIDIA GH200 480GB",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA H100 PCIe",
        "NVIDIA L40S",
        "NVIDIA T400",
        "CPU",
    ],
)
def test_other_devices_are_unknown(device: str) -> None:
    assert published(device) is None


def test_a_device_that_is_unknown_is_measured() -> None:
    # a call of n GFLOP, say, takes n ms
    found = measured("cpu", (BFLOAT16, FLOAT32), TINY, lambda call: 1e-3)
    assert found[FLOAT32.name].matmul_rate == 2 * 32**3 / 1e-3
    assert found[BFLOAT16.name].matmul_rate == 2 * 64**3 / 1e-3
    assert {each.elementwise_rate for each in found.values()} == {2 * 32**3 / 1e-3}
    assert {each.bandwidth for each in found.values()} == {2 * 2**16 / 1e-3}


def test_a_bound_has_no_overhead_and_the_bytes_of_its_precision() -> None:
    config = LayerConfig(LayerSpec(64, 64, 32, CP(16)), Gate())
    rooflines = published("NVIDIA H200")
    assert rooflines is not None
    wide, narrow = (bound(config, 4096, each, rooflines) for each in (FLOAT32, BFLOAT16))
    assert wide is not None
    assert narrow is not None
    cost = config.cost(4096)
    whole = rooflines[FLOAT32.name].time(cost)
    assert wide == pytest.approx(whole - len(cost.steps) * rooflines[FLOAT32.name].overhead)
    assert narrow < wide
    step = bound(config, 4096, FLOAT32, rooflines, training=True)
    assert step is not None
    assert step > wide
    assert bound(config, 4096, FLOAT32, {}) is None


def test_rounding_is_what_a_row_says() -> None:
    for precision, error in ((FLOAT32, 1e-6), (TF32, 2e-4), (BFLOAT16, 2e-3)):
        check_rounding(precision, error)
    with pytest.raises(ArithmeticError, match=r"should not be rounded; their error is 2.0e-04"):
        check_rounding(FLOAT32, 2e-4)
    with pytest.raises(ArithmeticError, match="should be rounded"):
        check_rounding(TF32, 1e-6)


def test_rows_cover_what_the_report_promises() -> None:
    rows = settings(FULL, (BFLOAT16, FLOAT32, TF32))
    assert len(set(rows)) == len(rows) == 48
    assert {row.experts for row in rows} == {16, 128, 1024, 8192}
    # if time is short, every value of every setting has a row beside the first one
    assert {row.distance(rows[0]) for row in rows[1:8]} == {1}
    for field in ("factorization", "experts", "batch", "precision"):
        every = {getattr(row, field) for row in rows}
        assert {getattr(row, field) for row in rows[:8]} == every, field


def test_turns_are_long_enough_and_divided() -> None:
    asked: list[int] = []

    def elapsed(call: object, count: int) -> float:
        asked.append(count)
        return count * 1e-3

    turn = Turns(elapsed, 3e-3)

    def call() -> None:
        raise AssertionError("the clock calls it")

    assert turn(call) == pytest.approx(1e-3)
    assert turn(call) == pytest.approx(1e-3)
    assert asked == [1, 1, 1, 2, 2, 4, 4, 4, 4]
    assert Turns(lambda call, count: 0.0, 1.0)(call) == 0.0
    endless = Turns(lambda call, count: asked.append(count) or 0.0, 1.0)
    endless(call)
    assert asked[-1] == MOST_CALLS


def test_interleaved_calls_are_timed_by_turns() -> None:
    calls = [lambda: None, lambda: None]
    seconds = {calls[0]: 1.0, calls[1]: 3.0}
    assert interleaved(calls, 0.0, turn=seconds.__getitem__) == [1.0, 3.0]
