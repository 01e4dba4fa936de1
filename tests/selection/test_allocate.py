"""One budget for a whole model: it is kept, spent, and shared out as asked."""

from __future__ import annotations

import copy
import json
import pickle
import time
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe import CP, Gate, LayerSpec, Tucker, select_rank
from tensormoe.selection import (
    AllocatedLayer,
    Allocation,
    Budget,
    LayerSite,
    Projection,
    Sensitivity,
    SensitivityPoint,
    allocate,
)
from tensormoe.selection._allocate_solve import Bounds, Point, along_curves, in_proportion, smoothed

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}
LARGE = {
    **LLAMA,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8}
SITES = (
    LayerSite.of_experts("0.experts", 8, 64, 96),
    LayerSite.of_experts("1.experts", 4, 64, 32, gated=False, bias=True),
    LayerSite.of_mlp("2.mlp", 64, 128, gated=True, bias=False, itemsize=2),
    LayerSite.of_linear("2.attention", 64, 48),
)


def shares(found: Allocation) -> list[float]:
    """Of what each projection had, gates left out."""
    return [
        spec.num_parameters / ((layer.site.experts or 1) * each.entries)
        for layer in found.layers
        for spec, each in zip(layer.specs, layer.site.projections, strict=True)
    ]


def weights(value: float = 1.0) -> dict[str, float]:
    return dict.fromkeys((name for site in SITES for name in site.unit_names), value)


# --- the two ways of sharing out


@given(st.data())
def test_in_proportion(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    numbers = st.floats(0.5, 100.0)
    rates = [data.draw(numbers) for _ in range(count)]
    bounds = [Bounds(low, low + data.draw(numbers)) for low in (data.draw(numbers) for _ in rates)]
    least, most = (sum(getattr(each, k) for each in bounds) for k in ("least", "most"))
    limit = least + data.draw(st.floats(0.0, 1.2)) * (most - least)
    found = in_proportion(rates, bounds, limit)
    assert sum(found) == pytest.approx(min(limit, most))
    levels = []
    for share, rate, each in zip(found, rates, bounds, strict=True):
        assert each.least <= share <= each.most
        if each.least < share < each.most:
            levels.append(share / rate)
    if levels:
        level = levels[0]
        assert levels == pytest.approx([level] * len(levels))
        for share, rate, each in zip(found, rates, bounds, strict=True):
            # who is at a bound would be beyond it in proportion
            assert share != each.least or share >= level * rate * (1 - 1e-9)
            assert share != each.most or share <= level * rate * (1 + 1e-9)


CURVES = st.lists(
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(0, 30)),
        min_size=1,
        max_size=5,
        unique_by=lambda point: point[0],
    ),
    min_size=1,
    max_size=4,
)


@given(CURVES, st.floats(0.0, 1.0))
def test_no_choice_of_points_is_better_than_the_optimum(
    given_points: list[list[tuple[int, int]]], part: float
) -> None:
    curves = [[Point(cost, loss) for cost, loss in sorted(each)] for each in given_points]
    least = sum(curve[0].cost for curve in curves)
    limit = least + part * (sum(curve[-1].cost for curve in curves) - least)
    found = along_curves(curves, limit)
    assert sum(point.cost for point in found) <= limit + 1e-9
    loss = sum(point.loss for point in found)
    for chosen in product(*curves):
        if sum(point.cost for point in chosen) <= limit:
            assert loss <= sum(point.loss for point in chosen) + 1e-9
    # and all but one are points, the one being between two of its curve
    between = [p for p, curve in zip(found, curves, strict=True) if p not in curve]
    assert len(between) <= 1


def test_smoothed_curves_fall_and_pass_through_what_was_measured() -> None:
    points = [Point(1, 4.0), Point(3, 1.0), Point(5, 2.0), Point(7, -0.5)]
    found = smoothed(points)
    losses = [point.loss for point in found]
    assert losses == sorted(losses, reverse=True)
    known = {point.cost: point.loss for point in found}
    assert known[1] == 4.0
    assert known[3] == pytest.approx(1.0)
    # halfway between logarithms
    assert known[2] == pytest.approx(2.0)
    # more loss at a higher cost is noise, and so is a gain
    assert known[5] == pytest.approx(1.0)
    assert 0 < known[7] < 0.01


# --- budgets


@pytest.mark.parametrize("factorization", ["cp", "tensor_ring", "tucker", "shared_basis"])
@pytest.mark.parametrize("by", ["equal", "size", "sensitivity"])
def test_budgets_are_kept_and_spent(by: str, factorization: str) -> None:
    known = weights() if by == "sensitivity" else None
    for share in (0.2, 0.45, 0.8):
        found = allocate(
            SITES, share, by=by, factorization=factorization, experts=2, sensitivities=known
        )
        assert found.by == by
        assert found.names == tuple(site.name for site in SITES)
        assert found.parameters <= share * found.parameters_before
        assert found.limit == int(share * found.parameters_before)
        # bonds are whole numbers, and several grow together
        assert found.parameters > (0.97 if factorization == "cp" else 0.9) * found.limit
        assert max(shares(found)) <= 1


