"""A budget, what every factorization makes of it, and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from tensormoe._spec import LayerSpec
from tensormoe._validation import choice, positive_int, positive_ints
from tensormoe.errors import BudgetError, SpecError
from tensormoe.factorizations import FACTORIZATIONS, resolve_factorization
from tensormoe.gates import Gate
from tensormoe.planning._baselines import dense_moe_cost, linear_cost, mlp_cost, sparse_moe_cost
from tensormoe.planning._budget import Budget
from tensormoe.planning._cost import Cost
from tensormoe.planning._roofline import PUBLISHED_ROOFLINES, Roofline
from tensormoe.planning._select import OBJECTIVES, select_rank

__all__ = ["ComparisonRow", "compare"]


@dataclass(frozen=True)
class ComparisonRow:
    """One way to spend a budget, or a layer to measure it against.

    Args:
        name: of the factorization or the baseline.
        cost: of one call; None where nothing fits the budget.
        time: predicted seconds of that call.
        expert_rank: of one expert's matrix; None where a layer is no matrix.
        expert_span: of all experts; None likewise.
        spec: of a factorized layer.
        problem: why nothing fits, if so.
    """

    name: str
    cost: Cost | None = None
    time: float | None = None
    expert_rank: int | None = None
    expert_span: int | None = None
    spec: LayerSpec | None = field(default=None, repr=False)
    problem: str | None = None


def compare(
    in_features: int,
    out_features: int,
    experts: int | tuple[int, ...],
    *,
    budget: Budget | int | str = "linear",
    bias: bool = True,
    gate: Gate | str = "entmax",
    factorizations: Sequence[str] = tuple(FACTORIZATIONS),
    objective: str = "capacity",
    hidden_features: int | None = None,
    top_k: int = 2,
    roofline: Roofline | str | None = None,
    training: bool = False,
) -> tuple[ComparisonRow, ...]:
    """Factorizations at a budget, next to a linear layer, an MLP, and dense and sparse mixtures.

    Every cost is that of one call of ``budget.batch`` inputs with the gate; the gate's own
    parameters are not counted against the budget.

    Args:
        in_features: I.
        out_features: O.
        experts: N, or one size a level.
        budget: as for :func:`select_rank`.
        bias: whether layers and experts have a bias.
        gate: of all mixtures but the sparse one, whose router is a softmax.
        factorizations: names; one row each.
        objective: as for :func:`select_rank`.
        hidden_features: of the MLP; 4·I unless given.
        top_k: experts an input of the sparse mixture, no more than there are.
        roofline: for predicted times; the budget's own or "cpu" unless given.
        training: forward and backward with all gradients, instead of forward alone.

    Returns:
        The factorizations in the order given, then linear, mlp, dense_moe and sparse_moe.

    Raises:
        SpecError: sizes that make no layer, or an unknown factorization.
        BudgetError: a budget or an objective that makes no sense; not one that is too small, which
            its rows tell.

    >>> for row in compare(64, 64, 8, factorizations=["cp", "hadamard", "dense"]):
    ...     print(row.name, row.cost.parameters if row.cost else row.problem)
    cp 4622
    hadamard parameters must be at least 4672 for hadamard, ...
    dense parameters must be at least 33280 for dense, ...
    linear 4160
    mlp 33088
    dense_moe 33792
    sparse_moe 33792
    """
    # so that all a selection can object to below is too small a budget
    choice(objective, OBJECTIVES, "objective", BudgetError)
    limits = Budget.parse(budget, in_features, out_features, bias)
    device = _device(limits, roofline)
    levels = positive_ints(experts, "experts", "level")
    batch, itemsize = limits.batch, limits.itemsize
    gate = Gate.parse(gate)
    rows = [
        _factorized(
            choice(name, FACTORIZATIONS, "factorization", SpecError),
            LayerSpec(in_features, out_features, levels, "hadamard", bias),
            limits,
            objective,
            gate,
            device,
            training,
        )
        for name in factorizations
    ]
    count, rank = prod(levels), min(in_features, out_features)
    hidden = 4 * in_features if hidden_features is None else hidden_features
    kept = min(positive_int(top_k, "top_k"), count)
    costs = {
        "linear": linear_cost(
            in_features, out_features, batch, bias=bias, training=training, itemsize=itemsize
        ),
        "mlp": mlp_cost(
            in_features,
            hidden,
            out_features,
            batch,
            bias=bias,
            training=training,
            itemsize=itemsize,
        ),
        "dense_moe": dense_moe_cost(
            in_features,
            out_features,
            levels,
            batch,
            bias=bias,
            gate=gate,
            training=training,
            itemsize=itemsize,
        ),
        "sparse_moe": sparse_moe_cost(
            in_features,
            out_features,
            levels,
            kept,
            batch,
            bias=bias,
            training=training,
            itemsize=itemsize,
        ),
    }
    spans = {"linear": 1, "dense_moe": min(count, in_features * out_features)}
    spans["sparse_moe"] = spans["dense_moe"]
    rows += [
        ComparisonRow(
            name, cost, device.time(cost), rank if name in spans else None, spans.get(name)
        )
        for name, cost in costs.items()
    ]
    return tuple(rows)


def _factorized(
    name: str,
    sizes: LayerSpec,
    budget: Budget,
    objective: str,
    gate: Gate,
    device: Roofline,
    training: bool,
) -> ComparisonRow:
    given = sizes.in_features, sizes.out_features, sizes.experts
    try:
        rank = select_rank(name, *given, budget=budget, bias=sizes.bias, objective=objective)
    except BudgetError as error:
        return ComparisonRow(name, problem=str(error))
    spec = LayerSpec(*given, resolve_factorization(name, rank), sizes.bias)
    cost = spec.cost(budget.batch, gate=gate, training=training, itemsize=budget.itemsize)
    return ComparisonRow(name, cost, device.time(cost), spec.expert_rank, spec.expert_span, spec)


def _device(budget: Budget, roofline: Roofline | str | None) -> Roofline:
    if roofline is None:
        given = budget.roofline
        return given if isinstance(given, Roofline) else PUBLISHED_ROOFLINES["cpu"]
    if isinstance(roofline, Roofline):
        return roofline
    return PUBLISHED_ROOFLINES[choice(roofline, PUBLISHED_ROOFLINES, "roofline", SpecError)]
