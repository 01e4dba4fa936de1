"""Tokens in the order of their experts, so that each expert runs once, on all of its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from tensormoe.backend import Array, Backend, default_integer, device_of


@dataclass(frozen=True, eq=False)
class ByExpert:
    """Choices (tokens, k) as one list, sorted by expert.

    Attributes:
        order: (tokens · k,) places of the choices in the list of all, token by token.
        token: (tokens · k,) the token of each.
        expert: (tokens · k,) the expert of each, ascending.
        counts: (N,) how many choices fall on each expert.
    """

    order: Array
    token: Array
    expert: Array
    counts: Array


def by_expert(index: Array, experts: int, backend: Backend) -> ByExpert:
    """Sort choices by expert; those of one expert stay in the order of their tokens.

    Args:
        index: (tokens, k) integers in [0, experts).
        experts: N.
        backend: the adapter of the array's library.

    >>> import numpy as np
    >>> from tensormoe.backend import get_backend
    >>> sent = by_expert(np.array([[2, 0], [1, 2]]), 4, get_backend("numpy"))
    >>> sent.order.tolist(), sent.token.tolist(), sent.counts.tolist()
    ([1, 2, 0, 3], [0, 1, 0, 1], [1, 1, 2, 0])
    """
    xp = backend.namespace
    flat = backend.reshape(index, (-1,))
    order = xp.argsort(flat, stable=True)
    ones = xp.ones(flat.shape, dtype=default_integer(xp), device=device_of(flat))
    counts = backend.scatter_add(ones, flat, 0, experts)
    return ByExpert(order, order // index.shape[1], backend.take(flat, order, 0), counts)
