"""Experts averaged over groups, hidden units aligned (M-SMoE, Li et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensormoe._validation import brief, flag
from tensormoe.backend import Array, Backend, backend_of
from tensormoe.compression._aligning import match_units, taken_units
from tensormoe.compression._grouping import ExpertGroups
from tensormoe.errors import ShapeError, SpecError
from tensormoe.functional._dtypes import cast, widened

_UP_ROLES = ((), ("up_proj",), ("gate_proj", "up_proj"), ("gate_up_proj",))


def merge_stacks(
    stacks: Mapping[str, Any],
    groups: ExpertGroups,
    *,
    biases: Mapping[str, Any] | None = None,
    align: bool = True,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Average the experts of every group, weighted, their hidden units in one order.

    The order of an expert's hidden units is arbitrary, so those of two experts have nothing to do
    with one another. Each expert's are permuted to be as close as can be to the dominant expert's
    (Li et al. 2024, section 3.1). Averages are taken in float32 at least.

    Args:
        stacks: by role ``down_proj`` and ``up_proj``, with ``gate_proj``, or ``gate_up_proj`` for
            both: (N, in, out), or a matrix (in, out) per expert. Experts of one layer have
            ``down_proj`` alone, and no hidden units.
        groups: who becomes one.
        biases: (N, out), or a row per expert, by role.
        align: whether units are permuted.

    Returns:
        Stacks (M, in, out) and biases (M, out) by role, in the dtype of the weights.

    Raises:
        SpecError: other roles.
        ShapeError: experts of different sizes or number, or entries that are not finite.
        MissingDependencyError: without SciPy, which matches the units.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> up, down = rng.standard_normal((4, 6)), rng.standard_normal((6, 4))
    >>> order = rng.permutation(6)
    >>> stacks = {"up_proj": (up, up[:, order]), "down_proj": (down, down[order])}
    >>> groups = ExpertGroups((0, 0), (0,), (0.75, 0.25), (1.0, 0.9))
    >>> merged, _ = merge_stacks(stacks, groups)
    >>> merged["up_proj"].shape, np.allclose(merged["up_proj"][0], up)
    ((1, 4, 6), True)
    """
    flag(align, "align")
    given = {} if biases is None else biases
    backend = _checked(stacks, given, len(groups.groups))
    xp, align = backend.namespace, align and len(stacks) > 1
    parts = {"weight": stacks, "bias": given}
    found: dict[tuple[str, str], list[Array]] = {}
    for members in groups.members:
        first = _expert(parts, members[0], backend)
        total = {key: groups.shares[members[0]] * each for key, each in first.items()}
        for n in members[1:]:
            if not groups.shares[n]:
                continue
            other = _expert(parts, n, backend)
            if align:
                other = taken_units(other, match_units(first, other, backend), backend)
            total = {key: each + groups.shares[n] * other[key] for key, each in total.items()}
        for key, each in total.items():
            found.setdefault(key, []).append(cast(each, parts[key[0]][key[1]][0].dtype, backend))
    merged = {
        key: xp.concat([array[None, ...] for array in each], axis=0) for key, each in found.items()
    }
    return (
        {role: merged["weight", role] for role in stacks},
        {role: merged["bias", role] for role in given},
    )


def _expert(
    parts: Mapping[str, Mapping[str, Any]], n: int, backend: Backend
) -> dict[tuple[str, str], Array]:
    """Weights and biases of one expert in float32 at least, by kind and role.

    Raises:
        ShapeError: they are not finite.
    """
    xp = backend.namespace
    found = {
        (kind, role): widened(stack[n], backend)
        for kind, stacks in parts.items()
        for role, stack in stacks.items()
    }
    for (kind, role), each in found.items():
        if not bool(xp.all(xp.isfinite(each))):
            raise ShapeError(
                f"experts must be finite to be merged; the {kind} of {role} of expert {n} is not."
            )
    return found


def _checked(stacks: Mapping[str, Any], biases: Mapping[str, Any], count: int) -> Backend:
    """Refuse stacks that are not of these experts, and return their library."""
    if {*stacks} not in [{"down_proj", *up} for up in _UP_ROLES] or not {*biases} <= {*stacks}:
        raise SpecError(
            "stacks must be down_proj, and up_proj, gate_proj and up_proj, or gate_up_proj, with "
            f"biases of some of them; got {brief(sorted(stacks))} and {brief(sorted(biases))}."
        )
    for role, each in (*stacks.items(), *biases.items()):
        if len(each) != count:
            raise ShapeError(
                f"{role} must be of the {count} experts that are grouped; got {len(each)}."
            )
        shapes = [tuple(matrix.shape) for matrix in each]
        for n, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ShapeError(
                    f"experts must all have one size; {role} of expert 0 has shape {shapes[0]}, of "
                    f"expert {n} {shape}. Merge lists of equal experts."
                )
    arrays = [each[0] for each in (*stacks.values(), *biases.values())]
    return backend_of(*arrays)
