"""From dense experts to factors."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from time import perf_counter

from tensormoe._registry import backend_of
from tensormoe._spec import LayerSpec
from tensormoe.backend import Array, Backend
from tensormoe.decomposition._checks import (
    checked_bias,
    checked_bonds,
    checked_samples,
    checked_weights,
)
from tensormoe.decomposition._errors import bias_error, output_error, svd_error, weight_errors
from tensormoe.decomposition._gauge import robust
from tensormoe.decomposition._report import Decomposition, Report
from tensormoe.decomposition._runs import Runs
from tensormoe.decomposition._search import Search
from tensormoe.decomposition._solve import from_host, to_host
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._weighted import Weighting, weigh
from tensormoe.errors import SpecError
from tensormoe.factorizations import INPUT, FactorizationLike
from tensormoe.functional._dtypes import cast
from tensormoe.planning import Budget

__all__ = ["decompose"]


def decompose(
    weights: Array,
    factorization: FactorizationLike,
    *,
    rank: int | tuple[int, ...] | None = None,
    budget: Budget | int | float | None = None,
    tolerance: float | None = None,
    bias: Array | None = None,
    inputs: Array | None = None,
    coefficients: Array | None = None,
    weighted: bool = False,
    search: Search | None = None,
    compare: bool = True,
    seed: int = 0,
) -> Decomposition:
    """Factors of dense experts by alternating least squares, and what was lost.

    The search runs on a small core first: input and output modes are projected onto the subspaces
    that the factors can fill. Two sweeps over the weights themselves follow. One implementation
    serves every network; only programs of contractions differ.

    Args:
        weights: (experts…, in, out), of any library, dtype and device; they are not changed.
        factorization: a value such as ``CP(64)``, or a name with one of the three below.
        rank: bond sizes, with a name.
        budget: upper limits for the factors alone, without a gate: a :class:`tensormoe.Budget`, a
            number of parameters, or as a float in (0, 1] a share of the weights' own. Of a few
            ranks that no other one of the cost beats in expert rank and span, the one with the
            smallest error is taken; of more than 2²⁴ weights, the one with the most capacity.
        tolerance: the relative error of the weights that is to be reached with as few parameters
            as can be, within a few percent.
        bias: (experts…, out), the experts' biases: one more row of each matrix.
        inputs: (samples, in), to report the error of outputs.
        coefficients: (samples, experts…) or (samples, N), with inputs: outputs are mixed by them.
        weighted: whether factors minimize the error of outputs rather than that of the weights, as
            far as second moments of inputs and loads of experts tell.
        search: how long to search; :class:`Search` has the defaults.
        compare: whether to compute the error of truncated singular value decompositions of equal
            size, which takes a product of the weights with themselves.
        seed: of the random starts.

    Returns:
        Factors by name, in the library, dtype and device of the weights, and a report.

    Raises:
        BackendError: arrays of an unknown library, or of several.
        ShapeError: weights that are no stack of matrices, not finite, or other shapes that do not
            fit.
        SpecError, RankError, BudgetError: a factorization, rank, budget or tolerance that cannot
            be, a rank above what any tensor of the shape can need among them.

    >>> import numpy as np
    >>> experts = np.random.default_rng(0).standard_normal((6, 1, 1)) * np.ones((1, 8, 5))
    >>> found = decompose(experts, "cp", rank=1)
    >>> found.factors["input"].shape, found.report.error < 1e-7
    ((8, 1), True)
    """
    start = perf_counter()
    arrays = [each for each in (weights, bias, inputs, coefficients) if each is not None]
    backend = backend_of(*arrays)
    # nobody differentiates through a search
    weights, bias, inputs, coefficients = (
        None if each is None else backend.stop_gradient(each)
        for each in (weights, bias, inputs, coefficients)
    )
    checked_weights(weights, backend)
    experts, (rows, columns) = tuple(weights.shape[:-2]), weights.shape[-2:]
    if bias is not None:
        checked_bias(bias, weights, backend)
    if inputs is not None or coefficients is not None:
        coefficients = checked_samples(inputs, coefficients, weights, backend)
    if weighted and inputs is None:
        raise SpecError("weighted decomposition needs inputs; got none. Pass inputs=….")
    source = Source(weights, backend, bias)
    weighting = weigh(source, inputs, coefficients) if weighted else Weighting(source)
    sizes = (rows, columns, experts)
    runs = Runs(weighting.source, sizes, bias is not None, search or Search(), seed)
    kind = runs.resolve(factorization, rank, budget, tolerance)
    spec = LayerSpec(rows, columns, experts, kind, bias=bias is not None)
    if budget is None and tolerance is None:
        checked_bonds(spec)
    found, history = runs.run(kind)
    factors = weighting.undo(spec, found)
    if backend.namespace.finfo(weights.dtype).bits == 16:
        factors = _rounded_well(spec, factors, backend)
    if bias is not None:
        factors = _without_last_row(spec, factors)
    stored = {name: cast(factors[name], weights.dtype, backend) for name in spec.shapes}
    plain = Source(weights, backend)
    error, each = weight_errors(spec, stored, plain)
    parameters = spec.num_parameters
    report = Report(
        error,
        each,
        svd_error(source, parameters) if compare else None,
        None if bias is None else bias_error(spec, stored, Source(bias[..., None, :], backend)),
        None if inputs is None else output_error(spec, stored, plain, inputs, coefficients),
        parameters,
        prod(weights.shape) + (0 if bias is None else prod(bias.shape)),
        len(history),
        history,
        perf_counter() - start,
    )
    return Decomposition(spec, stored, report)


def _rounded_well(
    spec: LayerSpec, factors: Mapping[str, Array], backend: Backend
) -> dict[str, Array]:
    """The same tensor from factors that lose little when they are rounded to 16 bits."""
    host = {name: to_host(array, backend) for name, array in factors.items()}
    found = robust(spec.network, host)
    return {name: from_host(found[name], factors[name], backend) for name in factors}


def _without_last_row(spec: LayerSpec, factors: Mapping[str, Array]) -> dict[str, Array]:
    """Factors whose input mode has one more row, which is the bias, as the layer's."""
    found = dict(factors)
    for term in spec.network.terms:
        assert term.bias is not None
        carrier = term.input_factor
        axis = (slice(None),) * carrier.legs.index(INPUT)
        whole = found[carrier.name]
        found[carrier.name] = whole[(*axis, slice(None, -1))]
        found[term.bias.name] = whole[(*axis, -1)]
    return found
