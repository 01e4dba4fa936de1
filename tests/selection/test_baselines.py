"""Baselines against counts by hand."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe import LayerSpec
from tensormoe.errors import SpecError
from tensormoe.gates import Gate
from tensormoe.selection import dense_moe_cost, linear_cost, mlp_cost, sparse_moe_cost

sizes = st.integers(1, 40)


@given(sizes, sizes, sizes, st.booleans())
def test_linear(rows: int, columns: int, batch: int, bias: bool) -> None:
    cost = linear_cost(rows, columns, batch, bias=bias)
    assert cost.parameters == rows * columns + bias * columns
    assert cost.matmul_flops == 2 * batch * rows * columns
    assert cost.elementwise_flops == bias * batch * columns
    moved = rows * columns + batch * rows + bias * (columns + batch * columns)
    assert cost.bytes_read == 4 * moved
    assert cost.peak_memory == 4 * batch * columns
    trained = linear_cost(rows, columns, batch, bias=bias, training=True)
    assert trained.matmul_flops == 3 * cost.matmul_flops
    gradients = batch * rows + rows * columns + bias * columns
    assert trained.peak_memory >= 4 * (gradients + batch * columns)


@given(sizes, sizes, sizes, sizes, st.booleans())
def test_mlp(rows: int, hidden: int, columns: int, batch: int, bias: bool) -> None:
    cost = mlp_cost(rows, hidden, columns, batch, bias=bias)
    assert cost.parameters == (rows + bias) * hidden + (hidden + bias) * columns
    assert cost.matmul_flops == 2 * batch * hidden * (rows + columns)
    assert cost.elementwise_flops == batch * hidden + bias * batch * (hidden + columns)
    assert cost.peak_memory == 4 * batch * (hidden + max(hidden, columns))
    trained = mlp_cost(rows, hidden, columns, batch, bias=bias, training=True)
    assert trained.matmul_flops == 3 * cost.matmul_flops
    assert trained.saved_memory == 2 * 4 * batch * hidden


@given(sizes, sizes, st.lists(st.integers(1, 8), min_size=1, max_size=2), st.integers(16, 64))
def test_dense_moe(rows: int, columns: int, experts: list[int], batch: int) -> None:
    count = prod(experts)
    cost = dense_moe_cost(rows, columns, tuple(experts), batch, bias=False, gate=Gate("softmax"))
    assert cost.parameters == count * rows * columns + rows * sum(experts)
    gate = rows * sum(experts)
    # papers: N·I·O, and then the mix of results or of weights, which is smaller by a mode
    mixture = cost.matmul_flops + cost.elementwise_flops
    softmax = Gate("softmax")
    alone = LayerSpec(rows, columns, tuple(experts), "dense", bias=False).cost(batch)
    assert cost.matmul_flops - alone.matmul_flops == 2 * batch * gate
    assert mixture > alone.flops
    assert softmax.activation == "softmax"
    # N = 1 leaves elementwise products only
    assert alone.flops >= batch * count * rows * columns


def test_dense_moe_is_the_papers_count() -> None:
    # Oldfield et al. 2024: N·I·O multiply-adds an input, then N·O for the mix
    cost = dense_moe_cost(768, 768, 16, 64, bias=False)
    gate = 768 * 16
    assert cost.matmul_flops == 2 * 64 * (16 * 768 * 768 + 16 * 768 + gate)


@given(sizes, sizes, st.integers(2, 40), st.integers(1, 2), sizes, st.booleans())
def test_sparse_moe(
    rows: int, columns: int, experts: int, top_k: int, batch: int, bias: bool
) -> None:
    cost = sparse_moe_cost(rows, columns, experts, top_k, batch, bias=bias)
    assert cost.parameters == experts * (rows + bias) * columns + rows * experts
    router, mix = rows * experts, top_k * columns
    grouped = top_k * rows * columns
    assert cost.matmul_flops == 2 * batch * (router + grouped + mix)
    step = next(each for each in cost.steps if each.label == "experts")
    read = min(experts, batch * top_k)
    assert step.bytes_read == 4 * (batch * top_k * rows + read * rows * columns)
    assert step.bytes_written == 4 * batch * top_k * columns
    assert cost.peak_memory >= 4 * batch * top_k * (rows + columns)
    trained = sparse_moe_cost(rows, columns, experts, top_k, batch, bias=bias, training=True)
    # each of the three products gives two gradients; one way of the mix is elementwise
    assert trained.matmul_flops == 2 * batch * (3 * router + 3 * grouped + 2 * mix)
    assert trained.peak_memory > 4 * trained.parameters


def test_sparse_work_does_not_grow_with_experts_but_for_the_router() -> None:
    few, many = (sparse_moe_cost(96, 64, count, 2, 256, bias=False) for count in (8, 64))
    assert many.matmul_flops - few.matmul_flops == 2 * 256 * 96 * (64 - 8)
    assert many.parameters == 8 * few.parameters


@pytest.mark.parametrize("cost", [linear_cost, dense_moe_cost, mlp_cost, sparse_moe_cost])
def test_sizes_must_be_positive(cost: object) -> None:
    assert callable(cost)
    extra = {linear_cost: (), dense_moe_cost: (4,), mlp_cost: (4,), sparse_moe_cost: (4, 2)}[cost]
    with pytest.raises(SpecError, match="must be a positive integer; got 0"):
        cost(8, 0, *extra, 16) if cost is not mlp_cost else cost(8, 0, 4, 16)
    with pytest.raises(SpecError, match="batch must be a positive integer; got -1"):
        cost(8, 8, *extra, -1)


def test_more_experts_than_there_are_cannot_be_picked() -> None:
    with pytest.raises(SpecError, match="top_k must be at most the 4 experts; got 5"):
        sparse_moe_cost(8, 8, 4, 5, 16)
    with pytest.raises(SpecError, match="top_k must be a positive integer"):
        sparse_moe_cost(8, 8, 4, 0, 16)
