"""Routing level by level: each level of a product of experts chooses for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from tensormoe.backend import Array, Backend, backend_of, default_integer, device_of
from tensormoe.gates import TopK
from tensormoe.routing._product import check_logits, check_product_router
from tensormoe.routing._router import Router
from tensormoe.routing._routes import Routes, choose


@dataclass(frozen=True, eq=False)
class LevelRoutes:
    """Routing record of experts (i, j, …) whose weights are products of one weight per level.

    Losses are functions of its levels: ``load_balance_loss(routes.scores, routes.choices,
    experts=sizes)``.

    Attributes:
        levels: the record of each level, (..., heads, k) and (..., heads, N_e).
    """

    levels: tuple[Routes, ...]

    @property
    def chosen(self) -> list[TopK]:
        """Choices of each level, with their weights."""
        return [level.chosen for level in self.levels]

    @property
    def choices(self) -> list[TopK]:
        """The same, each with weight one, for losses that count choices."""
        return [level.choices for level in self.levels]

    @property
    def scores(self) -> list[Array]:
        """Scores of all of each level."""
        return [level.scores for level in self.levels]

    @property
    def logits(self) -> list[Array]:
        """Logits of each level, in float32 at least, without noise."""
        return [level.logits for level in self.levels]

    def reshaped(self, batch_shape: tuple[int, ...], backend: Backend) -> LevelRoutes:
        """The record of a mixture with other axes before those of the heads."""
        heads = self.levels[0].logits.shape[-2]
        return LevelRoutes(
            tuple(level.reshaped((*batch_shape, heads), backend) for level in self.levels)
        )


def choose_levels(
    router: Router,
    logits: Sequence[Array],
    k: int,
    *,
    noise: Sequence[Array] | None = None,
    backend: Backend | None = None,
) -> LevelRoutes:
    """The best k of each level, for experts (i, j, …) of weight g¹_i · g²_j · … .

    All k · k · … combinations are in use, which costs no more than its levels do where the sum over
    the experts factors (Monet, Park et al. 2025, arXiv 2412.04139).

    Args:
        router: the rule of each level; without bias, balance and capacity.
        logits: (..., N_e) for each level, in float32 or wider, with the same leading axes.
        k: kept per level, from 1; all of a level of fewer.
        noise: standard normal, of the logits' shapes, for a router with ``noise`` in training.
        backend: the adapter to run on; that of the logits' library by default.

    Raises:
        GateError: as :func:`choose_product`.

    >>> import numpy as np
    >>> found = choose_levels(Router(), [np.array([[0.0, 9.0, 0.0]]), np.array([[2.0, 2.0]])], 2)
    >>> [level.top_k_index.tolist() for level in found.levels]
    [[[1, 0]], [[0, 1]]]
    """
    check_product_router(router)
    logits = tuple(logits)
    backend = backend or backend_of(*logits)
    sizes = check_logits(logits, k, backend)
    lead = tuple(logits[0].shape[:-1])
    given = [None] * len(sizes) if noise is None else list(noise)
    levels = []
    for each, extra, size in zip(logits, given, sizes, strict=True):
        rows = prod(lead), size
        level = choose(
            router,
            backend.reshape(each, rows),
            min(k, size),
            noise=None if extra is None else backend.reshape(extra, rows),
            backend=backend,
        )
        levels.append(level.reshaped(lead, backend))
    return LevelRoutes(tuple(levels))


def spread(chosen: TopK, experts: int, backend: Backend) -> Array:
    """Coefficients (..., N), zero where nothing was chosen.

    >>> import numpy as np
    >>> from tensormoe.backend import get_backend
    >>> spread(TopK(np.array([[2, 0]]), np.array([[0.75, 0.25]])), 4, get_backend("numpy"))
    array([[0.25, 0.  , 0.75, 0.  ]])
    """
    xp = backend.namespace
    *lead, k = chosen.indices.shape
    rows = prod(lead)
    flat = backend.reshape(chosen.indices, (rows, k))
    starts = xp.arange(rows, dtype=default_integer(xp), device=device_of(flat)) * experts
    places = backend.reshape(flat + starts[:, None], (rows * k,))
    values = backend.reshape(chosen.values, (rows * k,))
    made = backend.scatter_add(values, places, 0, rows * experts)
    return backend.reshape(made, (*lead, experts))
