"""Factorizations by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tensormoe._validation import choice, positive_ints
from tensormoe.errors import RankError, SpecError
from tensormoe.factorizations._base import Factorization
from tensormoe.factorizations._base_delta import BaseDelta, SharedDelta
from tensormoe.factorizations._cp import CP
from tensormoe.factorizations._dense import Dense
from tensormoe.factorizations._hadamard import Hadamard
from tensormoe.factorizations._shared_basis import SharedBasis
from tensormoe.factorizations._tensor_ring import TensorRing
from tensormoe.factorizations._tensor_train import TensorTrain
from tensormoe.factorizations._tucker import Tucker

__all__ = ["FACTORIZATIONS", "resolve_factorization"]

FACTORIZATIONS: Mapping[str, type[Factorization]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            CP,
            TensorRing,
            TensorTrain,
            Tucker,
            SharedBasis,
            BaseDelta,
            SharedDelta,
            Hadamard,
            Dense,
        )
    }
)
"""The factorizations that have a name, by it."""


def resolve_factorization(
    factorization: str | Factorization, rank: int | tuple[int, ...] | None = None
) -> Factorization:
    """A factorization value from a name and a rank, or the value itself.

    Args:
        factorization: a value, or one of the names in ``FACTORIZATIONS``.
        rank: bond sizes for a name; must be None where there is nothing to choose or where
            ``factorization`` already is a value.

    Raises:
        SpecError: an unknown name, or something else than a name or a value.
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
    kind = FACTORIZATIONS[choice(factorization, FACTORIZATIONS, "factorization", SpecError)]
    if kind in (Hadamard, Dense):
        return kind().with_rank(() if rank is None else positive_ints(rank, "rank", "bond"))
    if rank is None:
        raise RankError(
            f"rank is missing for {factorization!r}. Give rank=…, or budget=… to have it chosen."
        )
    return kind(rank)  # type: ignore[call-arg]
