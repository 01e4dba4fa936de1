"""From a tensor to factors: search on the core, polish on the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import Any

from tensormoe.decomposition._als import Factors, solve_factor
from tensormoe.decomposition._compress import Core, compress, expand
from tensormoe.decomposition._contractions import Structure
from tensormoe.decomposition._search import Problem, Search, advance
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._starts import given, start, zeros

__all__ = ["ROOM", "fit"]

ROOM = 0.4
"""Of the tensor's entries, that a search may hold beside it."""

# sweeps with which every start is tried before the best one goes on
_TRIAL = 10
# starts that are tried unless told otherwise: entries of a core for all of them together, and most
_TRIED, _STARTS = 2**18, 8
# sweeps on the tensor take long: they end at the first one that gains less than so many times what
# ends a search
_SLOW, _PATIENCE = 6.0, 1
# what a core's error may differ by from that of the same factors on the tensor
_ROUNDING = 1e-3


def fit(
    terms: Sequence[Structure], source: Source, search: Search, rng: Any
) -> tuple[Factors, tuple[float, ...]]:
    """Factors of a tensor, and the relative error after every sweep that counts.

    Args:
        terms: the networks whose sum is to stand for the tensor, mostly one.
        source: the tensor.
        search: how long to search.
        rng: NumPy's generator.
    """
    norm = source.squared_norm()
    if norm == 0.0:
        return {k: each for term in terms for k, each in zeros(term, source).items()}, (0.0,)
    if len(terms) == 1:
        return _fit_term(terms[0], source, norm, search, rng)
    return _fit_sum(tuple(terms), source, norm, search, rng)


def _fit_sum(
    terms: tuple[Structure, ...], source: Source, norm: float, search: Search, rng: Any
) -> tuple[Factors, tuple[float, ...]]:
    """Each term for what those before it leave, then all of them in turn."""
    found: Factors = {}
    for place, term in enumerate(terms):
        left = source.without(terms[:place], found)
        squares = left.squared_norm()
        if squares == 0.0:
            more = given(term, left) | zeros(term, left)
        else:
            more, _ = _fit_term(term, left, squares, search, rng)
        found.update(more)
    whole = Problem(terms, source, norm, round(ROOM * prod(source.shape)))
    first = whole.error(found)
    factors, errors = advance(whole, found, search.sweeps, search.tolerance, known=first)
    names = {factor.name for term in terms for factor in term.wanted}
    return {name: factors[name] for name in factors if name in names}, (first, *errors)


def _fit_term(
    structure: Structure, source: Source, norm: float, search: Search, rng: Any
) -> tuple[Factors, tuple[float, ...]]:
    """Factors of one network, what is given included: on the core, then on the tensor."""
    if len(structure.factors) == 1:
        (factor,) = structure.factors
        axes = tuple(structure.open_legs.index(leg) for leg in factor.legs)
        return {factor.name: source.backend.permute(source.block(0, source.shape[0]), axes)}, (0.0,)
    if len(structure.wanted) == 1:
        return _solved_at_once(structure, source), ()
    # a share of the tensor's own memory, for the core and what is made of it
    room = round(ROOM * prod(source.shape))
    core = compress(structure, source, norm, rng)
    spare = room - prod(core.source.shape) if core.bases else room
    kept = core.source.squared_norm() if core.bases else norm
    # the core lacks a part of the tensor
    lost = max(norm - kept, 0.0)
    small = Problem((core.structure,), core.source, kept, spare, lost)
    trials = [
        advance(
            small,
            start(core.structure, core.source, place, rng),
            min(_TRIAL, search.sweeps),
            search.tolerance,
        )
        for place in range(search.starts or _affordable(core))
    ]
    trials.sort(key=lambda trial: trial[1][-1] if trial[1] else inf)
    errors = trials[0][1]
    del trials[1:]
    known = errors[-1] if errors else inf
    # nobody else holds the factors that a search starts from
    factors, more = advance(
        small,
        trials.pop()[0],
        search.sweeps - len(errors),
        search.tolerance,
        known=known,
    )
    history = [small.felt(error) * (kept / norm) ** 0.5 for error in (*errors, *more)]
    factors = expand(core, factors)
    del core, small
    whole = Problem((structure,), source, norm, room)
    if not history:
        # no sweep on the core was worth keeping
        history = [whole.error(factors)]
    known = history[-1] * (1.0 + _ROUNDING)
    least = min(_SLOW * search.tolerance, 1.0)
    factors, polished = advance(whole, factors, search.polish, least, _PATIENCE, known)
    return factors, (*history, *polished)


def _solved_at_once(structure: Structure, source: Source) -> Factors:
    """The one factor that is to be found."""
    (wanted,) = structure.wanted
    found = given(structure, source) | zeros(structure, source)
    found[wanted.name], _ = solve_factor(structure, wanted.name, source, found, 0.0)
    return found


def _affordable(core: Core) -> int:
    """Starts that take little time."""
    return min(max(1, _TRIED // prod(core.source.shape)), _STARTS)
