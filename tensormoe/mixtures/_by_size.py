"""Experts of different sizes: every choice runs the size of its own expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tensormoe.backend import Array, Backend, default_integer, device_of
from tensormoe.functional._dtypes import cast
from tensormoe.gates import OneExpert
from tensormoe.routing import by_expert

RunSize = Callable[[int, Array, OneExpert], Array]
"""Runs the experts of one size, by its place among the sizes: rows (rows, in) → (rows, out)."""


@dataclass(frozen=True)
class Dispatch:
    """Way in which choices are sent to the sizes of their experts.

    Attributes:
        reads: whether values of arrays can be read, so that a size is handed its own rows alone.
            Where something traces the call, shapes must not depend on values: every size is handed
            the rows of all, with weights of zero for those of other sizes.
        sorts: whether rows reach experts in the order of these, with counts. Grouped products then
            run the rows of a size alone, whatever it is handed.
    """

    reads: bool
    sorts: bool


def send_by_size(
    run: RunSize,
    x: Array,
    index: Array,
    weights: Array,
    experts: Sequence[int],
    backend: Backend,
    dispatch: Dispatch,
) -> Array:
    """Send tokens to experts of several sizes, and sum the weighted outputs.

    Args:
        run: the experts of one size; their numbers start at zero for each.
        x: (tokens, in).
        index: (tokens, k) numbers of experts, which are numbered size after size.
        weights: (tokens, k), in any floating-point dtype.
        experts: number of experts of each size.
        backend: the adapter of the arrays' library.
        dispatch: how rows reach the sizes.

    Returns:
        (tokens, out), in the dtype of ``x``.
    """
    firsts = [0, *accumulate(experts)][:-1]
    sizes = list(zip(firsts, experts, strict=True))
    if dispatch.reads:
        made = _own_rows(run, x, index, weights, sizes, backend, dispatch.sorts)
    elif dispatch.sorts:
        made = _sorted_rows(run, x, index, weights, sizes, backend)
    else:
        made = _all_rows(run, x, index, weights, sizes, backend)
    return cast(made, x.dtype, backend)


def _own_rows(
    run: RunSize,
    x: Array,
    index: Array,
    weights: Array,
    sizes: list[tuple[int, int]],
    backend: Backend,
    sorts: bool,
) -> Array:
    """Each size is handed its own rows alone."""
    tokens, k = index.shape
    sent = by_expert(index, sum(count for _, count in sizes), backend)
    loads = [int(each) for each in backend.floats(sent.counts)]
    parts, start = [], 0
    for place, (first, count) in enumerate(sizes):
        stop = start + sum(loads[first : first + count])
        counts = sent.counts[first : first + count] if sorts else None
        # sizes without rows run too: their parameters then have gradients, of zero
        rows = backend.take(x, sent.token[start:stop], 0)
        parts.append(run(place, rows, OneExpert(sent.expert[start:stop] - first, counts)))
        start = stop
    made = backend.namespace.concat(parts, axis=0)
    shares = backend.take(backend.reshape(weights, (tokens * k, 1)), sent.order, 0)
    made = made * cast(shares, made.dtype, backend)
    return backend.scatter_add(made, sent.token, 0, tokens)


def _sorted_rows(
    run: RunSize,
    x: Array,
    index: Array,
    weights: Array,
    sizes: list[tuple[int, int]],
    backend: Backend,
) -> Array:
    """Each size is handed as many rows as all have, its own first, in the order of experts."""
    xp = backend.namespace
    tokens, k = index.shape
    rows = tokens * k
    sent = by_expert(index, sum(count for _, count in sizes), backend)
    flat = backend.reshape(weights, (rows, 1))
    places = xp.arange(rows, dtype=default_integer(xp), device=device_of(index))
    total, start = None, None
    for place, (first, count) in enumerate(sizes):
        counts = sent.counts[first : first + count]
        own = backend.sum(counts, (0,))
        # those behind the last row are the first ones again
        turned = places if start is None else (places + start) % max(rows, 1)
        token = backend.take(sent.token, turned, 0)
        number = backend.take(sent.expert, turned, 0) - first
        number = xp.where(places < own, number, xp.zeros_like(number))
        rest = backend.reshape(rows - own, (1,))
        given = OneExpert(number, xp.concat([counts, rest], axis=0))
        made = run(place, backend.take(x, token, 0), given)
        shares = backend.take(flat, backend.take(sent.order, turned, 0), 0)
        shares = xp.where((places < own)[:, None], shares, xp.zeros_like(shares))
        part = backend.scatter_add(made * cast(shares, made.dtype, backend), token, 0, tokens)
        total = part if total is None else total + part
        start = own if start is None else start + own
    return total


def _all_rows(
    run: RunSize,
    x: Array,
    index: Array,
    weights: Array,
    sizes: list[tuple[int, int]],
    backend: Backend,
) -> Array:
    """Each size is handed the rows of all, in their own order."""
    xp = backend.namespace
    tokens, k = index.shape
    each = xp.broadcast_to(x[:, None, :], (tokens, k, x.shape[-1]))
    rows = backend.reshape(each, (tokens * k, x.shape[-1]))
    total = None
    for place, (first, count) in enumerate(sizes):
        here = (index >= first) & (index < first + count)
        number = xp.where(here, index - first, xp.zeros_like(index))
        made = run(place, rows, OneExpert(backend.reshape(number, (tokens * k,))))
        made = backend.reshape(made, (tokens, k, made.shape[-1]))
        shares = xp.where(here, weights, xp.zeros_like(weights))
        part = backend.sum(made * cast(shares, made.dtype, backend)[..., None], (1,))
        total = part if total is None else total + part
    return total
