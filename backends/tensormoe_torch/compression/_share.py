"""A budget shared out over the projections of a model in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tensormoe._rounding import AUTO, checked_bits
from tensormoe._validation import choice
from tensormoe.compression import SHARES, Calibration
from tensormoe.compression._bits import Names, entries_for
from tensormoe.compression._sharing import FORMS, Form, best_part, loss_curve, shared
from tensormoe.decomposition._several import Choice, several
from tensormoe.errors import SpecError
from tensormoe.factorizations import Dense, Factorization
from tensormoe.selection import Allocation, Budget
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.surgery._replace import at

if TYPE_CHECKING:
    from numpy.typing import NDArray

Place = tuple[str, str]
"""A layer's name, and a role of its projections."""


def check_share(
    share: str,
    bits: int | str | None,
    budget: Budget | int | float | None,
    calibration: Calibration | None,
) -> None:
    """Refuse to share out what can't be.

    Raises:
        SpecError: an unknown word, no calibration, or a budget that is not a share.
    """
    choice(share, SHARES, "share", SpecError)
    if bits == AUTO and (calibration is None or not isinstance(budget, float)):
        raise SpecError(
            "bits='auto' needs a calibration, and a budget that is a share, such as 0.25. Give "
            "both."
        )
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


@dataclass(frozen=True)
class Given:
    """Factorization, budget and bits of one projection.

    Args:
        kind: of its factors.
        budget: for them.
        bits: 8 or 4 of each entry; None for entries of the dtype.
    """

    kind: Choice
    budget: Budget | int | float | None
    bits: int | None


@torch.no_grad()
def given_parts(
    sources: Sequence[DenseExperts],
    kinds: Mapping[str, Mapping[str, Choice]],
    budget: Budget | int | float | None,
    share: str,
    bits: int | str | None,
    calibration: Calibration | None,
    others: Sequence[DenseExperts] = (),
) -> dict[Place, Given]:
    """Part of each projection in a budget.

    Args:
        sources: the experts.
        kinds: factorizations by name of a layer and role.
        budget: of each projection.
        share: how one that is a share is shared out.
        bits: of the factors' entries.
        calibration: of the model, if any.
        others: layers again whose gate and up projection are tried as one as well, of as many bytes
            as both have.

    Raises:
        BudgetError: too little for some.
    """
    places = [(source, role) for source in sources for role in source.roles]
    tried = [*places, *((source, "gate_up_proj") for source in others)]
    own = {(source.name, role): kinds[source.name][role] for source, role in tried}
    if share == "equal" and bits != AUTO:
        few = checked_bits(bits)
        return {
            (source.name, role): Given(
                own[source.name, role],
                entries_of(source, role, own[source.name, role], budget, few),
                few,
            )
            for source, role in tried
        }
    assert calibration is not None
    assert isinstance(budget, float)
    forms = FORMS if bits == AUTO else (Form(checked_bits(bits)),)
    curves, sizes = {}, {}
    for source, role in tried:
        stack, bias = _host(source, role)
        where = calibration, calibration.find(source.name), role, bias
        size = source.dtype.itemsize
        key = f"{source.name}.{role}"
        curves[key] = loss_curve(stack, *where, forms=forms, itemsize=size)
        sizes[key] = stack.size * size
    names = [f"{source.name}.{role}" for source, role in places]
    limit = int(budget * sum(sizes[name] for name in names))
    alone = {name: curves[name] for name in names}
    parts = shared(alone, sizes, limit, alike=share == "equal")
    for source in others:
        key = f"{source.name}.gate_up_proj"
        both = (parts[f"{source.name}.{role}"].nbytes for role in ("gate_proj", "up_proj"))
        parts[key] = best_part(curves[key], sizes[key], sum(both))
    found = {}
    for source, role in tried:
        part, kind = parts[f"{source.name}.{role}"], own[source.name, role]
        if part.form.whole:
            found[source.name, role] = Given(Dense(), None, part.form.bits)
            continue
        rows, columns, bias = source.own_sizes(role)
        shape = rows, columns, (source.count,)
        with at(f"{source.name}.{role}"):
            entries = entries_for(
                named(kind), shape, part.nbytes, part.form.bits, source.dtype.itemsize, bias
            )
        found[source.name, role] = Given(kind, entries, part.form.bits)
    return found


def entries_of(
    source: DenseExperts,
    role: str,
    kind: Choice,
    budget: Budget | int | float | None,
    bits: int | None,
) -> Budget | int | float | None:
    """A budget of entries: of few bits, a share is one of bytes.

    Raises:
        BudgetError: a share that leaves no entry.
    """
    if bits is None or not isinstance(budget, float) or not 0 < budget <= 1:
        return budget
    if isinstance(kind, Factorization):
        return budget
    rows, columns, bias = source.own_sizes(role)
    itemsize = source.dtype.itemsize
    size = int(budget * source.count * (rows + bias) * columns * itemsize)
    with at(f"{source.name}.{role}"):
        return entries_for(
            named(kind), (rows, columns, (source.count,)), size, bits, itemsize, bias
        )


def _host(source: DenseExperts, role: str) -> tuple[NDArray[Any], bool]:
    """The experts on the host, with a row of biases each where there are some."""
    import numpy as np

    weights, bias = source.decomposed(role)
    stack = weights.double().cpu().numpy()
    if bias is not None:
        row = bias.double().cpu().numpy()[:, None]
        stack = np.concatenate([stack, row], axis=1)
    return stack, bias is not None


def named(kind: Choice) -> Names:
    """A factorization by name, or several of which the best is taken."""
    found: Names = tuple(kind) if isinstance(kind, list) else kind  # type: ignore[assignment]
    return found
