"""Alternating least squares on any network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod, sqrt
from typing import Any

from tensormoe.backend import Array, Backend
from tensormoe.decomposition._contractions import (
    SOURCE,
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
    damping: float = 0.0,
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
        damping: how far directions have to be seen to be followed, see :func:`solve`.

    Returns:
        New factors, and their relative error, up to rounding: about 3e-4 in float32.
    """
    found = _balanced(factors, source.backend)
    *others, last = [factor.name for factor in structure.factors]
    _, legs = plan_partial(structure, last)
    if len(others) > 1 and prod(structure.sizes[leg] for leg in legs) <= room:
        met = source.contract(structure, lambda each: plan_partial(each, last), found, at_once=True)
        for name in others:
            update = plan_update(structure, name, last)
            moment = run(update.moment, {**found, SOURCE: met}, source.backend)
            found[name], _ = _solved(update, moment, found, source.backend, damping)
        del met
    else:
        for name in others:
            found[name], _ = solve_factor(structure, name, source, found, damping)
    found[last], explained = solve_factor(structure, last, source, found, damping)
    return found, sqrt(max(1.0 - explained / squared_norm, 0.0))


def solve_factor(
    structure: Structure, name: str, source: Source, factors: Mapping[str, Array], damping: float
) -> tuple[Array, float]:
    """The best factor for given others, and the squared norm that the network then explains."""

    def moment_of(each: Structure) -> Any:
        update = plan_update(each, name)
        return update.moment, update.legs

    moment = source.contract(structure, moment_of, factors)
    return _solved(plan_update(structure, name), moment, factors, source.backend, damping)


def _solved(
    update: Update,
    moment: Array,
    factors: Mapping[str, Array],
    backend: Backend,
    damping: float,
) -> tuple[Array, float]:
    """A better factor: from the one that is there, as far as the equations can be trusted."""
    host = to_host(moment, backend)
    matrices = [to_host(run(gram.program, factors, backend), backend) for gram in update.grams]
    old = to_host(factors[update.name], backend).transpose(_inverse(update.axes))
    change = host - _along(_times, matrices, old, update)
    best = old + _along(partial(solve, damping=damping), matrices, change, update)
    # ‖T − N‖² = ‖T‖² − 2⟨M, X⟩ + ⟨X, G X⟩
    seen = _along(_times, matrices, best, update)
    explained = float((best * (2.0 * host - seen)).sum(dtype="float64"))
    return from_host(best.transpose(update.axes), moment, backend), explained


def _along(function: Any, matrices: Sequence[Any], array: Any, update: Update) -> Any:
    """A function of a matrix and columns, along the bonds of each part of G in turn."""
    for matrix, gram in zip(matrices, update.grams, strict=True):
        size, count = prod(gram.bonds), len(gram.bonds)
        shape = array.shape
        lead = shape[: update.shared]
        before, after = shape[update.shared : gram.axis], shape[gram.axis + count :]
        flat = array.reshape(*lead, prod(before), size, prod(after)).swapaxes(-3, -2)
        found = function(matrix.reshape(*lead, size, size), flat.reshape(*lead, size, -1))
        apart = found.reshape(*lead, size, prod(before), prod(after)).swapaxes(-3, -2)
        array = apart.reshape(shape)
    return array


def _times(matrix: Any, columns: Any) -> Any:
    return matrix @ columns


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axes.index(place) for place in range(len(axes)))


def _balanced(factors: Mapping[str, Array], backend: Backend) -> Factors:
    """The same network with factors of unit size, and all scale in the last one."""
    found = dict(factors)
    *others, last = found
    for name in others:
        array = found[name]
        size = float(backend.namespace.max(backend.namespace.abs(array)))
        if size > 0.0:
            found[name] = array * (1.0 / size)
            found[last] = found[last] * size
    return found
