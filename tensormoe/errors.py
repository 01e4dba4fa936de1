"""Errors of the public interface: the rule, the value, its position, and what to do.

Every error that tensormoe raises on purpose is one of these classes or a plain ``TypeError``. They
derive from the built-in that callers would catch anyway.

>>> from tensormoe import LayerSpec, CP
>>> LayerSpec(8, 4, experts=(3, 0), factorization=CP(rank=2))
Traceback (most recent call last):
    ...
tensormoe.errors.SpecError: experts must be positive integers; got 0 for level 1. Give one size \
per level.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "Alternative",
    "BackendError",
    "BudgetError",
    "CheckpointError",
    "ClusterError",
    "GateError",
    "LayoutError",
    "MissingDependencyError",
    "PlanError",
    "RankError",
    "RequestError",
    "ShapeError",
    "SpecError",
    "TensormoeError",
    "TrainingError",
]


class TensormoeError(Exception):
    """Base class of every error that tensormoe raises on purpose."""


def located(error: TensormoeError, place: str) -> TensormoeError:
    """The same error, its message prefixed with where it happened."""
    made = type(error)(f"{place}: {error}")
    # with the data that an error carries besides
    made.__dict__.update(error.__dict__)
    return made


class SpecError(TensormoeError, ValueError):
    """A layer description that cannot be: sizes, levels, names, options."""


class RankError(SpecError):
    """A rank that does not fit its factorization."""


class RequestError(SpecError):
    """A request some of whose fields cannot be.

    Args:
        fields: the error of each of them, by name.

    >>> str(RequestError({"batch": SpecError("batch must be positive."), "bias": SpecError("No.")}))
    'batch must be positive. No.'
    """

    fields: Mapping[str, TensormoeError]

    def __init__(self, fields: Mapping[str, TensormoeError]) -> None:
        super().__init__(" ".join(map(str, fields.values())))
        self.fields = dict(fields)

    def __reduce__(self) -> tuple[type[RequestError], tuple[Mapping[str, TensormoeError]]]:
        return RequestError, (self.fields,)


@dataclass(frozen=True)
class Alternative:
    """A change with which something takes less.

    Args:
        change: arguments by name, as the function that raised the error takes them:
            ``{"experts": (16, 32)}`` or ``{"gate": False}``.
        needed: the least with which it fits then, for each limit that is too low.
    """

    change: Mapping[str, object]
    needed: Mapping[str, float]


class BudgetError(TensormoeError, ValueError):
    """A budget that cannot be met; the message names the smallest feasible one.

    Args:
        message: the rule, the value, and what to do.
        needed: for each limit that is too low, by name, the least with which something fits; empty
            for a budget that makes no sense at all.
        given: the same limits as they were asked for.
        alternatives: changes that take less than that.

    Attributes:
        needed: as given.
        given: as given.
        alternatives: as given, as a tuple.

    >>> from tensormoe import select_rank
    >>> try:
    ...     select_rank("cp", 64, 64, experts=512, budget=9_000)
    ... except BudgetError as error:
    ...     error.given, error.needed, error.alternatives[0]
    ({'parameters': 9000}, {'parameters': 33409}, \
Alternative(change={'experts': (16, 32)}, needed={'parameters': 3249}))
    """

    needed: Mapping[str, float]
    given: Mapping[str, float]
    alternatives: tuple[Alternative, ...]

    def __init__(
        self,
        message: str = "",
        needed: Mapping[str, float] = MappingProxyType({}),
        given: Mapping[str, float] = MappingProxyType({}),
        alternatives: Iterable[Alternative] = (),
    ) -> None:
        super().__init__(message)
        # plain dictionaries, so that the error can be pickled
        self.needed, self.given = dict(needed), dict(given)
        self.alternatives = tuple(alternatives)


class ShapeError(TensormoeError, ValueError):
    """An array whose shape does not fit the layer."""


class GateError(TensormoeError, ValueError):
    """Gate options, logits or coefficients that do not define a routing."""


class LayoutError(TensormoeError, NotImplementedError):
    """A factorization in the layout of a library that has none for it."""


class PlanError(TensormoeError, ValueError):
    """A contraction that cannot be planned, or a limit that no plan meets."""


class CheckpointError(TensormoeError, ValueError):
    """A file that is not a checkpoint, or is one of another layer; lists every difference."""


class ClusterError(TensormoeError, RuntimeError):
    """A cluster that cannot do the work: out of reach, without workers, or of another version."""


class TrainingError(TensormoeError, RuntimeError):
    """A training that cannot go on: a loss or gradients that are not finite."""


class BackendError(TensormoeError, TypeError):
    """Arrays of an unknown library or of several at once, or a library without its device."""


class MissingDependencyError(TensormoeError, ImportError):
    """An optional package is not installed; the message says what to install."""
