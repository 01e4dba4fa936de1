"""From a tensor to factors: search on the core, polish on the tensor."""

from __future__ import annotations

from math import inf, prod
from typing import Any

from tensormoe._devices import device_of
from tensormoe.backend import Array
from tensormoe.decomposition._als import Factors
from tensormoe.decomposition._compress import Core, compress, expand
from tensormoe.decomposition._contractions import Structure
from tensormoe.decomposition._search import Problem, Search, advance
from tensormoe.decomposition._solve import from_host
from tensormoe.decomposition._source import Source

__all__ = ["fit"]

# sweeps with which every start is tried before the best one goes on
_TRIAL = 10
# of the tensor's entries, that a search may hold beside it
_ROOM = 0.4


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
    norm = source.squared_norm()
    if norm == 0.0:
        return _zeros(structure, source), (0.0,)
    core = compress(structure, source, rng)
    spare = room - prod(core.source.shape) if core.bases else room
    kept = core.source.squared_norm() if core.bases else norm
    small = Problem(core.structure, core.source, kept, spare)
    trials = [
        advance(small, _random(core, rng), min(_TRIAL, search.sweeps), search.tolerance)
        for _ in range(search.starts)
    ]
    factors, errors = min(trials, key=lambda trial: trial[1][-1] if trial[1] else inf)
    factors, more = advance(small, factors, search.sweeps - len(errors), search.tolerance)
    # the core lacks a part of the tensor
    lost = max(norm - kept, 0.0)
    history = [((lost + error * error * kept) / norm) ** 0.5 for error in (*errors, *more)]
    factors = expand(core, factors)
    del core, small, trials
    whole = Problem(structure, source, norm, room)
    factors, polished = advance(whole, factors, search.polish, 0.0)
    return factors, (*history, *polished)


def _random(core: Core, rng: Any) -> Factors:
    """Standard normal factors, in the tensor's scale after the first sweep."""
    like, structure = core.source.block(0, 1), core.structure
    return {
        factor.name: from_host(
            rng.standard_normal(structure.shape(factor)), like, core.source.backend
        )
        for factor in structure.factors
    }


def _zeros(structure: Structure, source: Source) -> Factors:
    like = source.block(0, 1)
    zeros: dict[str, Array] = {}
    for factor in structure.factors:
        shape = structure.shape(factor)
        zeros[factor.name] = source.backend.namespace.zeros(
            shape, dtype=like.dtype, device=device_of(like)
        )
    return zeros
