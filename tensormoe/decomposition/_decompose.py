"""From dense experts to factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from tensormoe._extras import missing
from tensormoe._rounding import checked_bits
from tensormoe._spec import LayerSpec
from tensormoe._validation import instance
from tensormoe.backend import Array, backend_of
from tensormoe.decomposition._checks import (
    checked_bias,
    checked_samples,
    checked_weights,
)
from tensormoe.decomposition._controls import Control, spectra
from tensormoe.decomposition._errors import (
    Norms,
    bias_error,
    output_error,
    residual_norms,
    shares,
    total_error,
)
from tensormoe.decomposition._host import Workplace
from tensormoe.decomposition._moments import Moments
from tensormoe.decomposition._report import Decomposition, Report
from tensormoe.decomposition._runs import Runs
from tensormoe.decomposition._search import Found, Search
from tensormoe.decomposition._several import Choice, several
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._stored import (
    Given,
    Judge,
    Weightings,
    as_stored,
    matrices_of,
    read_back,
)
from tensormoe.decomposition._watch import Callback, Watch
from tensormoe.decomposition._weighted import (
    any_rank,
    check_metric,
    from_samples,
    turns_experts,
)
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import Dense
from tensormoe.selection import Budget


def decompose(
    weights: Array,
    factorization: Choice,
    *,
    rank: int | tuple[int, ...] | None = None,
    budget: Budget | int | float | None = None,
    tolerance: float | None = None,
    bias: Array | None = None,
    inputs: Array | None = None,
    coefficients: Array | None = None,
    weighted: bool = False,
    moments: Moments | None = None,
    search: Search | None = None,
    callback: Callback | None = None,
    compare: bool = True,
    judge: Judge | None = None,
    seed: int = 0,
    bits: int | None = None,
) -> Decomposition:
    """Factors of dense experts by alternating least squares, and what was lost.

    The search runs on a small core first: input and output modes are projected onto the subspaces
    that the factors can fill. Two sweeps over the weights themselves follow. One implementation
    serves every network; only programs of contractions differ.

    Args:
        weights: (experts…, in, out), of any library, dtype and device; they are not changed.
        factorization: a value such as ``CP(64)``, or a name with one of the three below. With a
            budget also several names, or ``"auto"`` for all that are registered: the one with the
            smallest error is taken, in the metric of moments if there are some, and
            ``report.tried`` has the others' errors. Each is searched for shortly, and those within
            5 % of the best for as long as it takes. Of more than 2²⁴ weights ``"auto"`` takes
            those alone whose best factors are known without a search, ``low_rank`` and
            ``shared_basis`` with one shared matrix; with a time limit, of which each has its part.
        rank: bond sizes, with a name.
        budget: upper limits for the factors alone, without a gate: a :class:`tensormoe.Budget`, a
            number of parameters, or as a float in (0, 1] a share of the weights' own. Of a few
            ranks that no other one of the cost beats in expert rank and span, the one with the
            smallest error is taken; of more than 2²⁴ weights, the one with the most capacity.
        tolerance: the relative error that is to be reached with as few parameters as can be, within
            a few percent: of weights and biases together, as one tensor; if ``weighted``, or with
            moments, of the outputs, as far as second moments tell.
        bias: (experts…, out), the experts' biases: one more row of each matrix.
        inputs: (samples, in), to report the error of outputs.
        coefficients: (samples, experts…) or (samples, N), with inputs: outputs are mixed by them.
        weighted: whether factors minimize the error of outputs rather than that of the weights, as
            far as second moments of inputs and loads of experts tell.
        moments: second moments to weight by instead, of inputs that nobody has to keep; of outputs
            too, if wanted.
        search: how long to search, a time limit included; :class:`Search` has the defaults.
        callback: called with a :class:`Progress` after every sweep; True ends the search.
        compare: whether to compute the errors of truncated singular value decompositions of no more
            parameters, see :class:`Control`, which takes products of the weights with themselves.
        judge: how bad factors are, by which one of several factorizations is chosen: a function of
            every expert's matrix (in, out), on the host, and of what is missing of it. By default
            their error, in the metric of moments if there are some.
        seed: of the random starts.
        bits: 8 or 4 to round the factors to the nearest integers of so many bits, with a scale for
            every 64 entries: factors are the values of what can be stored so, and errors theirs.

    Returns:
        Factors by name, in the library, dtype and device of the weights, and a report. Of a search
        that ends before its time the best so far: with the time limit, when the callback says so,
        or with Ctrl-C (a :exc:`KeyboardInterrupt`), after which truncated singular value
        decompositions are left out; ``report.ended`` says which.

    Raises:
        KeyboardInterrupt: Ctrl-C before the first sweep is done, or a second one.
        MissingDependencyError: without NumPy, which solves the equations of bonds on the host.
        BackendError: arrays of an unknown library, or of several.
        ShapeError: weights that are not a stack of matrices, not finite, or other shapes that do
            not fit, those of moments included.
        SpecError, RankError, BudgetError: a factorization, rank, budget or tolerance that cannot
            be, a rank above what any tensor of the shape can need among them; other bits, or bits
            with a tolerance, which rounding might miss.

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
    bits = checked_bits(bits)
    if bits is not None and tolerance is not None:
        raise SpecError(
            f"a tolerance can't be promised with {bits} bits, whose rounding adds an error of its "
            "own. Give a rank or a budget."
        )
    watch = Watch(search.seconds, callback)
    given = _taken(weights, bias, inputs, coefficients)
    metric = _metric(given, weighted, moments)
    *experts, rows, columns = given.weights.shape
    sizes = (rows, columns, tuple(experts))
    choice = several(factorization, metric)
    if metric is not None and choice is None:
        check_metric(factorization, sizes, metric)  # type: ignore[arg-type]
    turns = turns_experts(any_rank(factorization, sizes)) if choice is None else None  # type: ignore[arg-type]
    weightings = Weightings.of(given, metric, turns, judge, bits)
    runs = Runs(
        weightings.pooled.source,
        sizes,
        bias is not None,
        search,
        seed,
        watch,
        None if weightings.apart is None else weightings.apart.source,
        weightings.score if weightings.compares else None,
    )
    kind, found = runs.find(choice or factorization, rank, budget, tolerance)  # type: ignore[arg-type]
    spec = LayerSpec(*sizes, kind, bias=bias is not None)
    unweighted = weightings.undo(spec, found.factors)
    # each copy may be half as large as the weights
    found = replace(found, factors={})
    factors = as_stored(spec, unweighted, given, bits)
    del unweighted
    read = read_back(factors, given)
    # of as many entries as the weights have, other factors are the weights themselves
    compare = compare and not (bits is not None and isinstance(kind, Dense))
    norms = residual_norms(spec, read, matrices_of(given))
    report = _report(spec, read, given, found, norms, compare, watch)
    if choice is not None:
        report = replace(report, tried=tuple(choice.tried.items()))
    if moments is not None:
        report = replace(report, weighted_error=weightings.error(spec, read, norms))
    return Decomposition(spec, factors, report)


