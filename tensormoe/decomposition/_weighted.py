"""Errors of outputs instead of weights: the tensor in coordinates in which they are the same.

For inputs with second moments S = E[x xᵀ] and coefficients that do not depend on them, the expected
squared error of an expert's output is ‖Rᵀ (W − Ŵ)‖² with S = R Rᵀ, and its share in the mixture's
is its mean squared coefficient. So the decomposition of √pₙ Rᵀ Wₙ minimizes it, and its
factors, taken back, are those of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from tensormoe._spec import LayerSpec
from tensormoe.backend import Array
from tensormoe.decomposition._solve import from_host, wide
from tensormoe.decomposition._source import Source, power
from tensormoe.factorizations import INPUT, expert_leg

if TYPE_CHECKING:
    from numpy.typing import NDArray

# of the mean second moment, added to all: directions that no sample shows are not free
_FLOOR = 1e-3


@dataclass(frozen=True, eq=False)
class Weighting:
    """A weighted tensor, and how to undo that for its factors.

    Args:
        source: the tensor, weighted.
        back: the inverse of Rᵀ (in, in), in float64 on the host; None where nothing is weighted.
        loads: square roots of the mean squared coefficients of the first level, on the host.
    """

    source: Source
    back: NDArray[Any] | None = None
    loads: NDArray[Any] | None = None

    def undo(self, spec: LayerSpec, factors: Mapping[str, Array]) -> dict[str, Array]:
        """The factors of the tensor without weights."""
        found = dict(factors)
        backend = self.source.backend
        weighted = ((INPUT, self.back), (expert_leg(0), self.loads))
        for term, (leg, inverse) in product(spec.network.terms, weighted):
            # a term that is the same for all experts was found for weights of one
            if inverse is None or leg not in term.legs:
                continue
            # a mode that several factors have is taken back in one of them
            factor = next(each for each in term.factors if leg in each.legs)
            axis = factor.legs.index(leg)
            host = wide(found[factor.name], backend)
            moved = host.swapaxes(0, axis)
            flat = moved.reshape(moved.shape[0], -1)
            flat = inverse @ flat if inverse.ndim == 2 else flat / inverse[:, None]
            host = flat.reshape(moved.shape).swapaxes(0, axis)
            found[factor.name] = from_host(host, found[factor.name], backend)
        return found


def weigh(source: Source, inputs: Array, coefficients: Array | None) -> Weighting:
    """A tensor weighted by the second moments of samples.

    Args:
        source: the tensor.
        inputs: (samples, in).
        coefficients: (samples, N), all levels flattened.
    """
    import numpy as np

    backend = source.backend
    samples = wide(inputs, backend)
    if source.bias is not None:
        samples = np.concatenate([samples, np.ones((len(samples), 1))], axis=1)
    # only ratios count, and squares are to stay in range
    samples = samples * power(float(np.abs(samples).max()), 64)
    moments = samples.T @ samples / len(samples)
    size = len(moments)
    moments[np.diag_indices(size)] += _FLOOR * np.trace(moments) / size or 1.0
    root = np.linalg.cholesky(moments)
    loads = None
    if coefficients is not None:
        weights = wide(coefficients, backend)
        weights = weights * power(float(np.abs(weights).max()), 64)
        shares = np.mean(weights**2, axis=0).reshape(source.shape[0], -1).sum(axis=1)
        # experts that no sample used stay worth something
        loads = np.sqrt(np.maximum(shares, _FLOOR * shares.mean()))
        if not loads.any():
            loads = None
    like = source.like
    weighted = replace(
        source,
        inputs=from_host(root, like, backend),
        weights=None if loads is None else from_host(loads, like, backend),
    )
    return Weighting(weighted, np.linalg.inv(root.T), loads)
