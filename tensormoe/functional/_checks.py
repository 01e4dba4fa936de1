"""Checks of a layer's arguments, once for every framework."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TypeVar

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe.backend import Array, Backend, default_integer
from tensormoe.backend import check_array as check_array
from tensormoe.errors import ShapeError
from tensormoe.gates import OneExpert, TopK

Coefficients = Sequence["Array | TopK | OneExpert"]
"""One entry per level: dense coefficients (batch, N_e), indices and values (batch, k), or one
expert per row (batch,)."""

G = TypeVar("G")


def own_gate(gate: G | None, config: LayerConfig | BlockConfig) -> G:
    """The gate of a layer or block that must have one.

    Raises:
        ShapeError: there is none, and so no coefficients.
    """
    if gate is None:
        owner = "block" if isinstance(config, BlockConfig) else "layer"
        raise ShapeError(
            f"this {owner} has no gate; got no coefficients. Call it with coefficients=…, or build "
            "it with a gate."
        )
    return gate


def check_input(
    x: Array, features: int, dtype: object, backend: Backend, name: str = "x"
) -> tuple[int, ...]:
    """The leading shape of a floating-point input.

    Raises:
        BackendError: no array of the layer's library.
        ShapeError: no axis of ``features``, or another dtype than the layer's.
    """
    check_array(x, backend, name)
    shape = tuple(x.shape)
    if not shape or shape[-1] != features:
        raise ShapeError(
            f"{name} must end in an axis of {features} features; got shape {shape}. "
            "Check the layer's in_features, or move the feature axis last."
        )
    if x.dtype != dtype:
        raise ShapeError(
            f"{name} must have the layer's dtype {dtype}; got {x.dtype}. Cast the input, or build "
            "the layer with the input's dtype."
        )
    return shape[:-1]


def check_ids(
    ids: Array, count: int, backend: Backend, name: str = "ids", look: bool | None = None
) -> Array:
    """Integer ids in a type that indexes: of 32 bits at least.

    Args:
        ids: integers of any shape.
        count: how many there are.
        backend: the adapter of the layer's library.
        name: names them in messages.
        look: whether their range is checked; what the backend says of values by default.

    Raises:
        BackendError: no array of the layer's library.
        ShapeError: not integers, or an id outside [0, count).
    """
    xp = backend.namespace
    check_array(ids, backend, name)
    if not xp.isdtype(ids.dtype, "integral"):
        raise ShapeError(f"{name} must be integers; got {ids.dtype}. Cast them to int64.")
    if (backend.checks_values if look is None else look) and prod(ids.shape):
        low, high = int(xp.min(ids)), int(xp.max(ids))
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise ShapeError(
                f"{name} must lie in [0, {count}); got {wrong}. Check the size they index."
            )
    if ids.dtype in (xp.int32, xp.int64):
        return ids
    return xp.astype(ids, default_integer(xp))


def merged_coefficients(
    config: LayerConfig,
    coefficients: Array | TopK | OneExpert | Coefficients,
    lead: tuple[int, ...],
    backend: Backend,
    look: bool | None = None,
) -> list[Array | TopK | OneExpert]:
    """Ready-made coefficients, checked, with their leading axes merged into one.

    Args:
        config: the layer.
        coefficients: an array (..., N_e) or a ``TopK`` a level.
        lead: leading shape of the inputs.
        backend: the adapter of the layer's library.
        look: whether the range of indices is checked; what the backend says by default.

    Raises:
        BackendError, ShapeError: as :func:`check_coefficients` and :func:`check_ids`.
    """
    rows = prod(lead)
    merged: list[Array | TopK | OneExpert] = []
    checked = check_coefficients(config, coefficients, lead, backend)
    for given, count in zip(checked, config.spec.experts, strict=True):
        name = "indices of coefficients"
        if isinstance(given, OneExpert):
            indices = check_ids(given.indices, count, backend, name, look)
            merged.append(OneExpert(backend.reshape(indices, (rows,)), given.counts))
        elif isinstance(given, TopK):
            indices = check_ids(given.indices, count, backend, name, look)
            shape = (rows, given.values.shape[-1])
            values = backend.reshape(given.values, shape)
            merged.append(TopK(backend.reshape(indices, shape), values))
        else:
            merged.append(backend.reshape(given, (rows, count)))
    return merged


def check_coefficients(
    config: LayerConfig,
    coefficients: Array | TopK | OneExpert | Coefficients,
    lead: tuple[int, ...],
    backend: Backend,
) -> list[Array | TopK | OneExpert]:
    """Ready-made coefficients, one entry per level, their shapes checked.

    Raises:
        BackendError: no arrays of the layer's library.
        ShapeError: another number of levels, or shapes that do not fit the input.
    """
    listed: list[Array | TopK | OneExpert]
    listed = [*coefficients] if isinstance(coefficients, list | tuple) else [coefficients]
    experts = config.spec.experts
    if len(listed) != len(experts):
        raise ShapeError(
            f"coefficients must have one array per level, {len(experts)}; got {len(listed)}."
        )
    for level, (given, count) in enumerate(zip(listed, experts, strict=True)):
        name = f"coefficients of level {level}"
        if isinstance(given, OneExpert):
            check_array(given.indices, backend, name)
            if tuple(given.indices.shape) != lead:
                raise ShapeError(
                    f"{name} must name one expert per input, {lead}; got "
                    f"{tuple(given.indices.shape)}."
                )
            # one more entry counts rows of no expert
            fitting = ((count,), (count + 1,))
            if given.counts is not None and tuple(given.counts.shape) not in fitting:
                raise ShapeError(
                    f"counts of {name} must have shape {(count,)}; got {tuple(given.counts.shape)}."
                )
            continue
        for array in (given.indices, given.values) if isinstance(given, TopK) else (given,):
            check_array(array, backend, name)
        values = given.values if isinstance(given, TopK) else given
        if not backend.namespace.isdtype(values.dtype, "real floating"):
            raise ShapeError(
                f"{name} must be real floating point; got {values.dtype}. Cast them to the "
                "layer's dtype."
            )
        last: int | str = count
        if isinstance(given, TopK):
            same = given.indices.shape == given.values.shape
            fits, last = same and tuple(values.shape[:-1]) == lead, "k"
        else:
            fits = tuple(values.shape) == (*lead, count)
        if not fits:
            raise ShapeError(
                f"{name} must have shape {(*lead, last)}; got {tuple(values.shape)}. Their "
                "leading axes are the input's, their last one the level's experts."
            )
    return listed
