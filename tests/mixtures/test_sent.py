"""Experts of tokens that were sent, with what their rows share multiplied once per token."""

from __future__ import annotations

from itertools import product
from math import prod

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Hadamard,
    LowRank,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.backend import get_backend
from tensormoe.functional import materialize
from tensormoe.mixtures import run_sent
from tensormoe_numpy import BACKEND, MuMoE

N, IN, HIDDEN, OUT = 5, 40, 64, 36
ROLES = {"gate_proj": (IN, HIDDEN), "up_proj": (IN, HIDDEN), "down_proj": (HIDDEN, OUT)}
KINDS = [
    Dense(),
    LowRank(30),
    SharedBasis((1, 32)),
    SharedBasis((3, 32)),
    BaseDelta(30),
    SharedDelta(30),
    Tucker((4, 34, 34)),
    TensorTrain((4, 34)),
    TensorRing((2, 3, 20)),
    CP(40),
    Hadamard(),
]


def layers_of(factorization, bias=False):
    return {
        role: MuMoE(
            inner, outer, N, factorization, bias=bias, gate=None, dtype="float64", seed=seed
        )
        for seed, (role, (inner, outer)) in enumerate(ROLES.items())
    }


def tokens_of(count, k=2, seed=0):
    generator = np.random.default_rng(seed)
    # an expert without rows, experts twice in one token
    index = generator.choice([0, 1, 1, 1, 4], (count, k))
    return generator.standard_normal((count, IN)), index, generator.random((count, k))


def silu(x):
    return x / (1 + np.exp(-x))


def expected(layers, x, index, weights, biases):
    found = np.zeros((len(x), OUT))
    made = {
        role: materialize(each.config, each.parameters, BACKEND) for role, each in layers.items()
    }

    def project(role, row, expert):
        matrices, own = made[role]
        result = row @ matrices[expert]
        result = result if own is None else result + own[expert]
        return result + biases[role][expert] if biases else result

    for token, choice in product(range(len(x)), range(index.shape[1])):
        expert = index[token, choice]
        gate, up = (project(role, x[token], expert) for role in ("gate_proj", "up_proj"))
        down = project("down_proj", silu(gate) * up, expert)
        found[token] += weights[token, choice] * down
    return found


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("bias", ["none", "own", "beside"])
@pytest.mark.parametrize("factorization", KINDS, ids=str)
def test_sums_are_those_of_dense_experts(factorization, bias, sort):
    layers = layers_of(factorization, bias == "own")
    configs = {role: each.config for role, each in layers.items()}
    parameters = {role: each.parameters for role, each in layers.items()}
    biases = None
    if bias == "beside":
        generator = np.random.default_rng(9)
        biases = {role: generator.standard_normal((N, ROLES[role][1])) for role in ROLES}
    for count in (1, 60):
        x, index, weights = tokens_of(count)
        wanted = expected(layers, x, index, weights, biases)
        found = run_sent(
            configs, parameters, silu, x, index, weights, N, BACKEND, biases=biases, sort=sort
        )
        np.testing.assert_allclose(found, wanted, atol=1e-11)
    none = run_sent(configs, parameters, silu, *tokens_of(0), N, BACKEND, biases=biases, sort=sort)
    assert none.shape == (0, OUT)


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("factorization", [BaseDelta(30), Tucker((4, 34, 34))], ids=str)
def test_every_library_runs_them(factorization, library):
    convert = torch.as_tensor if library == "torch" else jnp.asarray
    layers = layers_of(factorization)
    x, index, weights = tokens_of(60)
    wanted = expected(layers, x, index, weights, None)
    configs = {role: each.config for role, each in layers.items()}
    parameters = {
        role: {
            name: convert(np.asarray(array, "float32")) for name, array in each.parameters.items()
        }
        for role, each in layers.items()
    }
    given = [convert(np.asarray(each, "float32")) for each in (x, weights)]
    act = torch.nn.functional.silu if library == "torch" else silu_of(jnp)
    found = run_sent(
        configs,
        parameters,
        act,
        given[0],
        convert(index),
        given[1],
        N,
        get_backend(library),
        sort=True,
    )
    np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-4)


def silu_of(xp):
    return lambda x: x / (1 + xp.exp(-x))


def work(program, batch):
    """Multiply-adds of a program's products over the batch."""
    found = 0
    for step in program.steps:
        if step.kind in ("linear", "matmul", "grouped") and step.batched:
            legs = {*step.input_legs[0], *step.input_legs[1]}
            if step.kind == "grouped":
                legs -= {*step.input_legs[2]}
            found += batch * prod(program.sizes[leg] for leg in legs if leg != "b")
    return found


def test_a_base_is_multiplied_once_per_token():
    layers = layers_of(BaseDelta(30))
    entering = layers["up_proj"].config.sent_stages[1][-1][0]
    assert work(entering.first, 1) == IN * HIDDEN
    assert work(entering.second, 1) == 30 * (IN + HIDDEN)
    leaving = layers["down_proj"].config.sent_stages[1][-1][1]
    assert work(leaving.first, 1) == 30 * (HIDDEN + OUT)
    assert work(leaving.second, 1) == HIDDEN * OUT


def test_a_shared_side_is_multiplied_once_per_token():
    layers = layers_of(Tucker((4, 34, 34)))
    entering = layers["up_proj"].config.sent_stages[1][-1][0]
    assert work(entering.first, 1) == IN * 34
    leaving = layers["down_proj"].config.sent_stages[1][-1][1]
    assert work(leaving.second, 1) == 34 * OUT


def test_what_is_not_linear_behind_experts_is_done_per_row():
    # every factor of a Hadamard network has the output, and a bias is added per row
    for layers in (layers_of(Hadamard()), layers_of(LowRank(30), bias=True)):
        for ways in layers["down_proj"].config.sent_stages:
            for _, leaving in ways:
                assert work(leaving.second, 1) == 0
