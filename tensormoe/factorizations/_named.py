"""Factorizations by name: those of the library, and those that others register."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TypeAlias, TypeVar

from tensormoe._entry_points import entry_points_of, load_entry_point, origin, the_only
from tensormoe._validation import positive_ints
from tensormoe.errors import RankError, SpecError
from tensormoe.factorizations._base import Factorization
from tensormoe.factorizations._base_delta import BaseDelta, SharedDelta
from tensormoe.factorizations._classes import check_values, checked_class, sample
from tensormoe.factorizations._cp import CP
from tensormoe.factorizations._dense import Dense
from tensormoe.factorizations._hadamard import Hadamard
from tensormoe.factorizations._low_rank import LowRank
from tensormoe.factorizations._shared_basis import SharedBasis
from tensormoe.factorizations._tensor_ring import TensorRing
from tensormoe.factorizations._tensor_train import TensorTrain
from tensormoe.factorizations._tucker import Tucker

ENTRY_POINT_GROUP = "tensormoe.factorizations"

FactorizationLike: TypeAlias = str | Factorization | type[Factorization]
"""A value with its rank, or a name or class that a rank or a budget makes a value of."""

_BUILT_IN = (
    CP,
    TensorRing,
    TensorTrain,
    Tucker,
    LowRank,
    SharedBasis,
    BaseDelta,
    SharedDelta,
    Hadamard,
    Dense,
)
_registered: dict[str, type[Factorization]] = {kind.name: kind for kind in _BUILT_IN}

Kind = TypeVar("Kind", bound=Factorization)


def register_factorization(kind: type[Kind]) -> type[Kind]:
    """Let a name stand for a class: in constructors, budgets, the command line and checkpoints.

    A checkpoint has the name and the rank of a layer's factorization, so a class is registered in
    every process that opens one. A distribution does that for those who install it by an entry
    point in the group ``tensormoe.factorizations``: ``mixtures = "my_package:Mixtures"``.

    Args:
        kind: a subclass of :class:`tensormoe.Factorization`, as a rule a frozen dataclass, whose
            values are made by ``kind(rank=…)``, where one integer stands for all bonds; or by
            ``kind()`` if it has no rank to choose.

    Returns:
        The class, so that this can be its decorator, above ``@dataclass``.

    Raises:
        SpecError: not such a class, or its name is another one's.

    >>> from tensormoe import CP
    >>> register_factorization(CP) is CP
    True
    """
    checked_class(kind)
    known = _registered.get(kind.name)
    if known is not None and not _same(known, kind):
        raise _taken(kind, f"{known.__module__}.{known.__qualname__}")
    for point in entry_points_of(ENTRY_POINT_GROUP).get(kind.name, ()):
        if point.value.partition(":")[0].split(".")[0] != kind.__module__.split(".")[0]:
            raise _taken(kind, f"distribution {origin(point)}")
    _registered[kind.name] = kind
    return kind


def factorization_class(factorization: str | type[Factorization]) -> type[Factorization]:
    """The class that a name stands for; a class stands for itself.

    Args:
        factorization: a name of the library or one that was registered, or a class, which need not
            be.

    Raises:
        SpecError: an unknown name, something else than a name or a class, or one that a
            distribution registers and that is none.
        MissingDependencyError: a distribution that registers it needs a package that is missing.

    >>> factorization_class("tensor_ring").__name__
    'TensorRing'
    """
    if isinstance(factorization, type):
        found: type[Factorization] | None = checked_class(factorization)
    else:
        found = _find(factorization)
    if found is None:
        listed = ", ".join(repr(name) for name in FACTORIZATIONS)
        raise SpecError(
            f"factorization must be one of {listed}; got {factorization!r}. Register your own "
            "class in this process with tensormoe.register_factorization, or by an entry point in "
            f"the group {ENTRY_POINT_GROUP!r}."
        )
    if found not in _BUILT_IN:
        check_values(found)
    return found


def rank_pattern(factorization: FactorizationLike, levels: int = 1) -> tuple[str, ...]:
    """The bonds by symbol of a name, a class or a value; empty where there is no rank to choose.

    Raises:
        SpecError: an unknown name, or something else.

    >>> rank_pattern("tensor_ring", levels=2), rank_pattern("hadamard")
    (('a', 'a', 'a', 's'), ())
    """
    if not isinstance(factorization, Factorization):
        factorization = sample(factorization_class(factorization))
    return tuple(factorization.rank_pattern(levels))


def resolve_factorization(
    factorization: FactorizationLike, rank: int | tuple[int, ...] | None = None
) -> Factorization:
    """A factorization value from a name or class and a rank, or the value itself.

    Args:
        factorization: a value, a class, or one of the names in ``FACTORIZATIONS``.
        rank: bond sizes for a name or class; must be None where there is nothing to choose or where
            ``factorization`` already is a value.

    Raises:
        SpecError: an unknown name, or something else than a name, a class or a value.
        RankError: a rank where none belongs, or none where one is needed.

    >>> resolve_factorization("tensor_ring", rank=(4, 4, 97))
    TensorRing(rank=(4, 4, 97))
    >>> resolve_factorization("cp")
    Traceback (most recent call last):
        ...
    tensormoe.errors.RankError: rank is missing for 'cp'. Give rank=…, or budget=… to have it \
