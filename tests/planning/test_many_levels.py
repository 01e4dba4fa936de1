"""Layers with many levels of experts: planned in little time, and nearly as well as can be."""

from __future__ import annotations

import json
from pathlib import Path
from time import process_time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opt_einsum.paths import DynamicProgramming

import tensormoe_numpy
from tensormoe import CP, LayerSpec, select_rank
from tensormoe.errors import CheckpointError, SpecError
from tensormoe.planning import _path, plan_regimes
from tensormoe.planning._path import search_tree
from tensormoe.testing import specs
from tests._checkpoint_files import f32, raw_file
from tests._kinds import KINDS


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", [2, 5])
def test_ten_levels_in_a_second(kind: Any, size: int) -> None:
    """Without a limit, CP alone took nine seconds for six levels."""
    for batch, options in ((64, {}), (64, {"top_k": 2}), (64, {"indexed_input": True})):
        spec = LayerSpec(64, 48, (size,) * 10, kind)
        start = process_time()
        spec.plan(batch, **options).cost("entmax", training=True)
        assert spec.expert_rank >= 1
        assert spec.expert_span >= 1
        assert process_time() - start < 1.0


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_as_many_levels_as_there_may_be(kind: Any) -> None:
    start = process_time()
    spec = LayerSpec(64, 48, (2,) * 32, kind)
    spec.cost(64, training=True)
    assert process_time() - start < 4.0


def test_more_levels_are_refused() -> None:
    for build in (
        lambda: LayerSpec(64, 48, (1,) * 50, CP(2)),
        lambda: select_rank("cp", 64, 48, (1,) * 50),
        lambda: tensormoe_numpy.MuMoE(64, 48, (1,) * 50),
    ):
        with pytest.raises(SpecError, match="experts must have at most 32 levels; got 50"):
            build()


@pytest.mark.parametrize("name", ["cp", "tensor_ring", "tensor_train", "tucker"])
def test_ranks_of_many_levels(name: str) -> None:
    """The cuts of a ring with ten levels are too many to be listed for every rank."""
    start = process_time()
    budget = 2**17
    rank = select_rank(name, 64, 48, (2,) * 10, budget=budget)
    assert process_time() - start < 2.0
    assert rank


def least_work(legs: Any, sizes: dict[str, int]) -> int:
    """Of all trees, those with outer products included."""
    minimize = f"combo-{_path.WRITE_WEIGHT}"
    path = DynamicProgramming(minimize=minimize, search_outer=True)(legs, ("b", "o"), sizes)
    return _path._total(_path._tree_of(legs, path, ("b", "o")), sizes)


@settings(max_examples=60)
@given(spec=specs(largest=12, largest_rank=12), batch=st.sampled_from([1, 64, 4096]))
def test_parts_never_lose_against_their_start(spec: LayerSpec, batch: int) -> None:
    """Trees that are searched in parts of five lie between the best ones and where they start."""
    for term in spec.network.terms:
        data = [("b", leg) for leg in (*spec.network.expert_legs, "i") if leg in term.legs]
        operands = [*data, *(factor.legs for factor in term.factors)]
        sizes = {**spec.network.sizes, "b": batch}
        legs = [tuple(each) for each in operands]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (("_MOST_EXACT", 2), ("_PART", 5)):
                patch.setattr(_path, name, value)
            parts = _path._total(search_tree(legs, ("b", "o"), sizes), sizes)
        start = _path._tree_of(legs, _path._sensible_path(legs), ("b", "o"))
        assert least_work(legs, sizes) <= parts <= _path._total(start, sizes)


@pytest.mark.parametrize("levels", [32, 50, 10_000])
def test_files_are_checked_before_anything_is_planned(tmp_path: Path, levels: int) -> None:
    """A small file that claims many levels, and has none of their arrays."""
    spec = {
        "in_features": 7,
        "out_features": 5,
        "experts": [2] * levels,
        "factorization": "tucker",
        "rank": 2,
        "bias": True,
    }
    config = json.dumps({"spec": spec, "gate": None, "indexed_input": False})
    metadata = {"format": "tensormoe", "version": "1", "block": "MuMoE", "config": config}
    path = tmp_path / "a"
    path.write_bytes(raw_file({"factors.input": f32(0, 4, [1])}, bytes(4), metadata))
    before, start = plan_regimes.cache_info().misses, process_time()
    with pytest.raises(CheckpointError, match=r"is missing|at most 32 levels|at most 64 integers"):
        tensormoe_numpy.MuMoE.load(path)
    assert plan_regimes.cache_info().misses == before
    assert process_time() - start < 2.0


def test_layers_plan_when_they_are_made() -> None:
    """A forward call only looks up programs, and a compiler has no planner to trace."""
    layer = tensormoe_numpy.MuMoE(7, 5, (3, 2), CP(3))
    assert "regimes" in vars(layer.config)
    again = tensormoe_numpy.MuMoE.restore(layer.config, layer.arrays)
    assert "regimes" in vars(again.config)
