"""Runs of the search: for a rank that is given, and for ranks that have to be found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf, prod

from tensormoe._spec import LayerSpec
from tensormoe._validation import non_negative_int
from tensormoe.decomposition._als import Factors
from tensormoe.decomposition._checks import checked_bonds
from tensormoe.decomposition._choose import Sizes, candidates, checked_tolerance, smallest
from tensormoe.decomposition._contractions import structures
from tensormoe.decomposition._fit import fit
from tensormoe.decomposition._search import Found, Search
from tensormoe.decomposition._several import Several
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._watch import Stopped, Watch
from tensormoe.decomposition._weighted import turns_experts
from tensormoe.errors import BudgetError, SpecError
from tensormoe.factorizations import (
    INPUT,
    OUTPUT,
    Factorization,
    FactorizationLike,
    resolve_factorization,
)
from tensormoe.selection import Budget

TRIAL = Search(starts=1, sweeps=8, polish=0)
"""Enough to tell candidates apart."""

LARGE = 2**24
"""Entries from which on trials of several ranks would take too long."""


_STOPPED = ("time", "stopped", "interrupted")
# of the smallest error after a short search, up to which others are searched for long
_CLOSE = 1.05
# ranks of each of several factorizations that are tried
_EACH = 8


@dataclass(frozen=True, eq=False)
class Runs:
    """The search for the factors of one tensor.

    Args:
        source: the tensor, weighted if errors are.
        sizes: in, out, and the experts.
        bias: whether the layer has biases, which are one more row of the tensor's matrices.
        search: how long to search.
        seed: of the random starts.
        watch: which ends searches before their time.
        apart: the tensor with every expert weighted by itself, for networks that can be.
        score: error of factors that are compared with those of another weighting; None where what
            searches minimize is one error for all.
    """

    source: Source
    sizes: Sizes
    bias: bool
    search: Search
    seed: int
    watch: Watch = field(default_factory=Watch)
    apart: Source | None = None
    score: Callable[[LayerSpec, Factors], float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", non_negative_int(self.seed, "seed"))

    def run(self, kind: Factorization, search: Search | None = None) -> Found:
        """Factors, the error after every sweep, and why the search ended.

        Raises:
            KeyboardInterrupt: before there were any factors.
        """
        import numpy as np

        rows, columns, experts = self.sizes
        spec = LayerSpec(rows, columns, experts, kind, bias=False)
        network = spec.network
        open_legs = (*network.expert_legs, INPUT, OUTPUT)
        wider = {**network.sizes, INPUT: rows + self.bias}
        terms = structures(network, open_legs, wider)
        rng, watch = np.random.default_rng(self.seed), self.watch
        own = self.apart is not None and turns_experts(spec)
        source = self.apart if own and self.apart is not None else self.source
        try:
            return fit(terms, source, search or self.search, rng, watch.follow(kind))
        except (KeyboardInterrupt, Stopped) as reason:
            if watch.best is None:
                raise
            why = reason.why if isinstance(reason, Stopped) else "interrupted"
            factors, errors = watch.best()
            return Found(factors, tuple(errors), why)
        finally:
            watch.best = None

    def find(
        self,
        factorization: FactorizationLike | Several,
        rank: int | tuple[int, ...] | None,
        budget: Budget | float | None,
        tolerance: float | None,
    ) -> tuple[Factorization, Found]:
        """The factorization with its rank, and its factors: the best so far of a stopped search.

        Of several ones, that with the smallest error.

        Raises:
            KeyboardInterrupt: before there were any factors.
            SpecError, RankError, BudgetError: one that cannot be.
        """
        if isinstance(factorization, Several):
            if budget is None or rank is not None or tolerance is not None:
                raise SpecError(
                    "one of several factorizations is chosen within a budget; got none, or a rank "
                    "or tolerance. Give budget=…."
                )
            return self._chosen(factorization, self._budget(budget))
        given = [each is not None for each in (rank, budget, tolerance)]
        if isinstance(factorization, Factorization) or not any(given):
            if any(given):
                raise SpecError(
                    "a factorization that is a value has its rank; got rank, budget or tolerance "
                    "besides. Give its name instead."
                )
            return self._checked(resolve_factorization(factorization, None))
        if sum(given) > 1:
            raise SpecError("one of rank, budget and tolerance must be given; got several.")
        if rank is not None:
            return self._checked(resolve_factorization(factorization, rank))
        if budget is not None:
            return self._long(*self._best(factorization, self._budget(budget)))
        assert tolerance is not None
        return self._within(factorization, checked_tolerance(tolerance))

    def _chosen(self, several: Several, budget: Budget | int) -> tuple[Factorization, Found]:
        """The best of several factorizations, of those closest after a short search a long one."""
        trials: list[tuple[float, Factorization, Found | None]] = []
        for name in several.within(self.sizes, budget, self.bias, self._dense > LARGE):
            kind, found = self._best(name, budget, few=True)
            if found is None:
                found = self._or(trials[-1][2] if trials else None, kind, TRIAL)
            trials.append((self._score(kind, found), kind, found))
            several.tried[kind] = trials[-1][0]
            if found.ended in _STOPPED:
                break
        trials.sort(key=lambda each: each[0])
        least = trials[0][0]
        finals = [each for each in trials if each[0] <= _CLOSE * least]
        best: tuple[float, Factorization, Found] | None = None
        for _, kind, trial in finals:
            kind, found = self._long(kind, trial)
            score = several.tried[kind] = self._score(kind, found)
            if best is None or score < best[0]:
                best = score, kind, found
            if found.ended in _STOPPED:
                break
        assert best is not None
        return best[1], best[2]

    def _score(self, kind: Factorization, found: Found) -> float:
        """Error by which factors of several networks are compared."""
        if self.score is None:
            return _least(found)
        rows, columns, experts = self.sizes
        return self.score(LayerSpec(rows, columns, experts, kind, bias=self.bias), found.factors)

    @property
    def _dense(self) -> int:
        rows, columns, experts = self.sizes
        return prod(experts) * (rows + self.bias) * columns

    def _budget(self, budget: Budget | float) -> Budget | int:
        """A budget, with a share of the weights' own entries as a number of them."""
        if not isinstance(budget, float):
            return budget
        if not 0 < budget <= 1:
            raise BudgetError(
                f"a budget that is a float is a share of the weights' entries, in (0, 1]; got "
                f"{budget!r}. Give an integer for a number of parameters."
            )
        return int(budget * self._dense)

    def _checked(self, kind: Factorization) -> tuple[Factorization, Found]:
        """A run for a given rank."""
        rows, columns, experts = self.sizes
        checked_bonds(LayerSpec(rows, columns, experts, kind, bias=self.bias))
        return kind, self.run(kind)

    def _best(
        self, name: str | type[Factorization], budget: Budget | int, few: bool = False
    ) -> tuple[Factorization, Found | None]:
        """The candidate within a budget with the lowest error of a short search, and its result.

        Candidates that a stopped search did not get to are left out.

        Args:
            name: of the factorization.
            budget: for the factors.
            few: whether it is one of several, of each of which few ranks are tried.
        """
        kinds: Sequence[Factorization] = candidates(name, self.sizes, budget, self.bias)
        kinds = tried(kinds) if few else kinds
        if len(kinds) == 1 or self._dense > LARGE:
            return kinds[0], None
        best: tuple[Factorization, Found] | None = None
        least = inf
        for kind in kinds:
            found = self._or(best and best[1], kind, TRIAL)
            score = self._score(kind, found)
            if best is None or score < least:
                best, least = (kind, found), score
            if found.ended in _STOPPED:
                return best[0], replace(best[1], ended=found.ended)
        return best  # type: ignore[return-value]

    def _or(self, known: Found | None, kind: Factorization, search: Search | None = None) -> Found:
        """A run; what is known where Ctrl-C leaves it without any factors."""
        try:
            return self.run(kind, search)
        except KeyboardInterrupt:
            if known is None:
                raise
            return replace(known, ended="interrupted")

    def _long(self, kind: Factorization, trial: Found | None) -> tuple[Factorization, Found]:
        """The long run, unless the short one was stopped."""
        if trial is None:
            return kind, self.run(kind)
        if trial.ended in _STOPPED:
            return kind, trial
        found = self._or(trial, kind)
        if found.ended in _STOPPED and _least(trial) < _least(found):
            # it did not get as far
            found = replace(trial, ended=found.ended)
        return kind, found

    def _within(
        self, name: str | type[Factorization], tolerance: float
    ) -> tuple[Factorization, Found]:
        """Factors of the smallest budget that reaches a tolerance.

        Of a stopped search, the smallest so far; where there is none, what it came to.
        """
        errors: dict[Factorization, float] = {}
        kinds: dict[int, Factorization] = {}
        last: tuple[Factorization, Found] | None = None

        def reaches(budget: int) -> bool:
            nonlocal last
            ended = ""
            try:
                kind, trial = self._best(name, budget)
                if trial is not None and trial.ended in _STOPPED:
                    ended, last = trial.ended, last or (kind, trial)
                elif kind not in errors:
                    _, found = self._long(kind, trial)
                    errors[kind], ended = found.errors[-1], found.ended
                    if errors[kind] <= tolerance or last is None:
                        last = kind, found
            except BudgetError:
                return False
            except KeyboardInterrupt:
                if last is None:
                    raise
                ended = "interrupted"
            if ended in _STOPPED:
                raise Stopped(ended)
            kinds[budget] = kind
            return errors[kind] <= tolerance

        try:
            kind = kinds[smallest(1, self._dense, reaches, tolerance)]
        except Stopped as reason:
            assert last is not None
            return last[0], replace(last[1], ended=reason.why)
        return last if last is not None and last[0] == kind else (kind, self.run(kind))


def tried(kinds: Sequence[Factorization]) -> Sequence[Factorization]:
    """The ranks of one of several factorizations that are tried, evenly spread."""
    return kinds[:: -(-len(kinds) // _EACH)]


def _least(found: Found) -> float:
    return min(found.errors, default=inf)
