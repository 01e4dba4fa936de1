"""Errors of outputs instead of weights: the tensor in coordinates in which they are the same.

For inputs with second moments S = E[x xᵀ] and coefficients that do not depend on them, the expected
squared error of an expert's output is ‖Rᵀ (W − Ŵ)‖² with S = R Rᵀ, and its share in the mixture's
is its mean squared coefficient. So the decomposition of √pₙ Rᵀ Wₙ minimizes it, and its
factors, taken back, are those of the weights. A metric M = Q Qᵀ of the outputs is one more matrix,
√pₙ Rᵀ Wₙ Q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from tensormoe._spec import LayerSpec
from tensormoe.backend import Array, Backend
from tensormoe.decomposition._choose import Sizes
from tensormoe.decomposition._moments import Moments
from tensormoe.decomposition._norms import power
from tensormoe.decomposition._solve import from_host, to_host, wide
from tensormoe.decomposition._source import Source
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import (
    INPUT,
    OUTPUT,
    Factorization,
    FactorizationLike,
    Leg,
    expert_leg,
    rank_pattern,
    resolve_factorization,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEPT = 2**29
"""Entries of weighted tensors that are kept; larger ones are weighted again in every pass."""

# rows of a triangular system that are solved at a time
_STRIP = 256


@dataclass(frozen=True, eq=False)
class Root:
    """A root R of second moments: R Rᵀ is a multiple of them, and ridge · 1.

    Args:
        array: R, (size, size) and lower triangular; (N, size, size) where every expert has its own.
        ridge: that was added.
    """

    array: Array
    ridge: float


@dataclass(frozen=True, eq=False)
class Weighting:
    """A weighted tensor, and how to undo that for its factors.

    Args:
        source: the tensor, weighted.
        loads: √p of the first level, on the host; None where experts weigh alike.
        roots: of the moments of inputs and outputs, by leg.
    """

    source: Source
    loads: NDArray[Any] | None = None
    roots: Mapping[Leg, Root] = field(default_factory=dict)

    @property
    def turned(self) -> Source | None:
        """The tensor Rᵀ W of inputs' moments alone, whatever experts weigh; None unless kept."""
        bare = replace(self.source, weights=None)
        return bare if set(self.roots) == {INPUT} and bare.plain else None

    def undo(self, spec: LayerSpec, factors: Mapping[str, Array]) -> dict[str, Array]:
        """The factors of the tensor without weights."""
        import numpy as np

        found = dict(factors)
        backend = self.source.backend
        hosts = {leg: to_host(each.array, backend) for leg, each in self.roots.items()}
        for term, leg in product(spec.network.terms, (INPUT, expert_leg(0), OUTPUT)):
            weighted = leg in hosts or (leg == expert_leg(0) and self.loads is not None)
            # a term that is the same for all experts was found for weights of one
            if not weighted or leg not in term.legs:
                continue
            # a mode that several factors have is taken back in one of them
            factor = next(each for each in term.factors if leg in each.legs)
            legs = (expert_leg(0), leg) if leg in hosts and hosts[leg].ndim == 3 else (leg,)
            axes = [factor.legs.index(each) for each in legs]
            host = wide(found[factor.name], backend)
            moved = np.moveaxis(host, axes, range(len(axes)))
            flat = moved.reshape(*moved.shape[: len(axes)], -1)
            if leg not in hosts:
                assert self.loads is not None
                flat = flat / self.loads[:, None]
            elif len(legs) == 1:
                flat = solved(hosts[leg].T, flat)
            else:
                flat = np.stack([solved(a.T, b) for a, b in zip(hosts[leg], flat, strict=True)])
            host = np.moveaxis(flat.reshape(moved.shape), range(len(axes)), axes)
            found[factor.name] = from_host(host, found[factor.name], backend)
        return found


def check_metric(factorization: FactorizationLike, sizes: Sizes, moments: Moments) -> None:
    """Refuse networks in which a side can't be turned: several factors have its leg.

    Raises:
        SpecError: moments of that side, and such a network.
    """
    spec = any_rank(factorization, sizes)
    network, kind = spec.network, spec.factorization
    sides = (("inputs", INPUT, moments.inputs), ("outputs", OUTPUT, moments.outputs))
    for term, (side, leg, given) in product(network.terms, sides):
        holders = [each.name for each in term.factors if leg in each.legs]
        if given is not None and len(holders) > 1:
            raise SpecError(
                f"moments of {side} need one factor that has the {side}; in {kind.name!r}, "
                f"{' and '.join(holders)} have them. Leave the moments of {side} out."
            )


