"""A budget shared out over the projections of a model in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tensormoe._rounding import entries_within
from tensormoe._validation import choice
from tensormoe.compression import SHARES, Calibration
from tensormoe.compression._bits import Names, fitting
from tensormoe.compression._sharing import loss_curve, shared
from tensormoe.decomposition._several import Choice, several
from tensormoe.errors import SpecError
from tensormoe.selection import Allocation, Budget
from tensormoe_torch.compression._dense import DenseExperts

Place = tuple[str, str]
"""A layer's name, and a role of its projections."""


def check_share(
    share: str, budget: Budget | int | float | None, calibration: Calibration | None
) -> None:
    """Refuse to share out what can't be.

    Raises:
        SpecError: an unknown word, no calibration, or a budget that is not a share.
    """
    choice(share, SHARES, "share", SpecError)
    if share != "equal" and (calibration is None or not isinstance(budget, float)):
        raise SpecError(
            "a budget that is a share, such as 0.25, is shared out by sensitivity with a "
            f"calibration; got {'no calibration' if calibration is None else repr(budget)}. Give "
            "both."
        )


def check_choice(
    factorization: Choice | Allocation,
    rank: int | tuple[int, ...] | None,
    budget: Budget | int | float | None,
    tolerance: float | None,
) -> None:
    """Refuse several factorizations without a budget.

    Raises:
        SpecError: there is none, or a rank or tolerance; or an unknown name.
    """
    if isinstance(factorization, Allocation) or several(factorization, None) is None:
        return
    if budget is None or rank is not None or tolerance is not None:
        raise SpecError(
            "one of several factorizations is chosen within a budget; got none, or a rank or "
            "tolerance. Give budget=…."
        )


@torch.no_grad()
def budgets(
    sources: Sequence[DenseExperts],
    budget: Budget | int | float | None,
    share: str,
    calibration: Calibration | None,
    kinds: Mapping[str, Mapping[str, Choice]],
    bits: int | None,
) -> dict[Place, int]:
    """Entries for each projection, where they are shared out by sensitivity; else nothing."""
    if share == "equal" or calibration is None or not isinstance(budget, float):
        return {}
    curves, sizes, places = {}, {}, {}
    for source in sources:
        layer = calibration.find(source.name)
        for role in source.stacks:
            weights, bias = source.decomposed(role)
            stack = weights.double().cpu().numpy()
            if bias is not None:
                row = bias.double().cpu().numpy()[:, None]
                stack = np.concatenate([stack, row], axis=1)
            name = f"{source.name}.{role}"
            places[name], sizes[name] = (source.name, role), stack.size
            curves[name] = loss_curve(stack, calibration, layer, role, bias is not None)
    limit = budget * sum(sizes.values())
    if bits is None:
        found = shared(curves, sizes, int(limit))
        return {places[name]: entries for name, entries in found.items()}
    itemsize = sources[0].dtype.itemsize
    found = shared(curves, sizes, entries_within(int(limit * itemsize), bits, itemsize))
    fitted = {}
    for source in sources:
        for role in source.stacks:
            rows, columns, bias = source.own_sizes(role)
            own = rows, columns, (source.count,)
            entries = found[f"{source.name}.{role}"]
            names = named(kinds[source.name][role])
            fitted[source.name, role] = fitting(names, own, entries, bits, itemsize, bias)
    return fitted


def named(kind: Choice) -> Names:
    """A factorization by name, or several of which the best is taken."""
    found: Names = tuple(kind) if isinstance(kind, list) else kind  # type: ignore[assignment]
    return found
