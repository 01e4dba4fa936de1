"""Edits of routing records: logits steered, weights scaled, experts silenced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf, prod
from typing import TypeVar

from tensormoe._validation import brief, instance
from tensormoe.backend import Array, Backend, backend_of, device_of
from tensormoe.editing._amounts import check_amounts, check_factors, check_numbers
from tensormoe.errors import SpecError
from tensormoe.routing import ProductRoutes, Router, Routes, SoftRoutes, choose

R = TypeVar("R", Routes, ProductRoutes, SoftRoutes)


def steer_routes(
    routes: Routes,
    additions: Mapping[int, float],
    router: Router,
    *,
    choice_bias: Array | None = None,
) -> Routes:
    """The record of tokens for which amounts were added to the logits of some experts.

    Experts are chosen anew, as many per token as before. An amount above zero brings an expert to
    tokens that did without it; ``-inf`` silences one, and another takes its place. Give the result
    to the mixture in the place of its own record.

    Args:
        routes: as a router of experts made them, such as that of ``SparseMoE``.
        additions: an amount by the expert's index, finite or ``-inf``; where experts were merged,
            by that of the router's output.
        router: the rule that they were chosen by.
        choice_bias: (N,), for a router with ``balance``.

    Returns:
        A record of the same library. Noise that the router added for its choice is left out.

    Raises:
        TypeError: ``additions`` is not a mapping.
        ShapeError: an index out of range, or every expert silenced.
        SpecError: another kind of record or rule, or an amount that cannot be.

    >>> import numpy as np
    >>> from tensormoe.routing import Router, choose
    >>> routes = choose(Router(), np.log([[0.5, 0.125, 0.375]]), 2)
    >>> steered = steer_routes(routes, {0: -np.inf}, Router())
    >>> steered.top_k_index.tolist(), steered.top_k_weights.round(2).tolist()
    ([[2, 1]], [[0.75, 0.25]])
    """
    instance(routes, Routes, "routes", "the record of a router that chooses k experts", SpecError)
    instance(router, Router, "router", "a tensormoe.routing.Router", SpecError)
    logits, backend = routes.logits, backend_of(routes.logits)
    count = int(logits.shape[-1])
    amounts = check_amounts(additions, count, infinite=True)
    xp, batch_shape = backend.namespace, tuple(logits.shape[:-1])
    added = xp.asarray(amounts, dtype=logits.dtype, device=device_of(logits))
    rows = backend.reshape(logits, (prod(batch_shape), count)) + added
    k = int(routes.top_k_index.shape[-1])
    found = choose(router, rows, k, choice_bias=choice_bias, backend=backend)
    return replace(found.reshaped(batch_shape, backend), mixing=routes.mixing)


def scale_routes(routes: R, factors: Mapping[int, float]) -> R:
    """The record in which the weights of some experts are multiplied.

    That multiplies their outputs: a factor above one amplifies an expert, one of zero silences it,
    and no other takes its place. Weights no longer sum to what they did. The choice stays.

    Args:
        routes: of a router that chooses k experts, of product keys, or of soft routing, where the
            weights are those of the slots in the outputs.
        factors: a finite factor by the expert's index; where experts were merged, by that of the
            router's output.

    Returns:
        A record of the same kind and library.

    Raises:
        TypeError: ``factors`` is not a mapping.
        ShapeError: an index out of range.
        SpecError: another kind of record, or a factor that is not a finite number.

    >>> import numpy as np
    >>> from tensormoe.routing import Router, choose
    >>> routes = choose(Router(), np.log([[0.5, 0.125, 0.375]]), 2)
    >>> scale_routes(routes, {0: 0.0, 2: 2.0}).top_k_weights.round(3).tolist()
    [[0.0, 0.857]]
    """
    if isinstance(routes, SoftRoutes):
        backend = backend_of(routes.combine)
        count = int(routes.combine.shape[-2])
        scales = [1.0] * count
        for index, factor in check_factors(factors, count).items():
            scales[index] = factor
        xp, dtype = backend.namespace, routes.combine.dtype
        column = xp.asarray(scales, dtype=dtype, device=device_of(routes.combine))
        return replace(routes, combine=routes.combine * column[:, None])
    if isinstance(routes, ProductRoutes):
        count = prod(int(each.shape[-1]) for each in routes.logits)
    elif isinstance(routes, Routes):
        count = int(routes.logits.shape[-1])
    else:
        raise SpecError(
            "routes must be a record of chosen experts, of product keys or of soft routing; got "
            f"{brief(routes)}. Scale the parts that it is made of."
        )
    backend = backend_of(routes.top_k_weights)
    checked = check_factors(factors, count)
    weights = scaled_weights(routes.top_k_index, routes.top_k_weights, checked, backend)
    return replace(routes, top_k_weights=weights)


def silence_routes(
    routes: Routes,
    indices: int | Iterable[int],
    router: Router | None = None,
    *,
    choice_bias: Array | None = None,
) -> Routes:
    """The record in which no token has anything of some experts.

    Args:
        routes: as a router of experts made them.
        indices: of the silent experts, or one.
        router: the rule; other experts are then chosen in their place, and weights are those of a
            router without them. Without it their weights are zero, and others keep theirs.
        choice_bias: (N,), for a router with ``balance``.

    Raises:
        ShapeError, SpecError: as :func:`steer_routes` and :func:`scale_routes`.

    >>> import numpy as np
    >>> from tensormoe.routing import Router, choose
    >>> routes = choose(Router(), np.log([[0.5, 0.125, 0.375]]), 2)
    >>> silence_routes(routes, 0).top_k_weights.round(3).tolist()
    [[0.0, 0.429]]
    >>> silence_routes(routes, 0, Router()).top_k_index.tolist()
    [[2, 1]]
    """
    instance(routes, Routes, "routes", "the record of a router that chooses k experts", SpecError)
    silent = check_numbers(indices, int(routes.logits.shape[-1]))
    if router is None:
        return scale_routes(routes, dict.fromkeys(silent, 0.0))
    return steer_routes(routes, dict.fromkeys(silent, -inf), router, choice_bias=choice_bias)


def scaled_weights(
    index: Array, weights: Array, factors: Mapping[int, float], backend: Backend
) -> Array:
    """Weights (..., k) of the experts ``index`` (..., k), those of some multiplied."""
    xp = backend.namespace
    for expert, factor in factors.items():
        # zeros, whatever there was
        changed = xp.zeros_like(weights) if factor == 0.0 else weights * factor
        weights = xp.where(index == expert, changed, weights)
    return weights
