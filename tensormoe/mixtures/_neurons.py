"""Experts of a few hidden units each, out of tables or out of tensor networks."""

from __future__ import annotations

from collections.abc import Callable

from tensormoe.backend import Array, Backend
from tensormoe.functional._dtypes import cast
from tensormoe.gates import OneExpert
from tensormoe.mixtures._experts import Act

LookUp = Callable[[str, Array], Array]
"""Rows (*index, row) of a table, by its name and their numbers."""
Combine = Callable[[str, Array, Array], Array]
"""Sums (tokens, row) of rows of a table, by its name, their numbers and weights (tokens, rows)."""
Project = Callable[[str, Array, tuple[OneExpert, ...]], Array]
"""Runs a layer, by its role, on rows (rows, in) and one expert per level."""

UP, DOWN = "up_proj", "down_proj"


def run_tables(
    look_up: LookUp,
    combine: Combine | None,
    act: Act,
    hidden: int,
    x: Array,
    index: Array,
    weights: Array,
    backend: Backend,
) -> Array:
    """Outputs (tokens, out) of experts whose vectors are rows of tables, weighted and summed.

    Only the rows of experts that are chosen are read.

    Args:
        look_up: reads rows of ``up_proj`` (N, hidden · in) and ``down_proj`` (N, hidden · out).
        combine: sums rows of ``down_proj`` by weights, where a library does it at once, for one
            hidden unit; None to look them up.
        act: the activation.
        hidden: hidden units per expert.
        x: (tokens, in).
        index: (tokens, k) numbers of experts.
        weights: (tokens, k).
        backend: the adapter of the arrays' library.
    """
    tokens, k = index.shape
    rows = look_up(UP, index)
    rows = backend.reshape(rows, (tokens, k * hidden, x.shape[1]))
    units = act(backend.reshape(backend.matmul(rows, x[:, :, None]), (tokens, k, hidden)))
    shares = units * cast(weights, units.dtype, backend)[:, :, None]
    if combine is not None and hidden == 1:
        return cast(combine(DOWN, index, shares[:, :, 0]), x.dtype, backend)
    rows = look_up(DOWN, index)
    # a size that -1 stands for cannot be found where there are no tokens
    rows = backend.reshape(rows, (tokens, k * hidden, rows.shape[-1] // hidden))
    made = backend.matmul(backend.reshape(shares, (tokens, 1, k * hidden)), rows)
    return cast(made[:, 0, :], x.dtype, backend)


def run_networks(
    project: Project,
    act: Act,
    sizes: tuple[int, ...],
    x: Array,
    index: Array,
    weights: Array,
    backend: Backend,
) -> Array:
    """Outputs (tokens, out) of experts whose matrices are entries of tensor networks.

    Args:
        project: runs ``up_proj`` and ``down_proj``.
        act: the activation.
        sizes: N_e of each level.
        x: (tokens, in).
        index: (tokens, k) numbers of experts, in row-major order of the levels.
        weights: (tokens, k).
        backend: the adapter of the arrays' library.
    """
    tokens, k = index.shape
    xp = backend.namespace
    each = xp.broadcast_to(x[:, None, :], (tokens, k, x.shape[1]))
    rows = backend.reshape(each, (tokens * k, x.shape[1]))
    given = tuple(
        OneExpert(backend.reshape(place, (tokens * k,))) for place in level_places(index, sizes)
    )
    units = act(project(UP, rows, given))
    # weighted where rows are narrow: what comes behind is linear
    shares = units * cast(backend.reshape(weights, (tokens * k, 1)), units.dtype, backend)
    made = project(DOWN, shares, given)
    made = backend.reshape(made, (tokens, k, made.shape[-1]))
    return cast(backend.sum(made, (1,)), x.dtype, backend)


def level_places(index: Array, sizes: tuple[int, ...]) -> list[Array]:
    """Places in each level of experts that are numbered in row-major order.

    >>> import numpy as np
    >>> [place.tolist() for place in level_places(np.array([5, 0]), (2, 3))]
    [[1, 0], [2, 0]]
    """
    places = []
    for size in reversed(sizes):
        places.append(index % size)
        index = index // size
    return places[::-1]
