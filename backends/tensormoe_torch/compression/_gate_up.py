"""Gate and up projection of experts in memory as one tensor or as two, as is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NoReturn

import torch
from torch import nn

from tensormoe._validation import choice
from tensormoe.compression import GATE_UP
from tensormoe.compression._predicted import Lost
from tensormoe.decomposition import Decomposition
from tensormoe.errors import SpecError
from tensormoe.mixtures import gate_of
from tensormoe.selection import Allocation, Budget
from tensormoe_torch._layer import MuMoE
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.compression._gate import Own
from tensormoe_torch.compression._put import sparse_parent
from tensormoe_torch.compression._samples import Samples

_BOTH, _GATE, _UP = "gate_up_proj", "gate_proj", "up_proj"


def check_gate_up(gate_up: str, factorization: object, budget: Budget | int | float | None) -> None:
    """Refuse an unknown way, or a choice of ways without a budget to compare them at.

    Raises:
        SpecError: there is one.
    """
    choice(gate_up, GATE_UP, "gate_up", SpecError)
    if gate_up == "auto" and (
        not isinstance(budget, float) or isinstance(factorization, Allocation)
    ):
        raise SpecError(
            f"gate_up='auto' compares both ways at equal bytes, and needs a budget that is a "
            f"share; got {budget!r}. Give for example budget=0.25, or one of 'joined' and 'apart'."
        )


def arranged(model: nn.Module, source: DenseExperts, gate_up: str) -> DenseExperts:
    """Experts whose gate and up projection are decomposed as wanted; apart with ``"auto"``.

    Args:
        model: it holds them.
        source: as they are stored.
        gate_up: one of :data:`tensormoe.compression.GATE_UP`.

    Raises:
        SpecError: experts without a gate, or whose projections must stay one.
    """
    if gate_up == "stored":
        return source
    if _BOTH not in source.stacks and _GATE not in source.stacks:
        raise SpecError(
            f"gate_up={gate_up!r} needs experts with a gate; those of {source.name!r} "
            f"({type(source.module).__name__}) have none. Leave it as 'stored', or leave them out "
            "of the selection."
        )
    if gate_up == "joined":
        return source if _BOTH in source.stacks else replace(source, joined=True)
    if _BOTH not in source.stacks:
        return source
    if isinstance(source.act, Own):
        _refuse(source, gate_up, "gate in a way of their own, which takes both as one layer")
    if sparse_parent(model, source.name) is not None:
        _refuse(source, gate_up, "belong to a mixture that has both in one layer")
    act = gate_of(source.act)
    if act is None:
        _refuse(source, gate_up, "have a function of both that can't be taken apart")
    both = source.stacks[_BOTH]
    hidden = both.sizes[1] // 2
    stacks = {
        _GATE: both.part(slice(0, hidden)),
        _UP: both.part(slice(hidden, None)),
        "down_proj": source.stacks["down_proj"],
    }
    return replace(source, stacks=stacks, act=act)


def _refuse(source: DenseExperts, gate_up: str, reason: str) -> NoReturn:
    raise SpecError(
        f"experts whose gate and up projection are taken apart must have one function for each; "
        f"got gate_up={gate_up!r}, and those of {source.name!r} ({type(source.module).__name__}) "
        f"{reason}. Leave it as 'stored', or 'joined'."
    )


Made = tuple[Decomposition, Lost | None]
"""Factors of a projection, and what is lost on a calibration's data."""


def better(
    source: DenseExperts,
    apart: Mapping[str, Made],
    fitted: Callable[[DenseExperts, str], Made],
    sample: Samples | None,
) -> tuple[DenseExperts, Mapping[str, Made]]:
    """The way of gate and up projection that loses less: experts as they are decomposed, factors.

    Args:
        source: the experts, with both apart.
        apart: factors of each projection.
        fitted: makes those of a projection of experts.
        sample: rows to compare outputs for; without them and a calibration weights are compared.
    """
    joined = replace(source, joined=True)
    both = fitted(joined, _BOTH)
    whole = sum(_loss(source, role, apart[role], sample) for role in (_GATE, _UP))
    if _loss(joined, _BOTH, both, sample) >= whole:
        return source, apart
    return joined, {_BOTH: both, "down_proj": apart["down_proj"]}


@torch.no_grad()
def _loss(source: DenseExperts, role: str, made: Made, sample: Samples | None) -> float:
    """Loss by the factors of a projection, in one unit for gate, up and both."""
    found, off = made
    if off is not None and off.predicted_loss is not None:
        return off.predicted_loss
    if off is not None:
        return off.energy * off.output_error**2
    weights, bias = source.decomposed(role)
    rebuilt, row = MuMoE.restore(found.config(), found.parameters).materialize()
    lacking = weights - rebuilt
    missing = None if bias is None or row is None else bias - row
    if sample is None:
        parts = [lacking] if missing is None else [lacking, missing]
        return sum(float(each.double().square().sum()) for each in parts)
    index, shares = sample.index.reshape(-1), sample.weights.reshape(-1, 1)
    rows, total = sample.of(role, source), 0.0
    for place in index.unique().tolist():
        chosen = index == place
        off_by = rows[chosen] @ lacking[place]
        if missing is not None:
            off_by = off_by + missing[place]
        total += float((shares[chosen] * off_by).double().square().sum())
    return total
