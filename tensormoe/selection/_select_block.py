"""Ranks within a budget for the two layers of a block, which share one gate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tensormoe._spec import LayerSpec
from tensormoe._validation import flag, positive_int
from tensormoe.errors import BudgetError, SpecError
from tensormoe.factorizations import Factorization
from tensormoe.gates import Gate
from tensormoe.planning._block_cost import block_cost
from tensormoe.planning._cost import Cost
from tensormoe.planning._plan import Plan
from tensormoe.selection._baselines import linear_cost
from tensormoe.selection._budget import Budget
from tensormoe.selection._family import Family
from tensormoe.selection._infeasible import levels_of, refusal
from tensormoe.selection._select import best_spec, measure_of
from tensormoe.selection._spending import Spending, counted_gate, idle, plan_within

Kind = str | type[Factorization]


def select_block(
    factorization: Kind | tuple[Kind, Kind],
    in_features: int,
    hidden_features: int,
    out_features: int,
    experts: int | tuple[int, ...],
    *,
    budget: Budget | int | str = "linear",
    bias: bool = True,
    objective: str = "capacity",
    gate: Gate | str | Literal[False] | None = "entmax",
    gated: bool = False,
) -> tuple[LayerSpec, LayerSpec]:
    """The layers of a block with the most capacity that a budget for all of it allows.

    The budget covers both layers and their gate, and is never exceeded by what
    :func:`tensormoe.planning.block_cost` counts. What gate and activation leave of it is split as
    the two linear layers that are replaced would take it, but no layer gets less than its smallest
    rank takes. What the first layer leaves of its share is the second's, and what both leave is the
    first's again. Memory is not split, since one layer runs after the other.

    Args:
        factorization: a name as for :func:`tensormoe.select_rank`, or one for each layer.
        in_features: size of an input.
        hidden_features: size between the layers.
        out_features: size of an output.
        experts: N, or one size per level of hierarchy.
        budget: upper limits for the whole block; "linear" stands for the parameters of the linear
            layers that it replaces.
        bias: whether every expert has a bias.
        objective: of each layer, as for :func:`tensormoe.select_rank`.
        gate: of both layers; None or False for a block that is given its coefficients.
        gated: whether half of the first layer's outputs multiply the other half, as in SwiGLU.

    Returns:
        The first layer, and the second.

    Raises:
        BudgetError: nothing fits; the message names the smallest budget that something fits.
        SpecError: sizes that are not those of a layer, or an unknown factorization.

    >>> first, second = select_block("cp", 768, 3072, 768, 128)
    >>> first.factorization, second.factorization
    (CP(rank=582), CP(rank=583))
    >>> first.num_parameters + second.num_parameters + 768 * 128, 769 * 3072 + 3073 * 768
    (4722189, 4722432)
    """
    pair = factorization if isinstance(factorization, tuple) else (factorization,) * 2
    if len(pair) != 2:
        raise SpecError(
            f"factorization must be one, or one per layer; got {len(pair)}: {factorization!r}."
        )
    hidden = positive_int(hidden_features, "hidden_features")
    width = 2 * hidden if flag(gated, "gated") else hidden
    first = Family(pair[0], in_features, width, experts, bias, None)
    second = Family(pair[1], hidden, out_features, experts, bias, None)
    measure = measure_of(objective)
    sizes = (in_features, hidden, out_features)
    limits = Budget.parse_block(budget, *sizes, bias, gated)
    built = counted_gate(gate)
    block = _Block(first, second, limits, built if limits.gate else None, gated)
    smallest = first.spec((1, 1)), second.spec((1, 1))
    one, two = (plan_within(limits, spec) for spec in smallest)
    if limits.exceeded(block.cost(one, two)):
        raise _refused(block)
    share = Spending(block.share(one, two), lambda plan: block.cost(plan, two))
    # a share that rounding makes too small for any rank leaves the smallest one
    chosen = best_spec(first, share, measure) or smallest[0]
    one = plan_within(limits, chosen)
    rest = Spending(limits, lambda plan: block.cost(one, plan))
    other = best_spec(second, rest, measure) or smallest[1]
    two = plan_within(limits, other)
    rest = Spending(limits, lambda plan: block.cost(plan, two))
    return best_spec(first, rest, measure) or chosen, other


@dataclass(frozen=True)
class _Block:
    """A block whose ranks are to be chosen.

    Args:
        first: the layer before the activation.
        second: the layer behind it.
        budget: upper limits for the whole block.
        gate: of both layers, if it counts.
        gated: whether half of the first layer's outputs multiply the other half.
    """

    first: Family
    second: Family
    budget: Budget
    gate: Gate | None
    gated: bool

    def cost(self, one: Plan | None, two: Plan | None) -> Cost:
        """The cost of a forward call of the whole block, but for a layer that is None."""
        budget, layers = self.budget, ((self.first.sizes, one), (self.second.sizes, two))
        first, second = (plan or idle(sizes, budget.batch) for sizes, plan in layers)
        cost = block_cost(first, second, self.gate, gated=self.gated, itemsize=budget.itemsize)
        left_out = sum(sizes.num_parameters for sizes, plan in layers if plan is None)
        return replace(cost, parameters=cost.parameters - left_out)

    def share(self, one: Plan, two: Plan) -> Budget:
        """The budget of all but what the second layer takes beyond its smallest rank.

        Args:
            one: the smallest first layer.
            two: the smallest second layer.
        """
        budget = self.budget
        least, besides, rest = (
            budget.spent(cost)
            for cost in (self.cost(one, two), self.cost(None, two), self.cost(None, None))
        )
        linear = [
            budget.spent(
                linear_cost(
                    each.in_features,
                    each.out_features,
                    budget.batch,
                    bias=each.bias,
                    itemsize=budget.itemsize,
                )
            )
            for each in (self.first.sizes, self.second.sizes)
        ]
        limits: dict[str, float] = {}
        for name, limit in budget.limits.items():
            part = linear[0][name] / (linear[0][name] + linear[1][name])
            share = besides[name] + part * (limit - rest[name])
            limits[name] = limit if name == "memory" else max(min(share, limit), least[name])
        return budget.with_limits(limits)


def _refused(block: _Block) -> BudgetError:
    first, second, budget = block.first, block.second, block.budget

    def smallest(one: Family, two: Family, gate: Gate | None) -> Cost:
        plans = (plan_within(budget, family.spec((1, 1))) for family in (one, two))
        return _Block(one, two, budget, gate, block.gated).cost(*plans)

    def split(experts: tuple[int, ...]) -> Cost:
        return smallest(first.with_experts(experts), second.with_experts(experts), block.gate)

    names = " and ".join(dict.fromkeys((first.name, second.name)))
    sizes = (first.sizes.in_features, second.sizes.in_features, second.sizes.out_features)
    experts = " × ".join(map(str, first.sizes.experts))
    return refusal(
        f"a block of {names}, {experts} experts of {' → '.join(map(str, sizes))}",
        budget,
        smallest(first, second, block.gate),
        None if block.gate is None else smallest(first, second, None),
        levels_of(first.sizes.experts) if first.by_pattern and second.by_pattern else (),
        split,
    )
