"""Ranks within a budget for the two layers of a block, which share one gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tensormoe._spec import LayerSpec
from tensormoe._validation import flag, positive_int
from tensormoe.errors import BudgetError, SpecError
from tensormoe.factorizations import Factorization
from tensormoe.gates import Gate
from tensormoe.planning._baselines import linear_cost
from tensormoe.planning._budget import Budget
from tensormoe.planning._cost import Cost, StepCost
from tensormoe.planning._estimate import Around
from tensormoe.planning._family import Family
from tensormoe.planning._infeasible import levels_of, refusal
from tensormoe.planning._layer_cost import GATE_ITEMSIZE, gate_cost
from tensormoe.planning._select import best_spec, measure_of

__all__ = ["select_block"]

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

    The budget covers both layers and their gate, and is never exceeded. What gate and activation
    leave of it is split as the two linear layers that are replaced would take it, but no layer gets
    less than its smallest rank takes. What the first layer leaves of its share is the second's, and
    what both leave is the first's again. Memory is not split, since one layer runs after the other.

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
    built = None if gate is None or gate is False else Gate.parse(gate)
    block = _Block(first, second, limits, built if limits.gate else None)
    smallest = (first.spec((1, 1)), second.spec((1, 1)))
    if limits.exceeded(block.cost(*smallest)):
        raise _refused(block)
    # a share that rounding makes too small for any rank leaves the smallest one
    one = best_spec(first, block.share(*smallest), block.around_first(None), measure)
    one = one or smallest[0]
    two = best_spec(second, limits, block.around_second(one), measure) or smallest[1]
    return best_spec(first, limits, block.around_first(two), measure) or one, two


@dataclass(frozen=True)
class _Block:
    """A block whose ranks are to be chosen.

    Args:
        first: the layer before the activation.
        second: the layer behind it.
        budget: upper limits for the whole block.
        gate: of both layers, if it counts.
    """

    first: Family
    second: Family
    budget: Budget
    gate: Gate | None

    @property
    def planned(self) -> bool:
        """Whether anything but parameters is limited."""
        return set(self.budget.limits) != {"parameters"}

    @property
    def routing(self) -> int:
        """Bytes of the coefficients, which are there until the second layer has run."""
        width = max(self.budget.itemsize, GATE_ITEMSIZE)
        entries = self.budget.batch * sum(self.first.sizes.experts)
        return 0 if self.gate is None else width * entries

    @property
    def hidden(self) -> int:
        """Bytes of the array between the layers."""
        return self.budget.itemsize * self.budget.batch * self.second.sizes.in_features

    def cost(self, one: LayerSpec, two: LayerSpec) -> Cost:
        """The cost of a forward call of the whole block."""
        return self.around_second(one).join(self._layer(two))

    def around_first(self, two: LayerSpec | None) -> Around:
        """The gate, the activation, and the second layer if there is one yet."""
        cost = self._rest()
        if two is not None:
            cost = Around(cost=cost, held=self.routing + self.hidden).join(self._layer(two))
        return Around(cost=cost, held=self.routing)

    def around_second(self, one: LayerSpec) -> Around:
        """The gate, the activation and the first layer."""
        cost = Around(cost=self._rest(), held=self.routing).join(self._layer(one))
        return Around(cost=cost, held=self.routing + self.hidden)

    def share(self, one: LayerSpec, two: LayerSpec) -> Budget:
        """The budget of the first layer, gate and activation; given are the smallest layers."""
        budget = self.budget
        rest, least, reserved = (
            budget.spent(cost) for cost in (self._rest(), self._layer(one), self._layer(two))
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
            left = limit - rest[name]
            part = left * linear[0][name] / (linear[0][name] + linear[1][name])
            part = max(min(part, left - reserved[name]), least[name])
            limits[name] = limit if name == "memory" else rest[name] + part
        return budget.with_limits(limits)

    def _layer(self, spec: LayerSpec) -> Cost:
        if not self.planned:
            return Cost(spec.num_parameters, (), 0)
        return spec.cost(self.budget.batch, itemsize=self.budget.itemsize)

    def _rest(self) -> Cost:
        """The gate and the activation."""
        sizes, budget = self.first.sizes, self.budget
        gate = gate_cost(self.gate, sizes.in_features, sizes.experts, budget.batch, budget.itemsize)
        entries = budget.batch * sizes.out_features
        read = budget.itemsize * entries
        step = StepCost("activation", 0, entries, read, self.hidden)
        return gate.then(Cost(0, (step,), self.routing + read + self.hidden))


def _refused(block: _Block) -> BudgetError:
    first, second, budget = block.first, block.second, block.budget

    def smallest(one: Family, two: Family, gate: Gate | None) -> Cost:
        return _Block(one, two, budget, gate).cost(one.spec((1, 1)), two.spec((1, 1)))

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
