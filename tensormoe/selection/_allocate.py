"""One budget for the layers of a whole model: public function."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

from tensormoe._spec import LayerSpec
from tensormoe._validation import brief, choice, is_number, positive_int
from tensormoe.errors import BudgetError, SpecError
from tensormoe.factorizations import Factorization, FactorizationLike
from tensormoe.gates import Gate
from tensormoe.selection._allocate_solve import Bounds, Point, along_curves, in_proportion, smoothed
from tensormoe.selection._allocate_units import Unit, checked_kinds, units_of
from tensormoe.selection._allocation import (
    METHODS,
    UNITS,
    AllocatedLayer,
    Allocation,
    check_names,
)
from tensormoe.selection._budget import Budget
from tensormoe.selection._model_sites import measured, sites_of
from tensormoe.selection._sensitivity import (
    Sensitivities,
    Sensitivity,
    SensitivityPoint,
    checked_sensitivities,
)
from tensormoe.selection._sites import LayerSite

Kind = type[Factorization]


def allocate(
    model: Any,
    budget: Budget | int | float | str,
    *,
    by: str | None = None,
    unit: str = "parameters",
    factorization: FactorizationLike | Sequence[FactorizationLike] = "cp",
    what: str | Sequence[str] | None = None,
    experts: int | tuple[int, ...] = 16,
    gate: Gate | str | None = "entmax",
    sensitivities: Sensitivities | None = None,
    inputs: Any = None,
) -> Allocation:
    """Share one budget out over the layers of a model: a rank for each of their projections.

    Three ways, ``by=``:

    - ``"equal"``: every projection keeps the same share of its parameters.
    - ``"size"``: in proportion to the square root of its parameters, so that large ones keep a
      smaller share. It minimizes the sum of 1/share over all projections.
    - ``"sensitivity"``: by what the model loses. With a weight w for each projection of n
      parameters, in proportion to √(w·n), which minimizes the sum of w/share; weights of 1 are
      ``"size"``, and weights of n ``"equal"``. With losses that were measured at a few ranks, the
      sum of losses is minimized over their convex hulls (Shoham and Gersho, Efficient bit
      allocation for an arbitrary set of quantizers, 1988), losses between ranks being
      interpolated.

    Args:
        model: the values of a ``config.json``, its path or its folder's, a configuration of
            transformers; a model itself, on the meta device too; or :class:`LayerSite` values.
        budget: what all factors together may take, gates of new mixtures included: as a float in
            (0, 1], or a string such as ``"25%"``, a share of what they replace; as an integer, a
            number in ``unit``; or a :class:`Budget` of parameters alone.
        by: one of :data:`METHODS`; by default ``"sensitivity"`` where there are sensitivities or
            inputs, and ``"equal"`` elsewhere.
        unit: ``"parameters"``, or ``"bytes"``, by the dtype of each layer.
        factorization: name or class for all layers; or several, of which each projection gets the
            one with the smaller loss, where losses were measured for all of them.
        what: layers that are wanted: ``"experts"`` (stacks of experts), ``"mlp"`` (whole MLPs),
            ``"attention"`` (its linear layers), ``"linear"`` (linear layers of attention and MLPs),
            or several of these; by default experts if there are any, else MLPs.
        experts: of the mixtures that linear layers and MLPs become, N or one size per level. A
            stack of experts keeps its number.
        gate: of these mixtures; None for mixtures that are given their coefficients.
        sensitivities: for every projection by name (:attr:`LayerSite.unit_names`) a positive
            weight; or :class:`Sensitivity` values.
        inputs: calibration batches instead, of a model with values: its framework measures
            sensitivities with them.

    Returns:
        The layers with their ranks, within the budget; ``compress`` and ``replace`` of
        :mod:`tensormoe_torch` take it.

    Raises:
        BudgetError: a budget that makes no sense, or is too small; the message and the error's
            ``needed`` have the smallest.
        SpecError: a model without such layers, an unknown one, sensitivities that are missing or
            not finite, or options that exclude one another.
        RankError: a factorization that has a rank already.

    >>> sites = [LayerSite.of_experts(f"layers.{k}.experts", 8, 64, 128) for k in range(2)]
    >>> found = allocate(sites, "25%")
    >>> found.parameters <= 0.25 * found.parameters_before
    True
    >>> found["layers.1.experts"].factorizations[0]
    CP(rank=81)
    >>> weights = {name: 1.0 + 8 * ("layers.1" in name) for s in sites for name in s.unit_names}
    >>> found = allocate(sites, "25%", sensitivities=weights)
    >>> [layer.factorizations[0].rank for layer in found.layers]
    [40, 122]
    """
    sites = sites_of(model, what)
    if not sites:
        raise SpecError("a model must have layers to share a budget out over; got none.")
    check_names(site.name for site in sites)
    choice(unit, UNITS, "unit", SpecError)
    if by is None:
        by = "equal" if sensitivities is None and inputs is None else "sensitivity"
    choice(by, METHODS, "by", SpecError)
    kinds = checked_kinds(factorization)
    built = None if gate is None else Gate.parse(gate)
    if any(site.experts is None for site in sites):
        _check_gate(built, experts)
    groups = units_of(sites, experts, built)
    units = [each for group in groups for each in group]
    limit = _limit(budget, sites, unit)
    scale = [each.itemsize if unit == "bytes" else 1 for each in units]
    _check_feasible(units, kinds, scale, limit, unit)
    known = _known(by, sensitivities, inputs, units)
    if known is None and by == "sensitivity":
        share = limit / sum(u.before * s for u, s in zip(units, scale, strict=True))
        found = measured(model, sites, kinds, experts, inputs, share)
        known = checked_sensitivities(found, [each.name for each in units])
    if len(kinds) > 1 and not (known and isinstance(next(iter(known.values())), Sensitivity)):
        raise SpecError(
            f"factorization must be one without measured sensitivities; got {len(kinds)}. Give "
            "inputs=…, or Sensitivity values."
        )
    specs, losses = _shared_out(by, units, kinds, scale, limit, known)
    made = iter(zip(units, specs, losses, strict=True))
    layers = []
    for site, group in zip(sites, groups, strict=True):
        rows = [next(made) for _ in group]
        lost = [loss for *_, loss in rows]
        layers.append(
            AllocatedLayer(
                site,
                tuple(spec for _, spec, _ in rows),
                built if site.experts is None else None,
                None if None in lost else sum(each for each in lost if each is not None),
            )
        )
    return Allocation(tuple(layers), by, limit, unit)


def _known(
    by: str, sensitivities: Any, inputs: Any, units: Sequence[Unit]
) -> dict[str, float] | dict[str, Sensitivity] | None:
    """Sensitivities that were given, checked; None where there are none, or some to measure."""
    given = [
        name
        for name, value in (("sensitivities", sensitivities), ("inputs", inputs))
        if value is not None
    ]
    if by != "sensitivity":
        if given:
            raise SpecError(
                f"{given[0]} must be given with by='sensitivity' alone; got by={by!r}. Drop one."
            )
        return None
    if len(given) != 1:
        raise SpecError(
            "by='sensitivity' needs sensitivities or calibration inputs; got "
            f"{'both' if given else 'neither'}. Pass inputs=… with a model, or sensitivities=…"
        )
    if sensitivities is None:
        return None
    return checked_sensitivities(sensitivities, [each.name for each in units])


def _check_gate(gate: Gate | None, experts: int | tuple[int, ...]) -> None:
    counts = experts if isinstance(experts, tuple) else (experts,)
    for count in counts:
        if gate is not None and gate.k is not None and isinstance(count, int) and gate.k > count:
            raise SpecError(
                f"k of a top-k gate must be at most the {count} experts; got {gate.k}. Lower k."
            )


def _limit(budget: Any, sites: Sequence[LayerSite], unit: str) -> int:
    """Limit for all factors together, in the unit.

    Raises:
        BudgetError: not a budget, or more than what is replaced.
    """
    whole = sum(s.parameters * (s.itemsize if unit == "bytes" else 1) for s in sites)
    if isinstance(budget, Budget):
        if not budget.counts_parameters_alone or unit != "parameters" or not budget.gate:
            raise BudgetError(
                "a budget of a whole model must limit parameters alone, gates included; got "
                f"{budget!r}. Write Budget(parameters=…), '25%', or a number with unit='bytes'."
            )
        budget = budget.parameters
    share = None
    if isinstance(budget, str):
        text = budget.strip().removesuffix("%")
        try:
            share = float(text) / 100 if budget.strip().endswith("%") else float("nan")
        except ValueError:
            share = float("nan")
    elif isinstance(budget, float):
        share = budget
    elif isinstance(budget, bool) or not (is_number(budget) or hasattr(budget, "__index__")):
        raise BudgetError(
            f"budget must be a share such as '25%' or 0.25, a number of {unit}, or a Budget; got "
            f"{brief(budget)}."
        )
    if share is not None:
        if not 0 < share <= 1:
            raise BudgetError(
                f"a share of what is replaced must be above 0% and at most 100%; got {budget!r}. "
                "Write '25%' or 0.25, or an integer for a number."
            )
        return max(1, int(share * whole))
    limit = positive_int(budget, "budget", BudgetError)
    if limit > whole:
        raise BudgetError(
            f"budget must be at most the {whole:,} {unit} of what is replaced; got {limit:,}. "
            "Lower it, or replace more layers."
        )
    return limit


def _check_feasible(
    units: Sequence[Unit], kinds: Sequence[Kind], scale: Sequence[int], limit: int, unit: str
) -> None:
    """Refuse a budget below what bonds of 1 take.

    Raises:
        BudgetError: it is; with the smallest.
    """
    least = sum(
        min(each.smallest(kind) for kind in kinds) * size
        for each, size in zip(units, scale, strict=True)
    )
    if least > limit:
        names = " or ".join(kind.name for kind in kinds)
        raise BudgetError(
            f"budget must be at least {least:,} {unit}, with bonds of 1, for {len(units)} "
            f"projections in {names}; got {limit:,}. Raise it, use fewer experts, or leave layers "
            "out.",
            {unit: least},
            {unit: limit},
        )


def _shared_out(
    by: str,
    units: Sequence[Unit],
    kinds: Sequence[Kind],
    scale: Sequence[int],
    limit: int,
    known: dict[str, float] | dict[str, Sensitivity] | None,
) -> tuple[list[LayerSpec], list[float | None]]:
    """The layer of each projection, and what is lost by it if that is known."""
    if known and isinstance(next(iter(known.values())), Sensitivity):
        curves: Any = [known[each.name] for each in units]
        return _by_curves(units, kinds, scale, limit, curves)
    weighted: Any = known
    # in proportion to √(w·n), with w = n for equal shares and w = 1 for sizes
    weights = [
        each.before
        if by == "equal"
        else sqrt(each.before * (1.0 if by == "size" else weighted[each.name]))
        for each in units
    ]
    (kind,) = kinds
    bounds = [each.bounds(kind) for each in units]
    costs = [
        Bounds(each.least * size, each.most * size)
        for each, size in zip(bounds, scale, strict=True)
    ]
    rates = [weight * size for weight, size in zip(weights, scale, strict=True)]
    shares = in_proportion(rates, costs, limit)
    given = [share / size for share, size in zip(shares, scale, strict=True)]
    specs = [each.spec(kind, entries) for each, entries in zip(units, given, strict=True)]
    if not known:
        return specs, [None] * len(units)
    losses: list[float | None] = [
        weighted[each.name] * each.before / each.entries(spec)
        for each, spec in zip(units, specs, strict=True)
    ]
    return specs, losses


def _by_curves(
    units: Sequence[Unit],
    kinds: Sequence[Kind],
    scale: Sequence[int],
    limit: int,
    known: Sequence[Sensitivity],
) -> tuple[list[LayerSpec], list[float | None]]:
    """Ranks along measured losses."""
    curves = [
        [point for kind in kinds for point in _curve(each, kind, size, found.points)]
        for each, size, found in zip(units, scale, known, strict=True)
    ]
    found = along_curves(curves, limit)
    chosen: list[Any] = [point.label for point in found]
    most = [
        each.bounds(kind).most * size for each, kind, size in zip(units, chosen, scale, strict=True)
    ]
    # beyond what was measured, what is left goes to all alike
    bounds = [Bounds(p.cost, max(p.cost, m)) for p, m in zip(found, most, strict=True)]
    rates = [each.before * size for each, size in zip(units, scale, strict=True)]
    costs = in_proportion(rates, bounds, limit)
    given = [cost / size for cost, size in zip(costs, scale, strict=True)]
    rows = zip(units, chosen, given, strict=True)
    return [each.spec(kind, n) for each, kind, n in rows], [point.loss for point in found]


def _curve(unit: Unit, kind: Kind, scale: int, points: Sequence[SensitivityPoint]) -> list[Point]:
    """Losses of one factorization against cost, from its smallest rank on.

    Below the first measured rank the loss goes on as between the first two; a single point stands
    for all ranks from the smallest on.

    Raises:
        SpecError: nothing was measured for it.
    """
    own = [
        Point((each.parameters + unit.gate) * scale, each.loss, kind)
        for each in points
        if each.factorization.name == kind.name
    ]
    if not own:
        raise SpecError(
            f"sensitivities of {unit.name!r} must be of {kind.name!r}; got "
            f"{', '.join(sorted({each.factorization.name for each in points}))}. Measure those."
        )
    least = unit.smallest(kind) * scale
    curve = smoothed([each for each in own if each.cost >= least] or [own[0]])
    first = curve[0]
    if first.cost <= least:
        return curve
    later = curve[1] if len(curve) > 1 else first
    slope = (first.loss - later.loss) / (later.cost - first.cost) if later is not first else 0.0
    return [Point(least, first.loss + slope * (first.cost - least), kind), *curve]
