"""Product routing: the best k of a product of experts, found without visiting the product.

An expert has one number per level, and its logit is the sum of one logit per level. The k largest
sums are among those of the k largest logits of each level, so that a million experts in two levels
cost two thousand logits (Lample et al. 2019; PEER, He 2024, arXiv 2407.04153).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tensormoe._validation import brief
from tensormoe.backend import Array, Backend, backend_of
from tensormoe.errors import GateError
from tensormoe.gates import TopK
from tensormoe.gates._top_k import check_k
from tensormoe.routing._router import Router
from tensormoe.routing._routes import best_indices, scores_of


@dataclass(frozen=True, eq=False)
class ProductRoutes:
    """Routing record of experts that are numbered by one index per level.

    Losses are functions of its levels, ``load_balance_loss(routes.scores, routes.choices,
    experts=sizes)`` for instance: nothing has an entry for every expert.

    Attributes:
        top_k_index: (..., k) numbers of the chosen experts in row-major order of the levels, the
            best first.
        top_k_weights: (..., k) their weights, in float32 at least.
        level_index: (..., k) for each level, the experts' places in it.
        logits: (..., N_e) for each level, in float32 at least, without noise.
    """

    top_k_index: Array
    top_k_weights: Array
    level_index: tuple[Array, ...]
    logits: tuple[Array, ...]

    @property
    def chosen(self) -> list[TopK]:
        """Places of the chosen experts in each level, with the experts' weights."""
        return [TopK(index, self.top_k_weights) for index in self.level_index]

    @property
    def choices(self) -> list[TopK]:
        """The same, each with weight one, for losses that count choices.

        A place that several experts of one choice share counts once.
        """
        backend = backend_of(self.top_k_weights)
        ones = backend.namespace.ones_like(backend.stop_gradient(self.top_k_weights))
        return [TopK(index, ones) for index in self.level_index]

    @property
    def scores(self) -> list[Array]:
        """Softmax of each level's logits, (..., N_e) each; their products are those of all sums."""
        backend = backend_of(self.logits[0])
        return [
            backend.reshape(scores_of(Router(), _merged(each, backend), backend), tuple(each.shape))
            for each in self.logits
        ]

    def reshaped(self, batch_shape: tuple[int, ...], backend: Backend) -> ProductRoutes:
        """The record of a mixture, (..., heads, k), with other axes before those of the heads."""

        def lead(array: Array) -> Array:
            return backend.reshape(array, (*batch_shape, *array.shape[-2:]))

        return ProductRoutes(
            lead(self.top_k_index),
            lead(self.top_k_weights),
            tuple(map(lead, self.level_index)),
            tuple(map(lead, self.logits)),
        )


def choose_product(
    router: Router,
    logits: Sequence[Array],
    k: int,
    *,
    noise: Sequence[Array] | None = None,
    backend: Backend | None = None,
) -> ProductRoutes:
    """The best k of all N₁ · N₂ · … experts of every token, and their weights.

    The logit of expert (i, j, …) is the sum of its levels' logits. Weights are, by router:

    - ``Router()``: the softmax over the k largest sums (PEER);
    - ``Router(renormalize=False)``: the softmax over all sums, which is the product of the levels'
      softmaxes (the Cartesian product router of OmniMoE, arXiv 2602.05711);
    - ``Router("sigmoid", renormalize=False)``: the sigmoid of each sum (PEER's other choice), and
      divided by their sum with ``renormalize``.

    The largest sums are the experts with the largest weights in all of these. The search is exact:
    an expert whose place is i-th best in one level and j-th best in the other has i · j experts
    that are no worse, so that pairs with i · j > k need not be looked at. Of equal sums, those
    that are better in an earlier level come first; of equal logits in a level, the lower index.

    Args:
        router: the rule; without bias, balance and capacity.
        logits: (..., N_e) for each level, in float32 or wider, with the same leading axes.
        k: experts per token, from 1 to the number of all. Of a level of fewer, all are candidates.
        noise: standard normal, of the logits' shapes, for a router with ``noise`` in training.
        backend: the adapter to run on; that of the logits' library by default.

    Returns:
        The record. Weights are differentiable, the choice is not.

    Raises:
        GateError: k is out of range, logits are not floating-point arrays with the same leading
            axes, or the router needs an entry per expert; where the backend checks values, also
            where logits are NaN.

    >>> import numpy as np
    >>> rows, columns = np.array([[0.0, 2.0, 1.0]]), np.array([[3.0, 1.0]])
    >>> routes = choose_product(Router(), [rows, columns], 2)
    >>> routes.top_k_index.tolist(), [index.tolist() for index in routes.level_index]
    ([[2, 4]], [[[1, 2]], [[0, 0]]])
    """
    check_product_router(router)
    logits = tuple(logits)
    backend = backend or backend_of(*logits)
    sizes = check_logits(logits, k, backend)
    lead = tuple(logits[0].shape[:-1])
    rows = [_merged(each, backend) for each in logits]
    ranked = list(map(backend.stop_gradient, rows))
    if noise is not None:
        ranked = [
            level + router.noise * _merged(each, backend)
            for level, each in zip(ranked, noise, strict=True)
        ]
    places = best_products(ranked, k, backend)
    index = places[0]
    for size, place in zip(sizes[1:], places[1:], strict=True):
        index = index * size + place
    weights = _weights(router, rows, places, backend)
    return ProductRoutes(
        backend.reshape(index, (*lead, k)),
        backend.reshape(weights, (*lead, k)),
        tuple(backend.reshape(place, (*lead, k)) for place in places),
        logits,
    )


