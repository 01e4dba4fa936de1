"""A search from given factors: sweeps that reach ahead, and are taken back where they fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite, sqrt

from tensormoe.backend import Array
from tensormoe.decomposition._als import Factors, sweep
from tensormoe.decomposition._contractions import Structure
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._watch import Follower
from tensormoe.errors import SpecError

__all__ = ["ENDED", "Found", "Problem", "Search", "advance", "checked_seconds", "worst"]

ENDED = ("converged", "sweeps", "stalled", "stopped", "time", "interrupted")
"""Why a search ended, from the best reason to the worst, see :class:`Found`."""

# sweeps in a row that have to gain too little before a search ends
_PATIENCE = 5
# the same where the error is of the size of rounding
_FINE = 2
# accepted sweeps from one look at the true error to the next
_LOOK = 5
# what the error of a sweep may lack of the true one: a share of it, and some of what rounding hides
_TRUST, _HIDDEN = 1.05, 3.0
# times what rounding hides: below, every sweep's true error is computed
_CLOSE = 10.0
_LEAST_DAMPING, _STRONG_DAMPING = 1e-6, 1e-4
# how far beyond the factors a sweep starts, in steps of the last one: at first, and at most
_REACH, _MOST_REACH = 0.5, 2.0


@dataclass(frozen=True)
class Search:
    """How long factors are searched for.

    Args:
        starts: random starts, the best of which goes on; None for as many as take little time, one
            for a large core and eight for a small one.
        sweeps: most sweeps on the core.
        polish: most sweeps on the tensor itself.
        tolerance: a search ends when sweeps lower the error by less than this share of it.
        seconds: a time limit of a decomposition, kept to within one sweep: the best factors by then
            are taken. The errors that are reported come on top. None for no limit.

    Raises:
        SpecError: a count that is no positive integer (no natural one for ``polish``), a tolerance
            outside [0, 1), or a time limit that is no positive number.
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
        number = isinstance(self.tolerance, (int, float)) and not isinstance(self.tolerance, bool)
        if not number or not 0 <= self.tolerance < 1:
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
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not number or not isfinite(seconds) or seconds <= 0:
        raise SpecError(
            f"seconds must be a positive number; got {seconds!r}. Leave it out for no limit."
        )
    return float(seconds)


@dataclass(frozen=True, eq=False)
class Problem:
    """A tensor and what is to stand for it.

    Args:
        terms: the networks whose sum is to stand for the tensor.
        source: the tensor.
        squared_norm: of the tensor.
        room: entries that may be held beyond tensor and factors.
        lost: squared norm that is missing whatever the factors are, since the tensor is a core.
        follower: told of every sweep, if anybody is.
    """

    terms: tuple[Structure, ...]
    source: Source
    squared_norm: float
    room: int
    lost: float = 0.0
    follower: Follower | None = None

    def felt(self, error: float) -> float:
        """An error beside what is missing anyway."""
        return sqrt(self.lost / self.squared_norm + error * error)

    @property
    def hidden(self) -> float:
        """The size of errors that a difference of squares cannot tell from rounding."""
        return sqrt(float(self.source.backend.namespace.finfo(self.source.dtype).eps))

    def surprises(self, error: float, claimed: float) -> bool:
        """Whether an error is above what was claimed by more than rounding."""
        return error > _TRUST * claimed + _HIDDEN * self.hidden

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
    """How the next sweep is made.

    Args:
        previous: factors before the last sweep, in whose direction the next one starts; None for a
            plain sweep.
        reach: how far, in steps of the last sweep.
        damping: how far directions have to be seen to be followed.
    """

    previous: Factors | None = None
    reach: float = _REACH
    damping: float = 0.0

    def start(self, factors: Factors) -> Factors:
        """Factors for the next sweep to start from."""
        if self.previous is None:
            return dict(factors)
        last = self.previous
        return {k: each + self.reach * (each - last[k]) for k, each in factors.items()}

    def faster(self, previous: Factors | None) -> _Pace:
        """The pace after a sweep that was accepted."""
        return _Pace(previous, min(1.1 * self.reach, _MOST_REACH), self.damping / 3.0)

    def slower(self) -> _Pace:
        """The pace after a sweep that was rejected."""
        if self.previous is not None:
            return _Pace(None, self.reach / 1.5, self.damping)
        return replace(self, damping=max(10.0 * self.damping, _LEAST_DAMPING))

    def careful(self) -> _Pace:
        """The pace after true errors differed from claimed ones."""
        return _Pace(None, self.reach, max(10.0 * self.damping, _STRONG_DAMPING))


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
    after a surprise well-seen directions alone are followed (Levenberg and Marquardt's damping).
    """
    claimed = checked = _Point(factors, known)
    del factors
    pace, idle, astray, ended = _Pace(), 0, False, "sweeps"
    for _ in range(count):
        start = pace.start(claimed.factors)
        found, error = sweep(
            problem.terms, problem.source, problem.squared_norm, start, problem.room, pace.damping
        )
        if error < _CLOSE * problem.hidden:
            error = problem.error(found)
        gains = problem.felt(error) < problem.felt(claimed.error) * (1.0 - tolerance)
        idle, astray = (0, False) if gains else (idle + 1, astray)
        if error <= claimed.error:
            pace = pace.faster(claimed.factors if claimed.errors else None)
            claimed = _Point(found, error, (*claimed.errors, error))
        else:
            astray = astray or (pace.previous is None and problem.surprises(error, claimed.error))
            pace = pace.slower()
        del start, found
        if problem.follower is not None and claimed.error < inf:
            now = partial(_settled, problem, claimed, checked)
            problem.follower.sweep(problem.felt(claimed.error), now)
        # what rounding hides is not waited for
        if idle >= (patience if claimed.error > problem.hidden else min(patience, _FINE)):
            ended = "converged"
            break
        if len(claimed.errors) - len(checked.errors) >= _LOOK:
            claimed, checked, surprise = _looked(problem, claimed, checked)
            if surprise:
                pace, astray = pace.careful(), True
    if len(claimed.errors) > len(checked.errors):
        _, checked, surprise = _looked(problem, claimed, checked)
        astray = astray or surprise
    if ended == "converged" and astray and checked.error > _CLOSE * problem.hidden:
        ended = "stalled"
    return Found(checked.factors, checked.errors, ended)


def _looked(problem: Problem, claimed: _Point, checked: _Point) -> tuple[_Point, _Point, bool]:
    """Where to go on, what is sure, and whether the claimed error was far from the true one."""
    true = problem.error(claimed.factors)
    surprise = problem.surprises(true, claimed.error)
    if true < checked.error:
        checked = _Point(claimed.factors, true, (*claimed.errors[:-1], true))
        claimed = replace(claimed, errors=checked.errors)
    return (checked if surprise else claimed), checked, surprise


def _settled(problem: Problem, claimed: _Point, checked: _Point) -> tuple[Factors, list[float]]:
    """Return factors and errors of the tensor for a search that ends here."""
    if len(claimed.errors) > len(checked.errors):
        _, checked, _ = _looked(problem, claimed, checked)
    return checked.factors, [problem.felt(error) for error in checked.errors]
