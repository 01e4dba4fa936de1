"""The configuration of a Cartesian product of experts from a constructor's arguments."""

from __future__ import annotations

from dataclasses import replace

from tensormoe._validation import positive_int
from tensormoe.errors import BudgetError
from tensormoe.factorizations import FactorizationLike
from tensormoe.mixtures._cartesian import CartesianConfig
from tensormoe.mixtures._sparse import sparse_config
from tensormoe.routing import Router
from tensormoe.selection import Budget


def cartesian_config(
    in_features: int,
    hidden_features: int | None,
    out_features: int | None = None,
    *,
    experts: int,
    top_k: int,
    kind: str = "swiglu",
    act_layer: str | None = None,
    bias: bool = False,
    factorization: FactorizationLike | tuple[FactorizationLike, FactorizationLike] = "dense",
    rank: int | tuple[int, ...] | None = None,
    budget: Budget | int | None = None,
    router: Router | str = "softmax",
    shared_features: int | None = None,
    mix_shared: bool = True,
    pre_norm: bool = False,
    eps: float = 1e-6,
) -> CartesianConfig:
    """The configuration that constructors make of their arguments, planned already.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.
        GateError: a router that cannot be.

    >>> config = cartesian_config(
    ...     32, 64, experts=8, top_k=2, factorization="cp", budget=20_000
    ... )
    >>> config.half.experts.up.factorization, config.num_experts, config.num_parameters
    (CP(rank=38), 64, 19968)
    """
    norms = (1 + bool(pre_norm)) * positive_int(in_features, "in_features")
    try:
        half = sparse_config(
            in_features,
            hidden_features,
            out_features,
            experts=experts,
            top_k=top_k,
            kind=kind,
            act_layer=act_layer,
            bias=bias,
            factorization=factorization,
            rank=rank,
            budget=_half(budget, norms),
            router=router,
            shared_features=shared_features,
            mix_shared=mix_shared and shared_features is not None,
        )
    except BudgetError as error:
        raise _doubled(error, budget, norms) from None
    return CartesianConfig(half, pre_norm, eps)


def _half(budget: Budget | int | None, norms: int) -> Budget | int | None:
    """Share of each half in the parameters of the whole; other values go on as they are."""
    if isinstance(budget, Budget) and budget.parameters is not None:
        return replace(budget, parameters=max(1, (budget.parameters - norms) // 2))
    if isinstance(budget, int) and not isinstance(budget, bool):
        return max(1, (budget - norms) // 2)
    return budget


def _doubled(error: BudgetError, budget: Budget | int | None, norms: int) -> BudgetError:
    """An error in the numbers of the whole."""
    if not error.needed or budget is None:
        return error
    limit = budget.parameters if isinstance(budget, Budget) else budget
    needed = 2 * int(error.needed["parameters"]) + norms
    return BudgetError(
        f"parameters must be at least {needed} for both halves of this mixture; got {limit}. Raise "
        "the budget; or use fewer experts; or choose another factorization.",
        {"parameters": needed},
        {"parameters": limit or 0},
    )