def any_rank(factorization: FactorizationLike, sizes: Sizes) -> LayerSpec:
    """A layer of a factorization: those of all ranks have the same legs."""
    kind = factorization
    if not isinstance(kind, Factorization):
        kind = resolve_factorization(kind, 1 if rank_pattern(kind, len(sizes[2])) else None)
    return LayerSpec(*sizes, kind, bias=False)


def turns_experts(spec: LayerSpec) -> bool:
    """Whether the inputs of every expert can be turned by themselves, in one factor of its own."""
    expert = expert_leg(0)
    holders = [
        factor for term in spec.network.terms for factor in term.factors if INPUT in factor.legs
    ]
    once = len(holders) == len(spec.network.terms)
    return once and all(expert in factor.legs for factor in holders)


def from_samples(source: Source, inputs: Array, coefficients: Array | None) -> Moments:
    """Second moments of samples.

    Args:
        source: the tensor that they are the inputs of.
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
    if coefficients is None:
        return Moments(moments)
    weights = wide(coefficients, backend)
    weights = weights * power(float(np.abs(weights).max()), 64)
    shares = np.mean(weights**2, axis=0).reshape(source.shape[0], -1).sum(axis=1)
    return Moments(moments, experts=shares if shares.any() else None)


def weigh(source: Source, moments: Moments, count: int = 1) -> Weighting:
    """A tensor weighted by second moments, those of every expert by its own.

    Args:
        source: the tensor.
        moments: to weight by.
        count: of such tensors that there will be.

    Raises:
        ShapeError: a metric of outputs that is not positive definite.
    """
    import numpy as np

    like, backend = source.like, source.backend
    weighted, loads, roots = source, None, {}
    if moments.inputs is not None:
        roots[INPUT] = root = _roots(moments, like, backend)
        weighted = replace(weighted, inputs=root.array)
    if moments.outputs is not None:
        try:
            roots[OUTPUT] = root = _root(moments.outputs, 0.0, like, backend)
        except np.linalg.LinAlgError:
            raise ShapeError(
                "outputs of moments must be positive definite; this matrix is not. Add a small "
                "multiple of the identity."
            ) from None
        weighted = replace(weighted, outputs=root.array)
    if roots and count * prod(source.shape) <= KEPT:
        weighted = weighted.kept()
    if moments.experts is not None:
        shares = moments.experts.astype("float64")
        # experts that no sample used stay worth something
        loads = np.sqrt(np.maximum(shares, moments.ridge * shares.mean()))
        loads = loads / np.sqrt(np.mean(loads**2))
        weighted = replace(weighted, weights=from_host(loads, like, backend))
    return Weighting(weighted, loads, roots)


def _roots(moments: Moments, like: Array, backend: Backend) -> Root:
    """Root of the inputs' moments, or of every expert's, all to one scale.

    Args:
        moments: of inputs.
        like: of the dtype of the roots; no more than one is there in float64.
        backend: adapter of its library.
    """
    import numpy as np

    assert moments.inputs is not None
    if not moments.apart:
        return _root(moments.inputs, moments.ridge, like, backend)
    size = moments.inputs.shape[-1]
    pooled = np.asarray(moments.pooled().inputs)
    mean = float(np.trace(pooled, dtype="float64")) / size or 1.0
    del pooled
    found = np.empty(moments.inputs.shape, to_host(like, backend).dtype)
    for root, each in zip(found, moments.inputs, strict=True):
        whole = each.astype("float64")
        whole /= mean
        whole[np.diag_indices(size)] += moments.ridge
        root[...] = np.linalg.cholesky(whole)
    return Root(from_host(found, like, backend), moments.ridge)


def _root(matrix: NDArray[Any], ridge: float, like: Array, backend: Backend) -> Root:
    """Root of a matrix and a ridge, scaled to a mean of the diagonal of 1."""
    import numpy as np

    # one copy alone, which may be larger than the weights
    found = matrix.astype("float64")
    size = len(found)
    found /= float(np.trace(found)) / size or 1.0
    found[np.diag_indices(size)] += ridge
    whole = float(np.trace(found)) / size or 1.0
    found /= whole
    root = from_host(np.linalg.cholesky(found), like, backend)
    return Root(root, ridge / whole)


def solved(upper: NDArray[Any], columns: NDArray[Any]) -> NDArray[Any]:
    """The solution of an upper triangular system for some columns, in float64.

    Strips of rows from the last one up: no inverse, which would be another matrix of that size.
    """
    import numpy as np

    found: NDArray[Any] = columns.astype("float64")
    for stop in range(len(upper), 0, -_STRIP):
        start = max(stop - _STRIP, 0)
        strip = upper[start:stop].astype("float64")
        known = found[start:stop] - strip[:, stop:] @ found[stop:]
        found[start:stop] = np.linalg.solve(strip[:, start:stop], known)
    return found
