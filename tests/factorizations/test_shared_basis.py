"""The shared basis: its two forms, what its figures do and do not tell, and its programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tensormoe_numpy
import tensormoe_torch
from tensormoe import Budget, LayerSpec, SharedBasis, from_tensorly, select_rank, to_tensorly
from tensormoe.errors import LayoutError, RankError
from tensormoe.testing import assert_output
from tensormoe_numpy import MuMoE


def layer(in_features: int, out_features: int, experts: tuple[int, ...] = (4,)) -> MuMoE:
    made = MuMoE(in_features, out_features, experts, SharedBasis((3, 2)), dtype="float64", seed=0)
    rng = np.random.default_rng(1)
    for array in made.factors.values():
        array[...] = rng.standard_normal(array.shape)
    return made


@pytest.mark.parametrize("sizes", [(7, 5), (5, 7), (6, 6)], ids=str)
def test_an_expert_is_the_papers_product(sizes: tuple[int, int]) -> None:
    """W = A Σ α B in the papers' (out, in), whichever side is larger."""
    made = layer(*sizes)
    mixing, left, right = (made.factors[name] for name in ("mixing", "input", "output"))
    for n in range(4):
        if sizes[0] >= sizes[1]:
            # up and gate projections: B reads the wide hidden state, A writes for its expert
            basis = sum(mixing[n, j] * left[:, j].T for j in range(3))
            want = right[:, n] @ basis
        else:
            basis = sum(mixing[n, j] * right[:, j] for j in range(3))
            want = basis @ left[:, n].T
        np.testing.assert_allclose(made.expert(n)[0].T, want, rtol=1e-12)


def test_the_basis_is_on_the_larger_side() -> None:
    wide, narrow = (LayerSpec(*sizes, 9, SharedBasis((3, 2))).shapes for sizes in [(7, 5), (5, 7)])
    assert wide == {"mixing": (9, 3), "input": (7, 3, 2), "output": (5, 9, 2), "bias": (3, 2)}
    assert narrow == {"mixing": (9, 3), "input": (5, 9, 2), "output": (7, 3, 2), "bias": (9, 2)}
    # the row of the bias does not turn it round
    assert LayerSpec(6, 6, 9, SharedBasis((3, 2))).shapes["input"] == (6, 3, 2)
    assert LayerSpec(5, 6, (3, 2), SharedBasis((3, 2))).shapes["input"] == (5, 3, 2, 2)


@pytest.mark.parametrize(("bases", "reads"), [(1, 4), (2, 8), (3, 12), (4, 12)])
def test_more_matrices_let_experts_read_more(bases: int, reads: int) -> None:
    """What J buys is no figure of the layer: the space that all experts together look at."""
    spec = LayerSpec(12, 5, 9, SharedBasis((bases, 4)), bias=False)
    assert (spec.expert_rank, spec.expert_span) == (4, 9)
    made = MuMoE(12, 5, 9, spec.factorization, bias=False, dtype="float64", seed=0)
    weights, _ = made.materialize()
    assert np.linalg.matrix_rank(weights.transpose(1, 0, 2).reshape(12, -1)) == reads


def test_selection_takes_what_bonds_leave() -> None:
    sizes = (2048, 768, 64)
    budget = Budget(parameters=64 * 2048 * 768 // 2, gate=False)
    bases, inner = select_rank("shared_basis", *sizes, budget=budget)  # type: ignore[misc]
    assert bases == 1
    for bonds in ((8, None), (None, 512), (1, None)):
        rank = select_rank("shared_basis", *sizes, budget=budget, bonds=bonds)
        assert isinstance(rank, tuple)
        assert all(given in (None, found) for given, found in zip(bonds, rank, strict=True))
        assert LayerSpec(*sizes, SharedBasis(rank)).num_parameters <= 64 * 2048 * 768 // 2
        more = tuple(found + (given is None) for given, found in zip(bonds, rank, strict=True))
        assert LayerSpec(*sizes, SharedBasis(more)).num_parameters > 64 * 2048 * 768 // 2
    tight = Budget(flops=10**9, batch=64)
    bases, inner = select_rank("shared_basis", *sizes, budget=tight)  # type: ignore[misc]
    assert LayerSpec(*sizes, SharedBasis((bases, inner))).cost(64).flops <= 10**9


@pytest.mark.parametrize("sizes", [(48, 32), (32, 48)], ids=str)
@pytest.mark.parametrize("experts", [(16,), (6, 5)], ids=str)
def test_top_k_picks_rows_of_every_factor_of_an_expert(
    sizes: tuple[int, int], experts: tuple[int, ...]
) -> None:
    spec = LayerSpec(*sizes, experts, SharedBasis((4, 8)))
    # a single row: many rows are spread over all experts
    program = spec.plan(1, top_k=2).program
    levels = {f"n{level}" for level in range(len(experts))}
    gathers = [step for step in program.steps if step.kind == "gather"]
    assert len(gathers) == sum(bool(levels & {*factor.legs}) for factor in spec.network.all_factors)
    # after the gathers, nothing is as large as all experts
    rest = [step for step in program.steps if step.kind != "gather"]
    assert not any(levels & {*step.legs} for step in rest)
    assert "permute" not in {step.kind for step in program.steps}


@pytest.mark.parametrize("rank", [(2, 5), (5, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("sizes", [(7, 5), (5, 7)], ids=str)
def test_no_two_matrices_start_alike(sizes: tuple[int, int], rank: tuple[int, int]) -> None:
    """Otherwise gradients would keep them alike, and all but one would be for nothing."""
    linear = torch.nn.Linear(*sizes, dtype=torch.float64)
    made, _ = tensormoe_torch.from_linear(linear, experts=4, factorization=SharedBasis(rank))
    name = "input" if sizes[0] > sizes[1] else "output"
    basis = made.factors[name].detach()
    assert basis.shape[1] == rank[0]
    for j in range(rank[0]):
        assert basis[:, j].any()
        for other in range(j):
            assert not torch.allclose(basis[:, j], basis[:, other])


def test_one_file_for_all_frameworks(tmp_path: Path) -> None:
    made = layer(4, 6, (3, 2))
    made.save(tmp_path / "layer.safetensors")
    opened = tensormoe_torch.MuMoE.load(tmp_path / "layer.safetensors")
    again = tensormoe_numpy.MuMoE.load(tmp_path / "layer.safetensors")
    assert opened.spec == again.spec == made.spec
    x = np.random.default_rng(2).standard_normal((5, 4))
    rest = (made.spec.factorization, made.factors, made.coefficients(x), x)
    assert_output(again(x), *rest)
    assert_output(opened(torch.tensor(x)).detach().numpy(), *rest)


def test_tensorly_has_no_layout() -> None:
    with pytest.raises(LayoutError, match=r"one that TensorLy has; got shared_basis.*materialize"):
        to_tensorly(SharedBasis((3, 2)), layer(7, 5).factors)
    with pytest.raises(LayoutError, match="shared_basis"):
        from_tensorly(SharedBasis((3, 2)), [np.ones(3)], bias=False)


def test_ranks_that_cannot_be() -> None:
    for rank in ((2, 3, 4), (2,)):
        with pytest.raises(RankError, match="rank must have 2 bonds, the shared matrices and"):
            LayerSpec(4, 3, 5, SharedBasis(rank))
    with pytest.raises(RankError, match="rank must be positive integers; got 0 for bond 1"):
        SharedBasis((2, 0))
