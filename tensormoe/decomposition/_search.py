"""A search from given factors: sweeps that reach ahead, and are taken back where they fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, sqrt

from tensormoe.backend import Array
from tensormoe.decomposition._als import Factors, sweep
from tensormoe.decomposition._contractions import Structure
from tensormoe.decomposition._source import Source
from tensormoe.errors import SpecError

__all__ = ["Problem", "Search", "advance"]

# sweeps in a row that have to gain too little before a search ends
_PATIENCE = 5
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

    Raises:
        SpecError: a count that is no positive integer (no natural one for ``polish``), or a
            tolerance outside [0, 1).
    """

    starts: int | None = None
    sweeps: int = 200
    polish: int = 20
    tolerance: float = 5e-4

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


@dataclass(frozen=True, eq=False)
class Problem:
    """A tensor and what is to stand for it.

    Args:
        terms: the networks whose sum is to stand for the tensor.
        source: the tensor.
        squared_norm: of the tensor.
        room: entries that may be held beyond tensor and factors.
        lost: squared norm that is missing whatever the factors are, since the tensor is a core.
    """

    terms: tuple[Structure, ...]
    source: Source
    squared_norm: float
    room: int
    lost: float = 0.0

    def felt(self, error: float) -> float:
        """An error beside what is missing anyway."""
        return sqrt(self.lost / self.squared_norm + error * error)

    @property
    def hidden(self) -> float:
        """The size of errors that a difference of squares cannot tell from rounding."""
        return sqrt(float(self.source.backend.namespace.finfo(self.source.dtype).eps))

    def error(self, factors: Mapping[str, Array]) -> float:
        """The relative error, from the difference itself."""
        left = self.source.without(self.terms, factors)
        return sqrt(left.squared_norm() / self.squared_norm)


def advance(
    problem: Problem,
    factors: Factors,
    count: int,
    tolerance: float,
    patience: int = _PATIENCE,
    known: float = inf,
) -> tuple[Factors, list[float]]:
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
    one another, where rounding hides the error: the true one is looked at from time to time, and
    after a surprise well-seen directions alone are followed (Levenberg and Marquardt's damping).
    """
    errors: list[float] = []
    lowest, idle, damping, reach = known, 0, 0.0, _REACH
    previous: Factors | None = None
    safe, marks, best, hidden = factors, 0, known, problem.hidden
    for turn in range(count):
        start = dict(factors)
        if previous is not None:
            start = {name: each + reach * (each - previous[name]) for name, each in factors.items()}
        found, error = sweep(
            problem.terms, problem.source, problem.squared_norm, start, problem.room, damping
        )
        if error < _CLOSE * hidden:
            error = problem.error(found)
        gains = problem.felt(error) < problem.felt(lowest) * (1.0 - tolerance)
        idle = 0 if gains else idle + 1
        if error <= lowest:
            factors, previous, lowest = found, factors if errors else None, error
            damping, reach = damping / 3.0, min(1.1 * reach, _MOST_REACH)
            errors.append(error)
        elif previous is not None:
            previous, reach = None, reach / 1.5
        else:
            damping = max(10.0 * damping, _LEAST_DAMPING)
        del start, found
        ends = idle == patience or turn == count - 1
        if len(errors) > marks and (ends or len(errors) - marks >= _LOOK):
            true = problem.error(factors)
            surprise = true > _TRUST * errors[-1] + _HIDDEN * hidden
            if true < best:
                safe, marks, best, errors[-1] = factors, len(errors), true, true
            if surprise:
                factors, errors, lowest = safe, errors[:marks], best
                previous, damping = None, max(10.0 * damping, _STRONG_DAMPING)
        if idle == patience:
            break
    return safe, errors[:marks]
