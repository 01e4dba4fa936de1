"""Routing record of a batch of tokens: the experts that a router chose, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, inf, prod
from typing import Any

from tensormoe.backend import Array, Backend, Ranks, backend_of, default_integer, device_of
from tensormoe.errors import GateError
from tensormoe.gates import Across, TopK, balanced_bias
from tensormoe.gates._top_k import check_k, largest
from tensormoe.routing._router import Router

# below, a pass for each of k experts takes no longer than a selection
_MANY = 64


@dataclass(frozen=True, eq=False)
class Routes:
    """Routing record: the experts of every token, and what they were chosen by.

    Losses are functions of it: ``z_loss(routes.logits)``, ``load_balance_loss(routes.scores,
    routes.choices, experts=N)`` and others of :mod:`tensormoe.gates`. Sigmoid scores do not sum to
    one: divide them by their sums first.

    Attributes:
        top_k_index: (..., k) numbers of the chosen experts, the best first.
        top_k_weights: (..., k) their weights, in float32 at least.
        logits: (..., N), in float32 at least.
        scores: (..., N) of all experts, without noise and biases.
        mixing: (..., 2) weights of the sum of the chosen experts and of the shared expert; None for
            ones.
    """

    top_k_index: Array
    top_k_weights: Array
    logits: Array
    scores: Array
    mixing: Array | None = None

    @property
    def chosen(self) -> TopK:
        """The chosen experts as coefficients by index, which losses and layers take."""
        return TopK(self.top_k_index, self.top_k_weights)

    @property
    def choices(self) -> TopK:
        """The chosen experts, each with weight one, for losses that count choices.

        A choice that ``capacity`` drops has weight 0 in :attr:`chosen`, but counts for the load: an
        expert that overflows is chosen too often.
        """
        backend = backend_of(self.top_k_weights)
        weights = backend.stop_gradient(self.top_k_weights)
        return TopK(self.top_k_index, backend.namespace.ones_like(weights))

    def reshaped(self, batch_shape: tuple[int, ...], backend: Backend) -> Routes:
        """The record with other leading axes."""
        every = self.top_k_index, self.top_k_weights, self.logits, self.scores, self.mixing
        return Routes(
            *(
                None if array is None else backend.reshape(array, (*batch_shape, array.shape[-1]))
                for array in every
            )
        )


def choose(
    router: Router,
    logits: Array,
    k: int,
    *,
    choice_bias: Array | None = None,
    noise: Array | None = None,
    backend: Backend | None = None,
) -> Routes:
    """The experts of every token and their weights, from logits.

    Ties go to the lower index. An expert of logit -inf has score 0, and is chosen after all others.
    Where the backend checks values, a token with no other expert is refused, and so is one with a
    NaN logit, or with an infinite one in a softmax. Elsewhere such tokens get NaN weights, but
    zeros for logits of -inf alone from sigmoids.

    Args:
        router: the rule.
        logits: (tokens, N), in float32 or wider.
        k: experts per token, from 1 to N.
        choice_bias: (N,), added to scores for the choice alone.
        noise: (tokens, N), standard normal, for a router with ``noise`` in training.
        backend: the adapter to run on; that of the logits' library by default.

    Returns:
        The record. Weights and scores are differentiable, the choice is not.

    Raises:
        GateError: k is out of range, or logits are not a floating-point matrix; where the backend
            checks values, also where they are not those of any choice.

    >>> import numpy as np
    >>> routes = choose(Router(), np.log([[0.5, 0.125, 0.375]]), 2)
    >>> routes.top_k_index.tolist(), routes.top_k_weights.round(3).tolist()
    ([[0, 2]], [[0.571, 0.429]])
    """
    backend = backend or backend_of(logits)
    xp = backend.namespace
    if logits.ndim != 2 or not xp.isdtype(logits.dtype, "real floating"):
        raise GateError(
            f"logits must be a floating-point matrix (tokens, N); got {logits.dtype} "
            f"{tuple(logits.shape)}. Merge leading axes."
        )
    check_k(k, logits.shape[1])
    if backend.checks_values and logits.shape[0]:
        _check_values(logits, router, xp)
    scores = scores_of(router, logits, backend)
    ranked = scores if noise is None else scores_of(router, logits + router.noise * noise, backend)
    if choice_bias is not None:
        # no bias brings back an expert that is masked
        ranked = xp.where(logits == -inf, logits, ranked + choice_bias[None, :])
    index = best_indices(ranked, k, backend)
    weights = xp.take_along_axis(scores, index, axis=-1)
    if router.capacity is not None:
        fits = within_capacity(index, logits.shape[1], router.capacity, backend)
        weights = weights * xp.astype(fits, weights.dtype)
    if router.renormalize:
        total = xp.sum(weights, axis=-1, keepdims=True)
        # a token that lost all of its experts, or whose scores underflow
        weights = weights / xp.where(total == 0.0, xp.ones_like(total), total)
    if router.scale != 1.0:
        weights = weights * router.scale
    return Routes(index, weights, logits, scores)


def without_best(
    router: Router,
    routes: Routes,
    *,
    choice_bias: Array | None = None,
    backend: Backend | None = None,
) -> Routes:
    """The record of tokens that each lose their most probable expert (Su et al. 2025, table 4).

    The expert with the largest logit is disabled, and k are chosen from the rest: a test of how
    much a mixture depends on single experts.

    Args:
        router: the rule.
        routes: (..., N) logits, and k.
        choice_bias: (N,), as for :func:`choose`.
        backend: the adapter to run on; that of the logits' library by default.

    Raises:
        GateError: every expert is chosen, so that none is left in the place of the best.

    >>> import numpy as np
    >>> routes = choose(Router(), np.log([[0.5, 0.125, 0.375]]), 2)
    >>> without_best(Router(), routes).top_k_index.tolist()
    [[2, 1]]
    """
    logits = routes.logits
    backend = backend or backend_of(logits)
    xp = backend.namespace
    batch_shape, experts, k = logits.shape[:-1], logits.shape[-1], routes.top_k_index.shape[-1]
    if k >= experts:
        raise GateError(
            f"k must be below the {experts} experts, so that one can be disabled; got {k}. Choose "
            "fewer per token."
        )
    rows = backend.reshape(logits, (prod(batch_shape), experts))
    columns = xp.arange(experts, device=device_of(rows))[None, :]
    best = xp.argmax(backend.stop_gradient(rows), axis=-1, keepdims=True)
    rows = xp.where(columns == best, xp.full_like(rows, -inf), rows)
    found = choose(router, rows, k, choice_bias=choice_bias, backend=backend)
    return replace(found.reshaped(batch_shape, backend), mixing=routes.mixing)


def next_bias(
    router: Router, bias: Array, routes: Routes, backend: Backend, across: Across | None = None
) -> Array:
    """Biases for the choice of the next step, by the load of this one."""
    return balanced_bias(bias, routes.choices, router.balance, across=across, backend=backend)


def within_capacity(index: Array, experts: int, capacity: float, backend: Backend) -> Array:
    """Whether each choice is among those that its expert has a place for, booleans (tokens, k).

    Places go to first choices before second ones, and to earlier tokens before later ones (GShard;
    Lepikhin et al. 2021).
    """
    xp = backend.namespace
    tokens, k = index.shape
    places = ceil(capacity * k * tokens / experts)
    first = backend.reshape(backend.permute(index, (1, 0)), (k * tokens, 1))
    columns = xp.arange(experts, device=device_of(index))[None, :]
    here = xp.astype(first == columns, default_integer(xp))
    before = xp.sum((xp.cumulative_sum(here, axis=0) - here) * here, axis=1)
    return backend.permute(backend.reshape(before < places, (k, tokens)), (1, 0))


def _check_values(logits: Array, router: Router, xp: Any) -> None:
    """Refuse logits that no choice follows from."""
    if bool(xp.any(xp.isnan(logits))):
        raise GateError("logits must not be NaN; got some. Look for the layer that made them.")
    top = xp.max(logits, axis=-1)
    nowhere = top == -inf
    if bool(xp.any(nowhere)):
        row = int(xp.argmax(xp.astype(nowhere, top.dtype)))
        raise GateError(
            f"every token must have at least one expert; got none in row {row}, where all logits "
            "are -inf. Leave each token one expert."
        )
    if router.scores == "softmax" and bool(xp.any(top == inf)):
        row = int(xp.argmax(top))
        raise GateError(
            f"logits of a softmax must be less than infinity; got inf in row {row}. Scale the "
            "router's projection or its input down."
        )


def scores_of(router: Router, logits: Array, backend: Backend) -> Array:
    xp: Any = backend.namespace
    if router.scores == "sigmoid":
        # of both signs without overflow
        small = xp.exp(-xp.abs(logits))
        return xp.where(logits >= 0, xp.ones_like(small), small) / (1.0 + small)
    if logits.shape[0] == 0:
        return logits
    top = backend.stop_gradient(xp.max(logits, axis=-1, keepdims=True))
    powers = xp.exp(logits - top)
    return powers / xp.sum(powers, axis=-1, keepdims=True)


def best_indices(ranked: Array, k: int, backend: Backend) -> Array:
    """Indices (tokens, k) of the k largest entries, the largest first."""
    xp = backend.namespace
    if ranked.shape[0] == 0:
        return xp.zeros((0, k), dtype=default_integer(xp), device=device_of(ranked))
    if ranked.shape[1] >= _MANY and isinstance(backend, Ranks):
        found = backend.largest_indices(ranked, k)
        if found is not None:
            return found
    return largest(backend, ranked, k)[0]