chosen.
    """
    if isinstance(factorization, Factorization):
        if rank is not None:
            raise RankError(
                f"rank must be given once; got rank={rank!r} beside {factorization!r}. Drop one."
            )
        return factorization
    kind = factorization_class(factorization)
    pattern = rank_pattern(kind)
    if not pattern:
        if rank is not None:
            sizes = positive_ints(rank, "rank", "bond", RankError)
            raise RankError(f"rank must be None for {kind.name}, which has none; got {sizes!r}.")
        return sample(kind)
    if rank is None:
        raise RankError(
            f"rank is missing for {kind.name!r}. Give rank=…, or budget=… to have it chosen."
        )
    sizes = positive_ints(rank, "rank", "bond", RankError)
    single = not isinstance(rank, Iterable) or len(sizes) == len(pattern) == 1
    value: Factorization = kind(rank=sizes[0] if single else sizes)  # type: ignore[call-arg]
    return value


class _Names(Mapping[str, type[Factorization]]):
    """The registry as it stands: names are listed unloaded, a class is loaded when it is read."""

    def __getitem__(self, name: str) -> type[Factorization]:
        found = _find(name)
        if found is None:
            raise KeyError(name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in _registered or name in entry_points_of(ENTRY_POINT_GROUP)

    def __iter__(self) -> Iterator[str]:
        return iter({**_registered, **entry_points_of(ENTRY_POINT_GROUP)})

    def __len__(self) -> int:
        return len({**_registered, **entry_points_of(ENTRY_POINT_GROUP)})

    def __repr__(self) -> str:
        return f"FACTORIZATIONS({', '.join(self)})"


FACTORIZATIONS: Mapping[str, type[Factorization]] = _Names()
"""Factorizations by name: a read-only view of the registry."""


def _find(name: Any) -> type[Factorization] | None:
    if not isinstance(name, str):
        return None
    # the library's own and those of this process first: nothing is scanned for them
    return _registered.get(name) or _from_entry_point(name)


@cache
def _from_entry_point(name: str) -> type[Factorization] | None:
    points = entry_points_of(ENTRY_POINT_GROUP).get(name, ())
    if not points:
        return None
    point = the_only(points, "factorization", SpecError)
    loaded: Any = load_entry_point(point, "factorization", SpecError)
    kind = checked_class(loaded, f" of {origin(point)}")
    check_values(kind, f" of {origin(point)}")
    if kind.name != name:
        raise SpecError(
            f"the {name} factorization of {origin(point)} must have that name; got "
            f"{kind.name!r}. Give the entry point and the class one name."
        )
    # importing it may have registered classes, this one or another of its name
    known = _registered.get(name)
    if known is not None and known is not kind:
        raise _taken(kind, f"{known.__module__}.{known.__qualname__}")
    return kind


def _same(known: type[Factorization], kind: type[Factorization]) -> bool:
    """Whether both are one definition, which a notebook or a reload may have run again."""
    if known is kind:
        return True
    places = [(each.__module__, each.__qualname__) for each in (known, kind)]
    return places[0] == places[1] and "<locals>" not in kind.__qualname__


def _taken(kind: type[Factorization], by: str) -> SpecError:
    return SpecError(
        f"a name must stand for one factorization; got {kind.name!r} for "
        f"{kind.__module__}.{kind.__qualname__}, which is taken by {by}. Give the class another "
        "name."
    )