def _metric(given: Given, weighted: bool, moments: Moments | None) -> Moments | None:
    """The moments that weigh the error, if any do."""
    if weighted and moments is not None:
        raise SpecError("one of weighted and moments must be given; got both. Leave one out.")
    if moments is not None:
        instance(moments, Moments, "moments", "Moments or None", SpecError)
        moments.check(tuple(given.weights.shape), given.bias is not None)
        return moments
    if not weighted:
        return None
    if given.inputs is None:
        raise SpecError("weighted decomposition needs inputs; got none. Pass inputs=….")
    return from_samples(given.source, given.inputs, given.coefficients)


def _taken(
    weights: Array, bias: Array | None, inputs: Array | None, coefficients: Array | None
) -> Given:
    """Check the arrays of a decomposition, and take them to where the work is done."""
    if isinstance(weights, (list, tuple)):
        raise ShapeError(
            f"weights must be one array (experts…, in, out); got a {type(weights).__name__} of "
            f"{len(weights)}. Stack them along a new first axis."
        )
    owner = backend_of(*(e for e in (weights, bias, inputs, coefficients) if e is not None))
    # nobody differentiates through a search
    weights, bias, inputs, coefficients = (
        None if each is None else owner.stop_gradient(each)
        for each in (weights, bias, inputs, coefficients)
    )
    checked_weights(weights, owner)
    if bias is not None:
        checked_bias(bias, weights, owner)
    if inputs is not None or coefficients is not None:
        coefficients = checked_samples(inputs, coefficients, weights, owner)
    place = Workplace.of(weights, owner)
    lent = place.lend(weights)
    bias, inputs, coefficients = (
        None if each is None else place.take(each) for each in (bias, inputs, coefficients)
    )
    source = Source(lent, place.backend, bias).scaled()
    return Given(weights, place, lent, source, bias, inputs, coefficients)


def _report(
    spec: LayerSpec,
    read: Mapping[str, Array],
    given: Given,
    found: Found,
    norms: Norms,
    compare: bool,
    watch: Watch,
) -> Report:
    """Errors of the factors as they are stored, next to those of singular value decompositions."""
    bias, dense, off = given.bias, prod(given.weights.shape), None
    error, each = shares(*norms)
    controls, ended = _controls(spec, given, found, compare)
    total, outputs = error, None
    if bias is not None:
        plain, tensor = matrices_of(given), Source(bias[..., None, :], given.place.backend).scaled()
        off = bias_error(spec, read, tensor, plain)
        total, dense = total_error(error, off, plain, tensor), dense + prod(bias.shape)
    if given.inputs is not None:
        outputs = output_error(spec, read, given.source, given.inputs, given.coefficients)
    return Report(
        error=error,
        expert_errors=each,
        controls=controls,
        bias_error=off,
        output_error=outputs,
        parameters=spec.num_parameters,
        dense_parameters=dense,
        sweeps=len(found.errors),
        history=found.errors,
        seconds=watch.elapsed,
        ended=ended,
        total_error=total,
    )


def _controls(
    spec: LayerSpec, given: Given, found: Found, compare: bool
) -> tuple[tuple[Control, ...], str]:
    """Truncated singular value decompositions, if they are wanted, and why the work ended."""
    if not compare or found.ended == "interrupted":
        return (), found.ended
    try:
        count = spec.num_parameters
        return spectra(given.source, count).controls(count), found.ended
    except KeyboardInterrupt:
        # the factors are there; only the comparison is not
        return (), "interrupted"
