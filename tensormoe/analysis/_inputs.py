"""Inputs of analysis: coefficients of one level, labels, and values on the host."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from tensormoe._extras import require
from tensormoe._validation import brief, positive_int
from tensormoe.backend import Array, Backend, backend_of
from tensormoe.decomposition._solve import to_host, wide
from tensormoe.errors import ShapeError
from tensormoe.gates import TopK
from tensormoe.routing import Routes, spread

if TYPE_CHECKING:
    from numpy.typing import NDArray


def host(array: Array, backend: Backend | None = None) -> NDArray[Any]:
    """The values as NumPy's, in float64."""
    require("tensormoe.analysis", ("numpy",), "numpy")
    return wide(array, backend or backend_of(array))


def host_numbers(array: Array, backend: Backend | None = None) -> NDArray[Any]:
    """Whole numbers of any dtype as NumPy's."""
    require("tensormoe.analysis", ("numpy",), "numpy")
    backend = backend or backend_of(array)
    return to_host(backend.stop_gradient(array), backend)


def rows_of(
    coefficients: Any, experts: int | None = None
) -> tuple[Array | TopK, int, int, Backend]:
    """Coefficients of one level with one leading axis.

    Args:
        coefficients: of one level.
        experts: N, which a ``TopK`` does not tell.

    Returns:
        The coefficients (rows, N) or (rows, k), the number of rows, N, and their backend.

    Raises:
        ShapeError: several levels, no axis of experts, or a ``TopK`` without ``experts``.
    """
    if isinstance(coefficients, list | tuple):
        if len(coefficients) != 1:
            raise ShapeError(
                f"coefficients must be those of one level; got {len(coefficients)} levels. Pass "
                "coefficients[level]."
            )
        (coefficients,) = coefficients
    if isinstance(coefficients, Routes):
        experts = coefficients.logits.shape[-1]
        coefficients = coefficients.chosen
    if isinstance(coefficients, TopK):
        if experts is None:
            raise ShapeError(
                "experts must be given for coefficients by index; got a TopK alone. Pass experts=N."
            )
        count = positive_int(experts, "experts", ShapeError)
        backend = backend_of(coefficients.values)
        rows = prod(coefficients.values.shape[:-1])
        flat = (rows, coefficients.values.shape[-1])
        made = TopK(
            backend.reshape(coefficients.indices, flat), backend.reshape(coefficients.values, flat)
        )
        return made, rows, count, backend
    backend = backend_of(coefficients)
    if coefficients.ndim < 1 or experts not in (None, coefficients.shape[-1]):
        raise ShapeError(
            f"coefficients must end in an axis of {experts or 'the'} experts; got shape "
            f"{tuple(coefficients.shape)}."
        )
    *lead, count = coefficients.shape
    return backend.reshape(coefficients, (prod(lead), count)), prod(lead), count, backend


def dense_rows(coefficients: Any, experts: int | None = None) -> tuple[Array, Backend]:
    """Coefficients (rows, N) of one level, zero where nothing was chosen.

    Raises:
        ShapeError: as :func:`rows_of`.
    """
    found, _, count, backend = rows_of(coefficients, experts)
    return (spread(found, count, backend) if isinstance(found, TopK) else found), backend


def checked_labels(labels: Any, rows: int, classes: int | None) -> tuple[NDArray[Any], int]:
    """Integer labels, one per row, and the number of classes.

    Args:
        labels: of any library, or a sequence.
        rows: how many there must be.
        classes: C; by default one more than the largest label.

    Raises:
        ShapeError: another number of labels, none, labels that are not integers, or out of range.
    """
    require("tensormoe.analysis", ("numpy",), "numpy")
    import numpy as np

    given = isinstance(labels, list | tuple | range)
    try:
        found = np.asarray(labels) if given else host_numbers(labels)
    except (TypeError, ValueError, OverflowError):
        raise ShapeError(f"labels must be integers; got {brief(labels)}.") from None
    with np.errstate(invalid="ignore"):  # NaN, which differs from any integer
        whole = found.astype(np.int64) if found.dtype.kind in "iuf" else None
    if whole is None or (whole != found).any() or found.dtype == bool:
        raise ShapeError(f"labels must be integers; got {brief(labels)}.")
    if whole.size != rows:
        raise ShapeError(
            f"labels must be one per input; got {whole.size} for {rows} inputs. Pass labels in the "
            "order of the inputs, all leading axes alike."
        )
    whole = whole.reshape(-1)
    if classes is None:
        if not rows:
            raise ShapeError("classes must be given where there are no labels; got none of both.")
        classes = int(whole.max()) + 1
    classes = positive_int(classes, "classes", ShapeError)
    wrong = np.flatnonzero((whole < 0) | (whole >= classes))
    if wrong.size:
        place = int(wrong[0])
        raise ShapeError(
            f"labels must lie in [0, {classes}); got {int(whole[place])} at position {place}. Pass "
            "a larger number of classes, or other labels."
        )
    return whole, classes
