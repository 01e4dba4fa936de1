"""Alternating least squares on any network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from tensormoe.decomposition._solve import from_host, inverse, to_host
from tensormoe.decomposition._source import Source, run

__all__ = ["solve_factor", "sweep"]

Factors = dict[str, Array]

# right-hand sides at a time: copies in float64 stay small beside the tensor
_COLUMNS = 256


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
        damping: how far directions have to be seen to be followed, see :func:`inverse`.

    Returns:
        New factors, all of them but the last of unit size, and their relative error up to rounding:
        3e-4 in float32, and worthless where huge factors cancel one another.
    """
    found = dict(factors)
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
    return _balanced(found, source.backend), sqrt(max(squared_norm - explained, 0.0) / squared_norm)


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
    grams = []
    for gram in update.grams:
        found = to_host(run(gram.program, factors, backend), backend)
        grams.append(found.reshape(*found.shape[: update.shared], *(prod(gram.bonds),) * 2))
    inverses = [inverse(gram, damping) for gram in grams]
    old = to_host(factors[update.name], backend).transpose(_inverse(update.axes))
    best = old.copy()
    whole = to_host(moment, backend)
    columns = (*whole.shape[: update.closed], -1)
    flat, wanted = best.reshape(columns), whole.reshape(columns)
    explained = 0.0
    for start in range(0, flat.shape[-1], _COLUMNS):
        part, target = (each[..., start : start + _COLUMNS] for each in (flat, wanted))
        part += _along(inverses, target - _along(grams, part, update), update)
        # ‖T − N‖² = ‖T‖² − 2⟨M, X⟩ + ⟨X, G X⟩
        explained += float((part * (2.0 * target - _along(grams, part, update))).sum())
    return from_host(best.transpose(update.axes), moment, backend), explained


def _along(matrices: Sequence[Any], array: Any, update: Update) -> Any:
    """Products with a matrix for each part of G along its bonds, in float64."""
    array = array.astype("float64")
    for matrix, gram in zip(matrices, update.grams, strict=True):
        size, count = prod(gram.bonds), len(gram.bonds)
        shape = array.shape
        lead = shape[: update.shared]
        before, after = shape[update.shared : gram.axis], shape[gram.axis + count :]
        columns = array.reshape(*lead, prod(before), size, prod(after))
        array = (matrix[..., None, :, :] @ columns).reshape(shape)
    return array


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
