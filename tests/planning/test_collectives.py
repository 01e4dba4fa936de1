"""Communication of layers that are cut over devices: how much, in what order, and for how long."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tensormoe import CP, Gate, LayerSpec, TensorRing
from tensormoe.errors import PlanError, SpecError
from tensormoe.functional import Options
from tensormoe.planning import (
    PUBLISHED_ROOFLINES,
    Collective,
    Cost,
    Roofline,
    Routing,
    compare_legs,
    plan_layer,
)
from tests._kinds import UNEVEN

SPEC = LayerSpec(768, 640, 512, CP(256))


def exchanged(cost: Cost) -> list[tuple[str, str, int, bool]]:
    return [(each.kind, each.array, each.bytes, each.backward) for each in cost.collectives]


def test_a_sum_over_the_rank() -> None:
    part = SPEC.shard("r", 8)
    assert exchanged(part.cost(100)) == [("all-reduce", "y", 4 * 100 * 640, False)]
    assert exchanged(part.cost(100, training=True, itemsize=2)) == [
        ("all-reduce", "y", 2 * 100 * 640, False),
        ("all-reduce", "d x", 2 * 100 * 768, True),
        # coefficients are float32
        ("all-reduce", "d coefficients_0", 4 * 100 * 512, True),
    ]
    assert part.cost(100).communicated == 4 * 100 * 640
    assert part.num_parameters * 8 == SPEC.num_parameters


def test_slices_of_outputs_inputs_and_experts() -> None:
    def arrays(leg: str) -> list[str]:
        return [each.array for each in SPEC.shard(leg, 2).cost(5, training=True).collectives]

    assert arrays("o") == ["d x", "d coefficients_0", "d expert_0", "d input", "d bias"]
    assert arrays("i") == ["y", "d coefficients_0", "d expert_0", "d output", "d bias"]
    assert arrays("n0") == ["y", "d x", "d input", "d output", "d bias"]
    assert not SPEC.shard("o", 2).cost(5).collectives
    assert not SPEC.shard("r", 1).cost(5, training=True).collectives


def test_a_ring_sums_gradients_of_the_factors_without_the_leg() -> None:
    spec = LayerSpec(64, 48, 32, TensorRing((4, 2, 8)))
    for leg, whole in (("r0", "input"), ("r1", "output"), ("r2", "expert_0")):
        cost = spec.shard(leg, 2).cost(10, training=True)
        found = {each.array: each.bytes for each in cost.collectives}
        shape = spec.shapes[whole]
        assert found[f"d {whole}"] == 4 * shape[0] * shape[1] * shape[2]
        assert found["y"] == 4 * 10 * 48


def test_coefficients_of_few_experts() -> None:
    for leg in ("r", "n0"):
        part = SPEC.shard(leg, 2)
        cost = plan_layer(part.network, 10, Routing(3)).cost(training=True)
        assert {each.array: each.bytes for each in cost.collectives}["d coefficients_0"] == 120
    embedding = SPEC.shard("r", 2).plan(10, indexed_input=True).cost(training=True)
    assert "d x" not in {each.array for each in embedding.collectives}


def test_a_block_communicates_once_forward() -> None:
    block = Options((8, 4), "cp", rank=6).block(12, 16, 10, "gelu", 0.0).shard(4)
    assert exchanged(block.cost(7)) == [("all-reduce", "y", 4 * 7 * 10, False)]
    training = [each.array for each in block.cost(7, training=True).collectives]
    # coefficients once for both layers, the input's once
    assert training.count("d coefficients_0") == training.count("d coefficients_1") == 1
    assert training.count("d x") == training.count("y") == 1
    assert "d first.input" in training
    assert "d second.output" in training
    assert "d first.output" not in training
    assert "d second.input" not in training


def test_a_block_cut_along_the_rank_of_each_layer_exchanges_hidden_features() -> None:
    block = Options(8, "cp", rank=6).block(12, 16, 10, "gelu", 0.0)
    both = replace(block, first=block.first.shard("r", 2), second=block.second.shard("r", 2))
    assert exchanged(both.cost(7)) == [
        ("all-reduce", "y", 4 * 7 * 10, False),
        ("all-reduce", "hidden", 4 * 7 * 16, False),
    ]
    found = {each.array: each.bytes for each in both.cost(7, training=True).collectives}
    assert found.pop("d hidden") == 4 * 7 * 16
    assert found.pop("d x") == 4 * 7 * 12
    assert found.keys() == {"y", "hidden", "d coefficients_0"}


def test_work_of_one_device() -> None:
    part, gate = SPEC.shard("r", 8), Gate()
    whole = SPEC.cost(64, gate=gate)
    assert part.cost(64).matmul_flops * 8 == SPEC.cost(64).matmul_flops
    own = part.cost(64, gate=gate)
    # every device has the whole gate, whichever leg is cut
    for leg in ("n0", "i", "r"):
        cut = SPEC.shard(leg, 8)
        gates = cut.cost(64, gate=gate).parameters - cut.cost(64).parameters
        assert gates == whole.parameters - SPEC.num_parameters
    assert own.matmul_flops > part.cost(64).matmul_flops


def test_chunks_communicate_each() -> None:
    part = LayerSpec(64, 8, 8, CP(256)).shard("r", 4)
    limit = part.plan(100).cost().peak_memory // 2
    plan = part.plan(100, memory_limit=limit)
    assert plan.chunk < 100
    calls = -(-100 // plan.chunk)
    cost = plan.cost()
    assert len(cost.collectives) == calls
    assert cost.communicated == 4 * 100 * 8


def test_time_of_a_ring_of_devices() -> None:
    device = Roofline("mine", 1e12, 1e12, 1e12, 1e-6, link_bandwidth=1e9)
    reduce = Collective("all-reduce", "y", 8_000_000, 8)
    gather = Collective("all-gather", "y", 8_000_000, 8)
    assert reduce.sent == 2 * gather.sent == 14_000_000
    assert device.time(Cost(0, (), 0, 0, (reduce,))) == pytest.approx(14e-3 + 14e-6)
    assert device.time(Cost(0, (), 0, 0, (gather,))) == pytest.approx(7e-3 + 7e-6)
    alone = Roofline("mine", 1e12, 1e12, 1e12, 1e-6)
    assert alone.time(SPEC.cost(4)) > 0
    with pytest.raises(PlanError, match="link_bandwidth of a roofline must be known"):
        alone.time(SPEC.shard("r", 2).cost(4))
    old = {name: value for name, value in alone.to_dict().items() if name != "link_bandwidth"}
    assert Roofline.from_dict(old) == alone
    assert all(each.link_bandwidth for each in PUBLISHED_ROOFLINES.values())


@pytest.mark.parametrize("kind", UNEVEN, ids=repr)
def test_every_leg_that_divides_is_compared(kind: Any) -> None:
    network = LayerSpec(12, 24, (6, 4), kind).network
    found = compare_legs(network, 2, batch=64)
    divisible = {leg for leg in network.shardable_legs if network.sizes[leg] % 2 == 0}
    assert {each.leg for each in found} == divisible
    assert [each.time for each in found] == sorted(each.time for each in found)
    for each in found:
        kinds = {one.array: one.kind for one in each.cost.collectives}
        # whole inputs and outputs on all devices
        assert kinds["y"] == ("all-gather" if each.leg == "o" else "all-reduce")
        assert kinds["d x"] == ("all-gather" if each.leg == "i" else "all-reduce")


def test_the_best_leg_is_the_one_that_all_factors_have() -> None:
    assert compare_legs(SPEC.network, 8)[0].leg == "r"
    assert compare_legs(LayerSpec(768, 768, 512, TensorRing((4, 4, 96))).network, 8)[0].leg == "r2"


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: compare_legs(SPEC.network, 0), PlanError, "devices must be a positive"),
        (lambda: compare_legs(SPEC.network, 7), SpecError, "multiple of the 7 devices as its size"),
        (lambda: compare_legs(SPEC.shard("r", 2).network, 2), SpecError, "must be whole to be cut"),
        (
            lambda: compare_legs(SPEC.network, 2, roofline=3),  # type: ignore[arg-type]
            PlanError,
            "roofline must be a Roofline",
        ),
    ],
)
def test_what_cannot_be_compared(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_plan_says_what_is_exchanged() -> None:
    text = SPEC.shard("r", 8).plan(100).describe(training=True)
    assert "512 experts of 768 → 640" in text
    assert "one of 8 devices, each with 32 of the 256 of leg r" in text
    assert "all-reduce of y" in text
    assert "750 KiB in 3 collectives" in text
    assert "capacity       expert rank 256" in text
    assert "none: the result is a slice" in SPEC.shard("o", 8).plan(100).describe()
    assert "communication" not in SPEC.plan(100).describe()
