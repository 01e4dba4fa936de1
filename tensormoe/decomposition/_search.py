"""A search from given factors: extrapolated sweeps, taken back where they fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, sqrt

from tensormoe._validation import is_number
from tensormoe.backend import Array
from tensormoe.decomposition._als import Factors, sweep
from tensormoe.decomposition._contractions import Structure
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._watch import Follower
from tensormoe.errors import SpecError

ENDED = ("converged", "sweeps", "stalled", "stopped", "time", "interrupted")
"""Reasons for a search to end, from the best reason to the worst, see :class:`Found`."""

# sweeps in a row that have to gain too little before a search ends, and the same where the error is
# of the size of rounding
_PATIENCE, _PATIENCE_AT_ROUNDING = 5, 2
# accepted sweeps from one computation of the true error to the next
_CHECK_EVERY = 5
# how far a true error may be above the claimed one: a share of it, and multiples of rounding's size
_TRUST, _TRUST_ROUNDING = 1.05, 3.0
# in the size of rounding: below, every sweep's true error is computed
_NEAR_ROUNDING = 10.0
_LEAST_DAMPING, _STRONG_DAMPING = 1e-6, 1e-4
# size of the extrapolation step, in steps of the last sweep: at first, and at most
_STEP, _MOST_STEP = 0.5, 2.0


@dataclass(frozen=True)
class Search:
    """Length of a search for factors.

    Args:
        starts: random starts, the best of which goes on; None for as many as take little time, one
            for a large core and eight for a small one.
        sweeps: most sweeps on the core.
        polish: most sweeps on the tensor itself.
        tolerance: a search ends when sweeps lower the error by less than this share of it.
        seconds: a time limit of a decomposition, kept to within one sweep: the best factors by then
            are taken. The errors that are reported come on top. None for no limit.

    Raises:
        SpecError: a count that is not a positive integer (a negative one for ``polish``), a
            tolerance outside [0, 1), or a time limit that is not a positive number.
    """

    starts: int | None = None
    sweeps: int = 200
    polish: int = 20
    tolerance: float = 5e-4
    seconds: float | None = None

    def __post_init__(self) -> None:
        counts = {"sweeps": self.sweeps, "polish": self.polish}
        if self.starts is not None:
            counts["starts"] = self.starts
        for name, count in counts.items():
            least = 0 if name == "polish" else 1
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise SpecError(
                    f"{name} must be an integer of at least {least}; got {count!r}. Leave it out "
                    "for the usual search."
                )
        if not is_number(self.tolerance) or not 0 <= self.tolerance < 1:
            raise SpecError(
                f"tolerance of a search must be a share of the error in [0, 1); got "
                f"{self.tolerance!r}. Give for example 0.001."
            )
        if self.seconds is not None:
            checked_seconds(self.seconds)


def checked_seconds(seconds: float) -> float:
    """``seconds`` if it is a time limit.

    Raises:
        SpecError: not a positive number.
    """
    if not is_number(seconds) or not 0 < seconds < inf:
        raise SpecError(
            f"seconds must be a positive number; got {seconds!r}. Leave it out for no limit."
        )
    return float(seconds)


@dataclass(frozen=True, eq=False)
class Problem:
    """A tensor and the networks that are to stand for it.

    Args:
        terms: the networks whose sum is to stand for the tensor.
        source: the tensor.
        squared_norm: of the tensor.
        workspace: entries that may be held beyond tensor and factors.
        lost: squared norm that is missing whatever the factors are, since the tensor is a core.
        follower: told of every sweep, if given.
    """

    terms: tuple[Structure, ...]
    source: Source
    squared_norm: float
    workspace: int
    lost: float = 0.0
    follower: Follower | None = None

    def total(self, error: float) -> float:
        """An error together with what is missing anyway."""
        return sqrt(self.lost / self.squared_norm + error * error)

    @property
    def resolution(self) -> float:
        """The size of errors that a difference of squares cannot tell from rounding."""
        return sqrt(float(self.source.backend.namespace.finfo(self.source.dtype).eps))

    def exceeds(self, error: float, claimed: float) -> bool:
        """Whether an error is above what was claimed by more than rounding."""
        return error > _TRUST * claimed + _TRUST_ROUNDING * self.resolution

    def error(self, factors: Mapping[str, Array]) -> float:
        """The relative error, from the difference itself."""
        left = self.source.without(self.terms, factors)
        return sqrt(left.squared_norm() / self.squared_norm)


@dataclass(frozen=True, eq=False)
class Found:
    """Factors that a search ends with.

    Args:
        factors: by name.
        errors: the relative error after every sweep that was kept, the last one from the difference
            itself.
        ended: why: ``"converged"``, further sweeps gained less than the search's tolerance;
            ``"sweeps"``, all of them were made; ``"stalled"``, sweeps claimed or led to what the
            true error did not follow, so that rounding or factors that cancel one another end the
            search, and not an optimum; ``"time"`` or ``"interrupted"``.
    """

    factors: Factors
    errors: tuple[float, ...]
    ended: str


def worst(*ended: str) -> str:
    """The reason to report for consecutive searches."""
    return max(ended, key=ENDED.index)


@dataclass(frozen=True, eq=False)
class _Point:
    """Intermediate factors, their error, and the errors after the sweeps so far."""

    factors: Factors
    error: float
    errors: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class _Pace:
    """Step size and damping of the next sweep.

    Args:
        previous: factors before the last sweep, in whose direction the next one starts; None for a
            plain sweep.
        step: how far, in steps of the last sweep.
        damping: how well directions have to be determined to be followed.
    """

    previous: Factors | None = None
    step: float = _STEP
    damping: float = 0.0

    def start(self, factors: Factors) -> Factors:
        """Factors for the next sweep to start from."""
        if self.previous is None:
            return dict(factors)
        last = self.previous
        return {k: each + self.step * (each - last[k]) for k, each in factors.items()}

    def faster(self, previous: Factors | None) -> _Pace:
        """The pace after a sweep that was accepted."""
        return _Pace(previous, min(1.1 * self.step, _MOST_STEP), self.damping / 3.0)

    def slower(self) -> _Pace:
        """The pace after a sweep that was rejected."""
        if self.previous is not None:
            return _Pace(None, self.step / 1.5, self.damping)
        return replace(self, damping=max(10.0 * self.damping, _LEAST_DAMPING))

    def careful(self) -> _Pace:
        """The pace after true errors differed from claimed ones."""
        return _Pace(None, self.step, max(10.0 * self.damping, _STRONG_DAMPING))


@dataclass(eq=False)
class _State:
    """A search between two sweeps.

    Args:
        problem: the tensor and the networks.
        claimed: the best factors by the errors that sweeps claim.
        verified: the best factors whose error was computed from the difference itself.
        pace: of the next sweep.
        idle: sweeps in a row that gained too little.
        astray: whether sweeps claimed or led to what the true error did not follow, since the last
            gain.
    """

    problem: Problem
    claimed: _Point
    verified: _Point
    pace: _Pace = _Pace()
    idle: int = 0
    astray: bool = False

    @property
    def unverified(self) -> int:
        """Accepted sweeps whose error is only claimed."""
        return len(self.claimed.errors) - len(self.verified.errors)

    def sweep(self, tolerance: float) -> None:
        """Make a sweep, and accept it or take it back."""
        problem, claimed = self.problem, self.claimed
        found, error = sweep(
            problem.terms,
            problem.source,
            problem.squared_norm,
            self.pace.start(claimed.factors),
            problem.workspace,
            self.pace.damping,
        )
        if error < _NEAR_ROUNDING * problem.resolution:
            error = problem.error(found)
        if problem.total(error) < problem.total(claimed.error) * (1.0 - tolerance):
            self.idle, self.astray = 0, False
        else:
            self.idle += 1
        if error <= claimed.error:
            self.pace = self.pace.faster(claimed.factors if claimed.errors else None)
            self.claimed = _Point(found, error, (*claimed.errors, error))
        else:
            plain = self.pace.previous is None
            self.astray = self.astray or (plain and problem.exceeds(error, claimed.error))
            self.pace = self.pace.slower()

    def report(self) -> None:
        """Tell the follower of a sweep."""
        if self.problem.follower is not None and self.claimed.error < inf:
            # of this moment: the state goes on
            now = _State(self.problem, self.claimed, self.verified).settled
            self.problem.follower.sweep(self.problem.total(self.claimed.error), now)

    def verify(self) -> None:
        """Compute the true error of the claimed factors.

        Where it is not as claimed, the search goes on from the verified factors, with care.
        """
        true, claim = self.problem.error(self.claimed.factors), self.claimed.error
        if true < self.verified.error:
            errors = (*self.claimed.errors[:-1], true)
            self.verified = _Point(self.claimed.factors, true, errors)
            self.claimed = replace(self.claimed, errors=errors)
        if self.problem.exceeds(true, claim):
            self.claimed, self.pace, self.astray = self.verified, self.pace.careful(), True

    def settled(self) -> tuple[Factors, list[float]]:
        """Factors and errors of the tensor for a search that ends here."""
        if self.unverified:
            self.verify()
        return self.verified.factors, [self.problem.total(each) for each in self.verified.errors]


def advance(
    problem: Problem,
    factors: Factors,
    count: int,
    tolerance: float,
    patience: int = _PATIENCE,
    known: float = inf,
) -> Found:
    """At most ``count`` sweeps, and the error after each that was kept.

    Args:
        problem: the tensor and the network.
        factors: to start from.
        count: of sweeps.
        tolerance: the share of the error by which a sweep has to lower it, what is missing anyway
            included.
        patience: how many sweeps in a row may gain less.
        known: the error of the factors, above which none is kept.

    Every sweep starts beyond the factors, in the direction that the last one took, further as long
    as that pays (Ang, Cohen & Gillis 2019, extrapolation with restarts): a third of the sweeps do.
    One that raises the error is taken back. Networks can also run away to huge factors that cancel
    one another, where rounding hides the error: the true one is computed from time to time, and
    where it is not as claimed, only directions that are well determined are followed (Levenberg and
    Marquardt's damping).
    """
    start = _Point(factors, known)
    state, ended = _State(problem, start, start), "sweeps"
    # the state alone holds them, until it has better ones
    del factors, start
    for _ in range(count):
        state.sweep(tolerance)
        state.report()
        # what rounding hides is not waited for
        above = state.claimed.error > problem.resolution
        if state.idle >= (patience if above else min(patience, _PATIENCE_AT_ROUNDING)):
            ended = "converged"
            break
        if state.unverified >= _CHECK_EVERY:
            state.verify()
    if state.unverified:
        state.verify()
    verified = state.verified
    lost = state.astray and verified.error > _NEAR_ROUNDING * problem.resolution
    if ended == "converged" and lost:
        ended = "stalled"
    return Found(verified.factors, verified.errors, ended)