def best_products(ranked: Sequence[Array], k: int, backend: Backend) -> list[Array]:
    """Places (rows, k) in each level of the k largest sums of one entry (rows, N_e) per level."""
    xp = backend.namespace
    places: list[Array] = []
    sums: Array = None
    for level in ranked:
        best = best_indices(level, min(k, level.shape[1]), backend)
        entries = xp.take_along_axis(level, best, axis=-1)
        if not places:
            places, sums = [best], entries
            continue
        # of each entry so far, how many of this level can come to stand in the best k
        widths = [min(best.shape[1], k // (rank + 1)) for rank in range(sums.shape[1])]
        ways = [(rank, width) for rank, width in enumerate(widths) if width]
        sums = xp.concat([sums[:, r : r + 1] + entries[:, :width] for r, width in ways], axis=1)
        places = [_repeated(place, ways, xp) for place in places]
        places.append(xp.concat([best[:, :width] for _, width in ways], axis=1))
        kept = best_indices(sums, min(k, sums.shape[1]), backend)
        sums = xp.take_along_axis(sums, kept, axis=-1)
        places = [xp.take_along_axis(place, kept, axis=-1) for place in places]
    return places


def check_product_router(router: Router) -> None:
    """Refuse a router that keeps something for every expert.

    Raises:
        GateError: it has a bias, balance or capacity.
    """
    if not isinstance(router, Router):
        raise GateError(f"router must be a Router; got {brief(router)}. Write Router('softmax').")
    for name, none in (("bias", False), ("balance", 0.0), ("capacity", None)):
        value = getattr(router, name)
        if value != none:
            raise GateError(
                f"a router of a product of experts must have {name}={none}, since it keeps nothing "
                f"for every expert; got {value!r}. Balance levels by a loss: "
                "load_balance_loss(routes.scores, routes.choices, experts=sizes)."
            )


def _repeated(place: Array, ways: Sequence[tuple[int, int]], xp: Any) -> Array:
    rows = place.shape[0]
    each = [xp.broadcast_to(place[:, rank : rank + 1], (rows, width)) for rank, width in ways]
    return xp.concat(each, axis=1)


def _weights(
    router: Router, rows: Sequence[Array], places: Sequence[Array], backend: Backend
) -> Array:
    """Weights (rows, k) of chosen experts, differentiable."""
    xp = backend.namespace
    picked = [
        xp.take_along_axis(level, place, axis=-1) for level, place in zip(rows, places, strict=True)
    ]
    if router.scores == "softmax" and not router.renormalize:
        each = [scores_of(router, level, backend) for level in rows]
        pairs = zip(each, places, strict=True)
        chosen = [xp.take_along_axis(level, place, axis=-1) for level, place in pairs]
        weights = chosen[0]
        for factor in chosen[1:]:
            weights = weights * factor
    else:
        total = picked[0]
        for part in picked[1:]:
            total = total + part
        weights = scores_of(router, total, backend)
        if router.scores == "sigmoid" and router.renormalize:
            total = xp.sum(weights, axis=-1, keepdims=True)
            weights = weights / xp.where(total == 0.0, xp.ones_like(total), total)
    return weights * router.scale if router.scale != 1.0 else weights


def check_logits(logits: tuple[Array, ...], k: int, backend: Backend) -> tuple[int, ...]:
    """Sizes of the levels of logits that fit one another and k.

    Raises:
        GateError: they do not fit, or are NaN where the backend checks values.
    """
    xp = backend.namespace
    for place, each in enumerate(logits):
        same = each.ndim >= 1 and each.shape[:-1] == logits[0].shape[:-1] and each.shape[-1] > 0
        if not same or not xp.isdtype(each.dtype, "real floating"):
            raise GateError(
                "logits must be one floating-point array (..., N_e) per level, with the same "
                f"leading axes and at least one expert; got {each.dtype} {tuple(each.shape)} for "
                f"level {place} and {tuple(logits[0].shape)} for the first."
            )
        if backend.checks_values and bool(xp.any(xp.isnan(each))):
            raise GateError(
                f"logits must not be NaN; got some in level {place}. Look for the layer that made "
                "them."
            )
    sizes = tuple(each.shape[-1] for each in logits)
    check_k(k, prod(sizes))
    return sizes


def _merged(array: Array, backend: Backend) -> Array:
    return backend.reshape(array, (prod(array.shape[:-1]), array.shape[-1]))
