"""Arguments of soft mixtures, and the configuration that they make."""

from __future__ import annotations

from typing import NoReturn

from tensormoe._validation import flag, positive_int
from tensormoe.errors import SpecError
from tensormoe.factorizations import FactorizationLike
from tensormoe.mixtures._experts import experts_config
from tensormoe.mixtures._soft import SoftConfig
from tensormoe.selection import Budget


def soft_config(
    in_features: int,
    hidden_features: int | None,
    out_features: int | None,
    *,
    experts: int,
    slots: int = 1,
    kind: str = "mlp",
    act_layer: str | None = None,
    bias: bool = False,
    factorization: FactorizationLike | tuple[FactorizationLike, FactorizationLike] = "dense",
    rank: int | tuple[int, ...] | None = None,
    budget: Budget | int | None = None,
    normalize: bool = True,
    noise: float = 0.0,
    causal: bool = False,
) -> SoftConfig:
    """The configuration that constructors make of their arguments, planned already.

    Raises:
        SpecError: sizes, names or options that cannot be, or ``causal``.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.
    """
    flag(causal, "causal")
    if causal:
        _refuse_causal()
    sizes = [
        positive_int(value, name)
        for name, value in (("in_features", in_features), ("experts", experts), ("slots", slots))
    ]
    built = experts_config(
        in_features,
        hidden_features,
        out_features,
        experts,
        kind=kind,
        act_layer=act_layer,
        bias=bias,
        factorization=factorization,
        rank=rank,
        budget=budget,
        router=sizes[0] * sizes[1] * sizes[2] + bool(normalize),
    )
    config = SoftConfig(built, slots, normalize, noise)
    config.plan_ahead()
    return config


def _refuse_causal() -> NoReturn:
    raise SpecError(
        "causal must be False for a soft mixture; got True. Every slot is an average of all tokens "
        "of a set, so that the output of a token depends on those behind it, and a model that "
        "predicts them would see what it predicts. Use SparseMoE, whose tokens are independent."
    )
