"""Coefficients as a matrix, whichever form they come in: what losses and measures compute with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from operator import add
from typing import Any, TypeAlias, TypeVar

from tensormoe.backend import Array, Backend, backend_of, device_of
from tensormoe.errors import GateError
from tensormoe.gates._top_k import TopK

Given: TypeAlias = Array | TopK | Sequence[Array | TopK]
"""Coefficients as gates return them: of one level, or a list or tuple of all levels'."""

Experts: TypeAlias = int | Sequence[int] | None
"""Numbers of experts, one or one per level, which ``TopK`` values do not know."""

R = TypeVar("R")


@dataclass(frozen=True)
class Weights:
    """Coefficients of one level, or logits, with tokens merged into one axis.

    Attributes:
        backend: adapter of their library.
        matrix: (tokens, experts), of at least 32 bits; zeros where a ``TopK`` has none.
        shape: of the caller's array, or of the values of a ``TopK``.
        indices: (tokens, k), of a ``TopK``; None for dense ones.
    """

    backend: Backend
    matrix: Array
    shape: tuple[int, ...]
    indices: Array | None = None

    def restore(self, gradient: Array) -> Array:
        """A gradient (tokens, experts) as one by what the caller gave."""
        if self.indices is not None:
            gradient = self.backend.namespace.take_along_axis(gradient, self.indices, axis=-1)
        return self.backend.reshape(gradient, self.shape)


def as_weights(
    given: Array | TopK,
    experts: int | None = None,
    name: str = "coefficients",
    *,
    any_tokens: bool = False,
    backend: Backend | None = None,
) -> Weights:
    """One level's coefficients as a matrix.

    Args:
        given: (..., experts), or a ``TopK`` with (..., k).
        experts: their number, which a ``TopK`` needs.
        name: of what is given, for messages.
        any_tokens: whether there may be none.
        backend: adapter of their library, for callers that know it.

    Raises:
        GateError: no tokens, no experts, no floating point, or a number of experts that is unknown
            or does not fit.
    """
    if not isinstance(given, TopK):
        backend, matrix = _matrix(given, name, any_tokens, backend)
        if experts is not None and experts != matrix.shape[-1]:
            raise GateError(f"{name} must have {experts} experts; got {matrix.shape[-1]}.")
        return Weights(backend, matrix, tuple(given.shape))
    if isinstance(experts, bool) or not isinstance(experts, int) or experts < 1:
        raise GateError(
            f"the number of experts must be known for a TopK; got experts={experts!r}. Pass "
            "experts=8, for instance."
        )
    backend, values = _matrix(given.values, name, any_tokens, backend)
    xp = backend.namespace
    tokens, k = values.shape
    indices = backend.reshape(given.indices, (tokens, k))
    first = xp.arange(tokens, device=device_of(indices))[:, None] * experts
    flat = backend.reshape(indices + first, (-1,))
    spread = backend.scatter_add(backend.reshape(values, (-1,)), flat, 0, tokens * experts)
    matrix = backend.reshape(spread, (tokens, experts))
    return Weights(backend, matrix, tuple(given.values.shape), indices)


def _matrix(
    array: Array, name: str, any_tokens: bool, backend: Backend | None
) -> tuple[Backend, Array]:
    backend = backend_of(array) if backend is None else backend
    xp = backend.namespace
    if not xp.isdtype(array.dtype, "real floating"):
        raise GateError(
            f"{name} must be real floating point; got dtype {array.dtype}. Pass what a gate "
            "returned."
        )
    shape = tuple(array.shape)
    if not shape or shape[-1] == 0 or (not any_tokens and 0 in shape):
        raise GateError(
            f"{name} must have at least one token and one expert; got shape {shape}. Skip empty "
            "batches."
        )
    if xp.finfo(array.dtype).bits < 32:
        array = xp.astype(array, xp.float32)
    return backend, backend.reshape(array, (prod(shape[:-1]), shape[-1]))


def counts(weights: Weights) -> Array:
    """Tokens that use each expert, (experts,): those whose coefficient is not zero."""
    xp = weights.backend.namespace
    matrix = weights.backend.stop_gradient(weights.matrix)
    return xp.sum(xp.astype(matrix > 0.0, matrix.dtype), axis=0)


def by_level(function: Callable[..., R], given: Any, *others: Any) -> list[R]:
    """``function`` of each level.

    Args:
        function: of one level's array or ``TopK``, and of the others' values for that level.
        given: a list or tuple with one per level.
        others: a list or tuple with one per level, or one value for all.

    Raises:
        GateError: no level, or others of another length.
    """
    if not given:
        raise GateError("there must be at least one level; got an empty sequence.")
    columns = []
    for other in others:
        if not isinstance(other, list | tuple):
            other = [other] * len(given)
        elif len(other) != len(given):
            raise GateError(
                f"sequences must have one entry per level, {len(given)}; got {len(other)}."
            )
        columns.append(other)
    return [function(*level) for level in zip(given, *columns, strict=True)]


def summed(function: Callable[..., Array], given: Any, *others: Any) -> Array:
    """``function`` of one level, or its sum over all levels of a list or tuple."""
    if not isinstance(given, list | tuple):
        return function(given, *others)
    return reduce(add, by_level(function, given, *others))


def gradients(function: Callable[..., Array], given: Any, *others: Any) -> Any:
    """``function`` of one level, or a tuple of what it is of each level of a list or tuple."""
    if not isinstance(given, list | tuple):
        return function(given, *others)
    return tuple(by_level(function, given, *others))