def test_gates_count() -> None:
    free = allocate(SITES, "40%", experts=8, gate=None)
    found = allocate(SITES, "40%", experts=8)
    linear = found["2.attention"]
    assert linear.parameters == linear.specs[0].num_parameters + 64 * 8
    assert found.parameters <= found.limit == free.limit
    assert free["2.attention"].specs[0].num_parameters > linear.specs[0].num_parameters
    assert found["0.experts"].gate is None
    assert linear.gate == Gate()
    assert free["2.attention"].gate is None


def test_bytes() -> None:
    found = allocate(SITES, 200_000, unit="bytes", experts=2, by="size")
    counted = sum(layer.parameters * layer.site.itemsize for layer in found.layers)
    assert 0.95 * 200_000 < counted == found.bytes <= 200_000
    assert allocate(SITES, "25%", unit="bytes", experts=2).limit == found.bytes_before // 4


def test_ways_to_write_a_budget() -> None:
    first = allocate(SITES, "25%", experts=2)
    same = (0.25, first.limit, Budget(parameters=first.limit), " 25 %")
    assert all(allocate(SITES, each, experts=2) == first for each in same)
    assert allocate(SITES, "100%", experts=2).parameters <= first.parameters_before


# --- how it is shared out


def test_equal_shares_are_those_of_each_projection_alone() -> None:
    found = allocate(SITES[:2], "30%")
    for layer in found.layers:
        for spec, each in zip(layer.specs, layer.site.projections, strict=True):
            count = layer.site.experts
            assert count is not None
            sizes = (each.in_features, each.out_features, count)
            budget = int(0.3 * count * each.entries)
            rank = select_rank("cp", *sizes, budget=budget, bias=each.bias, gate=None)
            assert spec.factorization.rank == rank


def test_large_layers_keep_smaller_shares_by_size() -> None:
    sites = (LayerSite.of_linear("large", 400, 400), LayerSite.of_linear("small", 100, 100))
    found = allocate(sites, "20%", by="size", experts=1, gate=None)
    large, small = shares(found)
    # √(400²/100²) = 4 times the parameters, a quarter of the share
    assert small / large == pytest.approx(4, rel=0.05)


def test_weights_of_one_are_sizes_and_weights_of_entries_equal_shares() -> None:
    def ranks(found: Allocation) -> list[Any]:
        return [kind.rank for layer in found.layers for kind in layer.factorizations]

    by_size = allocate(SITES, "30%", by="size", experts=2)
    assert ranks(allocate(SITES, "30%", sensitivities=weights(), experts=2)) == ranks(by_size)
    assert ranks(allocate(SITES, "30%", sensitivities=weights(7.5), experts=2)) == ranks(by_size)
    entries = {
        name: float((site.experts or 1) * each.entries)
        for site in SITES
        for name, each in zip(site.unit_names, site.projections, strict=True)
    }
    equal = allocate(SITES, "30%", experts=2)
    assert ranks(allocate(SITES, "30%", sensitivities=entries, experts=2)) == ranks(equal)


def test_weights() -> None:
    sites = [LayerSite.of_linear(str(k), 200, 200, bias=False) for k in range(3)]
    given = {"0": 1.0, "1": 4.0, "2": 9.0}
    found = allocate(sites, "30%", sensitivities=given, experts=1, gate=None)
    ranks = [layer.factorizations[0].rank for layer in found.layers]
    assert ranks == pytest.approx([15, 30, 45], abs=1)
    assert found.loss == pytest.approx(
        sum(w * 40_000 / layer.parameters for w, layer in zip((1, 4, 9), found.layers, strict=True))
    )


def curve(name: str, scale: float, kind: Any = CP, decay: float = 1 / 20) -> Sensitivity:
    points = []
    for rank in (4, 10, 20, 40):
        value = kind(rank) if kind is CP else kind((1, rank, rank))
        spec = LayerSpec(64, 64, 1, value, False)
        points.append(SensitivityPoint(value, spec.num_parameters, scale * 2.0 ** (-rank * decay)))
    return Sensitivity(name, tuple(points))


def test_measured_losses() -> None:
    sites = [LayerSite.of_linear(str(k), 64, 64, bias=False) for k in range(3)]
    found = allocate(
        sites,
        "50%",
        sensitivities=[curve("0", 1.0), curve("1", 1.0), curve("2", 8.0)],
        experts=1,
        gate=None,
    )
    one, other, last = (layer.factorizations[0].rank for layer in found.layers)
    assert abs(one - other) <= 3
    assert last > one + 10
    assert found.parameters <= found.limit
    # the losses of exponentials are equal at the optimum, but for the ends of what was measured
    assert found.layers[2].loss == pytest.approx(8.0 * 2 ** (-last / 20), rel=0.1)
    # whatever the order of names
    again = allocate(
        sites,
        "50%",
        sensitivities=[curve("2", 8.0), curve("1", 1.0), curve("0", 1.0)],
        experts=1,
        gate=None,
    )
    assert again == found


