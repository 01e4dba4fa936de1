"""Routing record of experts that are composed of two sub-experts, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from tensormoe.backend import Backend, backend_of
from tensormoe.gates import TopK
from tensormoe.routing._routes import Routes


@dataclass(frozen=True, eq=False)
class CartesianRoutes:
    """Routing record of both halves of a Cartesian product.

    Losses take the record of each half; statistics of composed experts take :attr:`pairs`.

    Attributes:
        first: record of the sub-experts that run first.
        second: record of those that run on their outputs.
    """

    first: Routes
    second: Routes

    @property
    def pairs(self) -> TopK:
        """The composed experts, (..., k²) of N²: pair (i, j) has number i · N + j.

        Weights are products of those of both halves, and need not be in descending order.

        >>> import numpy as np
        >>> from tensormoe.routing import Router, choose
        >>> halves = [choose(Router(), np.log([[p, 1 - p]]), 2) for p in (0.75, 0.5)]
        >>> pairs = CartesianRoutes(*halves).pairs
        >>> pairs.indices.tolist(), pairs.values.round(3).tolist()
        ([[0, 1, 2, 3]], [[0.375, 0.375, 0.125, 0.125]])
        """
        first, second = self.first, self.second
        backend = backend_of(first.logits)
        count = second.logits.shape[-1]
        index = first.top_k_index[..., :, None] * count + second.top_k_index[..., None, :]
        weights = first.top_k_weights[..., :, None] * second.top_k_weights[..., None, :]
        shape = *index.shape[:-2], index.shape[-2] * index.shape[-1]
        return TopK(backend.reshape(index, shape), backend.reshape(weights, shape))

    def reshaped(self, batch_shape: tuple[int, ...], backend: Backend) -> CartesianRoutes:
        """The record with other leading axes."""
        return CartesianRoutes(
            self.first.reshaped(batch_shape, backend), self.second.reshaped(batch_shape, backend)
        )
