"""Alternating least squares on any network."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod, sqrt
from typing import Any

from tensormoe.backend import Array, Backend
from tensormoe.decomposition._contractions import (
    SOURCE,
    Gram,
    Structure,
    Update,
    plan_partial,
    plan_update,
)
from tensormoe.decomposition._solve import from_host, solve, to_host
from tensormoe.decomposition._source import Source, run

__all__ = ["solve_factor", "sweep"]

Factors = dict[str, Array]


def sweep(
    structure: Structure,
    source: Source,
    squared_norm: float,
    factors: Mapping[str, Array],
    room: int,
) -> tuple[Factors, float]:
    """Solve for every factor once, the last one last.

    Where there is room for it, the tensor is contracted with the last factor once for all others,
    so that a sweep passes over it twice; else it passes once for each factor, a block at a time.

    Args:
        structure: the network.
        source: the tensor.
        squared_norm: of the tensor.
        factors: by name.
        room: entries that may be held beyond tensor and factors.

    Returns:
        New factors, and their relative error, up to rounding: about 3e-4 in float32.
    """
    found = dict(factors)
    *others, last = [factor.name for factor in structure.factors]
    _, legs = plan_partial(structure, last)
    if len(others) > 1 and prod(structure.sizes[leg] for leg in legs) <= room:
        partial = source.contract(structure, lambda each: plan_partial(each, last), found)
        for name in others:
            update = plan_update(structure, name, last)
            moment = run(update.moment, {**found, SOURCE: partial}, source.backend)
            found[name], _ = _solved(update, moment, found, source.backend)
        del partial
    else:
        for name in others:
            found[name], _ = solve_factor(structure, name, source, found)
    found[last], explained = solve_factor(structure, last, source, found)
    return found, sqrt(max(1.0 - explained / squared_norm, 0.0))


def solve_factor(
    structure: Structure, name: str, source: Source, factors: Mapping[str, Array]
) -> tuple[Array, float]:
    """The best factor for given others, and the squared norm that the network then explains."""

    def moment_of(each: Structure) -> Any:
        update = plan_update(each, name)
        return update.moment, update.legs

    moment = source.contract(structure, moment_of, factors)
    return _solved(plan_update(structure, name), moment, factors, source.backend)


def _solved(
    update: Update, moment: Array, factors: Mapping[str, Array], backend: Backend
) -> tuple[Array, float]:
    host = to_host(moment, backend)
    best = host
    for gram in update.grams:
        matrix = to_host(run(gram.program, factors, backend), backend)
        best = _solve_axes(matrix, best, update.shared, gram)
    explained = float((best * host).sum(dtype="float64"))
    return from_host(best.transpose(update.axes), moment, backend), explained


def _solve_axes(matrix: Any, moment: Any, shared: int, gram: Gram) -> Any:
    """Solve along the bonds of one part of G."""
    size, count = prod(gram.bonds), len(gram.bonds)
    lead = moment.shape[:shared]
    before, after = moment.shape[shared : gram.axis], moment.shape[gram.axis + count :]
    flat = moment.reshape(*lead, prod(before), size, prod(after)).swapaxes(-3, -2)
    solved = solve(matrix.reshape(*lead, size, size), flat.reshape(*lead, size, -1))
    apart = solved.reshape(*lead, size, prod(before), prod(after)).swapaxes(-3, -2)
    return apart.reshape(moment.shape)
