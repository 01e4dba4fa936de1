"""An MLP block, dense or of experts, at the same number of parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tensormoe import Factorization, Gate, select_rank
from tensormoe.factorizations import resolve_factorization
from tensormoe.selection import linear_cost, mlp_budgets
from tensormoe_torch import MuMoEMLP

__all__ = ["CP", "DENSE", "TENSOR_RING", "VARIANTS", "Variant", "flops", "make_mlp", "ranks"]


@dataclass(frozen=True)
class Variant:
    """A replacement for every MLP of a model.

    Args:
        name: for people.
        factorization: of the experts, by name; None for the dense MLP.
        bonds: sizes that are fixed, as ``select_rank`` takes them.
    """

    name: str
    factorization: str | None = None
    bonds: tuple[int | None, ...] | None = None


DENSE = Variant("dense")
CP = Variant("μMoE, CP", "cp")
# 4, 4 as in the paper's experiments: 16 directions for the experts, the rest for their rank
TENSOR_RING = Variant("μMoE, tensor ring", "tensor_ring", (4, 4, None))
VARIANTS = (DENSE, CP, TENSOR_RING)


def make_mlp(variant: Variant, features: int, hidden: int, experts: int, gate: Gate) -> nn.Module:
    """A block features → hidden → features with at most the parameters of the dense MLP.

    The gate counts: each of the two layers pays half of it.
    """
    if variant.factorization is None:
        return nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, features))
    share = features * experts // 2
    pair = tuple(
        _factorization(variant, rows, columns, experts, budget.parameters or 0, paid)
        for rows, columns, budget, paid in zip(
            (features, hidden),
            (hidden, features),
            mlp_budgets(features, hidden, features),
            (share, features * experts - share),
            strict=True,
        )
    )
    return MuMoEMLP(features, hidden, experts=experts, factorization=(pair[0], pair[1]), gate=gate)


def _factorization(
    variant: Variant, rows: int, columns: int, experts: int, budget: int, paid: int
) -> Factorization:
    assert variant.factorization is not None
    sizes = (rows, columns, experts)
    bonds = variant.bonds
    rank = select_rank(variant.factorization, *sizes, budget=budget - paid, bonds=bonds, gate=None)
    return resolve_factorization(variant.factorization, rank)


def flops(block: nn.Module, rows: int) -> int:
    """FLOPs of a forward call for ``rows`` inputs, the gate's included; no activation between."""
    if isinstance(block, MuMoEMLP):
        return block.cost(rows).flops
    layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
    return sum(linear_cost(each.in_features, each.out_features, rows).flops for each in layers)


def ranks(block: nn.Module) -> str:
    """The ranks of both layers in words; empty for a dense block."""
    if not isinstance(block, MuMoEMLP):
        return ""
    first, second = block.first.spec, block.second.spec
    return (
        f"{first.in_features} → {first.out_features} → {second.out_features}: "
        f"{first.num_experts} experts, ranks {first.factorization.rank} and "
        f"{second.factorization.rank}"
    )
