"""Error against parameters: the same experts in several factorizations at several budgets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from tensormoe._validation import brief
from tensormoe.backend import Array
from tensormoe.decomposition._controls import Control, spectra
from tensormoe.decomposition._decompose import decompose
from tensormoe.decomposition._host import source_of
from tensormoe.decomposition._report import Decomposition, Report
from tensormoe.decomposition._search import Search
from tensormoe.decomposition._watch import Callback
from tensormoe.errors import BudgetError, SpecError
from tensormoe.factorizations import (
    FACTORIZATIONS,
    Dense,
    Factorization,
    FactorizationLike,
    factorization_class,
)
from tensormoe.selection import Budget

Points: TypeAlias = "dict[str, dict[Factorization, Report]]"


@dataclass(frozen=True)
class ErrorPoint:
    """One factorization and what it lost.

    Args:
        factorization: with its rank; ``decompose`` finds the same factors for it again.
        report: of the decomposition.
    """

    factorization: Factorization
    report: Report


@dataclass(frozen=True)
class ErrorCurve:
    """Errors of the factorizations of one name.

    Args:
        name: of the factorization.
        points: by rising number of parameters.
    """

    name: str
    points: tuple[ErrorPoint, ...]

    def front(self, *, outputs: bool = False) -> tuple[ErrorPoint, ...]:
        """The points with a smaller error than every point of no more parameters.

        Args:
            outputs: whether the error of outputs counts instead of the weights', where it is known.
        """
        found: list[ErrorPoint] = []
        least = float("inf")
        for point in self.points:
            error = point.report.output_error if outputs else point.report.error
            if error is not None and error < least:
                least = error
                found.append(point)
        return tuple(found)


@dataclass(frozen=True)
class ControlCurve:
    """Truncated singular value decompositions of one unfolding.

    Args:
        unfolding: see :class:`Control`.
        points: by rising number of parameters.
        dense_parameters: entries of what was given.
    """

    unfolding: str
    points: tuple[Control, ...]
    dense_parameters: int


def control_curves(curves: Sequence[ErrorCurve]) -> tuple[ControlCurve, ...]:
    """The truncated singular value decompositions that error curves were compared with.

    Args:
        curves: from :func:`error_curves`; of the same weights.

    Returns:
        A curve for each unfolding, of what any point was compared with; none without comparisons.

    >>> import numpy as np
    >>> experts = np.random.default_rng(0).standard_normal((4, 12, 10))
    >>> curves = error_curves(experts, ["cp"], (0.3, 0.5))
    >>> [curve.unfolding for curve in control_curves(curves)]
    ['each expert', 'N·in × out', 'in × N·out', 'N × in·out']
    """
    reports = [point.report for curve in curves for point in curve.points]
    found: dict[str, dict[int, Control]] = {}
    for report in reports:
        for control in report.controls:
            found.setdefault(control.unfolding, {})[control.parameters] = control
    return tuple(
        ControlCurve(
            name, tuple(points[size] for size in sorted(points)), reports[0].dense_parameters
        )
        for name, points in found.items()
    )


def error_curves(
    weights: Array,
    factorizations: Sequence[FactorizationLike] | None = None,
    budgets: Sequence[Budget | int | float] = (0.05, 0.1, 0.2, 0.3, 0.5),
    *,
    bias: Array | None = None,
    inputs: Array | None = None,
    coefficients: Array | None = None,
    weighted: bool = False,
    search: Search | None = None,
    callback: Callback | None = None,
    compare: bool = True,
    seed: int = 0,
) -> tuple[ErrorCurve, ...]:
    """Decompose experts in several factorizations at several budgets, and keep the reports.

    Factors are dropped as soon as they are scored: no more than one decomposition is held.

    Args:
        weights: (experts…, in, out), as :func:`decompose` takes them, like all that follows but the
            next two.
        factorizations: names or classes, each of which is taken at every budget, and values, each
            of which is one more point of its name's curve; None for every registered name but
            ``"dense"``, which has nothing to lose.
        budgets: a :class:`tensormoe.Budget`, a number of parameters, or as a float in (0, 1] a
            share of the weights' own.
        bias: (experts…, out).
        inputs: (samples, in).
        coefficients: (samples, experts…) or (samples, N).
        weighted: whether the error of outputs is minimized.
        search: how long to search for each point, a time limit included.
        callback: called with a :class:`Progress` after every sweep; True ends the search for the
            point that it is about.
        compare: whether to compute the errors of truncated singular value decompositions, which
            :func:`control_curves` collects.
        seed: of the random starts.

    Returns:
        One curve per name, in the order in which names first appear; names of which nothing fits
        any budget are left out. With Ctrl-C, the points so far, and a warning.

    Raises:
        KeyboardInterrupt: Ctrl-C before there was a point.
        BudgetError: nothing fits any budget, or a budget makes no sense.
        BackendError, ShapeError, SpecError, RankError: as from :func:`decompose`.

    >>> import numpy as np
    >>> experts = np.random.default_rng(0).standard_normal((4, 12, 10))
    >>> curves = error_curves(experts, ["cp", "tensor_ring", "hadamard"], (0.1, 0.3, 0.5))
    >>> [(curve.name, len(curve.points)) for curve in curves]
    [('cp', 3), ('tensor_ring', 3), ('hadamard', 1)]
    >>> errors = [point.report.error for point in curves[0].front()]
    >>> errors == sorted(errors, reverse=True)
    True
    """
    kinds = _checked(factorizations, budgets)

    def at(kind: FactorizationLike, budget: Budget | int | float | None) -> Decomposition:
        return decompose(
            weights,
            kind,
            budget=budget,
            bias=bias,
            inputs=inputs,
            coefficients=coefficients,
            weighted=weighted,
            search=search,
            callback=callback,
            # singular values are the same for all
            compare=False,
            seed=seed,
        )

    points: Points = {}
    refused: BudgetError | None = None
    try:
        for kind in kinds:
            refused = _collect(points, kind, budgets, at) or refused
        if compare and points:
            points = _compared(points, weights, bias)
    except KeyboardInterrupt:
        if not points:
            raise
        warnings.warn(
            "error curves were interrupted: points or their SVDs are missing.", stacklevel=2
        )
    if refused is not None and not points:
        raise refused
    return tuple(
        ErrorCurve(
            name,
            tuple(
                ErrorPoint(kind, report)
                for kind, report in sorted(reports.items(), key=lambda each: each[1].parameters)
            ),
        )
        for name, reports in points.items()
    )


def _checked(
    factorizations: Sequence[FactorizationLike] | None,
    budgets: Sequence[Budget | int | float],
) -> Sequence[FactorizationLike]:
    """The factorizations to try; refuse what is not a list, and shares that are not."""
    if factorizations is None:
        factorizations = [name for name in FACTORIZATIONS if name != Dense.name]
    for given, name in ((factorizations, "factorizations"), (budgets, "budgets")):
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise SpecError(f"{name} must be a list; got {brief(given)}. Put one into a list.")
    for budget in budgets:
        if isinstance(budget, float) and not 0 < budget <= 1:
            raise BudgetError(
                f"a budget that is a float is a share of the weights' entries, in (0, 1]; got "
                f"{budget!r}. Give an integer for a number of parameters."
            )
    return factorizations


def _collect(
    points: Points,
    kind: FactorizationLike,
    budgets: Sequence[Budget | int | float],
    at: Callable[[FactorizationLike, Budget | int | float | None], Decomposition],
) -> BudgetError | None:
    """Add the points of a factorization, or of a name at every budget; return a refused budget.

    Raises:
        KeyboardInterrupt: a search was interrupted; its point is kept.
    """
    refused = None
    value = isinstance(kind, Factorization)
    name = kind.name if isinstance(kind, Factorization) else factorization_class(kind).name
    for budget in [None] if value else budgets:
        if not value and any(known.rank is None for known in points.get(name, ())):
            # there is one of this name, whatever the budget
            break
        try:
            found = at(kind, budget)
        except BudgetError as error:
            if value:
                raise
            refused = error
            continue
        points.setdefault(name, {})[found.spec.factorization] = found.report
        if found.report.ended == "interrupted":
            raise KeyboardInterrupt
    return refused


def _compared(points: Points, weights: Array, bias: Array | None) -> Points:
    """The same reports with truncated singular value decompositions."""
    most = max(report.parameters for reports in points.values() for report in reports.values())
    known = spectra(source_of(weights, bias), most)
    return {
        name: {
            kind: replace(report, controls=known.controls(report.parameters))
            for kind, report in reports.items()
        }
        for name, reports in points.items()
    }
