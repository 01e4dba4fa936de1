"""From dense experts to factors."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from tensormoe._extras import missing
from tensormoe._spec import LayerSpec
from tensormoe._validation import instance
from tensormoe.backend import Array, Backend, backend_of
from tensormoe.decomposition._checks import (
    checked_bias,
    checked_samples,
    checked_weights,
)
from tensormoe.decomposition._controls import Control, spectra
from tensormoe.decomposition._errors import (
    bias_error,
    output_error,
    total_error,
    weight_errors,
)
from tensormoe.decomposition._gauge import robust, stretched
from tensormoe.decomposition._host import Workplace
from tensormoe.decomposition._report import Decomposition, Report
from tensormoe.decomposition._runs import Runs
from tensormoe.decomposition._search import Search
from tensormoe.decomposition._solve import from_host, to_host
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._watch import Callback, Watch
from tensormoe.decomposition._weighted import Weighting, weigh
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import INPUT, FactorizationLike
from tensormoe.selection import Budget

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
    callback: Callback | None = None,
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
        tolerance: the relative error that is to be reached with as few parameters as can be, within
            a few percent: of weights and biases together, as one tensor; if ``weighted``, of the
            outputs, as far as second moments tell.
        bias: (experts…, out), the experts' biases: one more row of each matrix.
        inputs: (samples, in), to report the error of outputs.
        coefficients: (samples, experts…) or (samples, N), with inputs: outputs are mixed by them.
        weighted: whether factors minimize the error of outputs rather than that of the weights, as
            far as second moments of inputs and loads of experts tell.
        search: how long to search, a time limit included; :class:`Search` has the defaults.
        callback: called with a :class:`Progress` after every sweep; True ends the search.
        compare: whether to compute the errors of truncated singular value decompositions of no more
            parameters, see :class:`Control`, which takes products of the weights with themselves.
        seed: of the random starts.

    Returns:
        Factors by name, in the library, dtype and device of the weights, and a report. Of a search
        that ends before its time the best so far: with the time limit, when the callback says so,
        or with Ctrl-C (a :exc:`KeyboardInterrupt`), after which truncated singular value
        decompositions are left out; ``report.ended`` says which.

    Raises:
        KeyboardInterrupt: Ctrl-C before the first sweep is done, or a second one.
        MissingDependencyError: without NumPy, which solves the equations of bonds on the host.
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
    if absent := missing("decompose", ("numpy",), "numpy"):
        raise absent
    search = Search() if search is None else search
    instance(search, Search, "search", "a Search or None", SpecError)
    watch = Watch(search.seconds, callback)
    if isinstance(weights, (list, tuple)):
        raise ShapeError(
            f"weights must be one array (experts…, in, out); got a {type(weights).__name__} of "
            f"{len(weights)}. Stack them along a new first axis."
        )
    arrays = [each for each in (weights, bias, inputs, coefficients) if each is not None]
    owner = backend_of(*arrays)
    # nobody differentiates through a search
    weights, bias, inputs, coefficients = (
        None if each is None else owner.stop_gradient(each)
        for each in (weights, bias, inputs, coefficients)
    )
    checked_weights(weights, owner)
    experts, (rows, columns) = tuple(weights.shape[:-2]), weights.shape[-2:]
    if bias is not None:
        checked_bias(bias, weights, owner)
    if inputs is not None or coefficients is not None:
        coefficients = checked_samples(inputs, coefficients, weights, owner)
    if weighted and inputs is None:
        raise SpecError("weighted decomposition needs inputs; got none. Pass inputs=….")
    place = Workplace.of(weights, owner)
    backend, lent = place.backend, place.lend(weights)
    bias, inputs, coefficients = (
        None if each is None else place.take(each) for each in (bias, inputs, coefficients)
    )
    source = Source(lent, backend, bias).scaled()
    weighting = weigh(source, inputs, coefficients) if weighted else Weighting(source)
    sizes = (rows, columns, experts)
    runs = Runs(weighting.source, sizes, bias is not None, search, seed, watch)
    kind, found = runs.find(factorization, rank, budget, tolerance)
    spec = LayerSpec(rows, columns, experts, kind, bias=bias is not None)
    factors = weighting.undo(spec, found.factors)
    # the bias is a row of the input's factor as yet
    matrix = LayerSpec(rows, columns, experts, kind, bias=False)
    factors = stretched(matrix.network, factors, 1.0 / source.scale)
    if owner.namespace.finfo(weights.dtype).bits == 16:
        factors = _rounded_well(spec, factors, backend)
    if bias is not None:
        factors = _without_last_row(spec, factors)
    stored = {name: place.give(factors[name], weights) for name in spec.shapes}
    read = {name: place.take(array) for name, array in stored.items()}
    plain = source if bias is None else Source(lent, backend).scaled()
    error, each = weight_errors(spec, read, plain)
    parameters = spec.num_parameters
    controls: tuple[Control, ...] = ()
    ended = found.ended
    if compare and ended != "interrupted":
        try:
            controls = spectra(source, parameters).controls(parameters)
        except KeyboardInterrupt:
            # the factors are there; only the comparison is not
            ended = "interrupted"
    off, total = None, error
    if bias is not None:
        tensor = Source(bias[..., None, :], backend).scaled()
        off = bias_error(spec, read, tensor, plain)
        total = total_error(error, off, plain, tensor)
    report = Report(
        error,
        each,
        controls,
        off,
        None if inputs is None else output_error(spec, read, source, inputs, coefficients),
        parameters,
        prod(weights.shape) + (0 if bias is None else prod(bias.shape)),
        len(found.errors),
        found.errors,
        watch.elapsed,
        ended,
        total,
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
