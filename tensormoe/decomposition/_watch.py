"""Progress of a search, and its early end: by a callback, a time limit or Ctrl-C.

Every sweep leaves a snapshot of the best factors so far. Whatever ends a search early is an
exception, which unwinds to the one place that takes the last snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from time import perf_counter
from typing import TypeAlias

from tensormoe.backend import Array
from tensormoe.errors import SpecError
from tensormoe.factorizations import Factorization


@dataclass(frozen=True)
class Progress:
    """Progress of a search, after a sweep.

    Args:
        name: of what is decomposed, such as a projection of a model; ``""`` from ``decompose``.
        factorization: that is fitted now; with a budget or a tolerance, one of several.
        sweep: sweeps on it so far, of all starts together.
        error: the smallest relative error of it so far, as far as rounding lets it be seen.
        seconds: since the decomposition began.
    """

    name: str
    factorization: Factorization
    sweep: int
    error: float
    seconds: float


Callback: TypeAlias = Callable[[Progress], "bool | None"]
"""Called after every sweep. True ends the search with the best factors so far; an exception ends
everything, as anywhere."""

Factors: TypeAlias = dict[str, Array]
Snapshot: TypeAlias = Callable[[], tuple[Factors, Sequence[float]]]
"""The best factors so far, and the relative errors on the way to them."""


class Stopped(Exception):
    """The early end of a search.

    Args:
        why: ``"time"`` or ``"stopped"``.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@dataclass(eq=False)
class Watch:
    """All searches of one decomposition.

    Args:
        seconds: a time limit.
        callback: told of every sweep.
        ended: why a search ended before its time; None while none did.
        best: a snapshot of the run that is going on.
    """

    seconds: float | None = None
    callback: Callback | None = None
    ended: str | None = None
    best: Snapshot | None = None
    _error: float = inf
    _sweeps: int = 0
    _kind: Factorization | None = None
    _started: float = field(default_factory=lambda: perf_counter())

    @property
    def elapsed(self) -> float:
        """Seconds since the decomposition began."""
        return perf_counter() - self._started

    def follow(self, kind: Factorization) -> Follower:
        """A new run, for a factorization."""
        self.best, self._error, self._sweeps, self._kind = None, inf, 0, kind
        return Follower(self)

    def keep(self, error: float, snapshot: Snapshot, anyway: bool) -> None:
        """Take a snapshot for the best one if its error is no larger, or ``anyway``."""
        if anyway or error <= self._error:
            self.best, self._error = snapshot, error

    def tell(self) -> None:
        """Report a sweep, and end the search if requested.

        Raises:
            Stopped: the time is over, or the callback says so.
            SpecError: it says neither yes nor no.
        """
        self._sweeps += 1
        seconds = self.elapsed
        if self.callback is not None and self._kind is not None:
            said = self.callback(Progress("", self._kind, self._sweeps, self._error, seconds))
            if said is not None and said not in (True, False):
                raise SpecError(
                    f"a callback must return True to end the search, else None; got {said!r}. "
                    "Return nothing."
                )
            if said and self.best is not None:
                raise Stopped("stopped")
        if self.seconds is not None and seconds >= self.seconds and self.best is not None:
            raise Stopped("time")


@dataclass(frozen=True, eq=False)
class Follower:
    """Link from a search on a part of a tensor, or on its core, to the watch.

    Args:
        watch: of the decomposition.
        whole: makes factors of the part those of the tensor; None where they are.
        scale: relative errors of the part times this are those of the tensor.
        before: errors of the sweeps before those of this search.
    """

    watch: Watch
    whole: Callable[[Factors], Factors] | None = None
    scale: float = 1.0
    before: tuple[float, ...] = ()

    def part(self, whole: Callable[[Factors], Factors], scale: float) -> Follower:
        """For a search on a part of what this one follows.

        Args:
            whole: makes factors of the part those of what this one follows.
            scale: between their relative errors.
        """
        outer = self.whole
        made = whole if outer is None else lambda factors: outer(whole(factors))
        return replace(self, whole=made, scale=self.scale * scale)

    def after(self, errors: Sequence[float]) -> Follower:
        """A follower for a search that continues where one with these errors ended."""
        return replace(self, before=tuple(errors))

    def keep(self, error: float, snapshot: Snapshot, anyway: bool = False) -> None:
        """A snapshot, in terms of the part; see :meth:`Watch.keep`."""
        whole, scale, before = self.whole, self.scale, self.before

        def made() -> tuple[Factors, Sequence[float]]:
            factors, errors = snapshot()
            found = factors if whole is None else whole(factors)
            return found, [scale * each for each in (*before, *errors)]

        self.watch.keep(scale * error, made, anyway)

    def sweep(self, error: float, snapshot: Snapshot) -> None:
        """A sweep is done.

        Args:
            error: the smallest one so far.
            snapshot: of the factors that have it.

        Raises:
            Stopped: the search is to end.
        """
        self.keep(error, snapshot)
        self.watch.tell()
