"""Edits of coefficients: experts steered, and the mean coefficients of a subgroup."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from tensormoe._validation import brief, positive_int
from tensormoe.backend import Array, Backend, backend_of, default_integer, device_of
from tensormoe.editing._amounts import check_amounts
from tensormoe.errors import BackendError, ShapeError
from tensormoe.functional._dtypes import cast, widened
from tensormoe.gates import TopK
from tensormoe.routing import Routes, spread


def steer_experts(
    coefficients: Any, additions: Mapping[int, float], *, experts: int | None = None
) -> Array:
    """Coefficients with amounts added to those of some experts, for every input.

    An amount above zero brings an expert into the output of inputs that do not use it, one below
    takes away from it. What the others get stays, so that rows no longer sum to one. Give the
    result to a layer, ``layer(x, [steered])``.

    Args:
        coefficients: of one level: an array (..., N), a ``TopK``, or a routing record.
        additions: a finite amount by the expert's index.
        experts: N, which a ``TopK`` does not tell.

    Returns:
        Coefficients (..., N) of the same library and dtype, with zeros where a ``TopK`` or a
        routing record has none.

    Raises:
        TypeError: ``additions`` is not a mapping.
        BackendError: not an array of a known library.
        ShapeError: coefficients of several levels, or an index out of range.
        SpecError: an amount that is not a finite number.

    >>> import numpy as np
    >>> steer_experts(np.array([[0.75, 0.25, 0.0]]), {2: 0.5, 0: -0.25})
    array([[0.5 , 0.25, 0.5 ]])
    """
    found, backend = one_level(coefficients, experts)
    amounts = check_amounts(additions, int(found.shape[-1]))
    xp, wide = backend.namespace, widened(found, backend)
    added = xp.asarray(amounts, dtype=wide.dtype, device=device_of(wide))
    return cast(wide + added, found.dtype, backend)


def subgroup_coefficients(coefficients: Any, members: Any, *, experts: int | None = None) -> Array:
    """Mean coefficients (N,) of the inputs that belong to a subgroup.

    They say which experts the subgroup uses, and are what :func:`threshold_experts` compares other
    inputs with.

    Args:
        coefficients: of one level, of training inputs: an array (..., N), a ``TopK``, or a routing
            record.
        members: (...,) booleans, whether an input belongs to the subgroup: an array of any library
            with known values, or a flat sequence in the order of the inputs.
        experts: N, which a ``TopK`` does not tell.

    Returns:
        An array of the coefficients' library, in float32 at least, and differentiable.

    Raises:
        BackendError: not an array of a known library, or members without values, as under ``jit``.
        ShapeError: coefficients of several levels; members that are not one boolean per input; or a
            subgroup without any input.

    >>> import numpy as np
    >>> subgroup_coefficients(np.eye(3)[[0, 0, 2, 1]], [True, False, True, False])
    array([0.5, 0. , 0.5])
    """
    found, backend = one_level(coefficients, experts)
    xp, (*lead, count) = backend.namespace, found.shape
    rows = backend.reshape(widened(found, backend), (prod(lead), count))
    places = [place for place, is_member in enumerate(_booleans(members, lead)) if is_member]
    if not places:
        raise ShapeError(
            f"members must name at least one of the {prod(lead)} inputs; got none, so that there "
            "is no mean. Choose a subgroup that the inputs contain."
        )
    index = xp.asarray(places, dtype=default_integer(xp), device=device_of(rows))
    return backend.sum(backend.take(rows, index, 0), (0,)) / len(places)


def one_level(coefficients: Any, experts: int | None = None) -> tuple[Array, Backend]:
    """Dense coefficients (..., N) of one level, and their library.

    Raises:
        BackendError: not an array of a known library.
        ShapeError: several levels, no axis of experts, another number of them, a ``TopK`` without
            ``experts``, or no floating point.
    """
    if isinstance(coefficients, list | tuple):
        if len(coefficients) != 1:
            raise ShapeError(
                f"coefficients must be those of one level; got {len(coefficients)} levels. Pass "
                "coefficients[level]."
            )
        (coefficients,) = coefficients
    count = None if experts is None else positive_int(experts, "experts", ShapeError)
    if isinstance(coefficients, Routes):
        count = int(coefficients.logits.shape[-1])
        coefficients = coefficients.chosen
    if isinstance(coefficients, TopK):
        if count is None:
            raise ShapeError(
                "experts must be given for coefficients by index; got a TopK alone. Pass experts=N."
            )
        backend = backend_of(coefficients.indices, coefficients.values)
        return spread(coefficients, count, backend), backend
    backend = backend_of(coefficients)
    if coefficients.ndim < 1 or count not in (None, coefficients.shape[-1]):
        raise ShapeError(
            f"coefficients must end in an axis of {count or 'the'} experts; got shape "
            f"{tuple(coefficients.shape)}."
        )
    if not backend.namespace.isdtype(coefficients.dtype, "real floating"):
        raise ShapeError(
            f"coefficients must be real floating point; got {coefficients.dtype}. Pass what a gate "
            "returned."
        )
    return coefficients, backend


def _booleans(members: Any, lead: list[int]) -> list[bool]:
    """One boolean per input, on the host."""
    count = prod(lead)
    if isinstance(members, list | tuple):
        listed, shape = [*members], (len(members),)
    else:
        backend = backend_of(members)
        xp, shape = backend.namespace, tuple(members.shape)
        if not xp.isdtype(members.dtype, "bool"):
            raise ShapeError(
                f"members must be booleans; got {members.dtype}. Compare labels: labels == 3."
            )
        try:
            listed = [bool(each) for each in backend.floats(backend.reshape(members, (-1,)))]
        except (TypeError, RuntimeError) as error:
            raise BackendError(
                "members must have known values; got an array that is traced. Choose the subgroup "
                "outside of the compiled function, or pass a list."
            ) from error
    if shape not in ((count,), tuple(lead)):
        raise ShapeError(
            f"members must be one boolean per input, {tuple(lead)}; got shape {shape}. Pass them "
            "in the order of the inputs."
        )
    wrong = next((each for each in listed if not _is_boolean(each)), None)
    if wrong is not None:
        raise ShapeError(f"members must be booleans; got {brief(wrong)}. Compare labels.")
    return [bool(each) for each in listed]


def _is_boolean(value: object) -> bool:
    # NumPy's own, as a list made of an array has
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")
