"""A base and deltas: the papers' formula, the sum in the plan, and what a common part means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tensormoe_torch
from tensormoe import (
    BaseDelta,
    LayerSpec,
    SharedDelta,
    TopK,
    from_tensorly,
    select_rank,
    to_tensorly,
)
from tensormoe.errors import LayoutError, RankError
from tensormoe.factorizations import INPUT, OUTPUT
from tensormoe.planning import weight_program
from tensormoe.testing import assert_output
from tensormoe_numpy import MuMoE

KINDS: list[Any] = [BaseDelta(2), SharedDelta(2)]
SIZES = [(7, 5), (5, 7), (6, 6)]


def layer(kind: Any, sizes: tuple[int, int], experts: tuple[int, ...] = (4,)) -> MuMoE:
    made = MuMoE(*sizes, experts, kind, dtype="float64", seed=0)
    rng = np.random.default_rng(1)
    for array in made.factors.values():
        array[...] = rng.standard_normal(array.shape)
    return made


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_expert_is_the_papers_sum(kind: Any, sizes: tuple[int, int]) -> None:
    made = layer(kind, sizes)
    base, left, right = (made.factors[name] for name in ("base", "input", "output"))
    for n in range(4):
        reads = left[:, n] if left.ndim == 3 else left
        writes = right[:, n] if right.ndim == 3 else right
        np.testing.assert_allclose(made.expert(n)[0], base + reads @ writes.T, rtol=1e-12)
        found = made.expert(n)[1]
        rows = made.factors["bias_1"]
        want = made.factors["bias"] + (rows[n] if rows.ndim == 2 else rows) @ writes.T
        np.testing.assert_allclose(found, want, rtol=1e-12)


def test_arrays_of_an_expert_are_on_the_smaller_side() -> None:
    spec = LayerSpec(7, 5, (3, 2), BaseDelta(4))
    assert spec.shapes == {
        "base": (7, 5),
        "input": (7, 3, 2, 4),
        "output": (5, 3, 2, 4),
        "bias": (5,),
        "bias_1": (3, 2, 4),
    }
    wide, narrow = (LayerSpec(*sizes, 9, SharedDelta(4), bias=False) for sizes in [(7, 5), (5, 7)])
    assert wide.shapes == {"base": (7, 5), "input": (7, 4), "output": (5, 9, 4)}
    assert narrow.shapes == {"base": (5, 7), "input": (5, 9, 4), "output": (7, 4)}


@pytest.mark.parametrize("experts", [(6,), (3, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_base_is_computed_once_for_all_experts(kind: Any, experts: tuple[int, ...]) -> None:
    """It costs what a linear layer costs, whatever the experts are mixed by."""
    spec = LayerSpec(40, 30, experts, kind, bias=False)
    for k in (None, 2):
        program = spec.plan(64, top_k=k).program
        base = next(i for i, each in enumerate(program.operands) if each.name == "base")
        uses = [step for step in program.steps if base in step.inputs]
        assert [(step.kind, set(step.legs)) for step in uses] == [("linear", {"b", "o"})]
        assert [step.kind for step in program.steps].count("reduce") == len(experts)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_coefficients_that_do_not_sum_to_one(kind: Any, sizes: tuple[int, int]) -> None:
    """As a top-k router that does not renormalize has them: the base is scaled by their sum."""
    made = layer(kind, sizes)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((5, sizes[0]))
    indices = np.array([[0, 3], [1, 2], [2, 0], [3, 1], [0, 1]])
    values = rng.uniform(0.05, 0.3, (5, 2))
    found = made(x, coefficients=TopK(indices, values))
    want = np.zeros((5, sizes[1]))
    for token in range(5):
        for n, share in zip(indices[token], values[token], strict=True):
            weight, bias = made.expert(int(n))
            want[token] += share * (x[token] @ weight + bias)
    np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-12)
    assert np.all(made(x, coefficients=np.zeros((5, 4))) == 0)


def test_selection_takes_the_largest_rank() -> None:
    for name, kind in (("base_delta", BaseDelta), ("shared_delta", SharedDelta)):
        rank = select_rank(name, 96, 64, 8, budget=30_000, gate=None)
        assert isinstance(rank, int)
        assert LayerSpec(96, 64, 8, kind(rank)).num_parameters <= 30_000
        assert LayerSpec(96, 64, 8, kind(rank + 1)).num_parameters > 30_000
    # there is always a base
    with pytest.raises(ValueError, match=r"parameters must be at least \d+ for base_delta"):
        select_rank("base_delta", 96, 64, 8, budget=96 * 64)


def test_ranks_of_terms_add_up() -> None:
    network = LayerSpec(9, 8, 20, SharedDelta(2)).network
    assert network.generic_rank(network.expert_legs, {INPUT, OUTPUT}) == 1 + 2 * 8
    assert network.generic_rank({INPUT}, {OUTPUT}) == 8
    # no more than there are experts
    few = LayerSpec(9, 8, 12, SharedDelta(2)).network
    assert few.generic_rank(few.expert_legs, {INPUT, OUTPUT}) == 12


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_whole_tensors_are_built_without_a_copy_of_the_base_for_each_expert(kind: Any) -> None:
    program = weight_program(LayerSpec(7, 5, (3, 2), kind).network, single=False, bias=False)
    last = program.steps[-1]
    assert (last.kind, last.in_place) == ("add", True)
    assert last.input_legs == (("n0", "n1", "i", "o"), ("i", "o"))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_file_for_all_frameworks(kind: Any, tmp_path: Path) -> None:
    made = layer(kind, (4, 6), (3, 2))
    made.save(tmp_path / "layer.safetensors")
    opened = tensormoe_torch.MuMoE.load(tmp_path / "layer.safetensors")
    assert opened.spec == made.spec
    x = np.random.default_rng(2).standard_normal((5, 4))
    rest = (made.spec.factorization, made.factors, made.coefficients(x), x)
    assert_output(made(x), *rest)
    assert_output(opened(torch.tensor(x)).detach().numpy(), *rest)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_noise_is_as_large_as_asked_in_tiny_and_huge_weights(kind: Any) -> None:
    for size in (1e-30, 1.0, 1e30):
        linear = torch.nn.Linear(24, 16, dtype=torch.float64)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.mul_(size)
        made, fit = tensormoe_torch.from_linear(linear, experts=32, factorization=kind, noise=0.3)
        assert fit.error < 1e-12
        weights = torch.stack([made.expert(n)[0] for n in range(32)]).detach() / size
        off = weights - linear.weight.detach().T / size
        share = float(off.norm() / (linear.weight.detach() / size).norm()) / 32**0.5
        assert 0.2 < share < 0.4


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", [BaseDelta(9), SharedDelta(9)], ids=str)
def test_deltas_of_weights_without_strength_can_still_grow(
    kind: Any, sizes: tuple[int, int]
) -> None:
    """One side is zero, and what it meets is not, whatever the weights and their rank."""
    linear = torch.nn.Linear(*sizes)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    made, _ = tensormoe_torch.from_linear(linear, experts=3, factorization=kind)
    sides = [made.factors[name].detach().flatten(0, -2) for name in ("input", "output")]
    alive = [bool((side.abs().sum(0) > 0).all()) for side in sides]
    dead = [not side.any() for side in sides]
    assert sorted(zip(alive, dead, strict=True)) == [(False, True), (True, False)]


def test_tensorly_has_no_layout() -> None:
    with pytest.raises(LayoutError, match="one that TensorLy has; got base_delta"):
        to_tensorly(BaseDelta(2), layer(BaseDelta(2), (7, 5)).factors)
    with pytest.raises(LayoutError, match="shared_delta"):
        from_tensorly(SharedDelta(2), [np.ones(3)], bias=False)


def test_ranks_that_cannot_be() -> None:
    with pytest.raises(RankError, match="rank must be one positive integer; got"):
        BaseDelta((2, 3))  # type: ignore[arg-type]
    with pytest.raises(RankError, match="rank must have one bond for shared_delta; got 2"):
        SharedDelta(1).with_rank((2, 3))
    with pytest.raises(RankError, match="rank must be"):
        BaseDelta(0)
