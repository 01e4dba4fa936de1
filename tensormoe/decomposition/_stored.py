"""The arrays of a decomposition, the metrics that it works in, and factors as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from tensormoe._spec import LayerSpec
from tensormoe.backend import Array, Backend
from tensormoe.decomposition._bias_rows import without_bias_rows
from tensormoe.decomposition._errors import Norms, expert_pairs, moment_error
from tensormoe.decomposition._gauge import robust, stretched
from tensormoe.decomposition._host import Workplace
from tensormoe.decomposition._in_bits import in_bits
from tensormoe.decomposition._moments import Moments, relative
from tensormoe.decomposition._solve import from_host, to_host
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._weighted import Weighting, turns_experts, weigh

Judge: TypeAlias = Callable[[Iterable[tuple[Any, Any]]], float]
"""A number for factors, smaller for better ones, from every expert's matrix and what is missing."""


@dataclass(frozen=True, eq=False)
class Given:
    """The arrays of a decomposition, checked.

    Args:
        weights: of their own library.
        place: the library that the work is done on.
        lent: the weights there.
        source: the same as a tensor, biases included.
        bias: there, like what follows.
        inputs: (samples, in).
        coefficients: (samples, N).
    """

    weights: Array
    place: Workplace
    lent: Array
    source: Source
    bias: Array | None
    inputs: Array | None
    coefficients: Array | None


@dataclass(frozen=True, eq=False)
class Weightings:
    """The weighted tensor, and that of every expert weighted by itself.

    Args:
        given: the arrays.
        metric: of the errors, if any.
        pooled: of networks whose experts share their input side.
        apart: of those whose experts do not; None where all experts weigh their inputs alike.
        judge: of factors.
        bits: that factors are rounded to before they are judged.
    """

    given: Given
    metric: Moments | None
    pooled: Weighting
    apart: Weighting | None = None
    judge: Judge | None = None
    bits: int | None = None

    @property
    def compares(self) -> bool:
        """Whether factors are told apart by something else than what searches minimize."""
        return self.judge is not None or self.apart is not None or self.bits is not None

    @classmethod
    def of(
        cls,
        given: Given,
        metric: Moments | None,
        turns: bool | None,
        judge: Judge | None,
        bits: int | None,
    ) -> Weightings:
        """Weightings of a metric.

        Args:
            given: the arrays.
            metric: of the errors, if any.
            turns: whether the network turns every expert by itself; None for several networks.
            judge: of factors.
            bits: that they are rounded to.
        """
        if metric is None:
            return cls(given, None, Weighting(given.source), judge=judge, bits=bits)
        # one network alone needs one of them
        count = 2 if metric.apart and turns is None else 1
        apart = weigh(given.source, metric, count) if metric.apart and turns is not False else None
        pooled = apart if apart and turns else weigh(given.source, metric.pooled(), count)
        return cls(given, metric, pooled, apart, judge, bits)

    def undo(self, spec: LayerSpec, factors: Mapping[str, Array]) -> dict[str, Array]:
        """The factors of the tensor without weights."""
        return self._of(spec).undo(spec, factors)

    def error(self, spec: LayerSpec, factors: Mapping[str, Array], norms: Norms) -> float:
        """The error of factors, as they are stored, in the metric itself.

        Args:
            spec: of the layer.
            factors: by name, where the work is done.
            norms: of the residuals without biases.
        """
        assert self.metric is not None
        weighting, source = self._of(spec), self.given.source
        same = weighting is self.apart or not self.metric.apart
        return moment_error(
            spec,
            factors,
            source,
            self.metric,
            weighting if same else None,
            norms if source.bias is None else None,
        )

    def _of(self, spec: LayerSpec) -> Weighting:
        """The weighting that a network's factors were found in."""
        own = self.apart is not None and turns_experts(replace(spec, bias=False))
        return self.apart if own and self.apart else self.pooled

    def score(self, spec: LayerSpec, factors: Mapping[str, Array]) -> float:
        """The judge's number, or else the error in the metric itself: of any network, as stored.

        Large entries that cancel one another lose much by rounding.
        """
        found = as_stored(spec, self.undo(spec, factors), self.given, self.bits)
        pairs = expert_pairs(spec, read_back(found, self.given), self.given.source)
        if self.judge is not None:
            return self.judge(pairs)
        if self.metric is not None:
            return self.metric.error(pairs)
        return relative((float((b**2).sum()), float((a**2).sum())) for a, b in pairs)


def as_stored(
    spec: LayerSpec, factors: Mapping[str, Array], given: Given, bits: int | None
) -> dict[str, Array]:
    """Factors at the tensor's own scale, in the library, dtype and device of the weights."""
    # the bias is a row of the input's factor as yet
    matrix = replace(spec, bias=False)
    found = stretched(matrix.network, factors, 1.0 / given.source.scale)
    backend = given.place.backend
    if bits is not None or given.place.owner.namespace.finfo(given.weights.dtype).bits == 16:
        found = _rounded_well(spec, found, backend)
    found = without_bias_rows(spec.network, found)
    if bits is not None:
        dtype = str(getattr(given.weights.dtype, "name", given.weights.dtype)).rpartition(".")[2]
        found = {
            name: from_host(in_bits(to_host(array, backend), bits, dtype)[2], array, backend)
            for name, array in found.items()
        }
    return {name: given.place.give(found[name], given.weights) for name in spec.shapes}


def matrices_of(given: Given) -> Source:
    """The weights without biases."""
    return given.source if given.bias is None else Source(given.lent, given.place.backend).scaled()


def read_back(factors: Mapping[str, Array], given: Given) -> dict[str, Array]:
    """Factors as they are stored, where the work is done."""
    return {name: given.place.take(array) for name, array in factors.items()}


def _rounded_well(
    spec: LayerSpec, factors: Mapping[str, Array], backend: Backend
) -> dict[str, Array]:
    """The same tensor from factors that lose little when they are rounded to 16 bits."""
    host = {name: to_host(array, backend) for name, array in factors.items()}
    found = robust(spec.network, host)
    return {name: from_host(found[name], factors[name], backend) for name in factors}
