"""Multi-gate mixtures from the arguments of their constructors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensormoe._validation import brief, non_negative_int, positive_int
from tensormoe.errors import SpecError
from tensormoe.factorizations import FactorizationLike
from tensormoe.gates import Gate
from tensormoe.mixtures._budget import shared_out
from tensormoe.mixtures._experts import ExpertsConfig, experts_config
from tensormoe.mixtures._multi_gate import MultiGateConfig
from tensormoe.mixtures._sizes import per_group
from tensormoe.mixtures._tasks import Tasks
from tensormoe.selection import Budget

Pair = tuple[FactorizationLike, FactorizationLike]


def multi_gate_config(
    in_features: int,
    hidden_features: int | None = None,
    out_features: int | None = None,
    *,
    tasks: int | Sequence[str],
    experts: int,
    task_experts: int = 0,
    groups: Sequence[Sequence[str | int]] | None = None,
    group_experts: int | None = None,
    group_features: int | None = None,
    kind: str = "mlp",
    act_layer: str | None = None,
    bias: bool = False,
    factorization: FactorizationLike | Pair | Sequence[Pair] = "dense",
    rank: int | tuple[int, ...] | None = None,
    budget: Budget | int | None = None,
    gate: Gate | str = "softmax",
) -> MultiGateConfig:
    """The configuration that constructors make of their arguments, planned already.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.
        GateError: a gate that cannot be.

    >>> config = multi_gate_config(32, 16, 8, tasks=3, experts=4, task_experts=2)
    >>> config.experts.num_experts, config.experts_of(1)
    (10, (0, 1, 2, 3, 6, 7))
    """
    names = _names(tasks)
    rule = gate if isinstance(gate, Gate) else _named_gate(gate)
    shared, own = positive_int(experts, "experts"), non_negative_int(task_experts, "task_experts")
    members = None if groups is None else _members(groups, names)
    if members is None:
        for name, value in (("group_experts", group_experts), ("group_features", group_features)):
            if value is not None:
                raise SpecError(
                    f"{name} must be None without groups; got {brief(value)}. Leave it out, or "
                    "give groups of tasks."
                )
    of_group = 0 if members is None else shared if group_experts is None else group_experts
    if members is not None:
        of_group = positive_int(of_group, "group_experts")
    pools = [shared + own * len(names)]
    inner = positive_int(in_features, "in_features")
    outer = inner if out_features is None else positive_int(out_features, "out_features")
    sizes = [(inner, outer)]
    if members is not None:
        width = inner if group_features is None else positive_int(group_features, "group_features")
        pools = [shared + of_group * len(members), pools[0] + of_group * len(members)]
        sizes = [(inner, width), (width, outer)]
    each = per_group(factorization, len(pools), "stages")
    options: Any = {"kind": kind, "act_layer": act_layer, "bias": bias, "rank": rank}

    def pool(place: int, share: int | None = None, **changed: Any) -> ExpertsConfig:
        named = options | {"factorization": each[place], "budget": share} | changed
        first, last = sizes[place]
        return experts_config(first, hidden_features, last, pools[place], **named)

    def whole(found: Sequence[ExpertsConfig]) -> MultiGateConfig:
        first = found[0] if len(found) > 1 else None
        return MultiGateConfig(found[-1], names, own, rule, first, members, of_group)

    if budget is None:
        config = whole([pool(place) for place in range(len(pools))])
    else:
        dense = [pool(place, factorization="dense", rank=None) for place in range(len(pools))]
        weights = [one.num_parameters for one in dense]
        router = whole(dense).num_parameters - sum(weights)
        config = whole(shared_out(budget, weights, pool, router))
    config.plan_ahead()
    return config


def _names(tasks: int | Sequence[str]) -> Tasks:
    """Names of tasks, of a number of them too."""
    if isinstance(tasks, list | tuple):
        return tuple(tasks)
    return tuple(f"task_{place}" for place in range(positive_int(tasks, "tasks")))


def _named_gate(gate: str) -> Gate:
    """A gate by the name of its activation, without normalization, as in the papers."""
    return Gate.parse(gate) if not isinstance(gate, str) else Gate(gate, normalization=None)


def _members(groups: Sequence[Sequence[str | int]], tasks: Tasks) -> tuple[Tasks, ...]:
    """Groups of names, from names or places."""
    if not isinstance(groups, list | tuple) or not all(
        isinstance(group, list | tuple) for group in groups
    ):
        raise SpecError(
            f"groups must be tuples of tasks; got {brief(groups)}. Write (('click', 'like'), "
            "('share',)), for instance."
        )
    if not groups:
        raise SpecError("groups must hold at least one group of tasks; got none. Leave it out.")

    def name(task: str | int) -> Any:
        place = isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(tasks)
        return tasks[task] if place else task  # type: ignore[index]

    return tuple(tuple(map(name, group)) for group in groups)
