"""Costs that a budget covers besides the layer whose rank is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tensormoe._spec import LayerSpec
from tensormoe.gates import Gate
from tensormoe.planning._cost import Cost
from tensormoe.planning._draft import DENSE, Routing
from tensormoe.planning._plan import Plan
from tensormoe.planning._program import Program
from tensormoe.planning._regimes import batch_program
from tensormoe.selection._budget import Budget


@dataclass(frozen=True)
class Spending:
    """A budget, and how much of it a layer takes together with everything else that it covers.

    Args:
        budget: upper limits.
        cost: of all that they cover, from the plan of the layer.
        indexed_input: whether inputs are integer ids.
    """

    budget: Budget
    cost: Callable[[Plan], Cost]
    indexed_input: bool = False

    def of(self, spec: LayerSpec) -> Cost:
        """The cost of a layer with everything else."""
        return self.cost(plan_within(self.budget, spec, self.indexed_input))

    def allows(self, spec: LayerSpec) -> bool:
        """Whether a layer keeps to the budget."""
        return self.budget.allows(self.of(spec))

    def share(self, spec: LayerSpec) -> float:
        """The largest share of a limit that a layer takes, by a plan for one batch size.

        Such a plan takes a third of the time of a plan for all of them, and costs the same but for
        ties.
        """
        network, batch, routing = spec.network, self.budget.batch, Routing(None, self.indexed_input)
        program = batch_program(network, batch, routing)
        cost = self.cost(Plan(network, "", routing, batch, program, batch, batch, batch))
        limits = self.budget.limits
        return max(value / limits[name] for name, value in self.budget.spent(cost).items())


def counted_gate(gate: Gate | str | Literal[False] | None) -> Gate | None:
    """The gate that was asked for; None for a layer that is given its coefficients."""
    return None if gate is None or gate is False else Gate.parse(gate)


def spending_of_layer(budget: Budget, gate: Gate | None, indexed_input: bool = False) -> Spending:
    """A budget for one layer, and for its gate if there is one."""
    return Spending(budget, lambda plan: plan.cost(gate, itemsize=budget.itemsize), indexed_input)


def plan_within(budget: Budget, spec: LayerSpec, indexed_input: bool = False) -> Plan:
    """The plan that a layer runs by in the call that a budget is about."""
    if budget.counts_parameters_alone:
        # they are known without a plan, which takes milliseconds
        return idle(spec, budget.batch)
    return spec.plan(budget.batch, indexed_input=indexed_input)


def idle(spec: LayerSpec, batch: int) -> Plan:
    """A plan of which nothing runs."""
    return Plan(spec.network, "", DENSE, batch, Program((), (), (), ()), 1, None, batch)