def test_each_projection_gets_the_factorization_with_the_smaller_loss() -> None:
    sites = [LayerSite.of_linear(str(k), 64, 64, bias=False) for k in range(2)]
    known = []
    for name, better in (("0", "cp"), ("1", "tucker")):
        points = [
            SensitivityPoint(p.factorization, p.parameters, p.loss)
            for kind in (CP, Tucker)
            for p in curve(name, 1.0 if kind.name == better else 5.0, kind).points
        ]
        known.append(Sensitivity(name, tuple(points)))
    found = allocate(
        sites, "60%", factorization=("cp", "tucker"), sensitivities=known, experts=1, gate=None
    )
    assert [layer.factorizations[0].name for layer in found.layers] == ["cp", "tucker"]


def test_what_no_curve_asks_for_is_shared_equally() -> None:
    sites = [LayerSite.of_linear(str(k), 64, 64, bias=False) for k in range(2)]
    flat = [
        Sensitivity(str(k), (SensitivityPoint(CP(2), 258, 0.1), SensitivityPoint(CP(4), 516, 0.1)))
        for k in range(2)
    ]
    found = allocate(sites, "50%", sensitivities=flat, experts=1, gate=None)
    assert found.parameters > 0.9 * found.limit
    one, other = (layer.factorizations[0].rank for layer in found.layers)
    assert one == other


# --- models of real size


@pytest.mark.parametrize("config", [LLAMA, LARGE, MIXTRAL], ids=["8B", "70B", "8x7B"])
def test_models_of_real_size(config: dict[str, Any]) -> None:
    start = time.process_time()
    entries = 3 * 4096 * 14336
    if config is MIXTRAL:
        found = allocate(config, "25%", by="size")
        assert found.parameters_before == 32 * 8 * entries
    else:
        found = allocate(config, "25%", by="size", what="linear", factorization="cp")
        assert len(found.layers) == 7 * config["num_hidden_layers"]
    assert 0.99 * found.limit < found.parameters <= found.limit
    assert found.bytes == 2 * found.parameters
    assert time.process_time() - start < 10


# --- values


def test_allocations_are_values(tmp_path: Path) -> None:
    found = allocate(SITES, "40%", experts=(2, 2), sensitivities=weights(), gate="sparsemax")
    assert Allocation.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    path = tmp_path / "allocation.json"
    found.save(path)
    assert Allocation.load(path) == found
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert again == found
        assert hash(again) == hash(found)
    names = {
        "Allocation": Allocation,
        "AllocatedLayer": AllocatedLayer,
        "LayerSite": LayerSite,
        "Projection": Projection,
        "LayerSpec": LayerSpec,
        "CP": CP,
        "Gate": Gate,
    }
    assert eval(repr(found), names) == found


def test_tables() -> None:
    found = allocate(SITES, "40%", experts=(2, 2))
    text = str(found)
    for layer in found.layers:
        line = next(line for line in text.splitlines() if line.startswith(layer.name))
        assert f"{layer.parameters:,}" in line
        assert f"{layer.share:.1%}" in line
        assert " | ".join(str(kind.rank) for kind in layer.factorizations) in line
    assert f"{found.parameters:,}" in text
    assert "by equal" in text
    assert "<table" in found._repr_html_()
    assert "total" in str(found.of_kind())


def test_kinds() -> None:
    found = allocate(SITES, "40%", experts=2)
    assert found.of_kind("experts").names == ("0.experts", "1.experts")
    assert found.of_kind("linear", "mlp").names == ("2.mlp", "2.attention")
    with pytest.raises(KeyError):
        found["3"]


def test_sizes_of_sites() -> None:
    before = [8 * 3 * 64 * 96, 4 * (65 * 32 + 33 * 64), 64 * 256 + 128 * 64, 65 * 48]
    assert [site.parameters for site in SITES] == before
    assert SITES[0].unit_names[0] == "0.experts.gate_proj"
    assert [LayerSite.from_dict(site.to_dict()) for site in SITES] == list(SITES)


def test_sizes_are_square_roots() -> None:
    # the shares that minimize a sum of 1/share are in proportion to √n
    bounds = [Bounds(1, 1e9)] * 2
    best = in_proportion([sqrt(100), sqrt(900)], bounds, 200)
    losses = [100 / x + 900 / (200 - x) for x in (best[0] - 1, best[0], best[0] + 1)]
    assert min(losses) == losses[1]
