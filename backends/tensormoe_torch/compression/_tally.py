"""Statistics of a layer's experts by which they become fewer, summed call by call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tensormoe.compression._statistics import (
    choice_counts,
    column_products,
    counted_frequencies,
    mean_saliency,
    product_cosines,
    saliency_sums,
)
from tensormoe_torch.compression._dense import DenseExperts, one_by_one
from tensormoe_torch.compression._samples import Samples

# tokens that all experts run at a time
_BLOCK = 1024


@dataclass(eq=False)
class Tally:
    """Sums over the tokens of a layer so far; no token is kept.

    Args:
        experts: of the layer.
        saliency: whether norms of outputs, weighted by the router, are summed.
        means: whether every expert runs all tokens, and its outputs are summed.
        most: experts of a token.
        tokens: that the router saw.
    """

    experts: DenseExperts
    saliency: bool
    means: bool
    most: int = 0
    tokens: int = 0
    _counts: Any = 0
    _products: Any = None
    _salient: Any = 0.0
    _sums: Tensor | None = field(default=None, repr=False)
    _rows: int = 0

    def add_logits(self, logits: Tensor) -> None:
        """The router's logits (tokens, N) of a call."""
        self.tokens += len(logits)
        found = column_products(logits)
        self._products = found if self._products is None else self._products + found

    @torch.no_grad()
    def add(self, samples: Samples) -> None:
        """Tokens of a call of the experts."""
        self._counts = self._counts + choice_counts(samples.index, self.experts.count)
        self.most = max(self.most, samples.index.shape[1])
        arrays = (samples.x, samples.index, samples.weights)
        for x, index, weights in zip(*(each.split(_BLOCK) for each in arrays), strict=True):
            if self.saliency:
                outputs = one_by_one(self.experts.routed, x, index)
                norms = torch.linalg.vector_norm(outputs.float(), dim=-1)
                count = self.experts.count
                self._salient = self._salient + saliency_sums(index, weights, norms, count)
            if self.means:
                self._add_means(x)

    def _add_means(self, x: Tensor) -> None:
        # experts that are called one by one get each token once per choice: the mean is the same
        self._rows += len(x)
        found = []
        for n in range(self.experts.count):
            index = torch.full((len(x),), n, device=x.device)
            found.append(self.experts.routed(x, index).double().sum(dim=0))
        sums = torch.stack(found)
        self._sums = sums if self._sums is None else self._sums + sums

    @property
    def called(self) -> bool:
        """Whether the router was called."""
        return self._products is not None

    @property
    def chosen(self) -> int:
        """Number of experts that were chosen at all."""
        return int((self._counts > 0).sum())

    @property
    def seen(self) -> bool:
        """Whether the experts got a token."""
        return bool(self.most) and int(self._counts.sum()) > 0

    def frequencies(self) -> tuple[float, ...]:
        """Shares of the router's choices."""
        return counted_frequencies(self._counts)

    def similarity(self) -> tuple[tuple[float, ...], ...]:
        """Cosines of the router's logits."""
        return product_cosines(self._products)

    def salient(self) -> tuple[float, ...]:
        """Saliencies of the experts."""
        return mean_saliency(self._salient, self._counts)

    def mean_outputs(self) -> Tensor:
        """Mean output (N, out) of every expert over all tokens."""
        assert self._sums is not None
        return self._sums / self._rows
