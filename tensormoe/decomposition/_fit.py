"""From a tensor to factors: search on the core, polish on the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf, prod
from operator import or_
from typing import TYPE_CHECKING

from tensormoe.decomposition._als import Factors, solve_factor
from tensormoe.decomposition._compress import Core, compress, expand
from tensormoe.decomposition._contractions import Structure
from tensormoe.decomposition._search import Found, Problem, Search, advance, worst
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._spectral import closed, cuts
from tensormoe.decomposition._starts import given, starts, zeros
from tensormoe.decomposition._watch import Follower, Watch

if TYPE_CHECKING:
    from numpy.random import Generator

WORKSPACE = 0.4
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
    terms: Sequence[Structure],
    source: Source,
    search: Search,
    rng: Generator,
    follower: Follower | None = None,
) -> Found:
    """Factors of a tensor, the relative error after every sweep that counts, and why it ended.

    Args:
        terms: the networks whose sum is to stand for the tensor, mostly one.
        source: the tensor.
        search: how long to search.
        rng: NumPy's generator.
        follower: told of every sweep, if anybody is.
    """
    follower = follower or Follower(Watch())
    norm = source.squared_norm()
    if norm == 0.0:
        found = {k: each for term in terms for k, each in zeros(term, source).items()}
        return Found(found, (0.0,), "converged")
    if len(terms) == 1:
        return _fit_term(terms[0], source, norm, search, rng, follower)
    return _fit_sum(tuple(terms), source, norm, search, rng, follower)


def _fit_sum(
    terms: tuple[Structure, ...],
    source: Source,
    norm: float,
    search: Search,
    rng: Generator,
    follower: Follower,
) -> Found:
    """Each term for what those before it leave, then all of them in turn."""
    found: Factors = {}
    for index, term in enumerate(terms):
        left = source.without(terms[:index], found)
        squares = left.squared_norm()
        if squares == 0.0:
            more = given(term, left) | zeros(term, left)
        else:
            # a sum that is stopped here lacks the terms that follow
            known = {k: v for each in terms for k, v in zeros(each, source).items()} | found
            part = follower.part(partial(or_, known), (squares / norm) ** 0.5)
            more = _fit_term(term, left, squares, search, rng, part).factors
        found.update(more)
    workspace = round(WORKSPACE * prod(source.shape))
    whole = Problem(terms, source, norm, workspace)
    first = whole.error(found)
    follower.keep(first, lambda: (found, [first]), anyway=True)
    whole = replace(whole, follower=follower.after([first]))
    best = advance(whole, found, search.sweeps, search.tolerance, known=first)
    names = {factor.name for term in terms for factor in term.wanted}
    factors = {name: array for name, array in best.factors.items() if name in names}
    return Found(factors, (first, *best.errors), best.ended)


def _fit_term(
    structure: Structure,
    source: Source,
    norm: float,
    search: Search,
    rng: Generator,
    follower: Follower,
) -> Found:
    """Factors of one network, what is given included: on the core, then on the tensor."""
    if len(structure.factors) == 1:
        (factor,) = structure.factors
        axes = tuple(structure.open_legs.index(leg) for leg in factor.legs)
        whole = source.backend.permute(source.block(0, source.shape[0]), axes)
        return Found({factor.name: whole}, (0.0,), "converged")
    if len(structure.wanted) == 1:
        return Found(_solved_at_once(structure, source), (), "converged")
    # a share of the tensor's own memory, for the core and what is made of it
    workspace = round(WORKSPACE * prod(source.shape))
    plan = cuts(structure)
    direct = plan is not None and plan.direct(structure, source)
    core = Core(structure, source, {}) if direct else compress(structure, source, norm, rng)
    spare = workspace - prod(core.source.shape) if core.bases else workspace
    kept = core.source.squared_norm() if core.bases else norm
    # the core lacks a part of the tensor
    lost = max(norm - kept, 0.0)
    part = follower.part(partial(expand, core), (kept / norm) ** 0.5)
    small = Problem((core.structure,), core.source, kept, spare, lost, part)
    found = _on_core(small, core, search, rng)
    history = [small.total(error) * (kept / norm) ** 0.5 for error in found.errors]
    factors, ended = expand(core, found.factors), found.ended
    del core, small, found, part
    problem = Problem((structure,), source, norm, workspace)
    if not history:
        # no sweep on the core was worth keeping
        history = [problem.error(factors)]
    if not search.polish:
        return Found(factors, tuple(history), ended)
    known = history[-1] * (1.0 + _ROUNDING)
    # the snapshot before this one holds the core
    follower = follower.after(history)
    follower.keep(known, partial(_pair, factors, ()), anyway=True)
    problem = replace(problem, follower=follower)
    least = min(_SLOW * search.tolerance, 1.0)
    polished = advance(problem, factors, search.polish, least, _PATIENCE, known)
    errors = (*history, *polished.errors)
    return Found(polished.factors, errors, worst(ended, polished.ended))


def _on_core(small: Problem, core: Core, search: Search, rng: Generator) -> Found:
    """Continue the search from the best of a few starts."""
    count, tolerance = min(_TRIAL, search.sweeps), search.tolerance
    best = closed(core.structure, core.source)
    tries = starts(core.structure, core.source, search.starts or _affordable(core), rng)
    # the first sweep that gains nothing tells
    patience = {"patience": 1} if best else {}
    trials = [advance(small, each, count, tolerance, **patience) for each in tries]
    trials.sort(key=lambda trial: trial.errors[-1] if trial.errors else inf)
    # only the search holds the factors that it starts from
    del trials[1:]
    trial = trials.pop()
    known = trial.errors[-1] if trial.errors else inf
    if len(trial.errors) == search.sweeps or (best and trial.ended == "converged"):
        return trial
    first, factors = trial.errors, trial.factors
    if small.follower is not None:
        after = small.follower.after([small.total(error) for error in first])
        small = replace(small, follower=after)
    del trial
    more = advance(small, factors, search.sweeps - len(first), tolerance, known=known)
    return Found(more.factors, (*first, *more.errors), more.ended)


def _pair(factors: Factors, errors: Sequence[float]) -> tuple[Factors, Sequence[float]]:
    return factors, errors


def _solved_at_once(structure: Structure, source: Source) -> Factors:
    """The one factor that is to be found."""
    (wanted,) = structure.wanted
    found = given(structure, source) | zeros(structure, source)
    found[wanted.name], _ = solve_factor(structure, wanted.name, source, found, 0.0)
    return found


def _affordable(core: Core) -> int:
    """Starts that take little time."""
    return min(max(1, _TRIED // prod(core.source.shape)), _STARTS)
