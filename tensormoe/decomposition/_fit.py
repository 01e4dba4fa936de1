"""From a tensor to factors: search on the core, polish on the tensor."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from tensormoe.backend import Array
from tensormoe.decomposition._als import Factors, sweep
from tensormoe.decomposition._compress import compress, expand
from tensormoe.decomposition._contractions import Structure
from tensormoe.decomposition._solve import from_host
from tensormoe.decomposition._source import Source

__all__ = ["Search", "fit"]

# sweeps with which every start is tried before the best one goes on
_TRIAL = 10
# sweeps in a row that have to gain too little before a search ends
_PATIENCE = 5
_LEAST_DAMPING = 1e-6
_ROOM = 0.4


@dataclass(frozen=True)
class Search:
    """How long factors are searched for.

    Args:
        starts: random starts, the best of which goes on.
        sweeps: most sweeps on the core.
        polish: sweeps on the tensor itself.
        tolerance: a search ends when sweeps lower the error by less than this share of it.
    """

    starts: int = 1
    sweeps: int = 200
    polish: int = 2
    tolerance: float = 2e-4


def fit(
    structure: Structure, source: Source, search: Search, rng: Any
) -> tuple[Factors, tuple[float, ...]]:
    """Factors of a tensor, and the relative error after every sweep on the core, then on it."""
    if len(structure.factors) == 1:
        (factor,) = structure.factors
        axes = tuple(structure.open_legs.index(leg) for leg in factor.legs)
        return {factor.name: source.backend.permute(source.block(0, source.shape[0]), axes)}, (0.0,)
    # a share of the tensor's own memory, for the core and what is made of it
    room = round(_ROOM * prod(source.shape))
    core = compress(structure, source, rng)
    spare = room - prod(core.source.shape) if core.bases else room
    norm = source.squared_norm()
    if norm == 0.0:
        return _zeros(structure, source), (0.0,)
    kept = core.source.squared_norm() if core.bases else norm
    trials = [
        _advance(
            core.structure,
            core.source,
            _random(core.structure, core.source, rng),
            kept,
            spare,
            min(_TRIAL, search.sweeps),
            search,
        )
        for _ in range(search.starts)
    ]
    factors, errors = min(trials, key=lambda trial: trial[1][-1])
    factors, more = _advance(
        core.structure, core.source, factors, kept, spare, search.sweeps - len(errors), search
    )
    # the core lacks a part of the tensor
    lost = max(norm - kept, 0.0)
    history = [((lost + error * error * kept) / norm) ** 0.5 for error in (*errors, *more)]
    factors = expand(core, factors)
    del core
    factors, polished = _advance(structure, source, factors, norm, room, search.polish, search)
    return factors, (*history, *polished)


def _advance(
    structure: Structure,
    source: Source,
    factors: Factors,
    squared_norm: float,
    room: int,
    count: int,
    search: Search,
) -> tuple[Factors, list[float]]:
    """At most ``count`` sweeps, and the error after each that was kept.

    Networks can run away to huge factors that cancel one another, until rounding raises the error.
    A sweep that does is taken back, and the next ones follow well-seen directions only (Levenberg
    and Marquardt's damping).
    """
    errors: list[float] = []
    lowest, idle, damping = float("inf"), 0, 0.0
    for _ in range(count):
        found, error = sweep(structure, source, squared_norm, factors, room, damping)
        idle = 0 if error < lowest * (1.0 - search.tolerance) else idle + 1
        if error > lowest:
            damping = max(10.0 * damping, _LEAST_DAMPING)
        else:
            factors, lowest, damping = found, error, damping / 3.0
            errors.append(error)
        if idle == _PATIENCE:
            break
    return factors, errors


def _random(structure: Structure, source: Source, rng: Any) -> Factors:
    """Standard normal factors, in the tensor's scale after the first sweep."""
    like = source.block(0, 1)
    return {
        factor.name: from_host(rng.standard_normal(structure.shape(factor)), like, source.backend)
        for factor in structure.factors
    }


def _zeros(structure: Structure, source: Source) -> Factors:
    like = source.block(0, 1)
    zeros: dict[str, Array] = {}
    for factor in structure.factors:
        shape = structure.shape(factor)
        zeros[factor.name] = source.backend.namespace.zeros(shape, dtype=like.dtype)
    return zeros
