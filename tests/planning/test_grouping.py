"""Products grouped by expert: rows that are sorted, against an expert at a time."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tensormoe_jax
import tensormoe_torch
from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Hadamard,
    LayerSpec,
    LowRank,
    SharedBasis,
    SharedDelta,
    TensorTrain,
    Tucker,
)
from tensormoe.errors import PlanError
from tensormoe.functional import LayerConfig, apply_experts, experts_vjp, materialize
from tensormoe.gates import OneExpert
from tensormoe.planning import Routing, plan_regimes
from tensormoe.planning._cost import program_cost
from tensormoe_numpy import BACKEND, MuMoE

N, IN, OUT = 5, 40, 48


def layer(factorization, bias=True):
    return MuMoE(IN, OUT, N, factorization, bias=bias, gate=None, dtype="float64", seed=0)


def rows_of(count, seed=0):
    generator = np.random.default_rng(seed)
    # an expert without rows, and one with most
    index = np.sort(generator.choice([0, 1, 1, 1, 4], count))
    return generator.standard_normal((count, IN)), index, np.bincount(index, minlength=N)


def expected(made, x, index):
    weights, biases = materialize(made.config, made.parameters, BACKEND)
    rows = np.einsum("ti,tio->to", x, weights[index])
    return rows if biases is None else rows + biases[index]


def kinds(made, rows, *, by_expert=True):
    program = made.config.routed_regimes[by_expert].program(rows)
    return [step.kind for step in program.steps]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sorted_rows", [True, False])
def test_dense_experts(bias, sorted_rows):
    made = layer(Dense(), bias)
    x, index, counts = rows_of(301)
    given = OneExpert(index, counts if sorted_rows else None)
    output = apply_experts(made.config, made.parameters, x, [given], BACKEND)
    np.testing.assert_allclose(output, expected(made, x, index), atol=1e-12)
    assert ("grouped" in kinds(made, 301, by_expert=sorted_rows)) == sorted_rows


@pytest.mark.parametrize("factorization", [CP(7), Hadamard(), Tucker((2, 3, 4))], ids=str)
def test_small_experts_are_gathered(factorization):
    made = layer(factorization)
    x, index, counts = rows_of(64)
    output = apply_experts(made.config, made.parameters, x, [OneExpert(index, counts)], BACKEND)
    np.testing.assert_allclose(output, expected(made, x, index), atol=1e-12)
    assert "grouped" not in kinds(made, 10**6)


def test_few_rows_are_gathered_and_many_grouped():
    made = layer(Dense())
    assert "grouped" not in kinds(made, 1)
    assert "grouped" in kinds(made, 64)
    assert made.config.sorts(64)
    assert not made.config.sorts(1)


def test_gradients_are_sums_over_each_experts_rows():
    made = layer(Dense())
    x, index, counts = rows_of(200, seed=1)
    given = [OneExpert(index, counts)]
    output, pull = experts_vjp(made.config, made.parameters, x, given, BACKEND)
    cotangent = np.random.default_rng(2).standard_normal(output.shape)
    found = pull(cotangent)
    weights, _ = materialize(made.config, made.parameters, BACKEND)
    np.testing.assert_allclose(found["x"], np.einsum("to,tio->ti", cotangent, weights[index]))
    table = np.zeros_like(weights)
    np.add.at(table, index, np.einsum("ti,to->tio", x, cotangent))
    np.testing.assert_allclose(found["factors.weight"], table, atol=1e-12)
    biases = np.zeros((N, OUT))
    np.add.at(biases, index, cotangent)
    np.testing.assert_allclose(found["factors.bias"], biases, atol=1e-12)


def test_cost_counts_each_row_once_and_each_matrix_at_most_once():
    made = layer(Dense(), bias=False)
    program = made.config.routed_regimes[1].program(1000)
    (cost,) = program_cost(program, {**program.sizes, "b": 1000}, itemsize=8)
    assert cost.matmul_flops == 2 * 1000 * IN * OUT
    assert cost.bytes_read == 8 * (1000 * IN + N * IN * OUT) + 8 * N
    assert cost.bytes_written == 8 * 1000 * OUT


def test_routing_is_of_one_kind():
    network = LayerSpec(IN, OUT, N, Dense()).network
    for wrong in ({"top_k": 2, "one_expert": True}, {"by_expert": True}):
        with pytest.raises(PlanError, match="one_expert"):
            plan_regimes(network, Routing(**wrong))


def test_levels_are_gathered_together():
    spec = LayerSpec(IN, OUT, (3, 4), Dense(), bias=False)
    config = LayerConfig(spec, None)
    weight = np.random.default_rng(0).standard_normal((3, 4, IN, OUT))
    x = np.random.default_rng(1).standard_normal((6, IN))
    one, two = np.array([0, 1, 2, 2, 1, 0]), np.array([3, 0, 1, 2, 3, 0])
    given = [OneExpert(one), OneExpert(two)]
    output = apply_experts(config, {"factors.weight": weight}, x, given, BACKEND)
    np.testing.assert_allclose(output, np.einsum("ti,tio->to", x, weight[one, two]))


@pytest.mark.parametrize("width", [48, 7])
def test_rows_of_no_expert_come_last_and_give_zeros(width):
    rng = np.random.default_rng(3)
    rows, matrices = rng.standard_normal((9, 16)), rng.standard_normal((3, 16, width))
    counts = np.array([2, 0, 4, 3])
    wanted = np.vstack([rows[:2] @ matrices[0], rows[2:6] @ matrices[2], np.zeros((3, width))])
    np.testing.assert_allclose(BACKEND.grouped_matmul(rows, matrices, counts), wanted)
    with jax.enable_x64(True):
        found = jax.jit(tensormoe_jax.BACKEND.grouped_matmul)(
            *map(jnp.asarray, (rows, matrices, counts))
        )
        np.testing.assert_allclose(found, wanted)
    for dtype in (torch.float64, torch.float32):
        given = [torch.tensor(each, dtype=dtype, requires_grad=True) for each in (rows, matrices)]
        for call in (
            tensormoe_torch.BACKEND.grouped_matmul,
            # what compilers get
            torch.ops.tensormoe.grouped_matmul,
        ):
            made = call(*given, torch.tensor(counts))
            np.testing.assert_allclose(made.detach(), wanted, rtol=1e-5, atol=1e-5)
        cotangent = torch.ones_like(made)
        by_rows, by_matrices = torch.autograd.grad(made, given, cotangent)
        assert not by_rows[6:].any()
        assert by_rows[:6].any(1).all()
        np.testing.assert_allclose(
            by_matrices[2], np.outer(rows[2:6].sum(0), np.ones(width)), rtol=1e-4, atol=1e-5
        )


MIDDLE = [LowRank(30), SharedBasis((1, 32)), SharedBasis((3, 32)), BaseDelta(30), SharedDelta(30)]
"""Factorizations whose factors have the expert leg between the others."""


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factorization", MIDDLE, ids=str)
def test_experts_in_the_middle_of_a_factor_are_grouped(factorization, bias):
    made = layer(factorization, bias)
    x, index, counts = rows_of(500)
    given = [OneExpert(index, counts)]
    assert "grouped" in kinds(made, 500)
    assert "grouped" not in kinds(made, 500, by_expert=False)
    output, pull = experts_vjp(made.config, made.parameters, x, given, BACKEND)
    np.testing.assert_allclose(output, expected(made, x, index), atol=1e-12)
    # gathered, every factor's gradient is a sum over rows
    cotangent = np.random.default_rng(2).standard_normal(output.shape)
    _, plain = experts_vjp(made.config, made.parameters, x, [OneExpert(index)], BACKEND)
    wanted = plain(cotangent)
    for name, found in pull(cotangent).items():
        np.testing.assert_allclose(found, wanted[name], atol=1e-9, err_msg=name)


def test_no_factor_is_copied_for_the_products():
    for factorization in MIDDLE:
        program = layer(factorization, bias=False).config.routed_regimes[1].programs[-1]
        big = {step.kind for step in program.steps if step.kind in ("gather", "permute")}
        assert not big or all(
            len(step.legs) == 2 for step in program.steps if step.kind == "gather"
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factorization", [Tucker((5, 36, 36)), TensorTrain((5, 36))], ids=str)
def test_tables_of_experts_are_mixed_once_for_many_rows(factorization, bias):
    made = layer(factorization, bias)
    x, index, counts = rows_of(3000)
    program = made.config.routed_regimes[1].program(3000)
    mixed = not (bias and isinstance(factorization, TensorTrain))
    assert any(not step.batched for step in program.steps) == mixed
    assert ("grouped" in kinds(made, 3000)) == mixed
    assert all(step.batched for step in made.config.routed_regimes[1].program(1).steps)
    given = [OneExpert(index, counts)]
    output, pull = experts_vjp(made.config, made.parameters, x, given, BACKEND)
    np.testing.assert_allclose(output, expected(made, x, index), atol=1e-11)
    cotangent = np.random.default_rng(2).standard_normal(output.shape)
    _, plain = experts_vjp(made.config, made.parameters, x, [OneExpert(index)], BACKEND)
    wanted = plain(cotangent)
    for name, found in pull(cotangent).items():
        np.testing.assert_allclose(found, wanted[name], atol=1e-8, err_msg=name)


def test_tables_are_not_mixed_into_arrays_larger_than_the_layer():
    spec = LayerSpec(IN, 400, N, SharedBasis((2, 36)), bias=False)
    assert spec.num_parameters < N * 400 * 36
    for program in LayerConfig(spec, None).routed_regimes[1].programs:
        assert all(step.batched for step in program.steps)


def test_numbers_per_row_are_multiplied_into_the_smallest_array():
    spec = LayerSpec(IN, 400, N, SharedBasis((1, 24)), bias=False)
    for regimes in LayerConfig(spec, None).routed_regimes:
        for program in regimes.programs:
            (step,) = (each for each in program.steps if each.kind == "multiply")
            assert prod(program.sizes[leg] for leg in step.legs if leg != "b") == 24
