"""Routing record of several tasks: the coefficients of all experts that each task's gate makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import inf

from tensormoe.backend import Array, Backend, backend_of
from tensormoe.errors import GateError
from tensormoe.gates import Gate, activate

Ranges = tuple[tuple[int, int], ...]
"""Ascending ranges of experts' numbers, from the first to behind the last: those a gate reads."""


@dataclass(frozen=True, eq=False)
class TaskRoutes:
    """Routing record of a mixture with a gate per task.

    Losses are functions of it, for all tasks or for one of them, ``t``:
    ``load_balance_loss(routes.coefficients[..., t, :])`` where all tasks read all experts, and
    ``z_loss(routes.logits)``.

    Attributes:
        coefficients: (..., tasks, N), in float32 at least; zero for experts that a task does not
            read.
        logits: (..., tasks, N) what they came from; -inf for experts that a task does not read.
        groups: the record (..., groups + 1, N of the first stage) of a hierarchy's groups of tasks,
            the last one that of what all groups share; None without a hierarchy.
    """

    coefficients: Array
    logits: Array
    groups: TaskRoutes | None = None

    def reshaped(self, batch_shape: tuple[int, ...], backend: Backend) -> TaskRoutes:
        """The record with other leading axes."""
        groups = None if self.groups is None else self.groups.reshaped(batch_shape, backend)
        coefficients, logits = (
            backend.reshape(each, (*batch_shape, *each.shape[-2:]))
            for each in (self.coefficients, self.logits)
        )
        return TaskRoutes(coefficients, logits, groups)


def weigh_tasks(
    gate: Gate,
    logits: Array,
    reads: Sequence[Ranges],
    experts: int,
    *,
    backend: Backend | None = None,
) -> TaskRoutes:
    """Coefficients of experts for several tasks, from logits of the experts that each one reads.

    Args:
        gate: from logits to coefficients, the same for all tasks; it sees the experts of one task.
        logits: (rows, …), those of the first task's experts, then those of the second's, and so on.
        reads: the experts of each task.
        experts: N.
        backend: the adapter to run on; that of the logits' library by default.

    Raises:
        GateError: another number of logits.

    >>> import numpy as np
    >>> logits = np.log([[0.5, 0.5, 0.25, 0.75]])
    >>> gate = Gate("softmax", normalization=None)
    >>> weigh_tasks(gate, logits, [((0, 2),), ((0, 1), (2, 3))], 3).coefficients
    array([[[0.5 , 0.5 , 0.  ],
            [0.25, 0.  , 0.75]]])
    """
    backend = backend or backend_of(logits)
    widths = [sum(stop - start for start, stop in ranges) for ranges in reads]
    if logits.ndim != 2 or logits.shape[1] != sum(widths):
        raise GateError(
            f"logits must have shape (rows, {sum(widths)}), one per expert that a task reads; got "
            f"{tuple(logits.shape)}."
        )
    rows, start = logits.shape[0], 0
    made: list[tuple[Array, Array]] = []
    for width, same in groupby(widths):
        count = len([*same])
        stop = start + count * width
        block = backend.reshape(logits[:, start:stop], (rows, count, width))
        made.append((activate(gate, block, backend=backend).coefficients, block))
        start = stop
    if len(made) == 1 and widths[0] == experts:
        return TaskRoutes(*made[0])
    listed = [
        (weights[:, place, :], block[:, place, :])
        for weights, block in made
        for place in range(block.shape[1])
    ]
    coefficients, wide = (
        backend.namespace.concat(
            [
                _spread(each[place], ranges, experts, fill, backend)
                for each, ranges in zip(listed, reads, strict=True)
            ],
            axis=1,
        )
        for place, fill in ((0, 0.0), (1, -inf))
    )
    return TaskRoutes(coefficients, wide)


def _spread(values: Array, ranges: Ranges, experts: int, fill: float, backend: Backend) -> Array:
    """One task's values (rows, 1, N) from those of the experts that it reads."""
    xp = backend.namespace
    rows = values.shape[0]
    ends = [0, *(end for pair in ranges for end in pair), experts]
    parts, taken = [], 0
    for place, (first, last) in enumerate(pairwise(ends)):
        if place % 2:
            parts.append(values[:, taken : taken + last - first])
            taken += last - first
        elif last > first:
            column = xp.full_like(values[:, :1], fill)
            parts.append(xp.broadcast_to(column, (rows, last - first)))
    return backend.reshape(xp.concat(parts, axis=1), (rows, 1, experts))
